"""Parts 3 and 4: a step of the teacher's UNet and of its students', in each mode of torch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from sdcompress_engines.runners import Runner, open_runner

from sdcompress.models.load import LoadedPipeline

from .child import PartRun
from .models import CHECKED_AT, MODELS, ONE_LEVEL, TEACHER, TIMED_AT, Models
from .swaps import measure_swaps
from .timing import synchronize, time_call

BATCHES = (2, 16, 4)
"""UNet batches, the most important first: one picture with guidance, eight, two."""
NEEDS_CUDA = "needs CUDA graphs"
OUTPUT = "out_sample"


@dataclass(frozen=True)
class Variant:
    """How torch runs a UNet.

    Attributes:
        name: in the rows.
        mode: of `TorchRunner`.
        cuda_graph: replay calls from a CUDA graph.
        tuned: cuDNN measures its convolutions and takes the fastest (`torch.backends.cudnn.benchmark`).
    """

    name: str
    mode: str
    cuda_graph: bool = False
    tuned: bool = False


VARIANTS = (
    Variant("eager", "eager"),
    Variant("channels_last graph", "channels_last", cuda_graph=True),
    Variant("eager graph", "eager", cuda_graph=True),
    Variant("channels_last", "channels_last"),
)
TUNED = Variant("channels_last graph tuned", "channels_last", cuda_graph=True, tuned=True)
COMPILED = (Variant("compile", "compile"), Variant("compile graph", "compile", cuda_graph=True))


def unet_step(run: PartRun) -> None:
    """Write a row for each model, batch and variant, the most important first; then those of LoRA swaps."""
    models = Models(run)
    for batch in BATCHES[:1] if run.smoke else BATCHES:
        for name in MODELS:
            for variant in VARIANTS + ((TUNED,) if batch == BATCHES[0] and name in (TEACHER, "bk-tiny") else ()):
                step_row(run, models, name, batch, variant)
    for variant in VARIANTS[:2]:
        swap_row(run, models, "bk-tiny", variant)


def compiled_step(run: PartRun) -> None:
    """Write the rows of torch's compilers for one picture with guidance; the student first, as it compiles faster."""
    models = Models(run)
    names = (ONE_LEVEL,) if run.smoke else ("bk-tiny", TEACHER)
    for name in names:
        for variant in COMPILED:
            step_row(run, models, name, BATCHES[0], variant)
    for cuda_graph in (False, True):
        package_row(run, models, names[0], BATCHES[0], cuda_graph)


def step_row(run: PartRun, models: Models, name: str, batch: int, variant: Variant) -> None:
    """Write the row of a variant.

    Args:
        run: the part.
        models: has the UNet.
        name: of the UNet.
        batch: of the UNet.
        variant: how torch runs it.
    """
    label = f"{name} b{batch} {variant.name}"
    labels = {
        "model": name,
        "batch": batch,
        "mode": variant.mode,
        "cuda_graph": variant.cuda_graph,
        "tuned": variant.tuned,
    }
    if variant.cuda_graph and not run.is_cuda:
        run.skip(label, NEEDS_CUDA, **labels)
        return
    run.measure(label, lambda: measure_variant(run, models, name, batch, variant), **labels)


def swap_row(run: PartRun, models: Models, name: str, variant: Variant) -> None:
    """Write the row of a LoRA's way into a UNet in torch, and out again.

    Args:
        run: the part.
        models: has the UNet.
        name: of the UNet.
        variant: how torch runs it.
    """

    def measure() -> dict[str, Any]:
        with models.runner(name, variant.mode, variant.cuda_graph) as runner:
            return measure_swaps(run, models, name, runner)

    label = f"{name} LoRA swap {variant.name}"
    labels = {"model": name, "mode": variant.mode, "cuda_graph": variant.cuda_graph, "swap": True}
    if variant.cuda_graph and not run.is_cuda:
        run.skip(label, NEEDS_CUDA, **labels)
        return
    run.measure(label, measure, **labels)


