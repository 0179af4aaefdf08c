"""Units of a source, each encoded into the content of one file of a cache.

A unit is a shard, or a thousand pictures of a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from sdcompress_engines.errors import DataError

from sdcompress.data.config import DataConfig
from sdcompress.data.drawn import DAMAGED, DRAWN_LOGVAR, RESIZED, DrawnSet
from sdcompress.data.embed import embed_in_batches
from sdcompress.data.encode import LatentEncoder
from sdcompress.data.records import Record, Source
from sdcompress.data.skipped import Skipped
from sdcompress.data.views import CENTER, DrawnView, View, bucket_shapes, nearest_bucket, to_view
from sdcompress.support.pipeline import TextToImagePipeline

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yields the results of `work` in the order of `items`.

    It reads at most four items a thread ahead. `Executor.map` reads all of them at once before Python 3.14.

    Args:
        work: called once for each item, in a thread.
        items: read in the calling thread.
        workers: number of threads.
    """
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[Result]] = deque()
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) > 4 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


@dataclass(frozen=True)
class EncodedUnit:
    """An encoded unit.

    Attributes:
        tensors: `mean`, `logvar` and `time_ids` of each shape of its views, the embeddings of its captions, and the
            columns `pictures.*`, which give the rows of each picture.
        skipped: what was read, and what was left out and why.
        tiled: number of views that were encoded in tiles.
        tile_px: side of the smallest of those tiles, in pixels; None where there are none.
        drawn: number of pictures whose latents were drawn with them.
        not_drawn: of a drawn set, why pictures were encoded → their number.
    """

    tensors: dict[str, torch.Tensor]
    skipped: Skipped
    tiled: int
    tile_px: int | None
    drawn: int
    not_drawn: dict[str, int]


@dataclass(frozen=True)
class _Cut:
    """A picture as it is cached.

    Attributes:
        bucket: index of its shape.
        views: of it.
        not_drawn: why its drawn latents are not used; "" where they are, and where the set has none.
    """

    bucket: int
    views: list[View | DrawnView]
    not_drawn: str = ""


