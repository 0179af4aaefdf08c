"""Units of a source, each encoded into the content of one file of a cache.

A unit is a shard, or a thousand pictures of a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from sdcompress_engines.errors import DataError

from sdcompress.data.config import DataConfig
from sdcompress.data.embed import embed_in_batches
from sdcompress.data.encode import LatentEncoder
from sdcompress.data.records import Record, Source
from sdcompress.data.skipped import Skipped
from sdcompress.data.views import CENTER, View, bucket_shapes, nearest_bucket, to_view
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
    """

    tensors: dict[str, torch.Tensor]
    skipped: Skipped
    tiled: int
    tile_px: int | None


class UnitEncoder:
    """Encodes units of a source with one pipeline.

    Args:
        pipeline: its text encoders embed the captions, on their present device.
        latents: encodes pictures with the pipeline's VAE.
        size_px: side of the square pictures, or the root of the buckets' area.
        config: how pictures are cropped, and which share of them may be unusable.

    Attributes:
        shapes: of the views, as (width, height) in pixels.
        views: number of views of each picture; mirrored views count.
        skipped: what all units so far left out.
    """

    CHECK_FROM = 1000  # number of pictures after which too many unusable ones stop the build early

    def __init__(self, pipeline: TextToImagePipeline, latents: LatentEncoder, size_px: int, config: DataConfig) -> None:
        self.pipeline, self.latents, self.config = pipeline, latents, config
        step = max(latents.factor, min(64, size_px // 8) // latents.factor * latents.factor)
        self.shapes = bucket_shapes(size_px, step) if config.buckets else [(size_px, size_px)]
        self.crops = config.views if config.crop == "random" else 1
        self.views = self.crops * (2 if config.flip else 1)
        self.threads = max(1, (os.cpu_count() or 1) // 2)
        self.skipped = Skipped()

    def _cut_views(self, record: Record) -> tuple[Record, int, list[View]] | tuple[Record, DataError]:
        """Returns a record with its bucket and its views, or with the fault that makes its picture unusable.

        Random crops depend only on the picture's bytes, so that every build takes the same.
        """
        try:
            picture = record.picture()
        except DataError as error:
            return record, error
        bucket = nearest_bucket(*picture.size, self.shapes)
        width, height = self.shapes[bucket]
        random = np.random.default_rng(list(hashlib.sha256(record.encoded).digest()[:8]))
        flips = (False, True) if self.config.flip else (False,)
        views = []
        for _ in range(self.crops):
            place = (float(random.random()), float(random.random())) if self.config.crop == "random" else CENTER
            views += [to_view(picture, width, height, place, flip) for flip in flips]
        return record, bucket, views

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
        for found in map_in_order(self._cut_views, source.read_unit(number, skipped), self.threads):
            advance()
            if len(found) == 2:
                skipped.read -= 1
                skipped.add("unreadable picture", found[0].key)
                continue
            record, bucket, views = found
            columns["bucket"].append(bucket)
            columns["row"].append(batches.add(bucket, views))
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
        return EncodedUnit(tensors, skipped, tiled, self.latents.tile_px if tiled else None)


class _Batches:
    """Collects the views of a unit by shape, and encodes them as soon as a batch is full.

    Args:
        latents: encodes them.
        shapes: (width, height) of each bucket, in pixels.
    """

    def __init__(self, latents: LatentEncoder, shapes: list[tuple[int, int]]) -> None:
        self.latents, self.shapes = latents, shapes
        self.waiting: dict[int, list[View]] = {}
        self.rows: dict[int, int] = {}
        self.done: dict[str, list[torch.Tensor]] = {}

    def add(self, bucket: int, views: list[View]) -> int:
        """Take the views of one picture. Returns the row of the first one among the views of its shape."""
        row = self.rows.get(bucket, 0)
        self.rows[bucket] = row + len(views)
        waiting = self.waiting.setdefault(bucket, [])
        waiting.extend(views)
        while len(waiting) >= (size := self.latents.batch_size(*self.shapes[bucket])):
            self._encode(bucket, waiting[:size])
            del waiting[:size]
        return row

    def finish(self) -> dict[str, torch.Tensor]:
        """Encode what is left. Returns `mean`, `logvar` and `time_ids` of each shape."""
        for bucket, views in self.waiting.items():
            if views:
                self._encode(bucket, views)
        return {name: torch.cat(parts) for name, parts in self.done.items()}

    def _encode(self, bucket: int, views: list[View]) -> None:
        mean, logvar = self.latents.encode(torch.stack([view.pixels for view in views]))
        time_ids = torch.tensor([view.time_ids for view in views], dtype=torch.int32)
        for name, tensor in (("mean", mean), ("logvar", logvar), ("time_ids", time_ids)):
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
