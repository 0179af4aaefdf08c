"""Settings that people write in YAML and pydantic checks. One message names every error and the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from sdcompress_engines.errors import UsageError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def read_mapping(path: Path, content: str) -> dict[str, Any]:
    """Returns a YAML file's mapping; an empty file is an empty mapping.

    Args:
        path: the file.
        content: what the mapping holds, for the message: "knobs" or "settings".

    Raises:
        UsageError: the file is not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"is not YAML ({error})", where=path) from error
    if not isinstance(values, dict):
        raise UsageError(f"is not a mapping of {content}", where=path)
    return {str(name): value for name, value in values.items()}


def describe_errors(error: ValidationError, model: type[BaseModel], noun: str) -> str:
    """Returns one line that names every error in a set of settings.

    Args:
        error: pydantic's.
        model: the class that was validated.
        noun: what one of the settings is called: "knob" or "setting".
    """
    return "; ".join(_describe_error(each, model, noun) for each in error.errors())


def _describe_error(error: ErrorDetails, model: type[BaseModel], noun: str) -> str:
    if not error["loc"]:  # of the whole
        return str(error["ctx"]["error"]) if error["type"] == "value_error" else error["msg"]
    *path, last = (str(part) for part in error["loc"])
    name = ".".join([*path, last])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(last, _known_names(model, path), n=1, cutoff=0.5)
        return f"{name}: unknown {noun}" + (f", did you mean {near[0]}?" if near else "")
    if error["type"] == "value_error":
        return f"{name}: {error['ctx']['error']}"
    return f"{name}: {error['msg'].lower()}" + ("" if error["type"] == "missing" else f", got {error['input']!r}")


def _known_names(model: type[BaseModel], path: list[str]) -> list[str]:
    """Returns the field names at a place inside `model`; numbers in the path are places in a list."""
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
