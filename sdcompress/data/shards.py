"""webdataset shards: tar files of pictures, captions and metadata."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdcompress.data.config import DataConfig
from sdcompress.data.records import PICTURES, Record, Skipped, Source, _files_fingerprint, _text, read_object
from sdcompress.data.tar import open_tar, read_tar

SHARDS = (".tar", ".tar.gz", ".tgz")


class ShardSource(Source):
    """Webdataset shards, as img2dataset writes them: members of one key follow each other, `.json` may carry a caption
    too.
    """

    def __init__(self, name: str, paths: list[Path], config: DataConfig) -> None:
        super().__init__(name, config)
        self.paths = paths

    def units(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        return _files_fingerprint(self.paths)

    def _unit(self, number: int, skipped: Skipped) -> Iterator[Record]:
        path = self.paths[number]
        key, parts = "", dict[str, bytes]()
        try:
            with open_tar(path) as stream:
                for member, payload, fault in read_tar(stream):
                    if payload is None:
                        skipped.add(fault, f"{path.name}:{member}")
                        continue
                    folder, slash, name = member.rpartition("/")
                    stem, _, extension = name.partition(".")
                    if folder + slash + stem != key:
                        yield from self._group(f"{path.name}:{key}", parts, skipped)
                        key, parts = folder + slash + stem, {}
                    parts[extension.lower()] = payload
        except EOFError:
            skipped.add("shard cut short", path.name)
            if not any(f".{e}" in PICTURES for e in parts) or not parts.keys() & {"txt", "json"}:
                return  # the record the cut went through
        except (tarfile.TarError, OSError, zlib.error) as error:
            skipped.add(f"shard damaged ({type(error).__name__})", path.name)
            return
        yield from self._group(f"{path.name}:{key}", parts, skipped)

    def _group(self, key: str, parts: dict[str, bytes], skipped: Skipped) -> Iterator[Record]:
        encoded = next((parts[e] for e in parts if f".{e}" in PICTURES), None)
        if encoded is None:
            if "txt" in parts:
                skipped.add("caption without a picture", key)
            return
        meta = read_object(parts.get("json", b"{}"))
        if "txt" in parts:
            caption: Any = _text(parts["txt"])
            if caption is None:
                skipped.add("caption is no text", key)
                return
        else:
            caption = next((meta[column] for column in ("caption", "text", "prompt") if meta.get(column)), None)
        yield from self._record(key, encoded, caption, meta, skipped)


def expand_braces(pattern: str) -> list[str]:
    """`a{00..02}b` and `a{x,y}b` written out, as a shell does it; anything else as it is."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    if match[3] is not None:
        middles = match[3].split(",")
    else:
        first, last = int(match[1]), int(match[2])
        middles = [str(n).zfill(len(match[1])) for n in range(first, last + 1)]
    return [
        made for middle in middles for made in expand_braces(pattern[: match.start()] + middle + pattern[match.end() :])
    ]
