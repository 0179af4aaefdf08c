"""Latents and text embeddings, computed once: training from the cache never runs the VAE or the text encoder.

A cache is made in pieces, one file for each unit of the source (a shard, or a thousand pictures of a folder). A piece
is whole or not there, so a stopped build goes on; it does not depend on the others, so any number of processes can
share the work.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sdcompress_engines.errors import DataError
from sdcompress_engines.manifest import (
    FileEntry,
    check_free,
    faults,
    read_manifest,
    require_space,
    sha256_file,
    storage_errors,
    write_manifest,
)
from sdcompress_engines.progress import SILENT, Reporter

from .config import DataConfig
from .encode import LatentEncoder, Precision, PrecisionChoice, choose_precision, embed_in_batches, text_encoders_on
from .sources import Skipped, Source
from .units import EncodedUnit, UnitEncoder
from .views import to_pixels as to_pixels  # re-exported

if TYPE_CHECKING:
    from sdcompress.teacher import LoadedPipeline

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


def build_cache(
    source: Source,
    teacher: LoadedPipeline,
    output: Path,
    size_px: int | None = None,
    *,
    config: DataConfig | None = None,
    precision: PrecisionChoice = "auto",
    force: bool = False,
    report: Reporter = SILENT,
) -> LatentCache:
    """Encode every usable picture and caption of `source` with the teacher's VAE and text encoder into `output`.

    A stopped build is taken up where it was, unless it encoded in another precision. Under `accelerate launch` or
    `torchrun` the processes share the units, and the first one writes the index. Exact duplicates (the same bytes with
    the same captions) are kept once. The teacher's parts are where they were afterwards, with the weights they had.

    Args:
        precision: in which the VAE encodes; `auto` is what `choose_precision` says, the same for all processes.

    Raises:
        DataError: nothing usable, or more unusable than `config.max_unusable`; a picture that the memory does not hold.
        BackendMissing: `precision` is bf16 and the GPU has none.
        ArtifactError, StorageError: `output` cannot be written.
    """
    from accelerate import PartialState

    config = config or DataConfig()
    pipeline: Any = teacher.pipeline
    size_px = size_px or config.size_px or default_size_px(pipeline)
    state = PartialState(cpu=not torch.cuda.is_available())
    check_free(output, force)
    chosen = _agree(choose_precision(pipeline, state.device, precision))
    identity = {
        "teacher": teacher.sha256,
        "files": source.fingerprint(),
        "size_px": size_px,
        "data": _cut(config),
        "units": source.units(),
        "precision": chosen,
    }
    partial = output.with_name(f".{output.name}.partial")
    with storage_errors(output), text_encoders_on(pipeline, state.device):
        if state.is_main_process:
            _start_or_continue(partial, identity, report)
        state.wait_for_everyone()
        latents = LatentEncoder(pipeline.vae, state.device, chosen, processes=state.num_processes, report=report)
        encoder = UnitEncoder(pipeline, latents, size_px, config)
        try:
            with report.task("encode pictures") as advance:
                for number in range(state.process_index, source.units(), state.num_processes):
                    if not (partial / f"{unit_name(number)}.json").is_file():
                        _write_unit(partial, number, encoder.encode(source, number, advance))
            state.wait_for_everyone()
            if state.is_main_process:
                _finish(partial, output, source, teacher, identity, encoder, config, report)
        except BaseException:
            if state.is_main_process and not any(partial.glob("unit-*.json")):  # nothing to go on with
                shutil.rmtree(partial, ignore_errors=True)
            raise
        state.wait_for_everyone()
    return LatentCache.open(output)


def _agree(precision: Precision) -> Precision:
    """Returns fp32 where any of the processes says fp32, for one cache has one precision."""
    from accelerate.utils import gather_object

    return "fp32" if "fp32" in gather_object([precision]) else precision


def _start_or_continue(partial: Path, identity: dict[str, Any], report: Reporter) -> None:
    """Keep the pieces of a stopped build of the same identity, or empty the folder."""
    marker = partial / "build.json"
    if marker.is_file():
        try:
            begun = {"precision": "fp32"} | json.loads(marker.read_text())
        except (ValueError, TypeError):
            begun = {}
        done = len(list(partial.glob("unit-*.json")))
        if begun == json.loads(json.dumps(identity)):
            report.say(f"cache: going on after {done} of {identity['units']} pieces")
            return
        if done and begun == identity | {"precision": begun.get("precision")}:
            was, now = begun["precision"], identity["precision"]
            report.say(f"cache: starting over: its {done} pieces were encoded in {was}, this build encodes in {now}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    marker.write_text(json.dumps(identity, sort_keys=True))


def _write_unit(folder: Path, number: int, unit: EncodedUnit) -> None:
    """Write a unit's file and, last, the JSON beside it that says it is whole."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in unit.tensors.values())
    require_space(folder, size, "the cache's next piece")
    path = folder / unit_name(number)
    temporary = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in unit.tensors.items()}, temporary)
    os.replace(temporary, path)
    skipped = unit.skipped
    facts = {
        "sha256": sha256_file(path),
        "bytes": path.stat().st_size,
        "read": skipped.read,
        "reasons": skipped.reasons,
        "filtered": skipped.filtered,
        "fields": sorted(skipped.fields),
        "tiled": unit.tiled,
        "tile_px": unit.tile_px,
    }
    temporary.write_text(json.dumps(facts))
    os.replace(temporary, folder / f"{unit_name(number)}.json")


