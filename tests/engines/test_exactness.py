"""The relative L2 error sees a wrong scale, and nothing that is not a number passes for a small error."""

from __future__ import annotations

import math

import pytest
import torch
from sdcompress_engines.exactness import FP32_LIMIT, ieee_fp32, largest_relative_l2, relative_l2


def test_equal_tensors_have_no_error_and_a_wrong_scale_has_its_own() -> None:
    reference = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).half()
    assert relative_l2(reference, reference) == 0
    assert relative_l2(1.25 * reference.double(), reference) == pytest.approx(0.25)
    assert relative_l2(torch.zeros(3), torch.zeros(3)) == 0


def test_a_value_that_is_not_a_number_is_never_below_the_limit() -> None:
    reference = {"a": torch.ones(4), "b": torch.ones(4)}
    output = {"a": torch.ones(4), "b": torch.tensor([1.0, 1.0, 1.0, math.nan])}
    assert not relative_l2(output["b"], reference["b"]) <= FP32_LIMIT
    assert largest_relative_l2(output, reference) == math.inf
    assert largest_relative_l2(reference, reference) == 0


def test_ieee_fp32_ends_with_its_block() -> None:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        with ieee_fp32():
            assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before
