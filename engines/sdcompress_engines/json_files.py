"""JSON that somebody else may have written: read with a limit of size and of depth."""

from __future__ import annotations

import json
import math
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import ArtifactError, SdCompressError, shorten
from .files import check_regular

MOST_MIB = 32
"""Largest JSON file that is read; the largest in use are tokenizers, of about 3 MiB."""
MOST_LINE_BYTES = 2**20
"""Longest line of a file of JSON lines; the longest in use are rows of metadata, of a few thousand bytes."""
MOST_LEVELS = 32
"""Deepest nesting; the deepest in use are the results of a benchmark, with 9."""


def read_json(path: Path, error: type[SdCompressError] = ArtifactError, *, most_mib: int = MOST_MIB) -> Any:
    """Returns the content of a JSON file.

    Args:
        path: of the file.
        error: the class to raise.
        most_mib: limit of its size.

    Raises:
        SdCompressError: of the class `error`: it is no regular file, too large, no UTF-8, no JSON, or nested too deep.
        OSError: there is nothing, or it may not be read.
    """
    check_regular(path, error)
    size = path.stat().st_size
    if size > most_mib * 2**20:
        raise error(f"has {size / 2**20:,.0f} MiB", where=path, expected=f"a JSON file of at most {most_mib} MiB")
    return parse_json(path.read_bytes(), path, error)


def read_json_object(
    path: Path, error: type[SdCompressError] = ArtifactError, *, most_mib: int = MOST_MIB
) -> dict[str, Any]:
    """Returns the content of a JSON file that holds one object.

    Args:
        path, error, most_mib: see `read_json`.

    Raises:
        SdCompressError: of the class `error`: as `read_json`, or the file holds another kind of value.
        OSError: as `read_json`.
    """
    content = read_json(path, error, most_mib=most_mib)
    if not isinstance(content, dict):
        raise error(f"holds {_name_type(content)}", where=path, expected='a JSON object: {"NAME": VALUE, ...}')
    return content


def read_json_lines(
    path: Path, error: type[SdCompressError] = ArtifactError, *, most_bytes: int = MOST_LINE_BYTES
) -> Iterator[Any]:
    """Yields the value of each line of a file that is not blank.

    Args:
        path: of the file.
        error: the class to raise.
        most_bytes: limit of a line.

    Raises:
        SdCompressError: of the class `error`: it is no regular file, or a line is too long, no JSON or too deep.
        OSError: there is nothing, or it may not be read.
    """
    check_regular(path, error)
    with path.open("rb") as file:
        number = 0
        while line := file.readline(most_bytes + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > most_bytes:
                raise error(f"has over {most_bytes:,} bytes", where=where, expected="a line of JSON")
            if line.strip():
                yield parse_json(line.rstrip(b"\r\n"), where, error)


def parse_json(text: bytes | str, where: str | Path | None = None, error: type[SdCompressError] = ArtifactError) -> Any:
    """Returns the value of a JSON text, which may begin with a byte-order mark.

    Args:
        text: UTF-8 where it is bytes.
        where: the file or key that holds it, for the message.
        error: the class to raise.

    Raises:
        SdCompressError: of the class `error`: it is no UTF-8, no JSON, or nested too deep.
    """
    try:
        content = json.loads(text.removeprefix(BOM_UTF8).decode("utf-8") if isinstance(text, bytes) else text)
    except RecursionError as problem:
        raise _too_deep(where, error) from problem
    except ValueError as problem:  # also UnicodeDecodeError, and numbers of thousands of digits
        raise error(f"is not JSON ({shorten(problem, 120)})", where=where) from problem
    if _is_too_deep(content):
        raise _too_deep(where, error)
    return content


def _too_deep(where: str | Path | None, error: type[SdCompressError]) -> SdCompressError:
    return error("is nested too deep", where=where, expected=f"JSON of at most {MOST_LEVELS} levels")


def _is_too_deep(content: Any) -> bool:
    level = [content]
    for _ in range(MOST_LEVELS):
        level = [child for value in level for child in _children(value) if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _name_type(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def format_json(value: Any, indent: int | None = None) -> str:
    """Returns a value as JSON in ASCII; a number that is not finite, which JSON does not have, becomes null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
