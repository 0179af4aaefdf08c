"""How far a graph is from the module it came from."""

from __future__ import annotations

import itertools
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

from sdcompress.export.components import DTYPES, Precision, component_graph, random_inputs, signature_of
from sdcompress.export.onnx_file import upcast_onnx

TIMESTEPS = (1, 250, 500, 750, 999)


@dataclass(frozen=True)
class Parity:
    """How far a graph is from the same component in torch fp32, over several shapes and timesteps.

    Attributes:
        relative_l2: the largest ‖graph − torch‖ / ‖torch‖ of any output in any case.
        torch_relative_l2: the same for torch at the graph's precision: its noise floor; None for fp32.
        share_of_limit: the worst case's error over its limit; over 1 the export fails.
        cases: how many shapes and timesteps were compared.
    """

    relative_l2: float
    torch_relative_l2: float | None
    share_of_limit: float
    cases: int


@dataclass(frozen=True)
class Case:
    """One comparison: free axis → size, and the timestep."""

    sizes: Mapping[str, int]
    timestep: int


def default_cases(wanted: Signature, config: Any) -> list[Case]:
    """Both of two batch sizes, two shapes and, of a UNet, 77 and 154 tokens, each with both of the others, over five
    timesteps.

    Pictures are small ones: every weight takes part in them as it does in large ones, and a whole UNet answers in a
    second or two.
    """
    if wanted.component.startswith("text_encoder"):
        return grid(wanted, [1, 2], [(0, 0)], [CONTEXT_TOKENS])
    if wanted.component != "unet":
        return grid(wanted, [1, 2], [(16, 16), (24, 16)], [CONTEXT_TOKENS])
    side = max(wanted.multiple, min(16, _sample_size(config)) // wanted.multiple * wanted.multiple)
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
    """Every combination of these sizes, a timestep each in turn.

    Args:
        latents: (height, width) in latent pixels.
    """
    combinations = list(itertools.product(batches, latents, tokens))
    scale = wanted.multiple if wanted.component == "vae_encoder" else 8
    return [
        Case(
            {
                "batch": batch,
                "height": h,
                "width": w,
                "image_height": h * scale,
                "image_width": w * scale,
                "tokens": count,
            },
            timesteps[index % len(timesteps)],
        )
        for index, (batch, (h, w), count) in enumerate(combinations)
    ]


def compare_onnx(
    component: str,
    part: torch.nn.Module,
    precision: Precision,
    path: Path,
    host: str = "diffusers",
    cases: Sequence[Case] | None = None,
) -> Parity:
    """The parity of an ONNX file in ONNX Runtime with the module it was exported from.

    A bfloat16 graph is compared with its values in float32, as ONNX Runtime computes no bfloat16 on a CPU.
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
    """The parity of the graph that `open_graph` makes a runner of, with the signature of `host` in `precision`, with
    `part` in torch fp32.

    References are made before the graph is opened, one after the other, so that never two copies of the weights are
    held.
    """
    wanted, exact = signature_of(component, part, precision, host), signature_of(component, part, "fp32", host)
    chosen = list(cases or default_cases(wanted, part.config))
    feeds = [random_inputs(wanted, part.config, case.sizes, case.timestep) for case in chosen]

    def torch_answers(precision: Precision, ports: Signature) -> list[dict[str, torch.Tensor]]:
        graph = component_graph(component, part, DTYPES[precision], stable=False)
        with TorchRunner(graph, ports.inputs, ports.outputs) as runner:
            return [
                runner.infer({spec.name: feed[spec.name].to(spec.dtype) for spec in ports.inputs}) for feed in feeds
            ]

    truths = torch_answers("fp32", exact)
    floors = (
        [None] * len(chosen)
        if precision == "fp32"
        else [
            largest_relative_l2(found, truth)
            for found, truth in zip(torch_answers(precision, wanted), truths, strict=True)
        ]
    )
    with open_graph() as runner:
        dtypes = {spec.name: spec.dtype for spec in runner.inputs}
        errors = [
            largest_relative_l2(runner.infer({name: value.to(dtypes[name]) for name, value in feed.items()}), truth)
            for feed, truth in zip(feeds, truths, strict=True)
        ]
    shares = [
        error / (FP32_LIMIT if floor is None else HALF_FACTOR * floor)
        for error, floor in zip(errors, floors, strict=True)
    ]
    return Parity(
        max(errors), None if precision == "fp32" else max(floor or 0.0 for floor in floors), max(shares), len(chosen)
    )


def check_parity(parity: Mapping[str, Parity | None], precisions: Mapping[str, Precision]) -> None:
    """Refuse graphs that are too far from torch.

    Raises:
        GateFailed: names each, by how much it is off, and the limit.
    """
    over = {name: found for name, found in parity.items() if found is not None and not found.share_of_limit <= 1}
    if over:
        told = "; ".join(
            f"{name} is off by {p.relative_l2:.2e}"
            + (f", torch {precisions[name]} by {p.torch_relative_l2:.2e}" if p.torch_relative_l2 is not None else "")
            for name, p in over.items()
        )
        halved = any(precisions[name] != "fp32" for name in over)
        limit = f"at most {HALF_FACTOR:g} × torch in the same precision" if halved else f"relative L2 ≤ {FP32_LIMIT:g}"
        raise GateFailed(
            f"the exported graph does not match torch fp32: {told}",
            expected=limit,
            hint="--keep-failed to look at it, or "
            + ("--precision fp32" if halved else "another torch or onnxruntime version"),
        )


def _sample_size(config: Any) -> int:
    size = config["sample_size"] if isinstance(config, dict) else config.sample_size
    return int(size if isinstance(size, int) else max(size))
