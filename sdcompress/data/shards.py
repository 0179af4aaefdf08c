"""webdataset shards: tar files of pictures, captions and metadata."""

from __future__ import annotations

import math
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import DataError, UsageError, shorten
from sdcompress_engines.files import check_regular

from sdcompress.data.config import DataConfig
from sdcompress.data.records import (
    LONG_TEXT,
    MAX_TEXT_BYTES,
    PICTURE_SUFFIXES,
    Record,
    Source,
    choose_caption,
    decode_text,
    fingerprint_files,
    read_object,
)
from sdcompress.data.skipped import Skipped
from sdcompress.data.tar import MAX_MEMBER_BYTES, OVERSIZE, open_tar, read_tar

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
TEXTS = frozenset({"txt", "json"})
"""Extensions of captions and metadata."""
MAX_SHARDS = 250_000
"""Most files that brace lists may stand for; the largest public set, LAION-5B, has 231,349 shards."""
MAX_BRACES = 32
MAX_CHARACTERS = 2**26
"""Most characters of all these names together."""


class ShardSource(Source):
    """webdataset shards, as img2dataset writes them. Each shard is a unit.

    The members of one record have the same name but for the extension and follow each other. The caption is in `.txt`,
    or in `.json` under one of `CAPTION_COLUMNS`; the metadata is in `.json`.

    Args:
        name: for reports and manifests.
        paths: the shards, in order.
        config: which pictures are used, and which columns hold their captions.

    Raises:
        DataError: a shard is missing or no regular file.
    """

    def __init__(self, name: str, paths: list[Path], config: DataConfig) -> None:
        super().__init__(name, config)
        self.paths = self.inputs = paths
        for path in paths:
            try:
                check_regular(path, DataError)
            except OSError as error:
                raise DataError(f"cannot be read ({error.strerror})", where=path, expected="a shard") from error

    def count_units(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        return fingerprint_files(self.paths)

    def _read_all(self, number: int, skipped: Skipped) -> Iterator[Record]:
        path = self.paths[number]
        key, parts, faulty = "", dict[str, bytes](), set[str]()
        dotted, pictured = set[str](), set[str]()

        def limit(member: str) -> int | None:
            """Members of one name may be of any number: only the first picture, caption and metadata are read."""
            stem, extension = _split_name(member)
            if _is_name(stem) and f".{extension.rpartition('.')[2]}" in PICTURE_SUFFIXES:
                (dotted if "." in extension else pictured).add(stem)
            if extension in TEXTS:
                return MAX_TEXT_BYTES
            is_first = stem != key or _find_picture(parts) is None
            return MAX_MEMBER_BYTES if f".{extension}" in PICTURE_SUFFIXES and is_first else None

        try:
            with open_tar(path) as stream:
                for member, payload, fault in read_tar(stream, limit):
                    stem, extension = _split_name(member)
                    if payload is None:
                        too_long = fault == OVERSIZE and extension in TEXTS
                        skipped.add(LONG_TEXT if too_long else fault, f"{path.name}:{member}")
                        faulty.add(stem)
                        continue
                    if stem != key:
                        yield from self._join_parts(
                            f"{path.name}:{key}", parts, skipped, key in faulty or key in dotted
                        )
                        key, parts = stem, {}
                    parts[extension] = payload
        except EOFError:
            skipped.add("shard cut short", path.name)
            if _find_picture(parts) is None or not parts.keys() & TEXTS:
                return  # the shard ends within this record
        except (tarfile.TarError, OSError, zlib.error) as error:
            skipped.add(f"shard damaged ({type(error).__name__})", path.name)
            return
        yield from self._join_parts(f"{path.name}:{key}", parts, skipped, key in faulty or key in dotted)
        for stem in sorted(dotted - pictured):
            skipped.add("name of several dots", f"{path.name}:{stem}")

    def _join_parts(
        self, key: str, parts: dict[str, bytes], skipped: Skipped, is_counted: bool = False
    ) -> Iterator[Record]:
        """Yields the record of members with one name; nothing where there is no picture among them.

        Args:
            key: of the record.
            parts: extension without its dot → content.
            skipped: counts a caption without a picture, and one that is no text.
            is_counted: whether a faulty member of this name is counted already.
        """
        encoded = _find_picture(parts)
        if encoded is None:
            if "txt" in parts and not is_counted:
                skipped.add("caption without a picture", key)
            return
        meta = read_object(parts.get("json", b"{}"))
        if "txt" in parts:
            caption: Any = decode_text(parts["txt"])
            if caption is None:
                skipped.add("caption is no text", key)
                return
        else:
            caption = choose_caption(meta)
        yield from self._build_records(key, encoded, caption, meta, skipped)


def _split_name(member: str) -> tuple[str, str]:
    """Returns the name that the members of a record share, and the extension in lower case."""
    folder, slash, name = member.rpartition("/")
    stem, _, extension = name.partition(".")
    return folder + slash + stem, extension.lower()


def _is_name(stem: str) -> bool:
    """Returns whether members share more than a folder; `._a.png` is what macOS writes beside `a.png`."""
    return not stem.endswith("/") and stem != ""


def _find_picture(parts: Mapping[str, bytes]) -> bytes | None:
    return next((content for extension, content in parts.items() if f".{extension}" in PICTURE_SUFFIXES), None)


_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")


def expand_braces(pattern: str) -> list[str]:
    """Returns the names that a shell makes of `a{00..02}b` and `a{x,y}b`; other patterns are returned as they are.

    Raises:
        UsageError: there are more than `MAX_SHARDS` names, or more than `MAX_BRACES` lists.
    """
    names = [pattern]
    for _ in range(MAX_BRACES + 1):
        lists = [_find_lists(name) for name in names]
        counts = [math.prod(len(parts) for _, parts in found) for found in lists]  # lists in lists are not counted yet
        characters = sum(count * len(name) for count, name in zip(counts, names, strict=True))
        if sum(counts) > MAX_SHARDS or characters > MAX_CHARACTERS:
            break
        if not any(lists):
            return list(dict.fromkeys(names))
        names = [expanded for name, found in zip(names, lists, strict=True) for expanded in _expand_first(name, found)]
    raise UsageError(
        f"--data {shorten(repr(pattern), 120)} stands for too many files",
        expected=f"at most {MAX_SHARDS:,} shards, in at most {MAX_BRACES} brace lists",
        hint="the folder of the shards, or a glob",
    )


_Lists = list[tuple[re.Match[str], Sequence[str]]]


def _find_lists(name: str) -> _Lists:
    """Returns the brace lists of a name that have no lists in them, each with its parts, which are not made yet."""
    found: _Lists = []
    for match in _BRACES.finditer(name):
        if numbers := _RANGE.fullmatch(match[1]):
            found.append((match, _Numbers(numbers[1], numbers[2])))
        elif "," in match[1]:
            found.append((match, match[1].split(",")))
    return found


def _expand_first(name: str, lists: _Lists) -> Iterator[str]:
    if not lists:
        yield name
        return
    match, parts = lists[0]
    for part in parts:
        yield f"{name[: match.start()]}{part}{name[match.end() :]}"


class _Numbers(Sequence[str]):
    """The numbers from one to another, up or down, with as many digits as the first has.

    Args:
        first, last: decimal digits.
    """

    def __init__(self, first: str, last: str) -> None:
        step = 1 if int(first) <= int(last) else -1
        self.numbers, self.digits = range(int(first), int(last) + step, step), len(first)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        return str(self.numbers[place]).zfill(self.digits)
