"""Captioned pictures from an image folder or webdataset shards, read one after another."""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from sdcompress_engines.errors import DataError, UsageError

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
SHARDS = (".tar", ".tar.gz", ".tgz")
MAX_PIXELS = 64_000_000
MAX_BROKEN_SHARE = 0.05


@dataclass(frozen=True)
class Record:
    """One picture, still encoded, with its caption and whatever metadata came with it."""

    key: str
    encoded: bytes = field(repr=False)
    caption: str
    meta: dict[str, Any] = field(default_factory=dict)

    def picture(self) -> Image.Image:
        """The decoded picture, RGB, transparency on white.

        Raises:
            DataError: the bytes are no picture, or one of more than `MAX_PIXELS`.
        """
        try:
            picture: Image.Image = Image.open(io.BytesIO(self.encoded))
            if picture.width * picture.height > MAX_PIXELS:
                raise DataError(f"has {picture.width} x {picture.height} pixels", where=self.key, expected=f"at most {MAX_PIXELS:,}")
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                canvas = Image.new("RGBA", picture.size, "white")
                canvas.alpha_composite(picture.convert("RGBA"))
                picture = canvas
            return picture.convert("RGB")
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"is no readable picture ({type(error).__name__})", where=self.key) from error


@dataclass
class Skipped:
    """What was left out of a pass over a source, and why; the first few of each are named."""

    read: int = 0
    reasons: dict[str, list[str]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return sum(len(keys) for keys in self.reasons.values())

    def add(self, reason: str, key: str) -> None:
        self.reasons.setdefault(reason, []).append(key)

    def check(self, where: object, limit: float = MAX_BROKEN_SHARE) -> None:
        """Stop where too much was left out, or everything.

        Raises:
            DataError: nothing usable was found, or more than `limit` of it was skipped.
        """
        examples = "; ".join(f"{reason}: {len(keys)} ({', '.join(keys[:3])})" for reason, keys in self.reasons.items())
        if self.read == 0:
            raise DataError(f"holds no captioned picture{f' ({examples})' if examples else ''}", where=str(where), expected="pictures with captions: a .txt beside each, metadata.jsonl / metadata.csv, or webdataset shards")
        if self.count > limit * (self.read + self.count):
            raise DataError(f"{self.count} of {self.read + self.count} pictures cannot be used: {examples}", where=str(where), expected=f"at most {limit:.0%}")


class Source:
    """An iterable of `Record`; `skipped` tells what the latest pass left out."""

    def __init__(self, name: str, paths: list[Path]) -> None:
        self.name, self.paths, self.skipped = name, paths, Skipped()

    def fingerprint(self) -> str:
        """Of the names and sizes of all its files: tells without reading them that the data is no longer the same."""
        files = sorted(f for path in self.paths for f in (path.rglob("*") if path.is_dir() else [path]) if f.is_file())
        return hashlib.sha256("\n".join(f"{f.name} {f.stat().st_size}" for f in files).encode()).hexdigest()

    def __iter__(self) -> Iterator[Record]:
        self.skipped = Skipped()
        for record in self._records():
            if not record.caption.strip():
                self.skipped.add("no caption", record.key)
                continue
            self.skipped.read += 1
            yield record

    def _records(self) -> Iterator[Record]:
        raise NotImplementedError


class FolderSource(Source):
    """Pictures of a folder; captions in `metadata.jsonl`, `metadata.csv` (columns `file_name`, `text` or `caption`) or `.txt`."""

    def _records(self) -> Iterator[Record]:
        (root,) = self.paths
        table = self._table(root)
        for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in PICTURES):
            key = path.relative_to(root).as_posix()
            meta = table.get(key, {})
            beside = path.with_suffix(".txt")
            caption = meta.get("text") or meta.get("caption") or (beside.read_text(errors="replace") if beside.is_file() else "")
            yield Record(key, path.read_bytes(), str(caption).strip(), meta)

    @staticmethod
    def _table(root: Path) -> dict[str, dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        if (path := root / "metadata.jsonl").is_file():
            for number, line in enumerate(path.read_text().splitlines(), 1):
                try:
                    rows += [json.loads(line)] if line.strip() else []
                except ValueError as error:
                    raise DataError(f"line {number} is not JSON ({error})", where=path) from error
        elif (path := root / "metadata.csv").is_file():
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        return {str(row["file_name"]): row for row in rows if "file_name" in row}


class ShardSource(Source):
    """Webdataset shards, as img2dataset writes them: members of one key follow each other, `.json` may carry a caption too."""

    def _records(self) -> Iterator[Record]:
        for path in self.paths:
            yield from self._shard(path)

    def _shard(self, path: Path) -> Iterator[Record]:
        key, parts = "", dict[str, bytes]()
        try:
            with tarfile.open(path, "r|*") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    stem, _, extension = member.name.rpartition("/")[2].partition(".")
                    if stem != key:
                        yield from self._record(f"{path.name}:{key}", parts)
                        key, parts = stem, {}
                    file = tar.extractfile(member)
                    parts[extension.lower()] = file.read() if file else b""
        except (tarfile.TarError, EOFError, OSError) as error:
            self.skipped.add(f"shard cut short ({type(error).__name__})", path.name)
        yield from self._record(f"{path.name}:{key}", parts)

    def _record(self, key: str, parts: dict[str, bytes]) -> Iterator[Record]:
        encoded = next((parts[e] for e in parts if f".{e}" in PICTURES), None)
        if encoded is None:
            return
        try:
            meta = json.loads(parts.get("json", b"{}"))
        except ValueError:
            meta = {}
        meta = meta if isinstance(meta, dict) else {}
        text = parts["txt"].decode(errors="replace") if "txt" in parts else meta.get("caption") or ""
        yield Record(key, encoded, str(text).strip(), meta)


def open_source(data: str | Path | Iterable[Path]) -> Source:
    """A source for a folder of pictures, a folder of shards, a glob of shards, or a list of shard files.

    Raises:
        UsageError: nothing is there. DataError: a folder with neither pictures nor shards.
    """
    if not isinstance(data, str | Path):
        return ShardSource("shards", list(data))
    if str(data) == "nano":
        from sdcompress import nano

        return ShardSource("nano", nano.shards("train"))
    path = Path(data).expanduser()
    if path.is_dir():
        shards = sorted(p for p in path.iterdir() if p.name.endswith(SHARDS))
        if shards:
            return ShardSource(path.name, shards)
        if not any(p.suffix.lower() in PICTURES for p in path.rglob("*")):
            raise DataError("holds no picture and no shard", where=path, expected="pictures (.jpg, .png, .webp) or webdataset shards (.tar)")
        return FolderSource(path.name, [path])
    files = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(str(path)))
    if not files:
        raise UsageError("does not exist", where=str(data), expected="a folder of captioned pictures, webdataset shards (a folder or a glob), or nano")
    if not all(p.name.endswith(SHARDS) for p in files):
        raise DataError("is no webdataset shard", where=files[0], expected="a .tar file, or a folder")
    return ShardSource(path.name, files)
