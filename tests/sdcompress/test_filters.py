"""Conditions typed with `--where`."""

from __future__ import annotations

import pytest
from sdcompress_engines.errors import UsageError

from sdcompress.data.filters import parse_conditions


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("aesthetic >= 7.5", 7.5, True),
        ("aesthetic>7.5", 7.5, False),
        ("aesthetic<= 7.5", "7.5", True),
        ("aesthetic <8", 7.9, True),
        ("aesthetic == 7", 7, True),
        ("aesthetic != 7", 7, False),
        ("aesthetic > -1e-3", 0, True),
        ("aesthetic > 1", None, None),
        ("aesthetic > 1", "high", None),
        ("aesthetic > 1", float("nan"), None),
        ("aesthetic > 0", True, None),
    ],
)
def test_a_condition_holds_for_numbers_and_for_text_that_spells_one(
    text: str, value: object, holds: bool | None
) -> None:
    (condition,) = parse_conditions([text])
    assert condition.holds({"aesthetic": value}) is holds


def test_a_condition_is_reported_with_every_digit() -> None:
    assert [each.text for each in parse_conditions(["id>=16777217"])] == ["id >= 16777217"]


@pytest.mark.parametrize(
    "text",
    ["", "aesthetic", ">= 7", "aesthetic ~ 7", "aesthetic >= seven", "aesthetic >= nan", "__import__('os') > 1 or 1"],
)
def test_what_is_no_condition_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match=r"aesthetic >= 7\.5"):
        parse_conditions([text])
