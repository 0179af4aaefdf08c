"""A picture with its caption and metadata, and the source that yields such records."""

from __future__ import annotations

import hashlib
import io
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from sdcompress_engines.errors import ArtifactError, DataError, shorten
from sdcompress_engines.files import check_regular
from sdcompress_engines.json_files import parse_json
from sdcompress_engines.manifest import by_parts, sha256_file

from sdcompress.data.config import DataConfig
from sdcompress.data.drawn import DrawnSet
from sdcompress.data.filters import parse_conditions
from sdcompress.data.skipped import Skipped

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
UNREAD_SUFFIXES = frozenset({".gif", ".tif", ".tiff", ".jfif", ".avif", ".heic", ".heif", ".jxl"})
"""Pictures that are counted in a folder, and not read."""
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""What files with those suffixes may hold. Never EPS: Pillow reads it with an external program."""
CAPTION_COLUMNS = ("text", "caption", "prompt")
"""Metadata columns that hold a caption, in the order in which they are tried."""
MAX_PIXELS = 64_000_000
MAX_PICTURE_ASPECT = 64
"""Longest side of a picture over its shortest; enlarged to the short side, a picture of one row would fill memory."""
MAX_PICTURE_BYTES = 256 * 2**20
MAX_PROMPTS_BYTES = 256 * 2**20
MAX_TEXT_BYTES = 2**20
"""Largest caption or metadata of one picture that is read."""
MAX_CAPTION = 20_000
"""Longest caption, in characters; text encoders read the first 77 tokens."""
OVERSIZE = f"file of over {MAX_PICTURE_BYTES // 2**20} MiB"
LONG_TEXT = f"text of over {MAX_TEXT_BYTES // 2**20} MiB"
UNIT_PICTURES = 1000
"""Pictures in one unit of a folder."""
_TABLES = (".csv", ".tsv", ".json", ".jsonl")
TEXT_SUFFIXES = (".txt", ".json", ".jsonl", ".csv")
"""Captions, metadata and tables."""
MAX_FIELDS = 40
"""Largest number of metadata names that are collected for an error message."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Orientation in EXIF → what sets the picture upright."""
_WARNINGS = threading.Lock()


