"""Recipe files: from YAML and the command line's overrides to a configuration."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from sdcompress_engines.errors import UsageError, shorten

from sdcompress.support.faults import describe_value, faults_of
from sdcompress.support.yaml_files import parse_yaml, read_mapping
from sdcompress.train.config import KINDS, LoopConfig

RECIPES = Path(__file__).parent.parent / "recipes"
KIND = "kind"
_SETTING = re.compile(r"\w{1,80}(\.\w{1,80}){0,3}=.*", re.DOTALL)

Config = TypeVar("Config", bound=LoopConfig)


def recipe_names() -> list[str]:
    """Returns the names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(recipe: str | Path) -> Path:
    """Returns the file of a recipe, given by its name or as a path.

    Raises:
        UsageError: no such recipe; the message names the known recipes and the nearest.
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


def recipe_files(*recipes: str | None) -> list[Path]:
    """Returns the files among names and paths of recipes, as `recipe_path` takes them."""
    return [Path(recipe) for recipe in recipes if recipe and Path(recipe).suffix in (".yaml", ".yml")]


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """Returns a recipe's values as they are in the file, unchecked.

    Raises:
        UsageError: no such recipe, or not a YAML mapping.
    """
    return read_mapping(recipe_path(recipe), "knobs")


def load_config(
    config_class: type[Config], recipe: str | Path | None, overrides: dict[str, Any], settings: tuple[str, ...] = ()
) -> Config:
    """Returns the configuration of a recipe with the command line's overrides; `settings` win over `overrides`.

    Args:
        config_class: the configuration's class. The recipe's own `kind` (distill, finetune, lora; distill where it has
            none) must be the one of this class.
        recipe: name or file; None for the defaults.
        overrides: values by field name; those that are None do not count.
        settings: texts such as "data.flip=true".

    Raises:
        UsageError: no such recipe, a recipe of another kind, a knob that `settings` set to two values, unknown names or
            invalid values; one message names all errors of names and values.
    """
    values: dict[str, Any] = {}
    where: str | Path = "the options"
    if recipe is not None:
        where, values = recipe, read_recipe(recipe)
        kind = shorten(values.pop(KIND, "distill"), 60)
        if KINDS.get(kind) is not config_class:
            wanted = next(name for name, known in KINDS.items() if known is config_class)
            raise UsageError(
                f"is a recipe for {kind}", where=recipe, expected=f"one for {wanted}", hint="sdcompress recipes list"
            )
    values = _merge(values, {k: v for k, v in overrides.items() if v is not None})
    knobs: dict[str, Any] = {}
    for setting in settings:
        knobs = _merge(knobs, _parse_setting(setting), refuse_change=True)
    values = _merge(values, knobs)
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        raise UsageError(faults_of(error, config_class, "knob"), where=where) from error


def _merge(
    base: dict[str, Any], over: dict[str, Any], *, refuse_change: bool = False, within: str = ""
) -> dict[str, Any]:
    """Returns `base` with the values of `over`; nested mappings are merged too.

    Args:
        base, over: knobs by name.
        refuse_change: refuse a knob that has another value in `base`.
        within: name of the section whose knobs these are, with a dot; for the message.

    Raises:
        UsageError: with `refuse_change`, such a knob.
    """
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            value = _merge(base[key], value, refuse_change=refuse_change, within=f"{within}{key}.")
        elif refuse_change and base.get(key, value) != value:
            raise UsageError(
                f"--set {within}{key} has two values: {describe_value(base[key])} and {describe_value(value)}",
                expected="one value for each knob",
            )
        merged[key] = value
    return merged


def _parse_setting(setting: str) -> dict[str, Any]:
    """Returns a text such as "data.flip=true" as a nested mapping.

    Raises:
        UsageError: the text is not name=value, or the value is not YAML as `parse_yaml` reads it.
    """
    if not _SETTING.fullmatch(setting):
        raise UsageError(f"--set {shorten(repr(setting), 120)}", expected="name=value, such as data.flip=true")
    name, _, text = setting.partition("=")
    value = parse_yaml(text, f"--set {name}")
    for part in reversed(name.split(".")):
        value = {part: value}
    return dict(value)
