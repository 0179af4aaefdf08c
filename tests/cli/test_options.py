"""Options made from the fields of a configuration."""

from __future__ import annotations

from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner
from pydantic import BaseModel, Field
from sdcompress_engines.errors import UsageError

from sdcompress.cli._options import field_options, pop_given
from sdcompress.cli._training import TRAINING_FIELDS
from sdcompress.data.config import DataConfig
from sdcompress.train.config import KINDS


class Settings(BaseModel):
    size_px: int | None = Field(None, ge=8, description="Side of a picture.")
    rate: float = Field(0.5, gt=0, description="A rate.")
    flip: bool = Field(False, description="Mirror.")
    crop: Literal["center", "random"] = Field("center", description="Where.")
    captions: dict[str, float] = Field(default_factory=dict, description="Columns.")
    prompts: tuple[str, ...] = Field((), description="Texts.")


def parse(*arguments: str) -> dict[str, Any]:
    """Returns the values that a command with the options of `Settings` passes on."""
    given: dict[str, Any] = {}

    @click.command()
    @field_options(Settings, metavars={"rate": "RATE"})
    def command(**options: Any) -> None:
        given.update(pop_given(Settings, options))
        assert options == {}

    result = CliRunner().invoke(command, list(arguments), standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    given["output"] = result.output
    return given


def test_only_what_is_given_overrides() -> None:
    assert parse() == {"output": ""}


def test_values_have_the_types_of_their_fields() -> None:
    given = parse("--size", "64", "--rate", "0.25", "--flip", "--crop", "random", "--prompt", "a", "--prompt", "b")
    assert given == {
        "size_px": 64,
        "rate": 0.25,
        "flip": True,
        "crop": "random",
        "prompts": ("a", "b"),
        "output": "",
    }
    assert parse("--caption", "text=0.7", "--caption", "alt")["captions"] == {"text": 0.7, "alt": 1.0}


@pytest.mark.parametrize(
    "arguments", [("--size", "wide"), ("--crop", "left"), ("--flip", "yes"), ("--captions", "text"), ("--size-px", "8")]
)
def test_values_of_another_type_and_other_names_are_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(click.UsageError):
        parse(*arguments)


def test_a_share_that_is_no_number_is_refused() -> None:
    with pytest.raises(UsageError, match="--caption 'text=most'"):
        parse("--caption", "text=most")
    with pytest.raises(UsageError, match="--caption text has two shares"):
        parse("--caption", "text", "--caption", "text=0.5")


def test_the_help_has_description_default_and_unit() -> None:
    text = " ".join(parse("--help")["output"].split())
    assert "--size PX Side of a picture. [x>=8] --rate RATE A rate. [default: 0.5] [x>0]" in text
    assert "--flip Mirror. --crop [center|random] Where. [default: center]" in text
    assert "--caption TEXT Columns; repeat for more. --prompt TEXT Texts; repeat for more." in text


def test_every_field_with_an_option_has_a_description() -> None:
    fields = [field for name, field in DataConfig.model_fields.items()]
    fields += [
        config.model_fields[name]
        for config in KINDS.values()
        for name in TRAINING_FIELDS
        if name in config.model_fields
    ]
    assert len(fields) > 30
    assert all(field.description for field in fields)
