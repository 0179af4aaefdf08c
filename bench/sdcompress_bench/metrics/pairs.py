"""How far pictures are from their counterparts, pair by pair: PSNR and SSIM; and from their captions: CLIP score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from sdcompress_engines.errors import DataError

from .pictures import measure_pairs, to_images

if TYPE_CHECKING:
    from ..quality import ClipMetric

PSNR_CAP_DB = 100.0
"""PSNR of equal pictures, which has no finite value."""
_WINDOW = 11


def psnr(pictures: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Returns the peak signal-to-noise ratio of each pair in dB, at most `PSNR_CAP_DB`: (B,), float64.

    Raises:
        DataError: these are no pictures, or their shapes differ.
    """

    def measure(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (-10 * (x.double() - y.double()).square().mean((1, 2, 3)).log10()).clamp(max=PSNR_CAP_DB)

    return measure_pairs(measure, pictures, references)


def ssim(pictures: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Returns the structural similarity of each pair, 1 for equal pictures: (B,), float64.

    Wang, Bovik, Sheikh, Simoncelli 2004, "Image quality assessment: from error visibility to structural similarity",
    equation 13 averaged over valid windows and channels: Gaussian window 11 × 11 with σ 1.5, K1 = 0.01, K2 = 0.03.
    Ours, because torchmetrics also averages over mirrored borders, where the authors take whole windows alone.

    Raises:
        DataError: these are no pictures of at least 11 × 11 px, or their shapes differ.
    """
    line = torch.exp(
        -((torch.arange(_WINDOW, dtype=torch.float64, device=pictures.device) - _WINDOW // 2) ** 2) / (2 * 1.5**2)
    )
    line = (line / line.sum()).view(1, 1, 1, -1)

    def blur(planes: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(planes.flatten(0, 1)[:, None], line), line.mT).unflatten(0, planes.shape[:2])

    def measure(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, y = x.double(), y.double()
        mean_x, mean_y = blur(x), blur(y)
        var_x, var_y, covariance = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
        c1, c2 = 0.01**2, 0.03**2
        similar = (
            (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
        )
        return similar.flatten(1).mean(1)

    return measure_pairs(measure, pictures, references, least_px=_WINDOW)


def clip_score(metric: ClipMetric, pictures: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
    """Returns the cosine of each picture with its caption, × 100, by a CLIP: (B,), float32, on the CPU.

    Hessel et al. 2021, arXiv 2104.08718, without their clip at zero and weight of 2.5.

    Args:
        metric: the CLIP.
        pictures: (B, 3, H, W), uint8 or float in [0, 1].
        captions: one for each picture.

    Raises:
        DataError: the numbers of pictures and captions differ.
    """
    images = to_images(pictures)
    if len(images) != len(captions):
        raise DataError(f"{len(images)} pictures and {len(captions)} captions", expected="as many of each")
    return metric.clip_scores(images, captions)
