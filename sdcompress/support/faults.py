"""What pydantic found wrong, in one line: every fault with its place, its value, and the nearest known name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from reprlib import Repr
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError
from sdcompress_engines.errors import shorten

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MOST_FAULTS = 12
"""Faults that are named; of the others only the number is given."""
_NAME_LENGTH, _TEXT_LENGTH, _VALUE_LENGTH = 80, 160, 60

_WORDS = {r"valid tuple": "list", r"valid dictionary( or instance of \w+)?": "mapping of names to values"}
"""What pydantic calls in Python's words → as people write it in YAML."""

_values = Repr()
_values.maxstring = _values.maxother = _values.maxlong = _VALUE_LENGTH
_values.maxlevel, _values.maxdict, _values.maxlist, _values.maxtuple = 2, 3, 4, 4


def faults_of(error: ValidationError, model: type[BaseModel] | None = None, noun: str = "setting") -> str:
    """Returns one line that names every fault, such as `steps: input should be greater than 0, got -1`.

    Args:
        error: pydantic's.
        model: the class that was validated, whose field names are suggested for an unknown one; None suggests none.
        noun: what one of the fields is called: "knob" or "setting".
    """
    faults = error.errors(include_url=False)
    texts = [_describe(fault, model, noun) for fault in faults[:MOST_FAULTS]]
    left = len(faults) - len(texts)
    return "; ".join([*texts, *([f"and {left:,} more"] if left else [])])


def describe_value(value: object) -> str:
    """Returns a value as text of readable length, whatever its size."""
    return shorten(_values.repr(value), 2 * _VALUE_LENGTH)


def _describe(fault: ErrorDetails, model: type[BaseModel] | None, noun: str) -> str:
    path = [str(part) for part in fault["loc"]]
    name = shorten(".".join(path), _NAME_LENGTH)
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1][:_NAME_LENGTH], _known_names(model, path[:-1]), n=1, cutoff=0.5)
        return f"{name}: unknown {noun}" + (f", did you mean {near[0]}?" if near else "")
    text = str(fault["ctx"]["error"]) if fault["type"] == "value_error" else fault["msg"][:1].lower() + fault["msg"][1:]
    for words, plain in _WORDS.items():
        text = re.sub(words, plain, text)
    given = "" if fault["type"] in ("missing", "value_error") else f", got {describe_value(fault['input'])}"
    return f"{f'{name}: ' if name else ''}{shorten(text, _TEXT_LENGTH)}{given}"


def _known_names(model: type[BaseModel] | None, path: list[str]) -> list[str]:
    """Returns the field names at a place inside `model`; numbers in the path are places in a list."""
    if model is None:
        return []
    for part in path:
        if part in model.model_fields:
            model = next(_find_models(model.model_fields[part].annotation), model)
    return list(model.model_fields)


def _find_models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the pydantic models in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _find_models(inner)