@dataclass(frozen=True)
class Record:
    """One picture, still encoded, with its captions and metadata.

    Attributes:
        key: names the picture in messages.
        encoded: the bytes of the picture's file.
        caption: the first of `captions`.
        meta: the metadata that came with the picture, name → value.
        captions: each caption with the share of the time that it is drawn; the shares add up to 1.
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
        """Returns width and height in pixels, from the file's header.

        Raises:
            DataError: the bytes are no picture.
        """
        with self._reading():
            return self._open().size

    def picture(self) -> Image.Image:
        """Returns the decoded picture: upright, RGB, with transparency replaced by white.

        Raises:
            DataError: the bytes are no picture, or one of more than `MAX_PIXELS` or with sides of over 1 to
                `MAX_PICTURE_ASPECT`.
        """
        with self._reading():
            picture = self._open()
            self._check_size(*picture.size)
            picture.load()
            if (turn := _find_turn(picture)) is not None:  # the number of a mirrored picture is 0
                picture = picture.transpose(turn)
            if picture.mode.startswith("I;16"):
                picture = picture.point(lambda value: value / 256).convert("L")
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                canvas = Image.new("RGBA", picture.size, "white")
                canvas.alpha_composite(picture.convert("RGBA"))
                picture = canvas
            return picture.convert("RGB")

    def _check_size(self, width: int, height: int) -> None:
        if width * height > MAX_PIXELS:
            raise DataError(f"has {width} x {height} pixels", where=self.key, expected=f"at most {MAX_PIXELS:,}")
        if max(width, height) > MAX_PICTURE_ASPECT * min(width, height):
            raise DataError(
                f"has {width} x {height} pixels", where=self.key, expected=f"sides of at most 1 to {MAX_PICTURE_ASPECT}"
            )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn whatever Pillow raises into one error: a damaged picture reaches any line of its readers."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"is not a readable picture ({type(error).__name__})", where=self.key) from error

    def _open(self) -> Image.Image:
        with _pillow_warnings():
            return Image.open(io.BytesIO(self.encoded), formats=PICTURE_FORMATS)


@contextmanager
def _pillow_warnings() -> Iterator[None]:
    """Make Pillow's warning of many pixels an error, and drop the others, whatever filters Python was started with.

    Warning filters belong to the whole process, hence the lock.
    """
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _find_turn(picture: Image.Image) -> Image.Transpose | None:
    """Returns what sets a loaded picture upright; None where its EXIF does not say, or is damaged."""
    try:
        with _pillow_warnings():
            return _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return None


class Source:
    """Captioned pictures in units. Any process can read any unit, in any order.

    A subclass implements `count_units`, `fingerprint` and `_read_all`.

    Args:
        name: for reports and manifests.
        config: which pictures are used, and which columns hold their captions.

    Attributes:
        skipped: what the last iteration over the source left out.
        inputs: the files or the folder that are read.

    Raises:
        UsageError: a condition in `config.where` is malformed.
    """

    def __init__(self, name: str, config: DataConfig) -> None:
        self.name, self.config, self.skipped = name, config, Skipped()
        self.inputs: list[Path] = []
        self.conditions = parse_conditions(config.where)

    def count_units(self) -> int:
        """Returns the number of units."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Returns a hash of names and sizes, computed without reading the data."""
        raise NotImplementedError

    def hash_captions(self) -> str:
        """Returns a hash of the captions, of which an edit often keeps the size; empty for shards and hub sets."""
        return ""

    def open_drawn(self) -> DrawnSet | None:
        """Returns the latents that were drawn with the pictures, or None where there are none.

        Raises:
            DataError: as `sdcompress.data.drawn.open_drawn`.
        """
        return None

    def _read_all(self, number: int, skipped: Skipped) -> Iterator[Record]:
        """Yields every picture of unit `number` with its caption, which may be empty.

        Args:
            number: of the unit, from 0.
            skipped: collects what is no record.
        """
        raise NotImplementedError

    def read_unit(self, number: int, skipped: Skipped) -> Iterator[Record]:
        """Yields the usable records of unit `number`, always in the same order.

        Args:
            number: of the unit, from 0.
            skipped: collects what is left out.
        """
        for record in self._read_all(number, skipped):
            if not record.caption.strip():
                skipped.add("no caption", record.key)
                continue
            failed = self._find_failed_condition(record, skipped)
            if failed:
                skipped.add_filtered(failed)
                continue
            skipped.read += 1
            yield record

    def _find_failed_condition(self, record: Record, skipped: Skipped) -> str | None:
        """Returns the first condition that a record does not meet, in words; None where it meets all."""
        for condition in self.conditions:
            holds = condition.holds(record.meta)
            if holds is None:
                if len(skipped.fields) < MAX_FIELDS:
                    skipped.fields |= {shorten(name, 40) for name in islice(record.meta, MAX_FIELDS)}
                return f"no number in {condition.field!r}"
            if not holds:
                return f"not {condition.text}"
        if self.config.min_size_px or self.config.max_aspect:
            try:
                width, height = record.size()
            except DataError:
                return None  # counted as unusable when it is decoded
            if min(width, height) < self.config.min_size_px:
                return f"smaller than {self.config.min_size_px} px"
            if self.config.max_aspect and max(width, height) > self.config.max_aspect * min(width, height):
                return f"aspect over {self.config.max_aspect:g}"
        return None

    def _build_records(
        self, key: str, encoded: bytes, caption: Any, meta: dict[str, Any], skipped: Skipped
    ) -> Iterator[Record]:
        """Yields one record, or none where a caption is no text or too long.

        Args:
            key, encoded, meta: as of `Record`.
            caption: the caption where the config names no columns; of any type, as it was read.
            skipped: counts a caption that is no text or too long.
        """
        found = (
            [(meta.get(column), share) for column, share in self.config.captions.items() if meta.get(column)]
            if self.config.captions
            else [(caption, 1.0)]
        )
        found = [(text, share) for text, share in found if text is not None]
        if any(not is_text(text) for text, _ in found):
            skipped.add("caption is no text", key)
            return
        if any(len(text) > MAX_CAPTION for text, _ in found):
            skipped.add(f"caption of over {MAX_CAPTION:,} characters", key)
            return
        texts = [(text.strip(), share) for text, share in found if text.strip() and share > 0]
        total = sum(share for _, share in texts)
        captions = tuple((text, share / total) for text, share in texts)
        yield Record(key, encoded, captions[0][0] if captions else "", meta, captions)

    def __iter__(self) -> Iterator[Record]:
        self.skipped = Skipped()
        for number in range(self.count_units()):
            yield from self.read_unit(number, self.skipped)


