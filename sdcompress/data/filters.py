"""Conditions on a picture's metadata, such as `aesthetic >= 7.5`."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sdcompress_engines.errors import UsageError, shorten

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(rf"\s*([^\s<>=!]+)\s*({'|'.join(_OPERATORS)})\s*(\S+)\s*")


@dataclass(frozen=True)
class Condition:
    """A comparison of a numeric metadata field with a number.

    Attributes:
        field: name of the metadata field.
        sign: one of >= <= == != > <.
        value: the number on the right.
        text: the condition as it is typed.
    """

    field: str
    sign: str
    value: float
    text: str

    def holds(self, meta: dict[str, Any]) -> bool | None:
        """Returns whether the metadata meets the condition; None where the field is missing or no number."""
        number = as_number(meta.get(self.field))
        return None if number is None else _OPERATORS[self.sign](number, self.value)


def as_number(value: Any) -> float | None:
    """Returns a number, or text that spells one, as a float; None for anything else, NaN too. CSV has only text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number


def parse_conditions(texts: Iterable[str]) -> tuple[Condition, ...]:
    """Returns the conditions that were typed with `--where`.

    Raises:
        UsageError: a text is not of the form FIELD OPERATOR NUMBER.
    """
    conditions = []
    for text in texts:
        match = _CONDITION.fullmatch(text)
        number = as_number(match[3]) if match else None
        if match is None or number is None or math.isinf(number):
            raise UsageError(
                f"--where {shorten(repr(text), 120)}",
                expected='FIELD, one of >= <= > < == !=, and a finite number: "aesthetic >= 7.5"',
            )
        conditions.append(Condition(match[1], match[2], number, " ".join(match.groups())))
    return tuple(conditions)
