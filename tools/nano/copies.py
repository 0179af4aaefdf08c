"""How near generated pictures are to training pictures: are they drawn, or remembered?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from common import Split, augment
from diffusers import AutoencoderKL
from PIL import Image
from sdcompress_bench.quality import to_pixels

SIDE_PX, SHIFT_PX = 32, 1
"""Pictures are compared at this size, shifted by up to so many of its pixels, and mirrored."""


def shrink(pixels: torch.Tensor) -> torch.Tensor:
    """Returns pictures of 32 x 32 pixels, (N, 3, 32, 32), in [0, 1].

    Args:
        pixels: (N, 3, H, W), float32 in [0, 1].
    """
    return F.interpolate(pixels, (SIDE_PX, SIDE_PX), mode="area")


def find_nearest(small: torch.Tensor, training: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the RMSE of each picture to the nearest training picture, and the index of that one; (N,) each.

    A picture is also tried mirrored and shifted, on white.

    Args:
        small: (N, 3, 32, 32), in [0, 1].
        training: (M, 3, 32, 32), in [0, 1].
    """
    padded = F.pad(small, [SHIFT_PX] * 4, value=1.0)
    shifts = [(x, y) for x in range(2 * SHIFT_PX + 1) for y in range(2 * SHIFT_PX + 1)]
    moved = [padded[:, :, y : y + SIDE_PX, x : x + SIDE_PX] for x, y in shifts]
    distances = torch.stack(
        [torch.cdist(each.flatten(1), training.flatten(1)) for view in moved for each in (view, view.flip(-1))]
    ).amin(0)
    nearest = distances.min(1)
    return nearest.values / (3 * SIDE_PX**2) ** 0.5, nearest.indices


@torch.no_grad()
def pass_through(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Returns pictures as the VAE's decoder gives them back, (B, 3, H, W), in [-1, 1].

    Args:
        vae: in float32.
        pixels: (B, 3, H, W), in [-1, 1].
    """
    parts = [vae.decode(vae.encode(part).latent_dist.mean).sample for part in pixels.split(8)]
    return torch.cat(parts).clamp(-1, 1)


@torch.no_grad()
def measure_copies(vae: AutoencoderKL, train: Split, heldout: Split, drawn: dict[str, Sequence[Image.Image]]) -> dict:
    """Returns the distance to the nearest training picture for several sets of pictures: median, tenth and ninetieth.

    `copies` are training pictures, moved as in training and passed through the VAE: what memory alone would give.
    `real` are held-out pictures: what is new. `as_near_as_copies` is the share of a set that is as near to a training
    picture as half of the copies are.

    Args:
        vae: in float32.
        train: the training pictures.
        heldout: the held-out pictures.
        drawn: name → generated pictures.
    """
    every = torch.arange(len(train.captions))
    training = torch.cat([shrink(train.pixels(index) / 2 + 0.5) for index in every.split(100)])
    pixels = augment(train.pixels(every[:200]), torch.Generator().manual_seed(0))
    sets = {
        "copies": pass_through(vae, pixels) / 2 + 0.5,
        "real": heldout.pixels(torch.arange(len(heldout.captions))) / 2 + 0.5,
    } | {name: torch.stack([to_pixels(image) for image in images]) for name, images in drawn.items()}
    found: dict[str, Any] = {}
    limit = 0.0
    for name, pictures in sets.items():
        distance, _ = find_nearest(shrink(pictures), training)
        found[name] = {f"p{share}": distance.quantile(share / 100).item() for share in (10, 50, 90)}
        if name == "copies":
            limit = found[name]["p50"]
        found[name]["as_near_as_copies"] = (distance <= limit).float().mean().item()
    return found
