"""Numbers, names and paths on the command line: each option has bounds, and refuses the rest with exit code 2."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdcompress.cli import cli
from sdcompress.cli._types import OPSET, SEED, SIZE_PX, Capability, FilePath, Number, Several, Shapes, Text, Whole
from sdcompress.export.onnx_file import OPSET as DEFAULT_OPSET

from .conftest import Cli, one_line

QUICK = settings(deadline=None, max_examples=100)
OUR_TYPES = (Whole, Number, Several, Text, FilePath, Shapes, Capability, click.Choice)
ODD_NUMBERS = [
    *("nan", "-nan", "inf", "-inf", "Infinity", "1e999", "-1e999", "1e-999x", "0x10", "", " ", "one", "-1", "--1"),
    *("9" * 30, "-" + "9" * 30, "9" * 5000, "1" + "0" * 400, "1.5.2", "1,2", "٣x", "\x1b[2J", "1e1e1"),
]


def parameters(command: click.Command = cli, names: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Parameter]]:
    """Yields every option and argument of every command, with the command's name."""
    for parameter in command.params:
        yield " ".join(names), parameter
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            subcommand = command.get_command(context, name)
            assert subcommand is not None
            yield from parameters(subcommand, (*names, name))


VALUES = [
    (name, parameter)
    for name, parameter in parameters()
    if not (isinstance(parameter, click.Option) and (parameter.is_flag or "--version" in parameter.opts))
]
NUMBERS = [(name, parameter) for name, parameter in VALUES if isinstance(parameter.type, Whole | Number)]


def test_every_option_and_argument_has_a_type_with_bounds() -> None:
    assert len(VALUES) > 180
    assert len(NUMBERS) > 60
    assert [(name, p.opts[0], p.type) for name, p in VALUES if not isinstance(p.type, OUR_TYPES)] == []
    limits = [(p.type.min, p.type.max) for _, p in NUMBERS if isinstance(p.type, Whole | Number)]
    assert all(math.isfinite(bound) for pair in limits for bound in pair)


@pytest.mark.parametrize("text", ODD_NUMBERS)
def test_no_number_option_takes_an_odd_number(text: str) -> None:
    for name, parameter in NUMBERS:
        try:
            value: Any = parameter.type.convert(text, parameter, None)
        except click.BadParameter:
            continue
        pytest.fail(f"{name} {parameter.opts[0]} takes {text[:20]!r} as {value}")


@QUICK
@given(st.text() | st.floats().map(str) | st.integers().map(str))
def test_a_number_is_within_its_bounds_or_refused(text: str) -> None:
    for kind in (SIZE_PX, SEED, Number(0, 100), Number(0, 1, open_least=True, open_most=True)):
        value = convert(kind, text)
        if value is not None:
            assert kind.min is not None
            assert kind.max is not None
            assert kind.min <= value <= kind.max
            assert value % getattr(kind, "step", 1) == 0 or isinstance(kind, Number)


@QUICK
@given(st.text())
def test_a_list_of_names_has_no_gaps_and_no_repetition(text: str) -> None:
    values = convert(Several(Text(1), "torch,ort"), text)
    if values is not None:
        assert values == tuple(part.strip() for part in text.split(","))
        assert len(set(values)) == len(values) > 0
        assert all(values)


@QUICK
@given(st.text(st.sampled_from("0129:-. ")))
def test_shapes_are_ordered_and_bounded(text: str) -> None:
    value = convert(Shapes("batch"), text)
    if value is not None:
        numbers = [int(part) for part in value.split(":")]
        assert numbers == sorted(numbers)
        assert len(numbers) in (1, 3)
        assert 0 < numbers[0] <= numbers[-1] <= 1024


def convert(kind: click.ParamType, text: str) -> Any:
    """Returns the value, or None where it is refused."""
    try:
        return kind.convert(text, None, None)
    except click.BadParameter:
        return None


def test_the_newest_opset_is_the_one_that_is_exported() -> None:
    assert OPSET.max == DEFAULT_OPSET


@pytest.mark.parametrize("kind", [FilePath(), Text(1, path=True), Text(1)])
@pytest.mark.parametrize("text", ["", "  ", "a\0b"])
def test_empty_names_and_names_with_nul_are_refused(kind: click.ParamType, text: str) -> None:
    assert convert(kind, text) is None


def test_the_home_folder_is_meant_behind_an_equals_sign_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert convert(FilePath(), "~/x") == tmp_path / "x"
    assert convert(Text(1, path=True), "~/x.safetensors:0.8") == str(tmp_path / "x.safetensors:0.8")
    assert convert(Text(), "~/x") == "~/x"  # a prompt


def test_bytes_that_are_no_unicode_are_a_path_but_no_prompt() -> None:
    name = os.fsdecode(b"caf\xe9")
    assert convert(FilePath(), name) == Path(name)
    assert convert(Text(1, path=True), name) == name
    assert convert(Text(), name) is None
    assert convert(Text(), "") == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "nano", "x", "--size", "0"),
        ("generate", "nano", "x", "--size", "-64"),
        ("generate", "nano", "x", "--size", "100"),
        ("generate", "nano", "x", "--seed", str(2**64)),
        ("generate", "nano", "x", "--guidance", "nan"),
        ("generate", "nano", "x", "--steps", "1e10"),
        ("generate", "", "x"),
        ("data", "generate", "nano", "--prompts", "p.txt", "-n", "0", "-o", "out"),
        ("data", "inspect", "nano", "--limit", "0"),
        ("data", "cache", "nano", "nano", "-o", ""),
        ("distill", "nano", "--data", "nano", "-o", "out", "--steps", str(10**10)),
        ("distill", "nano", "--data", "nano", "-o", "out", "--learning-rate", "inf"),
        ("engines", "prune", "--older-than", "nan"),
        ("export", "nano", "-o", "out", "--opset", "999"),
        ("export", "nano", "-o", "out", "--trt", "--batch", "4:2:1"),
        ("export", "nano", "-o", "out", "--trt", "--compute-capability", "8"),
        ("bench", "nano", "--backend", ""),
        ("bench", "nano", "--backend", ","),
        ("bench", "nano", "--backend", "torch,torch"),
        ("bench", "nano", "--size", "64,7"),
        ("bench", "nano", "--batch", "1,1"),
        ("doctor", "--minutes", "inf"),
    ],
    ids=" ".join,
)
def test_a_wrong_value_is_exit_code_2_with_clicks_usage_line(cli: Cli, arguments: tuple[str, ...]) -> None:
    code, out, err = cli(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("Usage: sdcompress ")
    assert one_line(err).startswith("sdcompress: Invalid value for ")
    assert len(err) < 1500
