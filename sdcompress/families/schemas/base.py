"""What all schemas share: how values are checked and how faults become one line.

A file that somebody else wrote may hold anything. Known entries are checked; unknown ones are left out, because
diffusers and transformers keep them as attributes, which can replace methods; entries that name code are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from sdcompress_engines.errors import ModelError, shorten
from sdcompress_engines.signature import MOST_LEVELS

from sdcompress.support.faults import faults_of

_CODE = ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code", "quantization_config")
"""Entries with which diffusers or transformers load classes, files or kernels that a model brings along."""
_ATTENTION = ("attn_implementation", "_attn_implementation")
_PLAIN_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_VERSION = "_diffusers_version"

Activation = Literal["silu", "swish", "mish", "gelu", "relu"]
"""diffusers' names of activations: `diffusers.models.activations`."""
_MOST_IN_A_LEVEL = 16
"""Most entries for the blocks of one level."""

Schema = TypeVar("Schema", bound="ComponentSchema")


class ComponentSchema(BaseModel):
    """The config of a component. Entries that it does not know are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


def within(low: float, high: float) -> Any:
    """Returns the bounds of a number, for `Annotated`."""
    return Field(ge=low, le=high)


def levels() -> Any:
    """Returns the bounds of a list with one entry a level, for `Annotated`."""
    return Field(min_length=1, max_length=MOST_LEVELS)


def per_level(low: int, high: int, depth: int = 1) -> AfterValidator:
    """Returns the check of a whole number for all levels, or of a list with one for each, for `Annotated`.

    Args:
        low, high: bounds of the numbers.
        depth: how deep lists may lie in each other.
    """

    def holds(value: Any, depth: int) -> bool:
        if isinstance(value, list) and depth:
            return 0 < len(value) <= _MOST_IN_A_LEVEL and all(holds(each, depth - 1) for each in value)
        return type(value) is int and low <= value <= high

    def check(value: Any) -> Any:
        if not holds(value, depth):
            got = shorten(repr(value), 40)
            raise ValueError(f"expected a whole number from {low} to {high}, or a list with one a level, got {got}")
        return value

    return AfterValidator(check)


def check_content(
    schema: type[Schema], content: Any, where: str | Path, classes: tuple[str, ...] = ()
) -> tuple[dict[str, Any], Schema]:
    """Returns the known entries of a config as they are written, and the config with its defaults.

    Args:
        schema: of the component.
        content: of the file.
        where: the file, for the message.
        classes: accepted values of `_class_name`.

    Raises:
        ModelError: one line that names every fault.
    """
    plain = with_lists(content)
    refuse_code(plain, where)
    named = plain.get("_class_name")
    if named is not None and classes and named not in classes:
        raise ModelError(f"is for the class {shorten(repr(named), 80)}", where=where, expected=some_of(classes))
    try:
        checked = schema.model_validate(plain)
    except ValidationError as error:
        raise ModelError(
            f"does not describe a model ({shorten(faults_of(error, schema, 'entry'), 380)})", where=where
        ) from error
    kept = {key: value for key, value in plain.items() if key in schema.model_fields}
    if named is not None and classes:
        kept["_class_name"] = named
    if isinstance(version := plain.get(_VERSION), str) and _is_version(version):
        kept[_VERSION] = version  # diffusers mends the configs of its early versions
    return kept, checked


def some_of(names: Sequence[str]) -> str:
    """Returns the first names of a list as words."""
    return f"{' or '.join(names[:4])}{' ...' if len(names) > 4 else ''}"


def refuse_code(content: Mapping[str, Any], where: str | Path) -> None:
    """Refuse a config with an entry that names code.

    Raises:
        ModelError: it has one.
    """
    named = [key for key in _CODE if content.get(key)]
    named += [key for key in _ATTENTION if content.get(key) is not None and content[key] not in _PLAIN_ATTENTION]
    if named:
        raise ModelError(
            f"names code or a format of its own ({', '.join(named)})",
            where=where,
            expected="a model that diffusers and transformers load by themselves",
        )


def with_lists(content: Any) -> dict[str, Any]:
    """Returns a config as JSON holds it: with lists in the place of tuples."""
    return {str(key): _as_list(value) for key, value in dict(content).items()}


def _as_list(value: Any) -> Any:
    return [_as_list(each) for each in value] if isinstance(value, list | tuple) else value


def _is_version(text: str) -> bool:
    from packaging.version import InvalidVersion, Version

    try:
        Version(text)
    except InvalidVersion:
        return False
    return len(text) <= 40


def require(holds: bool, what: str) -> None:
    """Raise a `ValueError` with this text, for pydantic, where a condition does not hold."""
    if not holds:
        raise ValueError(what)
