"""Part 5: a whole picture, from caption to PIL image, and how its time is spent."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from sdcompress_engines.exactness import relative_l2
from sdcompress_engines.unet import EngineUNet

from sdcompress.sampling import generate, keep_timesteps_on_host
from sdcompress.support.pipeline import TextToImagePipeline

from ..device_clock import DeviceClock, Mark
from ..models import step_by_step
from .child import PartRun
from .models import TEACHER, Models
from .part_unet import VARIANTS, Variant, failed_captures_raise
from .results import measured
from .timing import synchronize

PROMPT = "a photo of a lighthouse at dusk"
STUDENT = "bk-tiny"
LIMIT = 0.5
"""Limit of the relative L2 of a model's final latents on two backends; with another UNet they are off by 1 or so.

Latents, because a decoder with random weights draws much the same picture from all.
"""


@dataclass(frozen=True)
class Drawing:
    """How a picture is drawn.

    Attributes:
        steps: of DDIM; the UNet is called once a step.
        guidance_scale: with guidance, a call has two latents.
        small_decoder: draw with a decoder of TAESD's shape in the place of the VAE.
    """

    steps: int = 25
    guidance_scale: float = 7.5
    small_decoder: bool = False

    @property
    def fewer_steps(self) -> int:
        """More than half of the steps, to tell what a step costs from what a picture costs."""
        return self.steps * 3 // 5


USUAL, FEW_STEP = Drawing(), Drawing(4, 1.0, small_decoder=True)
SMALL = {USUAL: Drawing(2), FEW_STEP: Drawing(2, 1.0, small_decoder=True)}
"""The drawings of the smoke run."""


def picture(run: PartRun) -> None:
    """Write rows for the teacher as people run it, and for the student in the same way and in its fastest.

    The student also draws in four steps without guidance and with a small decoder, as after `few-step`.
    """
    models = Models(run)
    best = best_variant(run)
    few = f"{STUDENT} {FEW_STEP.steps} steps small decoder"
    cases: list[tuple[str, str, Variant | None, Drawing]] = [
        (f"{TEACHER} eager", TEACHER, None, USUAL),
        (f"{STUDENT} best", STUDENT, best, USUAL),
        (f"{few} eager", STUDENT, None, FEW_STEP),
        (f"{few} best", STUDENT, best, FEW_STEP),
        (f"{STUDENT} eager", STUDENT, None, USUAL),
        (f"{TEACHER} eager, timesteps on the host", TEACHER, Variant("eager", "eager"), USUAL),
    ]
    for row, name, variant, drawing in cases:
        shown = {"variant": best.name} if variant is best else {}
        run.measure(row, partial(measure_case, run, models, name, variant, drawing), model=name, **shown)


def best_variant(run: PartRun) -> Variant:
    """Returns the fastest variant for bk-tiny in parts 3 and 4; without them, channels last in a graph."""
    rows = [row for row in measured(run.earlier) if row.get("model") == STUDENT and row.get("batch") == 2]
    rows = [row for row in rows if row["part"] in (3, 4) and row["mode"] != "aot" and not row.get("tuned")]
    if not rows:
        return VARIANTS[1] if run.is_cuda else VARIANTS[0]
    row = min(rows, key=lambda row: row["step_ms"])
    return Variant(row["row"].removeprefix(f"{STUDENT} b2 "), row["mode"], row["cuda_graph"])


def pipeline_of(models: Models, name: str, variant: Variant | None, drawing: Drawing) -> Any:
    """Returns the teacher's pipeline with DDIM and another UNet.

    Args:
        models: has the pipeline and the UNets.
        name: of the UNet.
        variant: of the UNet, which then runs behind a runner, with the scheduler's timesteps on the host as in
            `open_pipeline`; None is plain diffusers.
        drawing: chooses the decoder.
    """
    teacher = models.pipeline
    parts = dict(teacher.components)
    unet: Any = models.unet(name)
    if drawing.small_decoder:
        parts["vae"] = models.small_decoder
    if variant is not None:
        unet = EngineUNet(models.runner(name, variant.mode, variant.cuda_graph), dict(unet.config))
        if variant.mode != "eager":
            parts["vae"] = copy.deepcopy(parts["vae"]).to(memory_format=torch.channels_last)
    pipeline = type(teacher)(**{**parts, "unet": unet}, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    step_by_step(pipeline)
    if variant is not None:
        keep_timesteps_on_host(pipeline)
    return pipeline


def measure_case(run: PartRun, models: Models, name: str, variant: Variant | None, drawing: Drawing) -> dict[str, Any]:
    """Returns the figures of a case; of a variant, also the distance of its latents from plain diffusers'.

    Args:
        run: the part.
        models: has the models.
        name: of the UNet.
        variant: of the UNet; None is plain diffusers.
        drawing: how the picture is drawn.
    """
    drawing = SMALL[drawing] if run.smoke else drawing
    pipeline = pipeline_of(models, name, variant, drawing)
    if variant is None:
        return measure_picture(run, pipeline, drawing)
    plain = draw(pipeline_of(models, name, None, drawing), drawing)
    try:
        began = time.perf_counter()
        with failed_captures_raise():
            found = draw(pipeline, drawing)
        first_s, error = time.perf_counter() - began, relative_l2(found.latents, plain.latents)
        figures: dict[str, Any] = {"first_s": first_s, "relative_l2": error, "limit_relative_l2": LIMIT}
        figures |= measure_picture(run, pipeline, drawing)
    finally:
        pipeline.unet.close()
    if not error <= LIMIT:
        figures["failed"] = f"its latents are off by {error:.2f} from those of plain diffusers, over {LIMIT:g}"
    return figures


@dataclass(frozen=True)
class Drawn:
    """A picture of the UNet's own size, and the latents that it was decoded from, (1, 4, h, w) float32 on the CPU."""

    picture: Image.Image
    latents: torch.Tensor


