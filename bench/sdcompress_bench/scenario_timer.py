"""Times one scenario in this process: the stages of a pipeline, whole pictures, and the memory they need."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sdcompress_engines.errors import EngineError
from sdcompress_engines.resources import peak_rss_mib

from sdcompress.support.pipeline import TextToImagePipeline

from .device_clock import DeviceClock
from .environment import gpu_memory_used_mib

Call = Callable[[], Any]
_STEADY = 1.10
_WARM_UP_CALLS = 20


@dataclass(frozen=True)
class _StageTimer:
    """Times calls until there are enough samples or the budget is spent."""

    clock: DeviceClock
    budget_s: float

    def warm_up(self, call: Call) -> bool:
        """Call until three calls in a row agree within 10%; returns False if half the budget ends first."""
        recent: list[float] = []
        started = time.perf_counter()
        for _ in range(_WARM_UP_CALLS):
            recent = [*recent[-2:], self.clock.time_call(call)]
            if len(recent) == 3 and max(recent) <= _STEADY * min(recent):
                return True
            if time.perf_counter() - started > self.budget_s / 2:
                break
        return False

    def samples(self, call: Call, count: int, least: int) -> Iterator[float]:
        """Yields the milliseconds of calls, until there are enough or the budget ends.

        Args:
            call: what is timed.
            count: at most this many calls.
            least: at least this many, whatever the budget.
        """
        started = time.perf_counter()
        for index in range(count):
            if index >= least and time.perf_counter() - started > self.budget_s:
                return
            yield self.clock.time_call(call)


def time_case(case: dict[str, Any]) -> dict[str, Any]:
    """Returns everything that is measured of a scenario in this process; see `latency.Latency` for the figures.

    Args:
        case: what `latency.case_of` returns.

    Raises:
        EngineError: an output is not finite.
    """
    from sdcompress.sampling import generate

    from .fidelity import load
    from .loras import time_swaps

    if case["threads"]:
        torch.set_num_threads(case["threads"])
    cuda = case["device"].startswith("cuda")
    used_before = gpu_memory_used_mib() if cuda else None  # before this process has a context, which counts too
    free_before = torch.cuda.mem_get_info()[0] if cuda else 0
    started = time.perf_counter()
    places = (case["artifacts"], case["device"], case["precision"], case["decoder"], case["loras"])
    pipeline = load(case["path"], case["backend"], *places)
    load_ms = _since(started)
    options = {"steps": case["steps"], "guidance_scale": case["guidance_scale"], "size_px": case["size_px"]}
    seeds = [case["seed"] + i for i in range(case["batch"])]

    def end_to_end() -> None:
        generate(pipeline, case["prompts"], seeds=seeds, batch_size=case["batch"], **options)

    gc.collect()
    started = time.perf_counter()
    end_to_end()
    first_image_ms = _since(started)
    samples, unsteady = _time_stages(pipeline, case, _StageTimer(DeviceClock(case["device"]), case["stage_budget_s"]))
    # The first picture was the warm-up of `end_to_end`.
    if _needs_no_second(first_image_ms, samples, case):
        samples["end_to_end"] = [first_image_ms]
    else:
        wall_clock = _StageTimer(DeviceClock("cpu"), case["stage_budget_s"])
        samples["end_to_end"] = list(wall_clock.samples(end_to_end, case["end_to_end_samples"], 1))
    parts = ("unet", "text_encoder", "vae")
    found = {
        "samples_ms": samples,
        "unsteady": unsteady,
        "load_ms": load_ms,
        "first_image_ms": first_image_ms,
        "peak_rss_mib": peak_rss_mib(),
        "cuda_peak_mib": cuda_peak_mib(used_before, free_before) if cuda else None,
        "artifact_mib": {name: round(_size_mib(getattr(pipeline, name)), 3) for name in parts},
        "threads": torch.get_num_threads(),
    }
    if case["loras"]:  # after the peaks, which are those of drawing
        limits = case["samples"], case["stage_budget_s"]
        found["lora_swap_ms"] = time_swaps(pipeline, case["loras"], case["device"], *limits)
    return found


def _needs_no_second(first_ms: float, samples: dict[str, list[float]], case: dict[str, Any]) -> bool:
    """Returns whether the first picture can be the timed one: it took long, and its stages alone take as long."""
    unet, text, vae = (statistics.median(samples[stage]) for stage in ("unet_step", "text_encoder", "vae_decode"))
    stages_ms = case["steps"] * unet + text + vae
    return first_ms > 6000 * case["stage_budget_s"] and first_ms < 1.1 * stages_ms


@torch.no_grad()  # as in `generate`: torch would compile a UNet again for another mode
def _time_stages(
    pipeline: TextToImagePipeline, case: dict[str, Any], timer: _StageTimer
) -> tuple[dict[str, list[float]], list[str]]:
    """Returns stage → milliseconds of its calls, and the stages that were not steady when timing began.

    Raises:
        EngineError: an output is not finite.
    """
    samples: dict[str, list[float]] = {}
    unsteady = []
    for stage, call in _stage_calls(pipeline, case).items():
        last: list[torch.Tensor] = []

        def call_and_keep(call: Call = call, last: list[torch.Tensor] = last) -> None:
            last[:] = [call()]

        steady = timer.warm_up(call_and_keep)
        samples[stage] = list(timer.samples(call_and_keep, case["samples"], 3 if stage == "unet_step" else 1))
        if not steady:
            unsteady.append(stage)
        if not torch.isfinite(last[0]).all():
            raise EngineError(
                f"the {stage.replace('_', ' ')} gives values that are not finite in {case['precision']}",
                hint="fp32, or bf16 where the device has it",
            )
    return samples, unsteady


def _stage_calls(pipeline: TextToImagePipeline, case: dict[str, Any]) -> dict[str, Call]:
    """Returns stage → a call of it, with inputs of the scenario's shape on the device."""
    from .fidelity import UNetInputs

    batch, unet = case["batch"], pipeline.unet
    inputs = UNetInputs.of(pipeline, case["prompts"], case["size_px"]).repeated(case["unet_batch"] // batch)
    side = case["size_px"] // pipeline.vae_scale_factor
    shape = (case["unet_batch"], unet.config.in_channels, side, side)
    random = torch.Generator().manual_seed(case["seed"])
    latents = torch.randn(shape, generator=random).to(unet.device, unet.dtype)
    timestep = torch.tensor(501, device=unet.device)
    return {
        "unet_step": lambda: inputs.call(unet, latents, timestep),
        "text_encoder": _text_encoder_call(pipeline, case["prompts"]),
        "vae_decode": lambda: pipeline.vae.decode(latents[:batch].to(pipeline.vae.dtype), return_dict=False)[0],
    }


def _text_encoder_call(pipeline: Any, captions: list[str]) -> Call:
    """Returns a call of the text encoder on tokenized captions; SDXL's two encoders run one after the other."""
    from .fidelity import tokens

    second = getattr(pipeline, "text_encoder_2", None)
    ids = tokens(pipeline.tokenizer, captions, pipeline.unet.device)
    if second is None:
        return lambda: pipeline.text_encoder(ids)[0]
    ids_2 = tokens(pipeline.tokenizer_2, captions, pipeline.unet.device)
    return lambda: (pipeline.text_encoder(ids), second(ids_2)[0])[1]


def cuda_peak_mib(used_before_mib: float | None, free_before: int) -> float:
    """Returns the most GPU memory that this process held, MiB.

    Args:
        used_before_mib: memory in use before the process had a CUDA context; None leaves the context out.
        free_before: free bytes after the context was created.
    """
    taken = (free_before - torch.cuda.mem_get_info()[0]) / 2**20
    used = gpu_memory_used_mib()
    context = 0.0 if used is None or used_before_mib is None else max(0.0, used - used_before_mib - taken)
    return context + max(torch.cuda.max_memory_reserved() / 2**20, taken)


def _since(started: float) -> float:
    return (time.perf_counter() - started) * 1000


def _size_mib(component: Any) -> float:
    """Returns the MiB of a torch module's weights, of a graph with the weights beside it, or of an engine alone."""
    component = getattr(getattr(component, "runner", None), "module", component)  # of a compiled UNet, the module
    if isinstance(component, torch.nn.Module) and any(True for _ in component.parameters()):
        return sum(tensor.nbytes for tensor in component.state_dict().values()) / 2**20
    path = getattr(getattr(component, "runner", None), "path", None)
    if path is None:
        return 0.0
    # An engine holds its weights; those beside it are for exchanges.
    files = path.parent.glob(f"{path.name}*") if path.suffix == ".onnx" else [path]
    return sum(file.stat().st_size for file in files) / 2**20
