"""Latents and text embeddings of a data set, computed once and opened memory-mapped."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from sdcompress_engines.errors import DataError
from sdcompress_engines.manifest import (
    faults,
    read_manifest,
)

from sdcompress.data.config import DataConfig
from sdcompress.data.encode import Precision
from sdcompress.data.records import Source
from sdcompress.data.views import to_pixels as to_pixels

if TYPE_CHECKING:
    pass

INDEX = "index.safetensors"

EMPTY = "empty.safetensors"


def default_size_px(pipeline: Any) -> int:
    """The side the UNet was made for: `sample_size` times the VAE's factor."""
    return int(pipeline.unet.config.sample_size) * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)


@dataclass(frozen=True)
class CachedSample:
    """One view of one picture with one of its captions.

    Attributes:
        mean, std: of the VAE's posterior, unscaled, (C, h, w) float32.
        text: (77, D) float32.
        pooled: (P,) float32, for SDXL; else None.
        ids: the caption's tokens, (77,) int64; None for SDXL.
        time_ids: (6,) float32, see `View`.
    """

    mean: torch.Tensor
    std: torch.Tensor
    text: torch.Tensor
    pooled: torch.Tensor | None
    ids: torch.Tensor | None
    time_ids: torch.Tensor


@dataclass
class LatentCache:
    """A cache whose tensors stay on disk, mapped into memory, until they are drawn.

    Attributes:
        index: `unit`, `bucket`, `row`, `first`, `count` of each picture and the flat `caption_row` and `caption_share`.
        views: crops of each picture, mirrored ones counted.
        sha256: of the cache's content, to name it in what is trained from it.
        size_px: side of the square pictures, or the root of the buckets' area.
        source: the data set's name.
        precision: in which the VAE encoded; caches of before it was recorded are fp32.
        tile_px: side of the smallest tiles in which pictures were encoded; None where all were encoded whole.
    """

    folder: Path
    index: dict[str, torch.Tensor]
    views: int
    sha256: str
    teacher_sha256: str
    size_px: int
    source: str = ""
    precision: Precision = "fp32"
    tile_px: int | None = None
    _units: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict, repr=False)
    _empty: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.index["unit"])

    @property
    def buckets(self) -> torch.Tensor:
        """Which of the shapes each picture has, (N,) int32; pictures of one batch must share it."""
        return self.index["bucket"]

    def about(self) -> dict[str, Any]:
        """What a manifest says of the data something was trained on."""
        return {"source": self.source, "pictures": len(self), "size_px": self.size_px}

    def _unit(self, number: int) -> dict[str, torch.Tensor]:
        if number not in self._units:
            self._units[number] = load_file(self.folder / unit_name(number))
        return self._units[number]

    def sample(self, i: int, view: int, pick: float, *, drop_caption: bool = False) -> CachedSample:
        """View `view` of picture `i`, with the caption that `pick` in [0, 1) falls on by the captions' shares, or the
        empty one.
        """
        unit = self._unit(int(self.index["unit"][i]))
        bucket, row = int(self.index["bucket"][i]), int(self.index["row"][i]) + view
        if drop_caption:
            self._empty = self._empty or load_file(self.folder / EMPTY)
            texts, place = self._empty, 0
        else:
            texts, place = unit, int(self.index["caption_row"][self._caption(i, pick)])
        pooled = texts["pooled"][place].float() if "pooled" in texts else None
        ids = texts["ids"][place].long() if "ids" in texts else None
        std = (0.5 * unit[f"logvar.{bucket}"][row].float()).exp()
        return CachedSample(
            unit[f"mean.{bucket}"][row].float(),
            std,
            texts["text"][place].float(),
            pooled,
            ids,
            unit[f"time_ids.{bucket}"][row].float(),
        )

    def _caption(self, i: int, pick: float) -> int:
        first, count = int(self.index["first"][i]), int(self.index["count"][i])
        reached = 0.0
        for place in range(first, first + count):
            reached += float(self.index["caption_share"][place])
            if pick < reached:
                return place
        return first + count - 1

    @classmethod
    def open(
        cls,
        folder: Path,
        teacher_sha256: str | None = None,
        source: Source | None = None,
        size_px: int | None = None,
        config: DataConfig | None = None,
    ) -> LatentCache:
        """Open a cache, made with the teacher of this hash, from this data, at this size and so cut, as far as they are
        given.

        Raises:
            DataError: damaged, no cache, or made from something else.
        """
        found = faults(folder, "cache", contents=False)
        if found:
            raise DataError(f"is no whole cache: {found[0]}", where=folder, hint="delete it and let it be made again")
        manifest = read_manifest(folder)
        if manifest is None or "data" not in manifest.config:
            raise DataError("was made by an earlier version", where=folder, hint="delete it and let it be made again")
        if teacher_sha256 and manifest.inputs["teacher"] != teacher_sha256:
            raise DataError(
                f"was made with the teacher {manifest.inputs['teacher'][:12]}",
                where=folder,
                expected=f"{teacher_sha256[:12]}, the one given",
                hint="delete it and let it be made again",
            )
        if source and manifest.config["files"] != source.fingerprint():
            raise DataError(
                f"was made from other data ({manifest.config['source']})",
                where=folder,
                expected=f"{source.name} as it is now",
                hint="delete it and let it be made again",
            )
        if size_px and manifest.config["size_px"] != size_px:
            raise DataError(
                f"holds latents of {manifest.config['size_px']} px pictures",
                where=folder,
                expected=f"{size_px} px",
                hint="another --cache",
            )
        if config is not None:
            theirs, ours = manifest.config["data"], _cut(config)
            differing = "; ".join(
                f"{k}: {theirs.get(k)} there, {ours[k]} here" for k in ours if theirs.get(k) != ours[k]
            )
            if differing:
                raise DataError(
                    f"was made with other data settings ({differing})",
                    where=folder,
                    hint="another --cache, or delete it and let it be made again",
                )
        made = manifest.config
        return cls(
            folder,
            load_file(folder / INDEX),
            made["views"],
            manifest.inputs["data"],
            manifest.inputs["teacher"],
            made["size_px"],
            made["source"],
            made.get("precision", "fp32"),
            made.get("tile_px"),
        )


def unit_name(number: int) -> str:
    return f"unit-{number:05d}.safetensors"


def _cut(config: DataConfig) -> dict[str, Any]:
    """What decides a cache's content besides teacher, data and size."""
    return json.loads(config.model_dump_json(exclude={"size_px", "max_unusable"}))
