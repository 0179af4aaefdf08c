"""Captioned pictures from an image folder, webdataset shards or a hub dataset, in pieces that can be read apart.

What is read is not trusted: nothing is ever unpacked to disk, sizes are checked before bytes are read, and what cannot
be used is counted with its reason.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import re
import tarfile
import threading
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError
from sdcompress_engines.errors import BackendMissing, DataError, UsageError
from sdcompress_engines.manifest import by_parts

from .config import DataConfig
from .filters import parse_conditions
from .tar import open_tar, read_tar

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "GIF",
)  # what files of those names turn out to be; never EPS, which runs a program
SHARDS = (".tar", ".tar.gz", ".tgz")
CAPTION_COLUMNS = ("text", "caption", "prompt")
HUB = "hub:"
MAX_PIXELS = 64_000_000
MAX_BROKEN_SHARE = 0.05
UNIT_PICTURES = 1000
MAX_FIELDS = 40
_BROKEN = (
    UnidentifiedImageError,
    OSError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
_WARNINGS = threading.Lock()


@dataclass(frozen=True)
class Record:
    """One picture, still encoded, with its captions and whatever metadata came with it.

    Attributes:
        caption: the first of `captions`.
        captions: each with the share of the time it is drawn; the shares add up to 1.
    """

    key: str
    encoded: bytes = field(repr=False)
    caption: str
    meta: dict[str, Any] = field(default_factory=dict)
    captions: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if not self.captions:
            object.__setattr__(self, "captions", ((self.caption, 1.0),))

    def size(self) -> tuple[int, int]:
        """Width and height, from the file's header.

        Raises:
            DataError: the bytes are no picture.
        """
        try:
            return self._opened().size
        except _BROKEN as error:
            raise DataError(f"is no readable picture ({type(error).__name__})", where=self.key) from error

    def picture(self) -> Image.Image:
        """The decoded picture, upright, RGB, transparency on white.

        Raises:
            DataError: the bytes are no picture, or one of more than `MAX_PIXELS`.
        """
        try:
            picture = self._opened()
            if picture.width * picture.height > MAX_PIXELS:
                raise DataError(
                    f"has {picture.width} x {picture.height} pixels", where=self.key, expected=f"at most {MAX_PIXELS:,}"
                )
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I;16"):
                picture = picture.point(lambda value: value / 256).convert("L")
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                canvas = Image.new("RGBA", picture.size, "white")
                canvas.alpha_composite(picture.convert("RGBA"))
                picture = canvas
            return picture.convert("RGB")
        except _BROKEN as error:
            raise DataError(f"is no readable picture ({type(error).__name__})", where=self.key) from error

    def _opened(self) -> Image.Image:
        # Pillow's warning about many pixels becomes an error here; filters of warnings belong to the process, hence the
        # lock.
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(self.encoded), formats=FORMATS)


@dataclass
class Skipped:
    """What a pass over a source left out.

    Attributes:
        read: usable pictures.
        reasons: why a picture could not be used → the keys of those.
        filtered: which condition left pictures out → how many; nothing is wrong with them.
        fields: names of the metadata that pictures have, where a condition asked for one they have not.
    """

    read: int = 0
    reasons: dict[str, list[str]] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    fields: set[str] = field(default_factory=set)

    @property
    def count(self) -> int:
        """Pictures that could not be used."""
        return sum(len(keys) for keys in self.reasons.values())

    def add(self, reason: str, key: str) -> None:
        self.reasons.setdefault(reason, []).append(key)

    def merge(self, other: Skipped) -> None:
        self.read += other.read
        for reason, keys in other.reasons.items():
            self.reasons.setdefault(reason, []).extend(keys)
        for reason, count in other.filtered.items():
            self.filtered[reason] = self.filtered.get(reason, 0) + count
        self.fields |= other.fields

    def check(self, where: object, limit: float = MAX_BROKEN_SHARE) -> None:
        """Stop where too much was left out, or everything.

        Raises:
            DataError: nothing usable was found, or more than `limit` of it could not be used.
        """
        examples = "; ".join(f"{reason}: {len(keys)} ({', '.join(keys[:3])})" for reason, keys in self.reasons.items())
        if self.read == 0 and self.filtered:
            told = "; ".join(f"{reason}: {count}" for reason, count in self.filtered.items())
            raise DataError(
                f"has no picture left after filtering ({told})",
                where=str(where),
                hint=(
                    f"other conditions; the fields are {', '.join(sorted(self.fields))}"
                    if self.fields
                    else "weaker conditions"
                ),
            )
        if self.read == 0:
            raise DataError(
                f"holds no captioned picture{f' ({examples})' if examples else ''}",
                where=str(where),
                expected=(
                    "pictures with captions: a .txt beside each, metadata.jsonl / metadata.csv, or webdataset shards"
                ),
            )
        if self.count > limit * (self.read + self.count):
            raise DataError(
                f"{self.count} of {self.read + self.count} pictures cannot be used: {examples}",
                where=str(where),
                expected=f"at most {limit:.0%}",
                hint="--max-unusable SHARE, if that is fine",
            )


class Source:
    """Captioned pictures in units that can be read in any order, by any process."""

    def __init__(self, name: str, config: DataConfig) -> None:
        self.name, self.config, self.skipped = name, config, Skipped()
        self.conditions = parse_conditions(config.where)

    def units(self) -> int:
        """How many pieces there are."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Tells without reading the data that it is no longer the same."""
        raise NotImplementedError

    def _unit(self, number: int, skipped: Skipped) -> Iterator[Record]:
        """Every picture of a piece with its caption, or an empty one."""
        raise NotImplementedError

    def unit(self, number: int, skipped: Skipped) -> Iterator[Record]:
        """The usable records of piece `number`, always in the same order; what is left out goes to `skipped`."""
        for record in self._unit(number, skipped):
            if not record.caption.strip():
                skipped.add("no caption", record.key)
                continue
            reason = self._filtered(record, skipped)
            if reason:
                skipped.filtered[reason] = skipped.filtered.get(reason, 0) + 1
                continue
            skipped.read += 1
            yield record

    def _filtered(self, record: Record, skipped: Skipped) -> str | None:
        for condition in self.conditions:
            holds = condition.holds(record.meta)
            if holds is None:
                if len(skipped.fields) < MAX_FIELDS:
                    skipped.fields |= record.meta.keys()
                return f"no number in {condition.field!r}"
            if not holds:
                return f"not {condition.text}"
        if self.config.min_size_px or self.config.max_aspect:
            try:
                width, height = record.size()
            except DataError:
                return None  # told, and counted, when it is decoded
            if min(width, height) < self.config.min_size_px:
                return f"smaller than {self.config.min_size_px} px"
            if self.config.max_aspect and max(width, height) > self.config.max_aspect * min(width, height):
                return f"aspect over {self.config.max_aspect:g}"
        return None

    def _record(
        self, key: str, encoded: bytes, caption: Any, meta: dict[str, Any], skipped: Skipped
    ) -> Iterator[Record]:
        """One record, its captions chosen by the config's columns if it names any."""
        found = (
            [(meta.get(column), share) for column, share in self.config.captions.items() if meta.get(column)]
            if self.config.captions
            else [(caption, 1.0)]
        )
        if any(not is_text(text) for text, _ in found if text is not None):
            skipped.add("caption is no text", key)
            return
        texts = [
            (str(text).strip(), share) for text, share in found if text is not None and str(text).strip() and share > 0
        ]
        total = sum(share for _, share in texts)
        captions = tuple((text, share / total) for text, share in texts)
        yield Record(key, encoded, captions[0][0] if captions else "", meta, captions)

    def __iter__(self) -> Iterator[Record]:
        self.skipped = Skipped()
        for number in range(self.units()):
            yield from self.unit(number, self.skipped)