def _finish(
    partial: Path,
    output: Path,
    source: Source,
    teacher: LoadedPipeline,
    identity: dict[str, Any],
    encoder: UnitEncoder,
    config: DataConfig,
    report: Reporter,
) -> None:
    """Check the shares, write index and manifest, and rename the folder into its place."""
    total = Skipped()
    hashed: dict[str, FileEntry] = {}
    columns: dict[str, list[torch.Tensor]] = {}
    captions = rows = tiled = 0
    tiles_px: list[int] = []
    for number in range(source.units()):
        facts = json.loads((partial / f"{unit_name(number)}.json").read_text())
        total.merge(
            Skipped(
                read=facts["read"], reasons=facts["reasons"], filtered=facts["filtered"], fields=set(facts["fields"])
            )
        )
        tiled += facts.get("tiled", 0)
        tiles_px += [facts["tile_px"]] if facts.get("tile_px") else []
        hashed[unit_name(number)] = FileEntry(facts["sha256"], facts["bytes"])
        unit = load_file(partial / unit_name(number))
        ours = {name.removeprefix("pictures."): tensor for name, tensor in unit.items() if name.startswith("pictures.")}
        ours["unit"] = torch.full_like(ours["row"], number)
        ours["first"] = ours["first"] + captions
        captions += len(ours["caption_row"])
        rows += len(unit.get("text", ()))
        for name, tensor in ours.items():
            columns.setdefault(name, []).append(tensor)
    if total.read == 0:
        shutil.rmtree(partial)
    total.check(source.name, config.max_unusable)
    index = {name: torch.cat(parts) for name, parts in columns.items()}
    _, first_seen = np.unique(index.pop("digest").numpy(), axis=0, return_index=True)
    kept = torch.from_numpy(np.sort(first_seen))
    found = len(index["unit"])
    index |= {name: index[name][kept].contiguous() for name in ("unit", "bucket", "row", "first", "count")}
    save_file(index, partial / INDEX)
    save_file(embed_in_batches(encoder.pipeline, [""]), partial / EMPTY)
    (partial / "build.json").unlink()
    for sidecar in partial.glob("unit-*.json"):
        sidecar.unlink()
    size = sum(entry.bytes for entry in hashed.values()) + (partial / INDEX).stat().st_size
    content = hashlib.sha256("".join(entry.sha256 for entry in hashed.values()).encode()).hexdigest()
    figures = {
        "pictures": len(kept),
        "duplicates": found - len(kept),
        "captions": rows,
        "bytes": size,
        "bytes_per_picture": round(size / len(kept)),
        "skipped": {k: len(v) for k, v in total.reasons.items()},
        "filtered": total.filtered,
        "tiled_views": tiled,
    }
    write_manifest(
        partial,
        "cache",
        hashed=hashed,
        inputs={"teacher": teacher.sha256, "data": content},
        figures=figures,
        config={
            "size_px": identity["size_px"],
            "source": source.name,
            "files": identity["files"],
            "data": identity["data"],
            "views": encoder.views,
            "shapes": encoder.shapes,
            "precision": identity["precision"],
            "tile_px": min(tiles_px, default=None),
        },
    )
    if output.exists():
        shutil.rmtree(output)
    os.replace(partial, output)
    told = "".join(f", {len(keys)} left out: {reason}" for reason, keys in total.reasons.items()) + "".join(
        f", {count} filtered out: {reason}" for reason, count in total.filtered.items()
    )
    report.say(
        f"cache: {len(kept):,} pictures, {figures['bytes_per_picture']:,} bytes each{told}"
        + (f", {found - len(kept)} duplicates" if found > len(kept) else "")
    )
