"""How far one result is from another, the limits of that, and references in IEEE fp32.

On a GPU, torch computes fp32 convolutions in TF32 unless that is turned off, with 10 bits of mantissa instead of 23.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

FP32_LIMIT = 1e-4
"""Largest relative L2 error of a backend in fp32, against torch in IEEE fp32."""
HALF_FACTOR = 2.0
"""Largest error of a backend in half precision, as a multiple of torch's own error in that precision."""


def relative_l2(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns ‖output − reference‖ / ‖reference‖ over all elements, in float64. It is 0 for equal tensors.

    Unlike cosine similarity it notices a wrong scale. It is NaN if a value of `output` is NaN.

    Args:
        output, reference: tensors of one shape, any dtype, on one device.
    """
    error = (output.double() - reference.double()).norm()
    return (error / reference.double().norm().clamp_min(1e-30)).item()


def largest_relative_l2(outputs: Mapping[str, torch.Tensor], references: Mapping[str, torch.Tensor]) -> float:
    """Returns the largest `relative_l2` of any named tensor in `references`; infinity if one is NaN.

    Args:
        outputs: tensors by name, at least those in `references`.
        references: tensors by name, of the same shapes.
    """
    errors = [relative_l2(outputs[name], reference) for name, reference in references.items()]
    return max(error if error == error else float("inf") for error in errors)


def use_ieee_fp32() -> None:
    """Compute fp32 convolutions and matrix products in IEEE fp32 in this process from now on. A CPU does so anyway.

    Call it before a result is called exact, before a noise floor is measured, and before a reference is timed.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def ieee_fp32() -> Iterator[None]:
    """Compute in IEEE fp32 inside the block, as `use_ieee_fp32` does; afterwards as before."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    use_ieee_fp32()
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
