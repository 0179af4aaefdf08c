"""Pictures as the measures take them: uint8, or float in [0, 1], (B, 3, H, W)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from PIL import Image
from sdcompress_engines.errors import BackendMissing, DataError


def to_images(pictures: torch.Tensor) -> list[Image.Image]:
    """Returns RGB images of pictures, (B, 3, H, W)."""
    arrays = to_unit(pictures).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def to_unit(pictures: torch.Tensor, least_px: int = 1) -> torch.Tensor:
    """Returns pictures as float32 in [0, 1], (B, 3, H, W).

    Args:
        pictures: uint8, or float in [0, 1], (B, 3, H, W).
        least_px: the least height and width.

    Raises:
        DataError: another shape or type, or values outside of [0, 1].
    """
    shape = tuple(pictures.shape)
    if pictures.ndim != 4 or shape[1] != 3 or not len(pictures) or min(shape[2:]) < least_px:
        raise DataError(f"a tensor of shape {shape}", expected=f"pictures (B, 3, H, W), H and W of at least {least_px}")
    if pictures.dtype == torch.uint8:
        return pictures.float() / 255
    if not pictures.is_floating_point():
        raise DataError(f"pictures of type {pictures.dtype}", expected="uint8, or float in [0, 1]")
    low, high = (bound.item() for bound in pictures.aminmax())
    if not (low >= 0 and high <= 1):  # also true where a value is not a number
        raise DataError(f"float pictures from {low:g} to {high:g}", expected="0 to 1")
    return pictures.float()


def measure_pairs(
    measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    pictures: torch.Tensor,
    references: torch.Tensor,
    batch: int = 8,
    least_px: int = 1,
) -> torch.Tensor:
    """Returns the result of `measure` for each pair, (B,).

    Args:
        measure: takes two tensors of pictures in [0, 1], (b, 3, H, W), and returns (b,).
        pictures, references: (B, 3, H, W), uint8 or float in [0, 1].
        batch: pairs at once, because a large set would fill the memory as floats.
        least_px: the least height and width.

    Raises:
        DataError: the shapes differ, or these are no pictures.
    """
    if pictures.shape != references.shape:
        raise DataError(
            f"pictures of shape {tuple(pictures.shape)} and references of {tuple(references.shape)}",
            expected="pairs of one shape",
        )
    parts = zip(pictures.split(batch), references.split(batch), strict=True)
    return torch.cat([measure(to_unit(x, least_px), to_unit(y, least_px)) for x, y in parts])


def exact_convolutions() -> AbstractContextManager[None]:
    """Compute convolutions in full float32 on a GPU. With TF32, the default, LPIPS and Inception are off too far."""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return flags


def find_device(device: str | torch.device) -> torch.device:
    """Returns the device.

    Raises:
        BackendMissing: it is a CUDA device, and there is none.
    """
    wanted = torch.device(device)
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise BackendMissing("no CUDA device for the metrics", hint="device cpu")
    return wanted