def draw(pipeline: TextToImagePipeline, drawing: Drawing, steps: int | None = None) -> Drawn:
    """Returns one picture with its latents.

    Args:
        pipeline: draws it.
        drawing: its steps and guidance.
        steps: other steps.
    """
    latents: list[torch.Tensor] = []
    (picture,) = generate(
        pipeline,
        [PROMPT],
        seeds=[0],
        steps=steps or drawing.steps,
        guidance_scale=drawing.guidance_scale,
        take_latents=latents.append,
    )
    return Drawn(picture, latents[0].detach().float().cpu())


def measure_picture(run: PartRun, pipeline: TextToImagePipeline, drawing: Drawing) -> dict[str, Any]:
    """Returns the wall time of a picture, its parts on the device, and how often the host waits for the device.

    Raises:
        RuntimeError: the picture has only one color, so the output was not finite.
    """
    if not np.ptp(np.asarray(draw(pipeline, drawing).picture)):
        raise RuntimeError("the picture has one color")
    if run.is_cuda:
        torch.cuda.reset_peak_memory_stats(run.device)
    pictures: list[dict[str, Any]] = []
    end = time.perf_counter() + (0.1 if run.smoke else 4.0)
    while len(pictures) < (1 if run.smoke else 3) or time.perf_counter() < end:
        pictures.append(time_picture(run, pipeline, drawing))
    peak = {"peak_mib": torch.cuda.max_memory_allocated(run.device) / 2**20} if run.is_cuda else {}
    times = [each["picture_ms"] for each in pictures]
    return {
        **{name: statistics.median(each[name] for each in pictures) for name in pictures[0]},
        "picture_low_ms": min(times),
        "picture_high_ms": max(times),
        "pictures": len(times),
        **peak,
        **(waits(pipeline, drawing) if run.is_cuda else {}),
    }


def time_picture(run: PartRun, pipeline: TextToImagePipeline, drawing: Drawing) -> dict[str, Any]:
    """Returns the wall time of one picture and the time of its parts within it, ms."""
    synchronize(run.device)
    with (
        timed_calls(run.device, pipeline.text_encoder) as text,
        timed_calls(run.device, pipeline.unet) as unet,
        timed_calls(run.device, pipeline.vae.decoder) as vae,
    ):
        began = time.perf_counter()
        draw(pipeline, drawing)
        synchronize(run.device)
        picture_ms = 1000 * (time.perf_counter() - began)
    parts = {"unet_ms": sum(unet), "text_encoder_ms": sum(text), "vae_ms": sum(vae)}
    gap_ms = (picture_ms - sum(parts.values())) / len(unet)
    return {"picture_ms": picture_ms, "unet_calls": len(unet), **parts, "gap_ms_per_step": gap_ms}


@contextmanager
def timed_calls(device: torch.device, module: Any) -> Iterator[list[float]]:
    """Yields a list. After the block it has the milliseconds of each call of the module."""
    clock = DeviceClock(device)
    marks: list[Mark] = []
    found: list[float] = []

    def mark(*_: Any) -> None:
        marks.append(clock.mark())

    hooks = [module.register_forward_pre_hook(mark), module.register_forward_hook(mark)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    found += [clock.elapsed_ms(start, end) for start, end in zip(marks[::2], marks[1::2], strict=True)]


def waits(pipeline: TextToImagePipeline, drawing: Drawing) -> dict[str, float]:
    """Returns how often the host waits for the device in a picture and in a step, from two numbers of steps."""
    more, fewer = drawing.steps, drawing.fewer_steps
    counts = [count_waits(pipeline, drawing, steps) for steps in (more, fewer)]
    return {"synchronizations": counts[0], "synchronizations_per_step": (counts[0] - counts[1]) / (more - fewer)}


def count_waits(pipeline: TextToImagePipeline, drawing: Drawing, steps: int) -> int:
    """Returns how many synchronizing operations torch reports while it draws a picture.

    Args:
        pipeline: draws the picture.
        drawing: its guidance.
        steps: sampling steps.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            draw(pipeline, drawing, steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)
