"""What is in a data set: figures of one pass over it, and a sheet of its pictures, in memory that does not grow with
the data.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sdcompress_engines.errors import DataError
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.data.filters import as_number
from sdcompress.data.records import Record, Source

if TYPE_CHECKING:
    from PIL import Image

SAMPLE = 10_000
BINS = 10
FIELDS = 64
EXAMPLES = 3
CAPTIONS = 8
SHEET_PICTURES = 64
SHEET_COLUMNS = 8
TILE_PX = 160
MARGIN_PX = 6
SMALL_PX = 512
LARGEST = 1e300  # beyond it the width of a histogram overflows

Item = TypeVar("Item")


@dataclass(frozen=True)
class Spread:
    """Numbers, summed up.

    Count, least and most are exact; median and histogram are those of a sample of `SAMPLE` where there are more.

    Attributes:
        histogram: (from, to, share) of equal bins; the shares add up to 1.
    """

    count: int
    least: float
    median: float
    most: float
    histogram: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Unusable:
    """Pictures that cannot be used for one reason, and the keys of the first of them."""

    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Figures:
    """What one pass over a source found.

    Attributes:
        name: of the source.
        usable: pictures with a caption and a readable header that the conditions let through.
        unusable: by reason.
        filtered: condition → pictures it left out; nothing is wrong with them.
        width_px, height_px: of the usable pictures; None where there is none, as with all spreads.
        aspect: width over height.
        small_px, small: the share of usable pictures whose short side is under `small_px`.
        fields: numeric metadata.
        caption_words: words of the first caption of each picture.
        captions: some of them, drawn at random.
        fault: why training on it would stop; None where it would not.
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


class Reservoir(Generic[Item]):
    """A uniform sample of at most `size` of the items offered (Vitter 1985, algorithm R), the same for the same items
    and seed.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seen, self._random = size, 0, random.Random(seed)
        self._kept: list[tuple[int, Item]] = []

    def place(self) -> int | None:
        """Count one more item: the place it has in the sample, None where it is not drawn."""
        self.seen += 1
        if self.seen <= self.size:
            return self.seen - 1
        place = self._random.randrange(self.seen)
        return place if place < self.size else None

    def put(self, place: int, item: Item) -> None:
        """Keep the item just counted at the place it was given."""
        if place < len(self._kept):
            self._kept[place] = (self.seen, item)
        else:
            self._kept.append((self.seen, item))

    def offer(self, item: Item) -> None:
        place = self.place()
        if place is not None:
            self.put(place, item)

    def items(self) -> list[Item]:
        """The sample, in the order it was offered."""
        return [item for _, item in sorted(self._kept, key=lambda kept: kept[0])]


@dataclass
class _Numbers:
    """Numbers on their way to a `Spread`."""

    least: float = math.inf
    most: float = -math.inf
    sample: Reservoir[float] = field(default_factory=lambda: Reservoir(SAMPLE))

    def add(self, number: float) -> None:
        self.least, self.most = min(self.least, number), max(self.most, number)
        self.sample.offer(number)

    def spread(self) -> Spread | None:
        import numpy as np

        numbers = np.array(self.sample.items())
        if not len(numbers):
            return None
        if self.least == self.most:
            histogram: tuple[tuple[float, float, float], ...] = ((self.least, self.most, 1.0),)
        else:
            counts, edges = np.histogram(numbers, bins=BINS, range=(self.least, self.most))
            histogram = tuple(
                (float(low), float(high), float(count) / len(numbers))
                for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
            )
        return Spread(self.sample.seen, self.least, float(np.median(numbers)), self.most, histogram)


class _Fields:
    """The numeric fields of metadata, `FIELDS` at most: those that are numbers in at least half of the pictures that
    have them.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, _Numbers] = {}
        self.others: dict[str, int] = {}

    def add(self, meta: Mapping[str, Any]) -> None:
        for name, value in meta.items():
            number = as_number(value)
            if number is not None and abs(number) <= LARGEST:
                if name in self.numbers or len(self.numbers) < FIELDS:
                    self.numbers.setdefault(name, _Numbers()).add(number)
            elif value is not None and (name in self.others or len(self.others) < FIELDS):
                self.others[name] = self.others.get(name, 0) + 1

    def spreads(self) -> dict[str, Spread]:
        return {
            name: spread
            for name, numbers in self.numbers.items()
            if numbers.sample.seen >= self.others.get(name, 0)
            for spread in [numbers.spread()]
            if spread
        }


