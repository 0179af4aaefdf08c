"""Settings that people write in YAML and pydantic checks: all faults in one message, with the nearest name that is
known.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from sdcompress_engines.errors import UsageError


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """A YAML file's mapping of `what` (knobs, settings); an empty file is an empty one.

    Raises:
        UsageError: it is not YAML, or no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"is not YAML ({error})", where=path) from error
    if not isinstance(values, dict):
        raise UsageError(f"is no mapping of {what}", where=path)
    return {str(name): value for name, value in values.items()}


def told(error: ValidationError, kind: type[BaseModel], what: str) -> str:
    """Every fault of settings of `kind`, in one line; `what` is what one of them is called."""
    return "; ".join(_fault(each, kind, what) for each in error.errors())


def _fault(error: Any, kind: type[BaseModel], what: str) -> str:
    *path, last = (str(part) for part in error["loc"])
    name = ".".join([*path, last])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(last, _fields(kind, path), n=1, cutoff=0.5)
        return f"{name}: unknown {what}" + (f", did you mean {near[0]}?" if near else "")
    if error["type"] == "value_error":
        return f"{name}: {error['ctx']['error']}"
    return f"{name}: {error['msg'].lower()}" + ("" if error["type"] == "missing" else f", got {error['input']!r}")


def _fields(kind: type[BaseModel], path: list[str]) -> list[str]:
    """The names known at a place inside `kind`; numbers in the path are places in a list."""
    for part in path:
        if part in kind.model_fields:
            kind = next(_models(kind.model_fields[part].annotation), kind)
    return list(kind.model_fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)