def package_row(run: PartRun, models: Models, name: str, batch: int, cuda_graph: bool) -> None:
    """Write the row of a UNet that AOTInductor compiled.

    Args:
        run: the part.
        models: has the UNet.
        name: of the UNet.
        batch: of the UNet.
        cuda_graph: replay calls from a CUDA graph.
    """
    label = f"{name} b{batch} AOTInductor" + (" graph" if cuda_graph else "")
    labels = {"model": name, "batch": batch, "mode": "aot", "cuda_graph": cuda_graph}
    if cuda_graph and not run.is_cuda:
        run.skip(label, NEEDS_CUDA, **labels)
        return
    run.measure(label, lambda: measure_package(run, models, name, batch, cuda_graph), **labels)


def measure_variant(run: PartRun, models: Models, name: str, batch: int, variant: Variant) -> dict[str, Any]:
    """Returns the figures of a variant. A failed capture raises, because the row would be that of another variant.

    Args:
        run: the part.
        models: has the UNet.
        name: of the UNet.
        batch: of the UNet.
        variant: how torch runs it.
    """
    with models.runner(name, variant.mode, variant.cuda_graph) as runner, tuned(variant.tuned):
        figures = measure_runner(run, models, name, batch, runner)
    first_s = figures.pop("first_s")
    return figures | ({"compile_s": first_s} if variant.mode == "compile" else {})


def measure_runner(run: PartRun, models: Models, name: str, batch: int, runner: Runner) -> dict[str, Any]:
    """Returns the time, the error and the share of the peak of a UNet's runner, and `first_s` of its first call.

    Args:
        run: the part.
        models: has the reference output.
        name: of the UNet.
        batch: of the UNet.
        runner: an open runner.
    """
    dtypes = {spec.name: spec.dtype for spec in runner.inputs}
    feeds, checked = (
        {key: tensor.to(dtypes[key]) for key, tensor in models.feeds(name, batch, timestep).items()}
        for timestep in (TIMED_AT, CHECKED_AT)
    )
    synchronize(run.device)
    began = time.perf_counter()
    with failed_captures_raise():
        runner.infer(feeds)
    synchronize(run.device)
    first_s = time.perf_counter() - began
    figures = time_call(lambda: runner.infer(feeds), run.device, 0.1 if run.smoke else 0.7)
    floor = noise_floor(run, name, batch)
    judged = models.judge(name, batch, runner.infer(checked)[OUTPUT], figures["step_ms"], floor)
    return figures | judged | {"first_s": first_s}


def noise_floor(run: PartRun, name: str, batch: int) -> float | None:
    """Returns torch's own error in this precision, or None before it is measured.

    Args:
        run: has the rows of part 3.
        name: of the UNet.
        batch: of the UNet.
    """
    row = run.find(3, f"{name} b{batch} eager")
    return None if row is None else row["relative_l2"]


@contextmanager
def failed_captures_raise() -> Iterator[None]:
    """Turn the warning of a runner that continues without a CUDA graph into an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no CUDA graph could be captured")
        yield


@contextmanager
def tuned(wanted: bool) -> Iterator[None]:
    """Let cuDNN measure convolutions inside the block, if wanted."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def measure_package(run: PartRun, models: Models, name: str, batch: int, cuda_graph: bool) -> dict[str, Any]:
    """Returns the figures of AOTInductor's package, which is compiled first if it does not exist.

    It is compiled as `sdcompress export` does it.

    Args:
        run: the part.
        models: has the UNet.
        name: of the UNet.
        batch: of the UNet.
        cuda_graph: replay calls from a CUDA graph.
    """
    from sdcompress.export.aot import compile_unet

    package = run.scratch / "aot" / "unet.pt2"
    compiled = {}
    if not package.is_file():
        pipeline: Any = SimpleNamespace(unet=models.unet(name))
        precision: Any = run.precision
        loaded = LoadedPipeline(name, pipeline, "random", run.scratch / name)  # random weights: no folder holds them
        result = compile_unet(loaded, package.parent, device=run.device.type, precision=precision, force=True)
        compiled = {"compile_s": result.seconds}
    with open_runner(package, str(run.device), cuda_graph=cuda_graph) as runner:
        figures = measure_runner(run, models, name, batch, runner)
        swaps = {"lora_swap": measure_swaps(run, models, name, runner)} if runner.weights and not cuda_graph else {}
    figures.pop("first_s")
    return figures | swaps | compiled | {"package_mib": package.stat().st_size / 2**20}
