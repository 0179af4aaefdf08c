"""IEEE fp32 on a GPU: torch computes fp32 convolutions in TF32 unless it is told not to, with 10 bits of mantissa
instead of 23.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
