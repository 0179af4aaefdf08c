"""YAML: plain values within limits, and one line for everything else."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sdcompress_engines.errors import UsageError

from sdcompress.support.yaml_files import MOST_KIB, MOST_LEVELS, MOST_VALUES, parse_yaml, read_mapping, write_yaml

QUICK = settings(deadline=None, max_examples=300)
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["C"], include_characters="\n\t"), max_size=20)
VALUES = st.recursive(
    PLAIN | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.from_regex(r"\w{1,8}", fullmatch=True), inner),
    max_leaves=12,
)
PIECES = st.sampled_from(
    [
        *(
            "a",
            "- ",
            ": ",
            "\n",
            "  ",
            "\t",
            "[",
            "]",
            "{",
            "}",
            ",",
            "&x ",
            "*x",
            "<<: ",
            "!!",
            "? ",
            '"',
            "'",
            "|",
            ">",
        ),
        *("!!binary ", "!!set", "!!python/object/apply:os.system [echo]", "%YAML 1.1\n", "---\n", "...\n", "\\x", "0x"),
        *(
            '"',
            "'",
            "|",
            ">",
            "1e999",
            ".nan",
            "2020-01-01",
            "#",
            "yes",
            "~",
            "1_000",
            "12:30:45",
            "9" * 25,
            "\x00",
            "\ud800",
            "\x85",
        ),
    ]
)


def fault_of(text: bytes | str) -> str:
    with pytest.raises(UsageError) as caught:
        parse_yaml(text, "mine.yaml")
    line = str(caught.value)
    assert len(line) < 400
    assert "\n" not in line
    return line


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) for name in value) and all(map(is_plain, value.values()))
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


@QUICK
@given(st.lists(PIECES | TEXTS, max_size=30).map("".join) | st.text(max_size=60) | st.binary(max_size=60))
def test_any_text_is_plain_values_or_one_line(text: str | bytes) -> None:
    started = time.monotonic()
    value, line = None, "mine.yaml: is not YAML"
    try:
        value = parse_yaml(text, "mine.yaml")
    except UsageError as error:
        line = str(error)
    assert is_plain(value)
    assert line.startswith("mine.yaml: is not YAML")
    assert len(line) < 400
    assert time.monotonic() - started < 5


@settings(QUICK, max_examples=80)
@given(st.dictionaries(st.from_regex(r"\w{1,8}", fullmatch=True), VALUES, max_size=5))
def test_what_is_written_reads_back_equal(values: dict[str, Any]) -> None:
    assert parse_yaml(write_yaml(values)) == values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-1.5E+3", -1500.0),
        ("007", 7),
        ("0x1F", 31),
        ("0o17", 15),
        (str(2**63 - 1), 2**63 - 1),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("off", "off"),
        ("~", None),
        ("", None),
        ("2020-01-01", "2020-01-01"),
        ("12:30:45", "12:30:45"),
        ("1_000", "1_000"),
        ("inf", "inf"),
        ("=", "="),
        ("!!str 12", "12"),
        ("!!float 1", 1.0),
        ("\ufeffa: 1", {"a": 1}),
        ("1: 2", {"1": 2}),
        ("a: &x {b: 1}\nc: {<<: *x, d: 2}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
        ("a: &x {b: 1}\nc: {<<: [{b: 3}, *x], b: 2}", {"a": {"b": 1}, "c": {"b": 2}}),
    ],
)
def test_plain_values(text: str, value: Any) -> None:
    read = parse_yaml(text.encode())
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the name 'a' is there twice"),
        ("a: 1\n---\nb: 2", "line 2: a second document"),
        ("a:\n\tb: 1", "line 2: a tab; indent with spaces"),
        ("a: !!binary aGk=", "line 1: the tag tag:yaml.org,2002:binary"),
        ("a: !!set {b}", "the tag tag:yaml.org,2002:set"),
        ("a: !!timestamp 2020-01-01", "the tag tag:yaml.org,2002:timestamp"),
        ("!!python/object/apply:os.system [echo]", "the tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("!!int x", "'x' with the tag !!int"),
        ("a: .inf", "line 1: .inf is not a finite number"),
        ("1e999", "1e999 is not a finite number"),
        (str(2**63), "more than 64 bits"),
        ("9" * 100_000, "more than 64 bits"),
        ("&x [*x]", "*x stands inside what it stands for"),
        ("*x", "undefined alias"),
        ("{[1]: 2}", "a list or mapping as a name"),
        ("{<<: 1}", "<< takes a mapping"),
        ('"\\0"', "a control character"),
        ('"\\x1b[2J": 1', "not printable"),
        ("x" * 300 + ": 1", "too long"),
        ("a: \x00", "line 1: the character 0x0"),
        (b"a: \xff", "byte 3 is not UTF-8"),
        ("a: 1".encode("utf-16"), "byte 0 is not UTF-8"),
        ("[" * 100_000, f"more than {MOST_LEVELS} levels"),
        ("{a: " * 100_000, f"more than {MOST_LEVELS} levels"),
        ("- " * 100_000, f"more than {MOST_LEVELS} levels"),
        ("? " * 10_000, "line 1: "),
        ("[" + "1," * 100_000 + "]", f"more than {MOST_VALUES:,} values"),
        ("[nano" + "x" * 100_000, "line 1: "),
        ("@" * 100_000, "line 1: "),
    ],
    ids=range(29),
)
def test_everything_else_is_refused_with_its_line_at_once(text: str | bytes, fault: str) -> None:
    started = time.monotonic()
    assert fault in fault_of(text)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("join", ["[{}]", "{{a: {}}}", "{{<<: [{}]}}"])
def test_aliases_count_for_what_they_stand_for(join: str) -> None:
    lines = ["a0: &a0 {b: 1}"]
    for level in range(1, 12):
        inner = ", ".join([f"*a{level - 1}"] * (1 if "a:" in join else 9))
        lines.append(f"a{level}: &a{level} " + join.format(inner))
    if "a:" in join:
        lines.append("many: [" + ", ".join(["*a11"] * 2000) + "]")
    assert f"more than {MOST_VALUES:,} values" in fault_of("\n".join(lines))


def test_pyyamls_other_tags_run_nothing(tmp_path: Path) -> None:
    for tag in {*yaml.UnsafeLoader.yaml_constructors, "!custom"} - {None}:
        if str(tag).removeprefix("tag:yaml.org,2002:") not in ("null", "bool", "int", "float", "str", "seq", "map"):
            assert "only plain values" in fault_of(f"!<{tag}> x")


def test_a_file_has_a_size_and_a_kind(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("# " + "x" * 1024 * MOST_KIB)
    with pytest.raises(UsageError, match=f"at most {MOST_KIB} KiB"):
        read_mapping(path, "knobs")
    path.write_bytes(b"\xef\xbb\xbfsteps: 3\r\n")
    assert read_mapping(path, "knobs") == {"steps": 3}
    path.write_text("- steps")
    with pytest.raises(UsageError, match="is not a mapping of knobs"):
        read_mapping(path, "knobs")
    with pytest.raises(UsageError, match="a folder"):
        read_mapping(tmp_path, "knobs")


@pytest.mark.skipif(os.name != "posix", reason="named pipes")
def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UsageError, match="a named pipe"):
        read_mapping(tmp_path / "pipe.yaml", "knobs")
