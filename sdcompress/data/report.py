"""Figures of a data set from one pass over it, and a sheet of its pictures, in memory that does not grow with it."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image
from sdcompress_engines.errors import DataError
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.data.drawn import DrawnSet
from sdcompress.data.filters import as_number
from sdcompress.data.records import Record, Source
from sdcompress.data.skipped import EXAMPLE_KEYS

SAMPLE_SIZE = 10_000
"""Numbers from which medians and histograms are computed, at most."""
HISTOGRAM_BINS = 10
NUMERIC_FIELDS = 64
"""Metadata fields with figures, at most."""
EXAMPLE_CAPTIONS = 8
SHEET_PICTURES = 64
SHEET_COLUMNS = 8
TILE_PX = 160
MARGIN_PX = 6
SMALL_PX = 512
LARGEST_NUMBER = 1e300
"""Above it the width of a histogram overflows."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Spread:
    """The distribution of numbers.

    Count, least and most are exact. Median and histogram are those of a random sample of `SAMPLE_SIZE` where there are
    more numbers.

    Attributes:
        count: how many numbers there are.
        least, median, most: of the numbers.
        histogram: (from, to, share) of equal bins; the shares add up to 1.
    """

    count: int
    least: float
    median: float
    most: float
    histogram: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Unusable:
    """Pictures that cannot be used for one reason.

    Attributes:
        count: how many there are.
        examples: keys of the first of them.
    """

    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Figures:
    """The figures of one pass over a source.

    Attributes:
        name: of the source.
        usable: number of pictures that have a caption and a readable header and meet all conditions.
        unusable: reason → the pictures that cannot be used for it.
        filtered: condition → number of pictures that do not meet it. Nothing is wrong with these pictures.
        width_px, height_px: of the usable pictures. Every `Spread` is None where there is no usable picture.
        aspect: width over height of the usable pictures.
        small_px: limit of `small`.
        small: share of the usable pictures whose short side is below `small_px`.
        fields: numeric metadata field → its values.
        caption_words: number of words in the first caption of each usable picture.
        captions: some first captions, drawn at random.
        fault: why training on this source would stop; None where it would not.
        drawn_by: sha256 of the teacher that drew the pictures and their latents; None for other pictures.
        drawn: number of usable pictures with those latents.
        not_drawn: of a drawn set, why other pictures have none → their number.
    """

    name: str
    usable: int
    unusable: dict[str, Unusable]
    filtered: dict[str, int]
    width_px: Spread | None
    height_px: Spread | None
    aspect: Spread | None
    small_px: int
    small: float
    fields: dict[str, Spread]
    caption_words: Spread | None
    captions: tuple[str, ...]
    fault: str | None
    drawn_by: str | None
    drawn: int
    not_drawn: dict[str, int]


class Reservoir(Generic[Item]):
    """A uniform random sample of a stream (Vitter 1985, algorithm R).

    The same items and the same seed give the same sample.

    Args:
        size: items in the sample, at most.
        seed: of the random numbers.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seen, self._random = size, 0, random.Random(seed)
        self._kept: list[tuple[int, Item]] = []

    def draw_place(self) -> int | None:
        """Count one more item. Returns its place in the sample, or None where it is not drawn."""
        self.seen += 1
        if self.seen <= self.size:
            return self.seen - 1
        place = self._random.randrange(self.seen)
        return place if place < self.size else None

    def put(self, place: int, item: Item) -> None:
        """Keep the item counted last, at the place that `draw_place` returned for it."""
        if place < len(self._kept):
            self._kept[place] = (self.seen, item)
        else:
            self._kept.append((self.seen, item))

    def offer(self, item: Item) -> None:
        """Count one more item, and keep it where it is drawn."""
        place = self.draw_place()
        if place is not None:
            self.put(place, item)

    def items(self) -> list[Item]:
        """Returns the sample in the order of the stream."""
        return [item for _, item in sorted(self._kept, key=lambda kept: kept[0])]


@dataclass
class _Numbers:
    """Collects numbers for a `Spread`."""

    least: float = math.inf
    most: float = -math.inf
    sample: Reservoir[float] = field(default_factory=lambda: Reservoir(SAMPLE_SIZE))

    def add(self, number: float) -> None:
        """Count a number."""
        self.least, self.most = min(self.least, number), max(self.most, number)
        self.sample.offer(number)

    def spread(self) -> Spread | None:
        """Returns the distribution of the numbers so far, or None where there is none."""
        numbers = np.array(self.sample.items())
        if not len(numbers):
            return None
        edges = np.linspace(self.least, self.most, HISTOGRAM_BINS + 1)
        if not (np.diff(edges) > 0).all():  # equal numbers, or too close to each other for so many bins
            histogram: tuple[tuple[float, float, float], ...] = ((self.least, self.most, 1.0),)
        else:
            counts, _ = np.histogram(numbers, bins=edges)
            histogram = tuple(
                (float(low), float(high), float(count) / len(numbers))
                for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
            )
        return Spread(self.sample.seen, self.least, float(np.median(numbers)), self.most, histogram)


class _Fields:
    """Collects the numeric fields of metadata, at most `NUMERIC_FIELDS`.

    A field counts as numeric if it is a number in at least half of the pictures that have it.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, _Numbers] = {}
        self.others: dict[str, int] = {}

    def add(self, meta: Mapping[str, Any]) -> None:
        """Count the fields of one picture."""
        for name, value in meta.items():
            number = as_number(value)
            if number is not None and abs(number) <= LARGEST_NUMBER:
                if name in self.numbers or len(self.numbers) < NUMERIC_FIELDS:
                    self.numbers.setdefault(name, _Numbers()).add(number)
            elif value is not None and (name in self.others or len(self.others) < NUMERIC_FIELDS):
                self.others[name] = self.others.get(name, 0) + 1

    def spreads(self) -> dict[str, Spread]:
        """Returns the distribution of each numeric field."""
        return {
            name: spread
            for name, numbers in self.numbers.items()
            if numbers.sample.seen >= self.others.get(name, 0)
            for spread in [numbers.spread()]
            if spread
        }


