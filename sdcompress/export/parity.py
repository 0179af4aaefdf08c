"""The error of an exported graph against the torch module that it was exported from, and its limit."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.errors import GateFailed
from sdcompress_engines.exactness import FP32_LIMIT, HALF_FACTOR, largest_relative_l2
from sdcompress_engines.runners import OnnxRuntimeRunner, Runner, TorchRunner
from sdcompress_engines.signature import CONTEXT_TOKENS, Signature

from sdcompress.export.components import (
    DTYPES,
    Precision,
    component_graph,
    latent_side,
    random_inputs,
    signature_of,
)
from sdcompress.export.onnx_file import upcast_onnx

TIMESTEPS = (1, 250, 500, 750, 999)


@dataclass(frozen=True)
class Parity:
    """The error of a graph against the same component in torch fp32, over several shapes and timesteps.

    Attributes:
        relative_l2: the largest ‖graph − torch‖ / ‖torch‖ of any output in any case.
        torch_relative_l2: the same for torch in the precision of the graph, its noise floor; None for fp32.
        share_of_limit: the largest ratio of a case's error to its limit; over 1 the export fails.
        cases: how many shapes and timesteps were compared.
    """

    relative_l2: float
    torch_relative_l2: float | None
    share_of_limit: float
    cases: int

    @property
    def limit(self) -> float:
        """The largest relative L2 that is accepted."""
        return FP32_LIMIT if self.torch_relative_l2 is None else HALF_FACTOR * self.torch_relative_l2


@dataclass(frozen=True)
class Case:
    """One comparison: free axis → size, and the timestep."""

    sizes: Mapping[str, int]
    timestep: int


def default_cases(wanted: Signature, config: Any) -> list[Case]:
    """Returns the cases to compare a component in.

    They have two batch sizes and two shapes. For a UNet they also have 77 and 154 tokens and five timesteps, and every
    pair of sizes is in one case. Pictures are small: every weight takes part in them as in large ones, and a whole UNet
    takes a second or two.

    Args:
        wanted: the signature of the component.
        config: of the component, from diffusers or transformers.
    """
    if wanted.component.startswith("text_encoder"):
        return grid(wanted, [1, 2], [(0, 0)], [CONTEXT_TOKENS])
    if wanted.component != "unet":
        return grid(wanted, [1, 2], [(16, 16), (24, 16)], [CONTEXT_TOKENS])
    side = max(wanted.multiple, min(16, latent_side(config)) // wanted.multiple * wanted.multiple)
    every = grid(wanted, [1, 2], [(side, side), (side + wanted.multiple, side)], [CONTEXT_TOKENS, 2 * CONTEXT_TOKENS])
    return [
        replace(every[index], timestep=timestep) for index, timestep in zip((0, 3, 5, 6, 7), TIMESTEPS, strict=True)
    ]


def grid(
    wanted: Signature,
    batches: Sequence[int],
    latents: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    timesteps: Sequence[int] = TIMESTEPS,
) -> list[Case]:
    """Returns a case for every combination of sizes; the timesteps are used in turn.

    Args:
        wanted: the signature of the component.
        batches: batch sizes.
        latents: (height, width) in latent pixels.
        tokens: lengths of the context.
        timesteps: between 0 and 999.
    """
    combinations = list(itertools.product(batches, latents, tokens))
    scale = wanted.multiple if wanted.component == "vae_encoder" else 8
    return [
        Case(
            {
                "batch": batch,
                "height": height,
                "width": width,
                "image_height": height * scale,
                "image_width": width * scale,
                "tokens": count,
            },
            timesteps[index % len(timesteps)],
        )
        for index, (batch, (height, width), count) in enumerate(combinations)
    ]


def compare_onnx(
    component: str,
    part: torch.nn.Module,
    precision: Precision,
    path: Path,
    host: str = "diffusers",
    cases: Sequence[Case] | None = None,
) -> Parity:
    """Returns the parity of an ONNX file in ONNX Runtime with the module that it was exported from.

    A bfloat16 graph is compared with its values in float32, because ONNX Runtime computes no bfloat16 on a CPU.

    Args:
        component: a key of `PARTS`.
        part: the module that it is a part of, in fp32.
        precision: of the graph.
        path: of the graph.
        host: whose input and output names it has.
        cases: None takes `default_cases`.
    """
    if precision != "bf16":
        return compare(component, part, precision, lambda: OnnxRuntimeRunner(path), host, cases)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        single = Path(folder) / path.name
        upcast_onnx(path, single)
        return compare(component, part, precision, lambda: OnnxRuntimeRunner(single), host, cases)


def compare(
    component: str,
    part: torch.nn.Module,
    precision: Precision,
    open_graph: Callable[[], Runner],
    host: str = "diffusers",
    cases: Sequence[Case] | None = None,
) -> Parity:
    """Returns the parity of a graph with `part` in torch fp32.

    The references run before the graph is opened, one after the other, so that there are never two copies of the
    weights in memory.

    Args:
        component, part, precision, host, cases: see `compare_onnx`.
        open_graph: returns a runner of the graph, with the signature of `host` in `precision`.
    """
    wanted, exact = signature_of(component, part, precision, host), signature_of(component, part, "fp32", host)
    chosen = list(cases or default_cases(wanted, part.config))
    feeds = [random_inputs(wanted, part.config, case.sizes, case.timestep) for case in chosen]
    references = _run_torch(component, part, "fp32", exact, feeds)
    floors: list[float] = []
    if precision != "fp32":
        outputs = _run_torch(component, part, precision, wanted, feeds)
        floors = list(map(largest_relative_l2, outputs, references))
    with open_graph() as runner:
        dtypes = {spec.name: spec.dtype for spec in runner.inputs}
        errors = [
            largest_relative_l2(runner.infer({name: value.to(dtypes[name]) for name, value in feed.items()}), reference)
            for feed, reference in zip(feeds, references, strict=True)
        ]
    limits = [HALF_FACTOR * floor for floor in floors] or [FP32_LIMIT] * len(errors)
    ratios = (error / limit if math.isfinite(error) else math.inf for error, limit in zip(errors, limits, strict=True))
    return Parity(max(errors), max(floors) if floors else None, max(ratios), len(chosen))


def _run_torch(
    component: str,
    part: torch.nn.Module,
    precision: Precision,
    signature: Signature,
    feeds: Sequence[Mapping[str, torch.Tensor]],
) -> list[dict[str, torch.Tensor]]:
    """Returns the outputs of a component in torch, for each feed.

    Args:
        component, part, precision: see `compare_onnx`.
        signature: of the component in that precision.
        feeds: inputs by name; they are converted to the signature's dtypes.
    """
    graph = component_graph(component, part, DTYPES[precision], stable=False)
    with TorchRunner(graph, signature.inputs, signature.outputs) as runner:
        return [
            runner.infer({spec.name: feed[spec.name].to(spec.dtype) for spec in signature.inputs}) for feed in feeds
        ]


def check_parity(
    parity: Mapping[str, Parity | None],
    precisions: Mapping[str, Precision],
    find_layer: Callable[[str], str | None] = lambda component: None,
) -> None:
    """Refuse graphs that are too far from torch.

    Args:
        parity: of each component; None where it was not compared.
        precisions: component → precision of its graph.
        find_layer: returns the layer at which the graph of a component first differs, for the message, or None where it
            is not known.

    Raises:
        GateFailed: the message names each such graph, its error and the limit.
    """
    over = {name: each for name, each in parity.items() if each is not None and not each.share_of_limit <= 1}
    if over:
        halved = any(precisions[name] != "fp32" for name in over)
        limit = f"at most {HALF_FACTOR:g} × torch in the same precision" if halved else f"relative L2 ≤ {FP32_LIMIT:g}"
        faults = [_describe_fault(name, each, precisions[name], find_layer(name)) for name, each in over.items()]
        raise GateFailed(
            f"the exported graph does not match torch fp32: {'; '.join(faults)}",
            expected=limit,
            hint="--keep-failed to look at it, or "
            + ("--precision fp32 without --trt" if halved else "another torch or onnxruntime version"),
        )


def _describe_fault(name: str, parity: Parity, precision: Precision, layer: str | None) -> str:
    text = f"{name} is off by {parity.relative_l2:.2e}"
    if parity.torch_relative_l2 is not None:
        text += f", torch {precision} by {parity.torch_relative_l2:.2e}"
    return text if layer is None else f"{text}, first at {layer}"
