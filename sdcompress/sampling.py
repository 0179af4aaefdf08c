"""Latents, guidance and pictures: what a denoising loop needs, on any backend."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from sdcompress_engines.errors import DataError, ModelError, UsageError, shorten

from sdcompress.families.sampling_defaults import SamplingDefaults, sampling_defaults
from sdcompress.support.pipeline import TextToImagePipeline, native_size_px


def initial_latents(
    pipeline: TextToImagePipeline, seeds: Sequence[int], size_px: int
) -> tuple[torch.Tensor, list[torch.Generator]]:
    """Returns unit Gaussian latents and the generators that drew them.

    Args:
        pipeline: gives the number of latent channels and the scale of its VAE.
        seeds: one a picture.
        size_px: side of the pictures.

    Returns:
        Latents (B, C, size/f, size/f), float32, on the CPU; one generator a picture.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    side = size_px // pipeline.vae_scale_factor
    shape = (1, pipeline.unet.config.in_channels, side, side)
    return torch.cat([torch.randn(shape, generator=generator) for generator in generators]), generators


def generate(
    pipeline: TextToImagePipeline,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int | None = None,
    guidance_scale: float | None = None,
    size_px: int | None = None,
    negative_prompt: str | None = None,
    batch_size: int = 16,
    take_latents: Callable[[torch.Tensor], None] = lambda latents: None,
) -> list[Image.Image]:
    """Returns one picture a prompt.

    The noise of each picture comes from its own seed, in fp32, so it does not depend on batch size or precision.

    Args:
        pipeline: on any backend.
        prompts, seeds: of equal length.
        steps: denoising steps; None is the model's own number.
        guidance_scale: of classifier-free guidance; None is the model's own scale.
        size_px: side in pixels; None is what the UNet was made for.
        negative_prompt: what the pictures are guided away from.
        batch_size: pictures drawn at once.
        take_latents: called for each batch with what its pictures are decoded from: the UNet's latents, (B, C, H/8,
            W/8), in its dtype and on its device.

    Raises:
        DataError: prompts and seeds differ in number.
        ModelError: a picture is not finite.
        UsageError: the size is not a positive multiple of 8, or as `check_steps` and `check_guidance`.
    """
    if len(prompts) != len(seeds):
        raise DataError(f"{len(prompts)} prompts and {len(seeds)} seeds", expected="a seed for each prompt")
    size_px = size_px or native_size_px(pipeline)
    if size_px < pipeline.vae_scale_factor or size_px % 8:
        raise UsageError(f"size {size_px} px", expected="a positive multiple of 8")
    steps, guidance_scale = choose_sampling(sampling_defaults(pipeline), steps, guidance_scale, negative_prompt)
    check_steps(pipeline.scheduler, steps)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.safety_checker = None
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        chunk = list(prompts[start : start + batch_size])
        latents, generators = initial_latents(pipeline, seeds[start : start + batch_size], size_px)
        pixels, final = _run(
            pipeline,
            chunk,
            negative_prompt=[negative_prompt] * len(chunk) if negative_prompt else None,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            height=size_px,
            width=size_px,
            latents=latents.to(pipeline.unet.device, pipeline.unet.dtype),
            generator=generators,
        )
        take_latents(final)
        dtype, scheduler = str(pipeline.unet.dtype).removeprefix("torch."), type(pipeline.scheduler).__name__
        pictures += to_pictures(pixels, f"in {dtype}, after {steps} steps of the {scheduler}")
    return pictures


