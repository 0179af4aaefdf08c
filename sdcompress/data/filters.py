"""Conditions on a picture's metadata, such as `aesthetic >= 7.5`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sdcompress_engines.errors import UsageError

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"\s*([^\s<>=!]+)\s*(>=|<=|==|!=|>|<)\s*(\S+)\s*")


@dataclass(frozen=True)
class Condition:
    """A numeric field of the metadata against a number."""

    field: str
    sign: str
    value: float

    @property
    def text(self) -> str:
        return f"{self.field} {self.sign} {self.value:g}"

    def holds(self, meta: dict[str, Any]) -> bool | None:
        """Whether it holds; None where the field is missing or no number."""
        number = as_number(meta.get(self.field))
        return None if number is None else _OPERATORS[self.sign](number, self.value)


def as_number(value: Any) -> float | None:
    """A number, or a string that spells one (CSV has no other), as a float; None for anything else, NaN too."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if number == number else None


def parse_conditions(texts: Iterable[str]) -> tuple[Condition, ...]:
    """Conditions from what was typed.

    Raises:
        UsageError: not of the form FIELD OPERATOR NUMBER.
    """
    found = []
    for text in texts:
        match = _CONDITION.fullmatch(text)
        number = as_number(match[3]) if match else None
        if match is None or number is None:
            raise UsageError(
                f"--where {text!r}", expected='FIELD, one of >= <= > < == !=, and a number, such as "aesthetic >= 7.5"'
            )
        found.append(Condition(match[1], match[2], number))
    return tuple(found)
