"""From a picture to what the VAE takes: buckets of aspect ratios, crops and mirrors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

MAX_BUCKET_ASPECT = 2.0


@dataclass(frozen=True)
class View:
    """One crop of one picture.

    Attributes:
        pixels: float32 in [-1, 1], (3, h, w).
        time_ids: height and width of the original, top and left of the crop in the resized picture, height and width of
            the crop; SDXL is conditioned on them (arXiv 2307.01952, section 2.2).
    """

    pixels: torch.Tensor
    time_ids: tuple[int, int, int, int, int, int]


def bucket_shapes(size_px: int, step_px: int) -> list[tuple[int, int]]:
    """Returns (width, height) of equal area, about `size_px` squared, in multiples of `step_px`, the square first.

    The longest is `MAX_BUCKET_ASPECT` times as long as wide.
    """
    shapes = {(size_px, size_px)}
    for width in range(step_px, 2 * size_px, step_px):
        height = max(step_px, int(size_px * size_px / width // step_px) * step_px)
        if max(width / height, height / width) <= MAX_BUCKET_ASPECT:
            shapes.add((width, height))
    return sorted(shapes, key=lambda shape: (abs(math.log(shape[0] / shape[1])), shape))


def nearest_bucket(width: int, height: int, shapes: list[tuple[int, int]]) -> int:
    """Returns the index of the shape whose aspect ratio is nearest."""
    aspect = math.log(width / height)
    return min(range(len(shapes)), key=lambda i: (abs(aspect - math.log(shapes[i][0] / shapes[i][1])), i))


def to_view(
    picture: Image.Image, width: int, height: int, place: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> View:
    """Returns the picture resized to cover (width, height) and cropped to it.

    Args:
        place: where the crop lies in what is left over: 0 is left or top, 0.5 the center.
        flip: mirror the crop.
    """
    original = picture.size
    scale = max(width / picture.width, height / picture.height)
    if scale != 1:
        size = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    left, top = round((picture.width - width) * place[0]), round((picture.height - height) * place[1])
    if place == (0.5, 0.5):
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
    picture = picture.crop((left, top, left + width, top + height))
    array = np.asarray(ImageOps.mirror(picture) if flip else picture, dtype=np.float32) / np.float32(127.5) - 1
    return View(torch.from_numpy(array).permute(2, 0, 1), (original[1], original[0], top, left, height, width))


def to_pixels(picture: Image.Image, size_px: int) -> torch.Tensor:
    """Returns the center crop of a picture whose short side is `size_px`: float32 in [-1, 1], (3, size_px, size_px)."""
    return to_view(picture, size_px, size_px).pixels
