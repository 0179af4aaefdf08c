"""click options made from the fields of a pydantic model, so that an option is declared once, where it is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sdcompress.cli._types import TEXT, Number, Whole

PIXELS = "_px"


def field_options(
    model: type[BaseModel],
    names: Iterable[str] | None = None,
    metavars: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
) -> Callable[[Any], Any]:
    """Returns the decorator that adds one option for each field, in the fields' order.

    An option is None, or an empty tuple, where it is not given: the configuration then keeps its own value. The limits
    of a number, such as `ge`, are the option's too.

    Args:
        model: the configuration's class.
        names: the fields; None for all.
        metavars: names of the values in the help, by field; by default click's own, and PX for pixels.
        flags: names of the options, by field, such as `--lora`; by default the fields' own.
    """
    fields, metavars, flags = model.model_fields, metavars or {}, flags or {}
    options = [
        make_option(name, fields[name], metavars.get(name), flags.get(name))
        for name in (fields if names is None else names)
    ]

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def make_option(
    name: str, field: FieldInfo, metavar: str | None = None, flag: str | None = None
) -> Callable[[Any], Any]:
    """Returns the decorator that adds the option of one field.

    `size_px` becomes `--size PX`. A bool becomes a flag, a Literal a choice, a tuple or a mapping an option that can be
    repeated and has its name in the singular.

    Args:
        name: of the field, and of the option's argument of the command.
        field: its type, default and description.
        metavar: name of the value in the help.
        flag: name of the option; None derives it from the field's.
    """
    value_type = without_none(field.annotation)
    settings: dict[str, Any] = {"default": None, "help": describe(field)}
    option_name, unit = name.removesuffix(PIXELS), "PX" if name.endswith(PIXELS) else None
    if value_type is bool:
        settings["is_flag"] = True
    elif get_origin(value_type) is Literal:
        settings["type"] = click.Choice(get_args(value_type))
    elif is_repeated(field):
        option_name = option_name.removesuffix("s")
        settings |= {"multiple": True, "type": TEXT}
    else:
        settings["type"] = number_type(value_type, field)
    if metavar or unit:
        settings["metavar"] = metavar or unit
    return click.option(flag or f"--{option_name.replace('_', '-')}", name, **settings)


def number_type(value_type: type, field: FieldInfo) -> Whole | Number:
    """Returns the type of an option whose field is a number with bounds.

    Args:
        value_type: int or float.
        field: with `ge` and `le`; of a float also `gt` and `lt`.
    """
    names = ("ge", "gt", "le", "lt", "multiple_of")
    limits = {name: getattr(limit, name) for limit in field.metadata for name in names if hasattr(limit, name)}
    if value_type is int:
        return Whole(limits.get("ge"), limits.get("le"), limits.get("multiple_of", 1))
    least, most = limits.get("gt", limits.get("ge")), limits.get("lt", limits.get("le"))
    return Number(least, most, open_least="gt" in limits, open_most="lt" in limits)


def pop_given(model: type[BaseModel], options: dict[str, Any]) -> dict[str, Any]:
    """Remove the options of a model's fields from `options`; returns the values of those that were given.

    Args:
        model: the configuration's class.
        options: values by argument name, as click passes them.

    Raises:
        UsageError: the value of a mapping is not NAME or NAME=NUMBER.
    """
    given = {}
    for name, field in model.model_fields.items():
        value = options.pop(name, None)
        if value not in (None, ()):
            given[name] = parse_shares(name, value) if get_origin(field.annotation) is dict else value
    return given


def parse_shares(name: str, texts: Iterable[str]) -> dict[str, float]:
    """Returns texts such as ("text=0.7", "alt") as a mapping; a name without a number has the share 1.

    Args:
        name: of the field, for the message.
        texts: the values of a repeated option.

    Raises:
        UsageError: a share is not a number, or a name has two.
    """
    from sdcompress_engines.errors import UsageError

    shares: dict[str, float] = {}
    for text in texts:
        column, _, share = text.partition("=")
        try:
            number = float(share or 1)
        except ValueError as error:
            raise UsageError(
                f"--{name.removesuffix('s')} {text!r}", expected="COLUMN or COLUMN=SHARE, such as caption=0.7"
            ) from error
        if shares.setdefault(column, number) != number:
            raise UsageError(f"--{name.removesuffix('s')} {column} has two shares", expected="each column once")
    return shares


def describe(field: FieldInfo) -> str:
    """Returns the help text of a field's option: its description, how to repeat it, and its default."""
    text = field.description or ""
    if is_repeated(field):
        text = f"{text.removesuffix('.')}; repeat for more."
    default = field.get_default(call_default_factory=True)
    if default is None or default is False or default in ((), {}):
        return text
    return f"{text}  [default: {default}]"


def is_repeated(field: FieldInfo) -> bool:
    """Returns whether the field holds several values."""
    return get_origin(without_none(field.annotation)) in (tuple, dict)


def without_none(annotation: Any) -> Any:
    """Returns the type of an optional value: `int | None` gives int."""
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (each for each in get_args(annotation) if each is not NoneType)
    return annotation