def _run(pipeline: TextToImagePipeline, prompts: list[str], **options: Any) -> tuple[np.ndarray, torch.Tensor]:
    """Returns pixels in [0, 1], (B, H, W, 3), and the latents that they were decoded from: those of the last step.

    Args:
        pipeline: of diffusers.
        prompts: of the pictures.
        options: further arguments of the pipeline's call.
    """
    last: dict[str, torch.Tensor] = {}

    def keep(_: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        last.update(tensors)
        return tensors

    with torch.no_grad():
        pixels = pipeline(prompts, output_type="np", callback_on_step_end=keep, **options).images
    return pixels, last["latents"]


def to_pictures(pixels: np.ndarray, drawn: str) -> list[Image.Image]:
    """Returns pictures of pixels in [0, 1], (B, H, W, 3), as diffusers does, which makes black ones of NaN.

    Args:
        pixels: of the pictures.
        drawn: how they were drawn, for the message.

    Raises:
        ModelError: a pixel is not finite.
    """
    if not np.isfinite(pixels).all():
        raise ModelError(
            f"a picture has values that are not finite {drawn}",
            hint="--precision fp32 or bf16, another number of steps, or a scheduler config that fits the model",
        )
    return [Image.fromarray(picture) for picture in (pixels * 255).round().astype(np.uint8)]


def encode_pictures(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Returns the latents of pictures as the UNet takes them, without noise, (B, C, H/8, W/8), in the VAE's dtype.

    Args:
        vae: of a pipeline on any backend, a small decoder with its encoder too.
        pixels: (B, 3, H, W) in [-1, 1], in the VAE's dtype, on its device.
    """
    encoded = vae.encode(pixels)
    latents: torch.Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return latents * vae.config.scaling_factor


def check_steps(scheduler: Any, steps: int) -> None:
    """Refuse a number of steps that a scheduler cannot make; some need a few to begin with.

    Args:
        scheduler: of diffusers; it is not changed.
        steps: denoising steps.

    Raises:
        UsageError: it cannot.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # diffusers' own, which the drawing itself gives again
            type(scheduler).from_config(scheduler.config).set_timesteps(steps)
    except Exception as error:  # each scheduler fails in its own way
        raise UsageError(
            f"the {type(scheduler).__name__} cannot draw in {steps} steps ({shorten(error, 120)})",
            hint="another number of steps, such as 25",
        ) from error


def choose_sampling(
    defaults: SamplingDefaults, steps: int | None, guidance_scale: float | None, negative_prompt: str | None = None
) -> tuple[int, float]:
    """Returns the steps and the guidance scale that are asked for; in place of None, the model's own.

    Args:
        defaults: of the model.
        steps, guidance_scale, negative_prompt: what is asked for.

    Raises:
        UsageError: as `check_guidance`.
    """
    check_guidance(defaults, guidance_scale, negative_prompt)
    return (
        defaults.num_inference_steps if steps is None else steps,
        defaults.guidance_scale if guidance_scale is None else guidance_scale,
    )


def check_guidance(defaults: SamplingDefaults, guidance_scale: float | None, negative_prompt: str | None) -> None:
    """Refuse guidance of a model that has it in its weights: it would be applied twice, and saturate the picture.

    Args:
        defaults: of the model.
        guidance_scale, negative_prompt: what is asked for; None is nothing.

    Raises:
        UsageError: the model takes no guidance.
    """
    if not defaults.is_guidance_free:
        return
    asked = f"guidance {guidance_scale:g}" if guidance_scale is not None and guidance_scale > 1 else ""
    asked = asked or ("a negative prompt" if negative_prompt else "")
    if asked:
        raise UsageError(
            f"{asked} with a model that was trained for {defaults.num_inference_steps} steps without guidance: the"
            " guidance is in its weights",
            expected="--guidance 1 and no negative prompt",
            hint="leave both out, or use the model before its few-step training",
        )


def grid(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Returns pictures of one size on one sheet, row by row.

    Args:
        pictures: at least one.
        columns: None makes the sheet about square.
    """
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def keep_timesteps_on_host(pipeline: TextToImagePipeline) -> None:
    """Keep the scheduler's timesteps on the CPU, so that a denoising loop on a GPU never waits for the device.

    diffusers puts them on the device. Then every scheduler that looks a timestep up in a table (PNDM, DDIM, DDPM, LCM:
    `alphas_cumprod[t]`) copies it back at each step, and the host falls behind.
    """
    scheduler = pipeline.scheduler
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def set_timesteps_on_host(*args: Any, **options: Any) -> Any:
        bound = inspect.signature(set_timesteps).bind(*args, **options)
        if "device" in inspect.signature(set_timesteps).parameters:
            bound.arguments["device"] = "cpu"
        return set_timesteps(*bound.args, **bound.kwargs)

    def move_timestep(
        module: torch.nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args) > 1 and isinstance(args[1], torch.Tensor):  # every diffusers pipeline passes it second
            args = (args[0], args[1].to(args[0].device, non_blocking=True), *args[2:])
        return args, options

    scheduler.set_timesteps = set_timesteps_on_host
    pipeline.unet.register_forward_pre_hook(move_timestep, with_kwargs=True)