def _files_fingerprint(files: Iterable[Path]) -> str:
    return hashlib.sha256(
        "\n".join(f"{f.name} {f.stat().st_size}" for f in sorted(files, key=by_parts)).encode()
    ).hexdigest()


def is_text(value: object) -> bool:
    """Whether a value is text that can be written: JSON lets half a surrogate pair through."""
    try:
        return isinstance(value, str) and bool(value.encode() or True)
    except UnicodeEncodeError:
        return False


def read_object(payload: bytes | str) -> dict[str, Any]:
    """A JSON object; an empty one where the text is anything else."""
    try:
        content = json.loads(payload)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _text(payload: bytes) -> str | None:
    """UTF-8 text, None where it is not."""
    try:
        return payload.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


class FolderSource(Source):
    """Pictures of a folder; captions in `metadata.jsonl`, `metadata.csv` (columns `file_name` and `text`, `caption` or
    `prompt`), or in
    `.txt` or `.json` beside each picture."""

    def __init__(self, name: str, root: Path, config: DataConfig) -> None:
        super().__init__(name, config)
        self.root = root

    @cached_property
    def _pictures(self) -> list[Path]:
        found = (p for p in self.root.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
        return sorted(found, key=by_parts)

    @cached_property
    def _table(self) -> dict[str, dict[str, Any]]:
        rows: list[Any] = []
        if (path := self.root / "metadata.jsonl").is_file():
            for number, line in enumerate(path.read_text(errors="replace", encoding="utf-8-sig").split("\n"), 1):
                try:
                    rows += [json.loads(line)] if line.strip() else []
                except (ValueError, RecursionError) as error:
                    raise DataError(f"line {number} is not JSON ({error})", where=path) from error
        elif (path := self.root / "metadata.csv").is_file():
            with path.open(newline="", errors="replace", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
        # A table that was written on Windows may have backslashes.
        return {
            str(row["file_name"]).replace("\\", "/"): row
            for row in rows
            if isinstance(row, dict) and "file_name" in row
        }

    def units(self) -> int:
        return -(-len(self._pictures) // UNIT_PICTURES)

    def fingerprint(self) -> str:
        return _files_fingerprint(f for f in self.root.rglob("*") if f.is_file())

    def _unit(self, number: int, skipped: Skipped) -> Iterator[Record]:
        for path in self._pictures[number * UNIT_PICTURES : (number + 1) * UNIT_PICTURES]:
            key = path.relative_to(self.root).as_posix()
            meta = self._table.get(key, {})
            if (beside := path.with_suffix(".json")).is_file():
                meta = read_object(beside.read_bytes()) | meta
            caption = next((meta[column] for column in CAPTION_COLUMNS if meta.get(column)), None)
            if caption is None and (beside := path.with_suffix(".txt")).is_file():
                caption = _text(beside.read_bytes())
                if caption is None:
                    skipped.add("caption is no text", key)
                    continue
            yield from self._record(key, path.read_bytes(), caption, meta, skipped)


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


class HubSource(Source):
    """A dataset of the hub, or a local folder of Parquet files, streamed by `datasets`."""

    def __init__(self, name: str, config: DataConfig) -> None:
        super().__init__(name, config)
        try:
            import datasets
        except ImportError as error:
            raise BackendMissing(
                "a hub dataset is read by the package datasets, which is not installed",
                where=f"{HUB}{name}",
                hint="pip install datasets",
            ) from error
        repository, _, split = name.partition(":")
        repository, _, revision = repository.partition("@")
        try:
            stream = datasets.load_dataset(
                repository, split=split or "train", revision=revision or None, streaming=True
            )
        except Exception as error:
            told = (str(error).splitlines() or [""])[0]
            raise DataError(
                f"is no dataset the hub gives ({type(error).__name__}: {told})",
                where=f"{HUB}{name}",
                expected="hub:owner/name[@revision][:split]",
            ) from error
        images = [column for column, kind in (stream.features or {}).items() if isinstance(kind, datasets.Image)]
        if not images:
            raise DataError(
                "has no picture column",
                where=f"{HUB}{name}",
                expected=f"one among {', '.join(stream.features or ()) or 'its columns'}",
            )
        self.column = images[0]
        self.stream = stream.cast_column(self.column, datasets.Image(decode=False))

    def units(self) -> int:
        return int(self.stream.num_shards)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.name} {self.units()} {self.stream.info.dataset_size}".encode()).hexdigest()

    def _unit(self, number: int, skipped: Skipped) -> Iterator[Record]:
        for place, row in enumerate(self.stream.shard(self.units(), number)):
            picture = row.pop(self.column) or {}
            encoded = picture.get("bytes") or self._fetched(str(picture.get("path") or ""))
            caption = next((row[column] for column in CAPTION_COLUMNS if row.get(column)), None)
            yield from self._record(f"{number}:{place}", encoded, caption, row, skipped)

    @staticmethod
    def _fetched(path: str) -> bytes:
        """A picture beside the tables of a hub dataset; never a file of this machine, whatever a row says."""
        if not path.startswith("hf://"):
            return b""
        import fsspec

        with fsspec.open(path, "rb") as file:
            content: bytes = file.read()
        return content


def open_source(data: str | Path | Iterable[Path], config: DataConfig | None = None) -> Source:
    """A source for a folder of pictures; a folder, glob or brace list of shards, or a list of their files;
    `hub:owner/name`; or nano.

    Raises:
        UsageError: nothing is there, or a condition that cannot be read. DataError: a folder with neither pictures nor
            shards.
        BackendMissing: a hub dataset, and no package to read it.
    """
    config = config or DataConfig()
    if not isinstance(data, str | Path):
        return ShardSource("shards", list(data), config)
    if str(data) == "nano":
        from sdcompress import nano

        return ShardSource("nano", nano.shards("train"), config)
    if str(data).startswith(HUB):
        return HubSource(str(data).removeprefix(HUB), config)
    path = Path(data).expanduser()
    if path.is_dir():
        shards = sorted(p for p in path.iterdir() if p.name.endswith(SHARDS))
        if shards:
            return ShardSource(path.name, shards, config)
        if not any(p.suffix.lower() in PICTURES for p in path.rglob("*")):
            raise DataError(
                "holds no picture and no shard",
                where=path,
                expected="pictures (.jpg, .png, .webp) or webdataset shards (.tar)",
            )
        return FolderSource(path.name, path, config)
    files = (
        [path]
        if path.is_file()
        else [f for pattern in expand_braces(str(path)) for f in sorted(Path(p) for p in glob.glob(pattern))]
    )
    if not files:
        raise UsageError(
            "does not exist",
            where=str(data),
            expected=(
                "a folder of captioned pictures, webdataset shards (a folder, a glob, a list such as"
                " data/{00000..00099}.tar), hub:owner/name, or nano"
            ),
        )
    if not all(p.name.endswith(SHARDS) for p in files):
        raise DataError("is no webdataset shard", where=files[0], expected="a .tar file, or a folder")
    return ShardSource(path.name, files, config)


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