class _Survey:
    """Collects the figures of a source, picture by picture.

    Args:
        small_px: see `Figures`.
        drawn: the latents that were drawn with the pictures.
    """

    def __init__(self, small_px: int, drawn: DrawnSet | None) -> None:
        self.small_px, self.latents = small_px, drawn
        self.drawn, self.not_drawn = 0, Counter[str]()
        self.width, self.height, self.aspect, self.words = _Numbers(), _Numbers(), _Numbers(), _Numbers()
        self.fields = _Fields()
        self.captions = Reservoir[str](EXAMPLE_CAPTIONS)
        self.usable = self.small = 0

    def add(self, record: Record, width: int, height: int) -> None:
        """Count a usable picture.

        Args:
            record: the picture.
            width, height: in pixels.
        """
        self.usable += 1
        self.small += min(width, height) < self.small_px
        self.width.add(float(width))
        self.height.add(float(height))
        self.aspect.add(width / height)
        self.words.add(float(len(record.caption.split())))
        self.fields.add(record.meta)
        self.captions.offer(record.caption)
        if self.latents is not None:
            found = self.latents.read(record.key, record.encoded)
            self.drawn += not isinstance(found, str)
            self.not_drawn.update([found] if isinstance(found, str) else [])

    def figures(self, source: Source) -> Figures:
        """Returns the figures, with what `source.skipped` left out."""
        skipped = source.skipped
        fault = None
        try:
            skipped.check(source.name, source.config.max_unusable)
        except DataError as error:
            fault = str(error)
        return Figures(
            name=source.name,
            usable=self.usable,
            unusable={
                reason: Unusable(len(keys), tuple(keys[:EXAMPLE_KEYS])) for reason, keys in skipped.reasons.items()
            },
            filtered=dict(skipped.filtered),
            width_px=self.width.spread(),
            height_px=self.height.spread(),
            aspect=self.aspect.spread(),
            small_px=self.small_px,
            small=self.small / self.usable if self.usable else 0.0,
            fields=self.fields.spreads(),
            caption_words=self.words.spread(),
            captions=tuple(self.captions.items()),
            fault=fault,
            drawn_by=None if self.latents is None else self.latents.teacher,
            drawn=self.drawn,
            not_drawn=dict(self.not_drawn),
        )


def inspect_source(
    source: Source,
    *,
    limit: int | None = None,
    decode: bool = False,
    sheet: bool = False,
    small_px: int = SMALL_PX,
    report: Reporter = SILENT,
) -> tuple[Figures, Image.Image | None]:
    """Read a source once. Returns its figures and, with `sheet`, some of its pictures side by side.

    Args:
        source: the data set.
        limit: stop after this many pictures with a caption; None reads all.
        decode: decode every picture. That finds pictures that were cut, and takes long. Otherwise only headers are
            read.
        sheet: return a sheet of at most `SHEET_PICTURES` pictures, drawn at random. It is None where none is usable.
        small_px: see `Figures`.
        report: shows the progress.

    Raises:
        DataError: the metadata file of a folder is malformed.
    """
    unreadable: list[str] = []
    survey, tiles = _Survey(small_px, _open_latents(source, report)), Reservoir[Image.Image](SHEET_PICTURES)
    with report.task("inspect pictures", limit) as advance:
        for record in islice(source, limit):
            advance()
            try:
                width, height = record.picture().size if decode else record.size()
            except DataError:
                unreadable.append(record.key)
                continue
            survey.add(record, width, height)
            if sheet:
                _offer_tile(tiles, record)
    if unreadable:
        source.skipped.read -= len(unreadable)
        source.skipped.reasons.setdefault("unreadable picture", []).extend(unreadable)
    return survey.figures(source), draw_contact_sheet(tiles.items()) if sheet and tiles.items() else None


def _open_latents(source: Source, report: Reporter) -> DrawnSet | None:
    """Returns the latents that were drawn with the pictures. A line says why they cannot be used."""
    try:
        return source.open_drawn()
    except DataError as error:
        report.show_line(f"latents: not used: {error}")
        return None


def _offer_tile(tiles: Reservoir[Image.Image], record: Record) -> None:
    """Offer a thumbnail to the sample. The picture is decoded only if it is drawn; a broken one is not shown."""
    place = tiles.draw_place()
    if place is None:
        return
    try:
        picture = record.picture()
    except DataError:
        return
    picture.thumbnail((TILE_PX, TILE_PX))
    tiles.put(place, picture)


def draw_contact_sheet(thumbnails: Sequence[Image.Image]) -> Image.Image:
    """Returns thumbnails of at most `TILE_PX`, each in the middle of a white square, `SHEET_COLUMNS` in a row."""
    side = TILE_PX + 2 * MARGIN_PX
    columns = min(SHEET_COLUMNS, len(thumbnails))
    sheet = Image.new("RGB", (columns * side, math.ceil(len(thumbnails) / columns) * side), "white")
    for i, picture in enumerate(thumbnails):
        sheet.paste(
            picture,
            (i % columns * side + (side - picture.width) // 2, i // columns * side + (side - picture.height) // 2),
        )
    return sheet
