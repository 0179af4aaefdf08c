"""Latents, guidance and pictures: what a denoising loop needs, on any backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from sdcompress_engines.errors import DataError


def initial_latents(pipeline: Any, seeds: Sequence[int], size_px: int) -> tuple[torch.Tensor, list[torch.Generator]]:
    """Unit Gaussian latents (B, C, size/f, size/f), fp32 on the CPU, one seed a picture, and the generators that drew
    them.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    side = size_px // pipeline.vae_scale_factor
    shape = (1, pipeline.unet.config.in_channels, side, side)
    return torch.cat([torch.randn(shape, generator=generator) for generator in generators]), generators


def default_guidance_scale(own_size_px: int) -> float:
    """7.5, as Stable Diffusion is used; 4 for nano and its students, told by the size they were made for: at 7.5 their
    colours burn out.
    """
    return 7.5 if own_size_px >= 256 else 4.0


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int = 25,
    guidance_scale: float | None = None,
    size_px: int | None = None,
    negative_prompt: str | None = None,
    batch_size: int = 16,
) -> list[Image.Image]:
    """One picture a prompt.

    Noise comes from each picture's own seed and in fp32, so neither batch size nor precision changes what is drawn.

    Args:
        prompts, seeds: of equal length.
        guidance_scale: of classifier-free guidance; None is `default_guidance_scale`.
        size_px: side in pixels; None is what the UNet was made for.

    Raises:
        DataError: prompts and seeds differ in number.
    """
    if len(prompts) != len(seeds):
        raise DataError(f"{len(prompts)} prompts and {len(seeds)} seeds", expected="a seed for each prompt")
    own_size_px = int(pipeline.unet.config.sample_size) * pipeline.vae_scale_factor
    size_px = size_px or own_size_px
    guidance_scale = default_guidance_scale(own_size_px) if guidance_scale is None else guidance_scale
    pipeline.set_progress_bar_config(disable=True)
    pipeline.safety_checker = None
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        chunk = list(prompts[start : start + batch_size])
        latents, generators = initial_latents(pipeline, seeds[start : start + batch_size], size_px)
        negative = [negative_prompt] * len(chunk) if negative_prompt else None
        with torch.no_grad():
            pictures += pipeline(
                chunk,
                negative_prompt=negative,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                height=size_px,
                width=size_px,
                latents=latents.to(pipeline.unet.device, pipeline.unet.dtype),
                generator=generators,
            ).images
    return pictures


def grid(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size side by side, as square as they go unless `columns` is given."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet
