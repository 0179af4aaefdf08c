"""Latents and text embeddings of a data set, computed once and opened memory-mapped."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationError
from sdcompress_engines.errors import DataError, shorten
from sdcompress_engines.manifest import MANIFEST_NAME, Manifest, faults, read_manifest

from sdcompress.checkpoints.tensor_files import read_safetensors
from sdcompress.data.cache_check import describe_layout, find_index_fault, find_text_fault, find_unit_fault
from sdcompress.data.config import DataConfig
from sdcompress.data.precision import Precision
from sdcompress.data.records import Source
from sdcompress.support.faults import faults_of

INDEX = "index.safetensors"
"""Where each picture and caption is, see `LatentCache.index`."""
EMPTY = "empty.safetensors"
"""The embeddings of the absent caption, see `embed_absent_caption`."""
REBUILD_HINT = "delete the folder and let it be built again"
OTHER_CACHE = "choose another --cache; or delete the folder, if nothing else needs it"


@dataclass(frozen=True)
class CachedSample:
    """One view of one picture with one of its captions.

    All tensors are on the CPU.

    Attributes:
        mean, std: of the VAE's posterior, unscaled, (C, H/8, W/8), float32.
        text: the caption's embedding, (77, D), float32.
        pooled: the caption's pooled embedding, (P,), float32; None except with SDXL.
        ids: the caption's tokens, (77,), int64; None with SDXL.
        time_ids: see `View`, (6,), float32.
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
        folder: of the cache.
        index: for each picture its `unit`, its `bucket`, the `row` of its first view in the unit, and `first` and
            `count` of its captions; for each caption, `caption_row` in the unit and `caption_share`.
        views: number of views of each picture; mirrored views count.
        sha256: of the cache's content. Trained artifacts name their data by it.
        teacher_sha256: of the teacher that encoded it.
        size_px: side of the square pictures, or the root of the buckets' area.
        source: name of the data set.
        precision: in which the VAE encoded; fp32 for caches from before it was recorded.
        tile_px: side of the smallest tiles in which pictures were encoded; None where all were encoded whole.
        drawn: number of pictures, duplicates included, whose latents were drawn with them, not encoded.
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
    drawn: int = 0
    _units: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict, repr=False)
    _empty: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.index["unit"])

    @property
    def buckets(self) -> torch.Tensor:
        """The shape of each picture, as its index, (N,), int32. Pictures of one batch must share it."""
        return self.index["bucket"]

    def describe_data(self) -> dict[str, Any]:
        """Returns the facts about the data that a training's manifest records."""
        return {"source": self.source, "pictures": len(self), "size_px": self.size_px}

    def _unit(self, number: int) -> dict[str, torch.Tensor]:
        if number not in self._units:
            path = self.folder / unit_name(number)
            unit = read_safetensors(path, DataError, hint=REBUILD_HINT)
            fault = find_unit_fault(unit, self.index, number, self.views)
            first = next(iter(self._units.values()), unit)
            if not fault and describe_layout(unit) != describe_layout(first):
                fault = f"has {describe_layout(unit)}, and other units {describe_layout(first)}"
            _refuse(path, fault)
            self._units[number] = unit
        return self._units[number]

    def _read_empty(self, unit: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the embedding of the absent caption, of the sizes of those in `unit`."""
        if not self._empty:
            path = self.folder / EMPTY
            empty = read_safetensors(path, DataError, hint=REBUILD_HINT)
            names = [name for name in ("text", "pooled", "ids") if name in unit]
            fault = find_text_fault(empty)
            if not fault and any(name not in empty or empty[name].shape[1:] != unit[name].shape[1:] for name in names):
                fault = "has other sizes than the captions"
            _refuse(path, fault)
            self._empty = empty
        return self._empty

    def read_absent_caption(self) -> dict[str, torch.Tensor]:
        """Returns the embeddings of what guidance takes in place of a caption, see `embed_absent_caption`.

        Raises:
            DataError: a file was damaged or edited.
        """
        return self._read_empty(self._unit(int(self.index["unit"][0])))

    def sample(self, i: int, view: int, pick: float, *, drop_caption: bool = False) -> CachedSample:
        """Returns one view of one picture with one caption.

        Args:
            i: index of the picture.
            view: index of the view, below `views`.
            pick: in [0, 1); chooses the caption by the captions' shares.
            drop_caption: take what guidance takes in place of a caption.

        Raises:
            DataError: a file was damaged or edited.
        """
        unit = self._unit(int(self.index["unit"][i]))
        bucket, row = int(self.index["bucket"][i]), int(self.index["row"][i]) + view
        if drop_caption:
            texts, place = self._read_empty(unit), 0
        else:
            texts, place = unit, int(self.index["caption_row"][self._choose_caption(i, pick)])
        pooled = texts["pooled"][place].float() if "pooled" in texts else None
        ids = texts["ids"][place].long() if "ids" in texts else None
        std = (0.5 * unit[f"logvar.{bucket}"][row].float()).exp()
        mean, text = unit[f"mean.{bucket}"][row].float(), texts["text"][place].float()
        unit_file = unit_name(int(self.index["unit"][i]))
        for name, parts in ((unit_file, (mean, std)), (EMPTY if drop_caption else unit_file, (text,))):
            if not all(part.isfinite().all() for part in parts):
                _refuse(self.folder / name, f"has numbers that are not finite, of picture {i}")
        return CachedSample(
            mean=mean,
            std=std,
            text=text,
            pooled=pooled,
            ids=ids,
            time_ids=unit[f"time_ids.{bucket}"][row].float(),
        )

    def _choose_caption(self, i: int, pick: float) -> int:
        """Returns the index, over the captions of all pictures, of the caption of picture `i` that `pick` falls on."""
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
        """Open a cache and check that it fits. What is None is not checked.

        Args:
            folder: of the cache.
            teacher_sha256: of the teacher that must have encoded it.
            source: the data that it must hold, unchanged since.
            size_px: side of the pictures, see `LatentCache`.
            config: how the pictures must have been chosen and cropped.

        Raises:
            DataError: the folder is damaged or no cache, or the cache does not fit.
        """
        manifest = _read_cache_manifest(folder)
        facts = _check_facts(folder, manifest)
        _check_origin(folder, manifest, teacher_sha256, source)
        _check_settings(folder, manifest, size_px, config)
        index = read_safetensors(folder / INDEX, DataError, hint=REBUILD_HINT)
        _refuse(folder / INDEX, find_index_fault(index))
        for number in index["unit"].unique().tolist():
            if unit_name(number) not in manifest.files:
                _refuse(folder / INDEX, f"names {unit_name(number)}, which the cache does not have")
        return cls(
            folder=folder,
            index=index,
            views=facts.views,
            sha256=manifest.inputs["data"],
            teacher_sha256=manifest.inputs["teacher"],
            size_px=facts.size_px,
            source=facts.source,
            precision=facts.precision,
            tile_px=facts.tile_px,
            drawn=facts.drawn,
        )


class _Facts(BaseModel):
    """What the manifest of a cache records, as far as it is used."""

    views: int = Field(ge=1, le=64)
    size_px: int = Field(ge=1, le=2**16)
    source: str
    files: str
    captions: str | None = None
    data: dict[str, Any]
    precision: Precision = "fp32"
    tile_px: int | None = None
    drawn: int = Field(0, ge=0)
    data_sha256: str
    teacher: str


def _check_facts(folder: Path, manifest: Manifest) -> _Facts:
    """Returns the facts in the manifest of a cache.

    Raises:
        DataError: they are missing or of another kind; one message names all.
    """
    elsewhere = {"data_sha256": manifest.inputs.get("data"), "teacher": manifest.inputs.get("teacher")}
    elsewhere |= {"drawn": manifest.figures.get("drawn", 0)}
    try:
        return _Facts.model_validate(manifest.config | elsewhere)
    except ValidationError as error:
        fault = shorten(faults_of(error, _Facts, "entry"))
        raise DataError(
            f"has a manifest that is not a cache's ({fault})", where=folder / MANIFEST_NAME, hint=REBUILD_HINT
        ) from error


def _refuse(path: Path, fault: str) -> None:
    """Refuse a file of a cache, where there is a fault."""
    if fault:
        raise DataError(fault, where=path, expected="a file of a cache, as it was written", hint=REBUILD_HINT)


def _read_cache_manifest(folder: Path) -> Manifest:
    """Returns the manifest of a whole cache.

    Raises:
        DataError: a file is missing or cut, or this is no cache that can be opened.
    """
    manifest = read_manifest(folder)
    if manifest is not None and manifest.kind != "cache":
        raise DataError(
            f"is an artifact of kind {manifest.kind}, and no cache", where=folder, hint="choose another --cache"
        )
    if manifest is None and not (folder / INDEX).exists():
        raise DataError("is no cache", where=folder, hint="choose another --cache")
    found = faults(folder, "cache", contents=False)
    if found:
        raise DataError(f"is not a complete cache: {found[0]}", where=folder, hint=REBUILD_HINT)
    if manifest is None or "data" not in manifest.config:
        raise DataError("was made by an earlier version", where=folder, hint=REBUILD_HINT)
    return manifest


def _check_origin(folder: Path, manifest: Manifest, teacher_sha256: str | None, source: Source | None) -> None:
    """Refuse a cache of another teacher or of other data; arguments as of `LatentCache.open`."""
    encoded_by = manifest.inputs["teacher"]
    if teacher_sha256 and encoded_by != teacher_sha256:
        raise DataError(
            f"was made with the teacher {encoded_by[:12]}",
            where=folder,
            expected=f"{teacher_sha256[:12]}, the one given",
            hint=OTHER_CACHE,
        )
    captions = manifest.config.get("captions")  # earlier versions did not record them
    if source and (
        manifest.config["files"] != source.fingerprint()
        or (captions is not None and captions != source.hash_captions())
    ):
        raise DataError(
            f"was made from other data ({manifest.config['source']})",
            where=folder,
            expected=f"{source.name} as it is now",
            hint=OTHER_CACHE,
        )


def _check_settings(folder: Path, manifest: Manifest, size_px: int | None, config: DataConfig | None) -> None:
    """Refuse a cache whose pictures were chosen or cropped in another way; arguments as of `LatentCache.open`."""
    if size_px and manifest.config["size_px"] != size_px:
        raise DataError(
            f"holds latents of {manifest.config['size_px']} px pictures",
            where=folder,
            expected=f"{size_px} px",
            hint=OTHER_CACHE,
        )
    if config is None:
        return
    recorded, wanted = manifest.config["data"], select_content_settings(config)
    differing = "; ".join(
        f"{name}: {recorded.get(name)} in the cache, {value} now"
        for name, value in wanted.items()
        if recorded.get(name) != value
    )
    if differing:
        raise DataError(
            f"was made with other data settings ({differing})",
            where=folder,
            hint=OTHER_CACHE,
        )


def unit_name(number: int) -> str:
    """Returns the file name of a unit."""
    return f"unit-{number:05d}.safetensors"


def select_content_settings(config: DataConfig) -> dict[str, Any]:
    """Returns the settings that decide a cache's content, besides teacher, data and size."""
    settings: dict[str, Any] = json.loads(config.model_dump_json(exclude={"size_px", "max_unusable"}))
    return settings
