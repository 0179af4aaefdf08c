"""The types of options and arguments. Every number has bounds, and every path and name is one that can exist."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import click
from sdcompress_engines.errors import UsageError
from sdcompress_engines.paths import expand_user

from sdcompress.support.bounds import (
    LEAST_OPSET,
    LEAST_PX,
    MOST_BATCH,
    MOST_FEW_STEPS,
    MOST_GUIDANCE,
    MOST_OPSET,
    MOST_PICTURES,
    MOST_PX,
    MOST_SEED,
    MOST_STEPS,
    MOST_THREADS,
    MOST_TRAINING_STEPS,
    STEP_PX,
)


class Whole(click.IntRange):
    """Reads a whole number within bounds.

    Args:
        least, most: the bounds, which are accepted.
        step: what the number is a multiple of.
    """

    def __init__(self, least: int | None, most: int | None, step: int = 1) -> None:
        super().__init__(least, most)
        self.step = step

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number = int(super().convert(value, param, ctx))
        if number % self.step:
            self.fail(f"{number} is not a multiple of {self.step}.", param, ctx)
        return number


class Number(click.FloatRange):
    """Reads a finite number within bounds.

    Args:
        least, most: the bounds.
        open_least, open_most: the bound itself is refused.
    """

    def __init__(
        self, least: float | None, most: float | None, *, open_least: bool = False, open_most: bool = False
    ) -> None:
        super().__init__(least, most, min_open=open_least, max_open=open_most)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Several(click.ParamType):
    """Reads values with commas between them, such as 1,4, as a tuple. None is left out, and none is there twice.

    Args:
        item: the type of one value.
        name: of the values with an example, for messages.
    """

    def __init__(self, item: click.ParamType, name: str) -> None:
        self.item, self.name = item, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in value.split(",")]
        if not all(parts):
            self.fail(f"{value!r} lacks a value; expected {self.name}.", param, ctx)
        try:
            values = tuple(self.item.convert(part, param, ctx) for part in parts)
        except click.BadParameter as error:
            self.fail(f"{value!r} is not a list of {self.name}: {error.message}", param, ctx)
        if len(set(values)) < len(values):
            self.fail(f"{value!r} holds a value twice.", param, ctx)
        return values


def _expand(kind: click.ParamType, text: str, param: click.Parameter | None, ctx: click.Context | None) -> Path:
    try:
        return expand_user(text)
    except UsageError as error:
        kind.fail(str(error), param, ctx)


class Text(click.ParamType):
    """Reads text that every library takes: Unicode, without the character NUL.

    Args:
        least: 1 refuses an empty text.
        path: the text may be a path, whose bytes need not be Unicode. `~` at its beginning is the home folder: a shell
            leaves it, for example, behind `=`.
    """

    name = "text"

    def __init__(self, least: int = 0, *, path: bool = False) -> None:
        self.least, self.path = least, path

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if self.path and text.startswith("~"):
            text = os.fspath(_expand(self, text, param, ctx))
        if len(text.strip()) < self.least:
            self.fail("an empty text; leave the option out, or give it a value.", param, ctx)
        if "\0" in text or (not self.path and re.search("[\ud800-\udfff]", text)):
            self.fail(f"{text!r} holds bytes that are no text.", param, ctx)
        return text


class FilePath(click.Path):
    """Reads a path, which is not empty and does not hold the character NUL. `~` at its beginning is the home folder.

    Args:
        checks: of `click.Path`, such as `exists` and `dir_okay`.
    """

    def __init__(self, **checks: Any) -> None:
        super().__init__(path_type=Path, **checks)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        text = os.fsdecode(value)
        if not text.strip():
            self.fail("an empty path; `.` is this folder.", param, ctx)
        if "\0" in text:
            self.fail(f"{text!r} holds the character NUL.", param, ctx)
        return Path(os.fsdecode(super().convert(os.fspath(_expand(self, text, param, ctx)), param, ctx)))


class Shapes(click.ParamType):
    """Reads one size, or MIN:OPT:MAX, of an engine's profile; the value stays text.

    Args:
        axis: batch, height, width or tokens.
    """

    name = "MIN:OPT:MAX"

    def __init__(self, axis: str) -> None:
        self.axis = axis

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from sdcompress_engines.profiles import parse_range

        try:
            parse_range(value, self.axis)
        except UsageError as error:
            self.fail(str(error), param, ctx)
        return str(value)


class Capability(click.ParamType):
    """Reads a compute capability such as 8.9 as (8, 9)."""

    name = "MAJOR.MINOR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([1-9][0-9]?)\.([0-9])", value)
        if match is None:
            self.fail(f"{value!r} is not a compute capability; 8.9 is one", param, ctx)
        return int(match[1]), int(match[2])


NAME = Text(1, path=True)
"""The name of a model, a path, a hub id, or what else may not be empty."""
TEXT = Text()
SIZE_PX = Whole(LEAST_PX, MOST_PX, STEP_PX)
STEPS = Whole(1, MOST_STEPS)
TRAINING_STEPS = Whole(1, MOST_TRAINING_STEPS)
FEW_STEPS = Whole(1, MOST_FEW_STEPS)
BATCH = Whole(1, MOST_BATCH)
PICTURES = Whole(1, MOST_PICTURES)
GUIDANCE = Number(0, MOST_GUIDANCE)
SEED = Whole(0, MOST_SEED)
THREADS = Whole(1, MOST_THREADS)
DAYS = Number(0, 36_500)
MINUTES = Number(0.2, 10_080)
OPSET = Whole(LEAST_OPSET, MOST_OPSET)
