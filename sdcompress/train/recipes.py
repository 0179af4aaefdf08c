"""Recipe files: YAML → config, with the command line's overrides."""

from __future__ import annotations

import difflib
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from sdcompress_engines.errors import UsageError

from sdcompress.support.settings_file import read_mapping, told
from sdcompress.train.config import KINDS, TrainConfig

RECIPES = Path(__file__).parent.parent / "recipes"

Config = TypeVar("Config", bound=TrainConfig)


def recipe_names() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(recipe: str | Path) -> Path:
    """The file of a recipe given by name or path.

    Raises:
        UsageError: no such recipe; names the known and the nearest.
    """
    path = Path(recipe) if Path(recipe).suffix in (".yaml", ".yml") else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(str(recipe), recipe_names(), n=1, cutoff=0.4)
        raise UsageError(
            "no such recipe",
            where=str(recipe),
            expected=f"one of {', '.join(recipe_names())}, or a YAML file",
            hint=near[0] if near else "sdcompress recipes list",
        )
    return path


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """A recipe's raw values.

    Raises:
        UsageError: no such recipe, or no YAML mapping.
    """
    return read_mapping(recipe_path(recipe), "knobs")


def load_config(
    kind: type[Config], recipe: str | Path | None, overrides: dict[str, Any], settings: tuple[str, ...] = ()
) -> Config:
    """A recipe's configuration (None for the defaults), with overrides that are not None, then with `a.b=c` settings.

    A recipe's own `kind` (distill, finetune, lora; distill where it has none) must be the one asked for.

    Raises:
        UsageError: no such recipe, one of another kind, unknown keys or values that cannot be; all faults in one
            message.
    """
    values: dict[str, Any] = {}
    where: str | Path = "the options"
    if recipe is not None:
        where, values = recipe, read_recipe(recipe)
        theirs = values.pop("kind", "distill")
        if KINDS.get(theirs) is not kind:
            ours = next(name for name, config in KINDS.items() if config is kind)
            raise UsageError(
                f"is a recipe for {theirs}", where=recipe, expected=f"one for {ours}", hint="sdcompress recipes list"
            )
    values = _merge(values, {k: v for k, v in overrides.items() if v is not None})
    for setting in settings:
        values = _merge(values, _parse(setting))
    try:
        return kind(**values)
    except (ValidationError, TypeError) as error:
        raise UsageError(
            told(error, kind, "knob") if isinstance(error, ValidationError) else str(error), where=where
        ) from error


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        merged[key] = (
            _merge(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
        )
    return merged


def _parse(setting: str) -> dict[str, Any]:
    name, equals, text = setting.partition("=")
    if not equals or not name:
        raise UsageError(f"--set {setting!r}", expected="name=value, such as data.flip=true")
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(
            f"--set {setting!r} has no readable value", expected="name=value, such as data.flip=true"
        ) from error
    if isinstance(value, str):  # YAML reads 1e-4 as text; a knob never wants a number as text
        with suppress(ValueError):
            value = float(value)
    for part in reversed(name.split(".")):
        value = {part: value}
    return dict(value)
