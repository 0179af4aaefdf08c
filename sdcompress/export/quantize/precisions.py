"""The quantized precisions, and the packages and cards that they need."""

from __future__ import annotations

import importlib.util
from typing import Literal

Quantized = Literal["int8", "fp8"]

HighPrecision = Literal["fp16", "fp32"]

PRECISIONS: tuple[Quantized, ...] = ("int8", "fp8")

INSTALL = 'pip install "sdcompress[quantize]"'

FP8_CAPABILITY = (8, 9)
"""The first cards with fp8 arithmetic: Ada and Hopper."""


def missing() -> str | None:
    """Returns why nothing can be quantized here, or None."""
    lacking = [
        name
        for name in ("modelopt", "onnx_graphsurgeon", "onnxslim", "lief", "onnxruntime")
        if importlib.util.find_spec(name) is None
    ]
    return f"quantization needs {', '.join(lacking)}, not installed" if lacking else None


def unsupported(precision: str, compute_capability: tuple[int, int]) -> str | None:
    """Returns why a card does not compute in a precision, or None where it does.

    Every card that TensorRT serves computes int8.

    Args:
        precision: of a graph.
        compute_capability: (major, minor) of the card.
    """
    if precision != "fp8" or compute_capability >= FP8_CAPABILITY:
        return None
    major, minor = compute_capability
    return (
        f"fp8 needs compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} (RTX 40, L4, H100) or newer, not"
        f" {major}.{minor}; int8 runs there"
    )
