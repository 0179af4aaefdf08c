"""The quantized precisions, and what they need."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Literal

Quantized = Literal["int8", "fp8"]

HighPrecision = Literal["fp16", "fp32"]

PRECISIONS: tuple[Quantized, ...] = ("int8", "fp8")

INSTALL = "pip install 'sdcompress[quantize]'"

FP8_CAPABILITY = (8, 9)
"""The first cards with fp8 arithmetic: Ada and Hopper."""


def missing() -> str | None:
    """Why nothing can be quantized here, or None."""
    lacking = [
        name
        for name in ("modelopt", "onnx_graphsurgeon", "onnxslim", "lief", "onnxruntime")
        if importlib.util.find_spec(name) is None
    ]
    return f"quantization needs {', '.join(lacking)}, not installed" if lacking else None


def supported(precision: str, compute_capability: tuple[int, int]) -> str | None:
    """Why a card of this (major, minor) has no use for the precision, or None.

    Every card that TensorRT serves computes int8.
    """
    if precision != "fp8" or compute_capability >= FP8_CAPABILITY:
        return None
    major, minor = compute_capability
    return (
        f"fp8 needs compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} (RTX 40, L4, H100) or newer, not"
        f" {major}.{minor}; int8 runs there"
    )