def choose_caption(meta: dict[str, Any]) -> Any:
    """Returns the value of the first of `CAPTION_COLUMNS` that is not empty, or None. It may be no text."""
    return next((meta[column] for column in CAPTION_COLUMNS if meta.get(column)), None)


def read_limited(path: Path, most_bytes: int) -> bytes | None:
    """Returns the bytes of a file, or None where it has more than `most_bytes`."""
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    return content if len(content) <= most_bytes else None


def read_prompt_lines(path: Path) -> list[str]:
    """Returns the lines of a text file of prompts, stripped; blank lines are left out.

    Raises:
        DataError: it is no regular file, a table, too large, no UTF-8 text, or has no prompts or one that is too long.
    """
    expected = "a UTF-8 text file of prompts, one a line"
    if (kind := path.suffix.lower()) in _TABLES:
        raise DataError(f"is a file of type {kind}, whose lines are no prompts", where=path, expected=expected)
    try:
        check_regular(path, DataError)
        encoded = read_limited(path, MAX_PROMPTS_BYTES)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", where=path, expected=expected) from error
    text = None if encoded is None else decode_text(encoded)
    if text is None or not is_text(text):
        fault = "is too large" if encoded is None else "is no UTF-8 text"
        raise DataError(fault, where=path, expected=expected)
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise DataError("holds no prompt", where=path, expected=expected)
    if longest := next((prompt for prompt in prompts if len(prompt) > MAX_CAPTION), None):
        raise DataError(f"has a prompt of {len(longest):,} characters", where=path, expected=f"at most {MAX_CAPTION:,}")
    return prompts


def fingerprint_files(files: Iterable[Path]) -> str:
    """Returns a hash of the names and sizes of files, in any order."""
    return _hash_lines(f"{file.name} {file.stat().st_size}" for file in sorted(files, key=by_parts))


def fingerprint_texts(files: Iterable[Path]) -> str:
    """Returns a hash of the contents of those files that hold captions, metadata or tables, in any order."""
    lines = []
    for file in sorted((file for file in files if file.suffix.lower() in TEXT_SUFFIXES), key=by_parts):
        with suppress(OSError):  # such a file is counted when it is read
            lines.append(f"{file.name} {sha256_file(file)}")
    return _hash_lines(lines)


def _hash_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogatepass")).hexdigest()


def is_text(value: object) -> bool:
    """Returns whether a value is text that UTF-8 can hold. JSON may bring half of a surrogate pair, which it cannot.

    With the character NUL in it, it is none: text in UTF-16 that was read as UTF-8.
    """
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_object(payload: bytes | str) -> dict[str, Any]:
    """Returns a JSON object, or an empty one where the text is anything else."""
    try:
        content = parse_json(payload)
    except ArtifactError:
        return {}
    return content if isinstance(content, dict) else {}


def decode_text(payload: bytes) -> str | None:
    """Returns UTF-8 text without its byte order mark, or None where the bytes are something else."""
    try:
        return payload.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