class UnitEncoder:
    """Encodes units of a source with one pipeline.

    Args:
        pipeline: its text encoders embed the captions, on their present device.
        latents: encodes pictures with the pipeline's VAE.
        size_px: side of the square pictures, or the root of the buckets' area.
        config: how pictures are cropped, and which share of them may be unusable.
        drawn: latents of this teacher, by which pictures are cached without encoding.

    Attributes:
        shapes: of the views, as (width, height) in pixels.
        views: number of views of each picture; mirrored views count.
        skipped: what all units so far left out.
    """

    CHECK_FROM = 1000  # number of pictures after which too many unusable ones stop the build early

    def __init__(
        self,
        pipeline: TextToImagePipeline,
        latents: LatentEncoder,
        size_px: int,
        config: DataConfig,
        drawn: DrawnSet | None = None,
    ) -> None:
        self.pipeline, self.latents, self.config, self.drawn = pipeline, latents, config, drawn
        step = max(latents.factor, min(64, size_px // 8) // latents.factor * latents.factor)
        self.shapes = bucket_shapes(size_px, step) if config.buckets else [(size_px, size_px)]
        self.crops = config.views if config.crop == "random" else 1
        self.views = self.crops * (2 if config.flip else 1)
        self.threads = max(1, (os.cpu_count() or 1) // 2)
        self.skipped = Skipped()

    def _cut_record(self, record: Record) -> tuple[Record, _Cut | None]:
        """Returns a record with its views, or with None where its picture is unusable.

        Random crops depend only on the picture's bytes, so that every build takes the same.
        """
        try:
            size = record.size()
            latents = "" if self.drawn is None else self._find_latents(self.drawn, record, size)
            is_known = isinstance(latents, torch.Tensor) and not self.config.flip
            picture = None if is_known else record.picture()
        except DataError:
            return record, None
        bucket = nearest_bucket(*(size if picture is None else picture.size), self.shapes)
        width, height = self.shapes[bucket]
        random = np.random.default_rng(list(hashlib.sha256(record.encoded).digest()[:8]))
        views: list[View | DrawnView] = []
        for _ in range(self.crops):
            place = (float(random.random()), float(random.random())) if self.config.crop == "random" else CENTER
            for flip in (False, True) if self.config.flip else (False,):
                if not flip and isinstance(latents, torch.Tensor):
                    views.append(DrawnView(latents, (height, width, 0, 0, height, width)))
                elif picture is not None:
                    views.append(to_view(picture, width, height, place, flip))
        return record, _Cut(bucket, views, latents if isinstance(latents, str) else "")

    def _find_latents(self, drawn: DrawnSet, record: Record, size: tuple[int, int]) -> torch.Tensor | str:
        """Returns the drawn latents of a picture, or why it has to be encoded.

        Args:
            drawn: the set.
            record: the picture.
            size: width and height, in pixels.
        """
        latents = drawn.read(record.key, record.encoded)
        if isinstance(latents, str):
            return latents
        if size != self.shapes[nearest_bucket(*size, self.shapes)]:
            return RESIZED
        sides = (size[1] // self.latents.factor, size[0] // self.latents.factor)
        return latents if latents.shape == (self.latents.channels, *sides) else DAMAGED

    def encode(self, source: Source, number: int, advance: Callable[..., None]) -> EncodedUnit:
        """Returns an encoded unit.

        Args:
            source: the data set.
            number: of the unit, from 0.
            advance: called once for each picture.

        Raises:
            DataError: too large a share of the pictures so far is unusable, or there is too little memory for one.
        """
        skipped = Skipped()
        tiled_before = self.latents.tiled
        batches = _Batches(self.latents, self.shapes)
        captions: dict[str, int] = {}
        names = ("bucket", "row", "first", "count", "caption_row", "caption_share", "digest")
        columns: dict[str, list[Any]] = {name: [] for name in names}
        drawn, not_drawn = 0, Counter[str]()
        for record, cut in map_in_order(self._cut_record, source.read_unit(number, skipped), self.threads):
            advance()
            if cut is None:
                skipped.read -= 1
                skipped.add("unreadable picture", record.key)
                continue
            drawn += any(isinstance(view, DrawnView) for view in cut.views)
            not_drawn.update([cut.not_drawn] if cut.not_drawn else [])
            columns["bucket"].append(cut.bucket)
            columns["row"].append(batches.add(cut.bucket, cut.views))
            columns["first"].append(len(columns["caption_row"]))
            columns["count"].append(len(record.captions))
            for caption, share in record.captions:
                columns["caption_row"].append(captions.setdefault(caption, len(captions)))
                columns["caption_share"].append(share)
            content = record.encoded + json.dumps(record.captions).encode()
            columns["digest"].append(list(hashlib.sha256(content).digest()[:16]))
        encoded = batches.finish()
        total = self.skipped
        total.merge(skipped)
        if total.read + total.count + sum(total.filtered.values()) >= self.CHECK_FROM:
            total.check(source.name, self.config.max_unusable)
        tensors = encoded | embed_in_batches(self.pipeline, list(captions)) | _picture_columns(columns)
        tiled = self.latents.tiled - tiled_before
        return EncodedUnit(tensors, skipped, tiled, self.latents.tile_px if tiled else None, drawn, dict(not_drawn))


class _Batches:
    """Collects the views of a unit by shape, and encodes those without latents as soon as a batch is full.

    Args:
        latents: encodes them.
        shapes: (width, height) of each bucket, in pixels.
    """

    def __init__(self, latents: LatentEncoder, shapes: list[tuple[int, int]]) -> None:
        self.latents, self.shapes = latents, shapes
        self.waiting: dict[int, list[tuple[int, View]]] = {}
        self.rows: dict[int, int] = {}
        self.done: dict[str, list[torch.Tensor]] = {}
        self.order: dict[int, list[int]] = {}

    def add(self, bucket: int, views: Sequence[View | DrawnView]) -> int:
        """Take the views of one picture. Returns the row of the first one among the views of its shape."""
        first = self.rows.get(bucket, 0)
        self.rows[bucket] = first + len(views)
        waiting = self.waiting.setdefault(bucket, [])
        for row, view in enumerate(views, first):
            if isinstance(view, View):
                waiting.append((row, view))
            else:
                mean = view.latents[None]
                self._keep(bucket, [row], mean, torch.full_like(mean, DRAWN_LOGVAR), [view.time_ids])
        while len(waiting) >= (size := self.latents.batch_size(*self.shapes[bucket])):
            self._encode(bucket, waiting[:size])
            del waiting[:size]
        return first

    def finish(self) -> dict[str, torch.Tensor]:
        """Encode what is left. Returns `mean`, `logvar` and `time_ids` of each shape."""
        for bucket, views in self.waiting.items():
            if views:
                self._encode(bucket, views)
        places = {bucket: torch.tensor(rows).argsort() for bucket, rows in self.order.items()}
        return {name: torch.cat(parts)[places[int(name.partition(".")[2])]] for name, parts in self.done.items()}

    def _encode(self, bucket: int, views: list[tuple[int, View]]) -> None:
        mean, logvar = self.latents.encode(torch.stack([view.pixels for _, view in views]))
        self._keep(bucket, [row for row, _ in views], mean, logvar, [view.time_ids for _, view in views])

    def _keep(
        self, bucket: int, rows: list[int], mean: torch.Tensor, logvar: torch.Tensor, time_ids: list[tuple[int, ...]]
    ) -> None:
        """Keep the latents of some rows of a shape; `finish` sorts them."""
        self.order.setdefault(bucket, []).extend(rows)
        ids = torch.tensor(time_ids, dtype=torch.int32)
        for name, tensor in (("mean", mean), ("logvar", logvar), ("time_ids", ids)):
            self.done.setdefault(f"{name}.{bucket}", []).append(tensor)


def _picture_columns(columns: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
    """Returns the columns of a unit's pictures as tensors named `pictures.*`."""
    dtypes = {"caption_share": torch.float32, "digest": torch.uint8}
    return {
        f"pictures.{name}": (
            torch.tensor(values, dtype=dtypes.get(name, torch.int32)).reshape(
                len(values), *((16,) if name == "digest" else ())
            )
        )
        for name, values in columns.items()
    }