def look(
    source: Source,
    *,
    limit: int | None = None,
    decode: bool = False,
    sheet: bool = False,
    small_px: int = SMALL_PX,
    report: Reporter = SILENT,
) -> tuple[Figures, Image.Image | None]:
    """Go through a source once: its figures and, with `sheet`, up to `SHEET_PICTURES` of its pictures side by side on
    white.

    Args:
        limit: stop after this many pictures with a caption; None is all.
        decode: decode every picture, which finds those cut in the middle and takes long; else only headers are read.
        small_px: see `Figures.small`.

    Raises:
        DataError: a condition names a field that no picture has.
    """
    unreadable: list[str] = []
    sides, aspect, words = (_Numbers(), _Numbers()), _Numbers(), _Numbers()
    fields = _Fields()
    captions, tiles = Reservoir[str](CAPTIONS), Reservoir["Image.Image"](SHEET_PICTURES)
    usable = small = 0
    with report.task("look at pictures", limit) as advance:
        for record in islice(source, limit):
            advance()
            try:
                width, height = record.picture().size if decode else record.size()
            except DataError:
                unreadable.append(record.key)
                continue
            usable += 1
            small += min(width, height) < small_px
            for numbers, number in zip(
                (*sides, aspect, words), (width, height, width / height, len(record.caption.split())), strict=True
            ):
                numbers.add(float(number))
            fields.add(record.meta)
            captions.offer(record.caption)
            if sheet:
                _offer_tile(tiles, record)
    skipped = source.skipped
    if unreadable:
        skipped.read -= len(unreadable)
        skipped.reasons.setdefault("unreadable picture", []).extend(unreadable)
    fault = None
    try:
        skipped.check(source.name, source.config.max_unusable)
    except DataError as error:
        fault = str(error)
    figures = Figures(
        source.name,
        usable,
        {reason: Unusable(len(keys), tuple(keys[:EXAMPLES])) for reason, keys in skipped.reasons.items()},
        dict(skipped.filtered),
        sides[0].spread(),
        sides[1].spread(),
        aspect.spread(),
        small_px,
        small / usable if usable else 0.0,
        fields.spreads(),
        words.spread(),
        tuple(captions.items()),
        fault,
    )
    return figures, contact_sheet(tiles.items()) if sheet and tiles.items() else None


def _offer_tile(tiles: Reservoir[Image.Image], record: Record) -> None:
    """Decode a picture only if the sample takes it; a broken one is not shown."""
    place = tiles.place()
    if place is None:
        return
    try:
        picture = record.picture()
    except DataError:
        return
    picture.thumbnail((TILE_PX, TILE_PX))
    tiles.put(place, picture)


def contact_sheet(thumbnails: Sequence[Image.Image]) -> Image.Image:
    """Thumbnails of at most `TILE_PX`, each in the middle of a white square, `SHEET_COLUMNS` in a row."""
    from PIL import Image

    side = TILE_PX + 2 * MARGIN_PX
    columns = min(SHEET_COLUMNS, len(thumbnails))
    sheet = Image.new("RGB", (columns * side, math.ceil(len(thumbnails) / columns) * side), "white")
    for i, picture in enumerate(thumbnails):
        sheet.paste(
            picture,
            (i % columns * side + (side - picture.width) // 2, i // columns * side + (side - picture.height) // 2),
        )
    return sheet
