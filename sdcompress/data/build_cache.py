"""Encode a data set into a latent cache: unit by unit, resumable, over one or several processes."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sdcompress_engines.files import replace_file
from sdcompress_engines.manifest import (
    FileEntry,
    check_free,
    require_space,
    sha256_file,
    storage_errors,
    write_manifest,
)
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.data.cache import EMPTY, INDEX, LatentCache, _cut, default_size_px, unit_name
from sdcompress.data.config import DataConfig
from sdcompress.data.encode import (
    LatentEncoder,
    Precision,
    PrecisionChoice,
    choose_precision,
    embed_in_batches,
    text_encoders_on,
)
from sdcompress.data.records import Skipped, Source
from sdcompress.data.units import EncodedUnit, UnitEncoder
from sdcompress.data.views import to_pixels as to_pixels

if TYPE_CHECKING:
    from sdcompress.models.load import LoadedPipeline


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
    replace_file(temporary, path)
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
    replace_file(temporary, folder / f"{unit_name(number)}.json")


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
    replace_file(partial, output)
    told = "".join(f", {len(keys)} left out: {reason}" for reason, keys in total.reasons.items()) + "".join(
        f", {count} filtered out: {reason}" for reason, count in total.filtered.items()
    )
    report.say(
        f"cache: {len(kept):,} pictures, {figures['bytes_per_picture']:,} bytes each{told}"
        + (f", {found - len(kept)} duplicates" if found > len(kept) else "")
    )
