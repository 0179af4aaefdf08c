"""webdataset shards: tar files of pictures, captions and metadata."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdcompress.data.config import DataConfig
from sdcompress.data.records import (
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


class ShardSource(Source):
    """webdataset shards, as img2dataset writes them. Each shard is a unit.

    The members of one record have the same name but for the extension and follow each other. The caption is in `.txt`,
    or in `.json` under one of `CAPTION_COLUMNS`; the metadata is in `.json`.

    Args:
        name: for reports and manifests.
        paths: the shards, in order.
        config: which pictures are used, and which columns hold their captions.
    """

    def __init__(self, name: str, paths: list[Path], config: DataConfig) -> None:
        super().__init__(name, config)
        self.paths = self.inputs = paths

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
                    parts[extension.lower()] = payload
        except EOFError:
            skipped.add("shard cut short", path.name)
            if not any(f".{e}" in PICTURE_SUFFIXES for e in parts) or not parts.keys() & {"txt", "json"}:
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
        encoded = next((parts[e] for e in parts if f".{e}" in PICTURE_SUFFIXES), None)
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


def expand_braces(pattern: str) -> list[str]:
    """Returns the names that a shell makes of `a{00..02}b` and `a{x,y}b`; other patterns are returned as they are."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    if match[3] is not None:
        middles = match[3].split(",")
    else:
        first, last = int(match[1]), int(match[2])
        middles = [str(n).zfill(len(match[1])) for n in range(first, last + 1)]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for middle in middles for name in expand_braces(before + middle + after)]
