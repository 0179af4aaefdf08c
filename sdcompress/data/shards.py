"""webdataset shards: tar files of pictures, captions and metadata."""

from __future__ import annotations

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
from sdcompress.data.tar import open_tar, read_tar

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
        try:
            with open_tar(path) as stream:
                for member, payload, fault in read_tar(stream):
                    folder, slash, name = member.rpartition("/")
                    stem, _, extension = name.partition(".")
                    stem = folder + slash + stem
                    if payload is None:
                        skipped.add(fault, f"{path.name}:{member}")
                        faulty.add(stem)
                        continue
                    if stem != key:
                        yield from self._join_parts(f"{path.name}:{key}", parts, skipped, key in faulty)
                        key, parts = stem, {}
                    extension = extension.lower()
                    if extension in TEXTS and len(payload) > MAX_TEXT_BYTES:
                        skipped.add(LONG_TEXT, f"{path.name}:{member}")
                        faulty.add(stem)
                    elif extension in TEXTS or (f".{extension}" in PICTURE_SUFFIXES and _find_picture(parts) is None):
                        parts[extension] = payload  # and nothing else: members of one name may be of any number
        except EOFError:
            skipped.add("shard cut short", path.name)
            if _find_picture(parts) is None or not parts.keys() & TEXTS:
                return  # the shard ends within this record
        except (tarfile.TarError, OSError, zlib.error) as error:
            skipped.add(f"shard damaged ({type(error).__name__})", path.name)
            return
        yield from self._join_parts(f"{path.name}:{key}", parts, skipped, key in faulty)

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
        lists = [_find_list(name) for name in names]
        if not any(lists):
            return list(dict.fromkeys(names))
        counts = [len(found[1]) if found else 1 for found in lists]
        characters = sum(count * len(name) for count, name in zip(counts, names, strict=True))
        if sum(counts) > MAX_SHARDS or characters > MAX_CHARACTERS:
            break
        names = [
            f"{name[: found[0].start()]}{middle}{name[found[0].end() :]}" if found else name
            for name, found in zip(names, lists, strict=True)
            for middle in (found[1] if found else ("",))
        ]
    raise UsageError(
        f"--data {shorten(repr(pattern), 120)} stands for too many files",
        expected=f"at most {MAX_SHARDS:,} shards, in at most {MAX_BRACES} brace lists",
        hint="the folder of the shards, or a glob",
    )


def _find_list(name: str) -> tuple[re.Match[str], Sequence[str]] | None:
    """Returns the first brace list of a name and its parts, which are counted before they are made."""
    for match in _BRACES.finditer(name):
        if numbers := _RANGE.fullmatch(match[1]):
            return match, _Numbers(numbers[1], numbers[2])
        if "," in match[1]:
            return match, match[1].split(",")
    return None


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
