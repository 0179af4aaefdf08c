"""pydantic's faults as one line of readable length."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sdcompress.support.faults import MOST_FAULTS, faults_of


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    side: int = Field(ge=1)


class Whole(BaseModel):
    model_config = ConfigDict(extra="forbid")

    sides: tuple[int, ...] = ()
    part: Part | None = None


def fault_line(values: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        Whole(**values)
    return faults_of(caught.value, Whole)


def test_every_fault_has_its_place_its_value_and_the_nearest_name() -> None:
    line = fault_line({"sides": [1, "wide"], "part": {"side": 0, "sids": 1}})
    assert "sides.1: input should be a valid integer" in line
    assert "got 'wide'" in line
    assert "part.side: input should be greater than or equal to 1, got 0" in line
    assert "part.sids: unknown setting, did you mean side?" in line


@pytest.mark.parametrize(
    "values",
    [
        {"sides": "x" * 100_000},
        {"sides": ["x"] * 10_000},
        {"sides": {"x" * 5000: ["y" * 5000] * 5000}},
        {"x" * 100_000: 1},
        {f"x{i}": i for i in range(10_000)},
        {"part": {"side": "\x1b[2J\n" * 1000}},
    ],
)
def test_the_line_is_of_readable_length_whatever_was_given(values: dict[str, Any]) -> None:
    line = fault_line(values)
    assert len(line) < 300 * MOST_FAULTS
    assert line.isprintable()
