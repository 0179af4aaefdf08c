"""A picture with its caption and metadata, and what a source of them promises."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError
from sdcompress_engines.errors import DataError
from sdcompress_engines.manifest import by_parts

from sdcompress.data.config import DataConfig
from sdcompress.data.filters import parse_conditions

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})

FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "GIF",
)  # what files of those names turn out to be; never EPS, which runs a program

CAPTION_COLUMNS = ("text", "caption", "prompt")

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
