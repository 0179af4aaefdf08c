"""From a picture to the input of the VAE: buckets of aspect ratios, crops and mirrored pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

MAX_BUCKET_ASPECT = 2.0
CENTER = (0.5, 0.5)


@dataclass(frozen=True)
class View:
    """One crop of one picture.

    Attributes:
        pixels: (3, H, W), float32 in [-1, 1], on the CPU.
        time_ids: height and width of the original, top and left of the crop in the resized (and mirrored) picture,
            height and width of the crop, all in pixels. SDXL is conditioned on them (arXiv 2307.01952, section 2.2).
    """

    pixels: torch.Tensor
    time_ids: tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class DrawnView:
    """A whole picture whose latents are known.

    Attributes:
        latents: unscaled, (C, H/8, W/8) float16, on the CPU.
        time_ids: see `View`.
    """

    latents: torch.Tensor
    time_ids: tuple[int, int, int, int, int, int]


def bucket_shapes(size_px: int, step_px: int) -> list[tuple[int, int]]:
    """Returns shapes of nearly equal area as (width, height) in pixels, sorted by aspect ratio, the square first.

    Their long side is at most `MAX_BUCKET_ASPECT` times their short side.

    Args:
        size_px: side of the square; no other shape has a larger area.
        step_px: all sides are multiples of it.
    """
    shapes = {(size_px, size_px)}
    for width in range(step_px, 2 * size_px, step_px):
        height = max(step_px, int(size_px * size_px / width // step_px) * step_px)
        if max(width / height, height / width) <= MAX_BUCKET_ASPECT:
            shapes.add((width, height))
    return sorted(shapes, key=lambda shape: (abs(math.log(shape[0] / shape[1])), shape))


def nearest_bucket(width: int, height: int, shapes: list[tuple[int, int]]) -> int:
    """Returns the index of the shape whose aspect ratio is nearest to that of a picture.

    Args:
        width, height: of the picture, in pixels.
        shapes: (width, height) of each bucket, in pixels.
    """
    aspect = math.log(width / height)
    return min(range(len(shapes)), key=lambda i: (abs(aspect - math.log(shapes[i][0] / shapes[i][1])), i))


def to_view(
    picture: Image.Image, width: int, height: int, place: tuple[float, float] = CENTER, flip: bool = False
) -> View:
    """Returns a picture resized to cover a shape, and cropped to it.

    Args:
        picture: in RGB.
        width, height: of the crop, in pixels.
        place: position of the crop in what the shape does not cover, across and down: 0 is left or top, 0.5 the center.
        flip: mirror the crop.
    """
    original = picture.size
    scale = max(width / picture.width, height / picture.height)
    if scale != 1:
        size = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    left, top = round((picture.width - width) * place[0]), round((picture.height - height) * place[1])
    if place == CENTER:  # rounded down, where `round` would go to the even number
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
    crop = picture.crop((left, top, left + width, top + height))
    if flip:
        crop, left = ImageOps.mirror(crop), picture.width - width - left
    array = np.asarray(crop, dtype=np.float32) / np.float32(127.5) - 1
    return View(torch.from_numpy(array).permute(2, 0, 1), (original[1], original[0], top, left, height, width))


def to_pixels(picture: Image.Image, size_px: int) -> torch.Tensor:
    """Returns the center square of a picture, resized: (3, size_px, size_px), float32 in [-1, 1], on the CPU."""
    return to_view(picture, size_px, size_px).pixels
