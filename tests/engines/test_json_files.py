"""JSON that somebody else wrote is read within limits, and a fault in it is one line."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sdcompress_engines.errors import ArtifactError, ModelError
from sdcompress_engines.json_files import MOST_LEVELS, format_json, parse_json, read_json, read_json_object


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize("text", [nested(MOST_LEVELS + 1), nested(100_000), '{"a":' * 5000 + "1" + "}" * 5000])
def test_deep_nesting_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="nested too deep"):
        parse_json(text, "config.json")


def test_the_deepest_nesting_that_is_allowed_is_read() -> None:
    assert parse_json(nested(MOST_LEVELS))


@pytest.mark.parametrize("text", [b"", b"{", b"\xff{}", b"nul", b"1" * 5000, b'"\xed\xa0\x80"'])
def test_what_is_no_json_is_one_line(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match="is not JSON") as caught:
        read_json(tmp_path / "config.json", ModelError)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json_object(tmp_path / "config.json") == {"a": 1}


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(3 * 2**40)
    with pytest.raises(ArtifactError, match="at most 32 MiB"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("text", "kind"),
    [("[]", "a list"), ("1", "a number"), ('"a"', "a text"), ("null", "null"), ("true", "true or false")],
)
def test_another_value_than_an_object_is_named(tmp_path: Path, text: str, kind: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=f"holds {kind}"):
        read_json_object(tmp_path / "config.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ArtifactError, match="is a named pipe"):
        read_json(tmp_path / "config.json")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda v: st.lists(v) | st.dictionaries(st.text(), v),
    )
)
def test_what_is_written_is_json_of_numbers_that_are_finite(value: object) -> None:
    def refuse(name: str) -> None:
        pytest.fail(name)

    read = json.loads(format_json(value), parse_constant=refuse)
    expected = None if isinstance(value, float) and not math.isfinite(value) else value
    assert isinstance(value, list | dict) or read == expected
    assert format_json(value).isascii()
