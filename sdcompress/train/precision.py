"""The precision that a run computes in."""

from __future__ import annotations

import copy
from typing import Any

import torch

from sdcompress.data.precision import has_bf16_instructions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, device_type: str) -> str:
    """Returns `precision`, with `auto` resolved.

    `auto` is bf16 where the device computes in it, else fp16 on a GPU and fp32 on a CPU.

    Args:
        precision: auto, fp32, bf16 or fp16.
        device_type: "cuda" or "cpu".
    """
    if precision != "auto":
        return precision
    if device_type == "cuda":
        return "bf16" if has_bf16_instructions() else "fp16"
    return "bf16" if device_type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"


def copy_frozen(network: Any, precision: str) -> Any:
    """Returns a copy of a network in the precision of the run, without gradients, in eval mode.

    Args:
        network: the teacher's UNet, or the UNet under an adapter.
        precision: as in the configuration, `auto` included.
    """
    dtype = DTYPES[resolve_precision(precision, "cuda" if torch.cuda.is_available() else "cpu")]
    return copy.deepcopy(network).to(dtype).requires_grad_(False).eval()
