"""Encode a data set into a latent cache: unit by unit, resumable, over one or several processes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from sdcompress_engines.errors import ArtifactError, DataError, SdCompressError, storage_errors
from sdcompress_engines.files import write_atomically
from sdcompress_engines.json_files import read_json_object
from sdcompress_engines.manifest import write_manifest
from sdcompress_engines.output_folders import check_free, locked, replace_folder
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.data.cache import EMPTY, INDEX, LatentCache, select_content_settings
from sdcompress.data.cache_units import UnitTotals, drop_duplicates, read_facts, sum_units, write_unit
from sdcompress.data.config import DataConfig
from sdcompress.data.drawn import DrawnSet, describe_latents
from sdcompress.data.embed import embed_absent_caption, text_encoders_on
from sdcompress.data.encode import LatentEncoder
from sdcompress.data.precision import Precision, PrecisionChoice, choose_vae_precision
from sdcompress.data.records import Source
from sdcompress.data.units import UnitEncoder
from sdcompress.models.decoder import check_has_vae
from sdcompress.support.pipeline import native_size_px

if TYPE_CHECKING:
    from accelerate import PartialState

    from sdcompress.models.load import LoadedPipeline

BUILD = "build.json"
"""The file that records what an unfinished build encodes; the build is continued only if this matches."""


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
    """Encode every usable picture and caption of a source. Returns the cache.

    A stopped build is continued if it has the same teacher, data, settings and precision; otherwise it starts over.
    Under `accelerate launch` or `torchrun` the processes share the units, and the first one writes the index. Exact
    duplicates, which have the same bytes and the same captions, are kept once. Whole pictures of a drawn set are not
    encoded where the set holds their latents. The teacher is not changed.

    Args:
        source: the data set.
        teacher: its VAE and its text encoders encode.
        output: folder of the cache.
        size_px: side of the square pictures, or the root of the buckets' area; by default that of `config`, then the
            UNet's own.
        config: how pictures are cropped, and which share of them may be unusable.
        precision: in which the VAE encodes; `auto` is the result of `choose_vae_precision`, the same for all processes.
        force: replace what is in `output`.
        report: shows the progress.

    Raises:
        DataError: nothing is usable, more is unusable than `config.max_unusable`, or there is too little memory for one
            picture; or the processes were given different builds.
        BackendMissing: `precision` is bf16 and the GPU has none. ModelError: as `check_has_vae`.
        ArtifactError, StorageError: `output` cannot be written, or another process is building it.
    """
    from accelerate import PartialState

    config, pipeline, output = config or DataConfig(), teacher.pipeline, output.absolute()
    check_has_vae(pipeline, teacher.name)
    size_px = size_px or config.size_px or native_size_px(pipeline)
    state = PartialState(cpu=not torch.cuda.is_available())
    check_free(output, force, inputs := [*source.inputs, teacher.folder])
    chosen = agree_on_precision(choose_vae_precision(pipeline, state.device, precision))
    drawn = _open_latents(source, teacher, report)
    identity = _identify_build(source, teacher, size_px, config, chosen, drawn)
    _check_same_build(identity, output)
    partial = output.with_name(f".{output.name}.partial")
    with _owned(output, force, inputs, state), text_encoders_on(pipeline, state.device):
        if state.is_main_process:
            _start_or_continue(partial, identity, report)
        state.wait_for_everyone()
        latents = LatentEncoder(pipeline.vae, state.device, chosen, processes=state.num_processes, report=report)
        encoder = UnitEncoder(pipeline, latents, size_px, config, drawn)
        with _kept_where_begun(partial, state):
            _encode_units(partial, source, encoder, state, report)
            state.wait_for_everyone()
            if state.is_main_process:
                _finish(partial, output, source, encoder, identity, report)
        state.wait_for_everyone()
    return LatentCache.open(output)


@contextmanager
def _owned(output: Path, force: bool, inputs: Iterable[Path], state: PartialState) -> Iterator[None]:
    """Keep other builds of the same cache out, for the block. The main process holds the lock for all of its build.

    The lock lies beside the folder of the build, which is emptied and renamed.

    Raises:
        ArtifactError: another process is building the cache, or has just built it.
        StorageError: the file system has no locks.
    """
    with storage_errors(output), locked(output) if state.is_main_process else nullcontext():
        if state.is_main_process:
            check_free(output, force, inputs)
        yield


@contextmanager
def _kept_where_begun(partial: Path, state: PartialState) -> Iterator[None]:
    """After an error remove the build's folder, or name it where it holds units to continue with."""
    try:
        yield
    except BaseException as error:
        if done := len(list(partial.glob("unit-*.json"))):
            if isinstance(error, SdCompressError):
                raise error.with_hint(f"the same command continues after {done} units, kept in {partial}") from error
        elif state.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def agree_on_precision(precision: Precision) -> Precision:
    """Returns fp32 where any of the processes chose fp32, because a cache has one precision."""
    from accelerate.utils import gather_object

    return "fp32" if "fp32" in gather_object([precision]) else precision


def _open_latents(source: Source, teacher: LoadedPipeline, report: Reporter) -> DrawnSet | None:
    """Returns the latents that were drawn with the pictures, or None where the pictures have to be encoded.

    Args:
        source, teacher: as of `build_cache`.
        report: gets a line where there are latents that cannot be used.
    """
    try:
        drawn = source.open_drawn()
    except DataError as error:
        report.show_line(f"cache: the pictures are encoded, without the drawn latents: {error}")
        return None
    if drawn is None or drawn.fits(teacher.sha256, teacher.pipeline.vae):
        return drawn
    report.show_line(
        f"cache: the pictures are encoded: the latents of {source.name} were drawn by {drawn.teacher[:12]}, whose VAE"
        f" is not known to be that of {teacher.name} ({teacher.sha256[:12]})"
    )
    return None


def _identify_build(
    source: Source,
    teacher: LoadedPipeline,
    size_px: int,
    config: DataConfig,
    precision: Precision,
    drawn: DrawnSet | None,
) -> dict[str, Any]:
    """Returns what decides the content of a cache, as JSON values.

    Args:
        source, teacher, config: as of `build_cache`.
        size_px: side of the square pictures, or the root of the buckets' area.
        precision: in which the VAE encodes.
        drawn: latents that are taken in place of encoding.
    """
    return {
        "teacher": teacher.sha256,
        "files": source.fingerprint(),
        "captions": source.hash_captions(),
        "size_px": size_px,
        "data": select_content_settings(config),
        "units": source.count_units(),
        "precision": precision,
        "latents": None if drawn is None else drawn.sha256,
    }


def _check_same_build(identity: dict[str, Any], output: Path) -> None:
    """Refuse processes that were given different builds, by what differs."""
    from accelerate.utils import gather_object

    everyones = gather_object([identity])
    if differing := [name for name in identity if any(each[name] != everyones[0][name] for each in everyones)]:
        raise DataError(
            f"the processes differ in {', '.join(differing)}",
            where=output,
            expected="the same command, with equal copies of model and data, on every machine",
        )


def _start_or_continue(partial: Path, identity: dict[str, Any], report: Reporter) -> None:
    """Keep the units of a stopped build of the same identity, or empty the folder.

    Args:
        partial: folder of the build.
        identity: of this build.
        report: gets a line where finished units are kept or thrown away.
    """
    marker = partial / BUILD
    if marker.is_file():
        try:
            recorded_later = {"precision": "fp32", "captions": identity["captions"], "latents": None}
            begun = recorded_later | read_json_object(marker)
        except ArtifactError:
            begun = {}
        done = len(list(partial.glob("unit-*.json")))
        if begun == json.loads(json.dumps(identity)):
            _remove_unfinished(partial)
            report.show_line(f"cache: continuing after {done} of {identity['units']} units")
            return
        if done and begun == identity | {"precision": begun.get("precision")}:
            before, now = begun["precision"], identity["precision"]
            report.show_line(
                f"cache: starting over: its {done} units were encoded in {before}, this build encodes in {now}"
            )
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_atomically(marker, json.dumps(identity, sort_keys=True))


def _remove_unfinished(partial: Path) -> None:
    """Remove the files that a killed build was writing; no process writes yet."""
    for path in partial.iterdir():
        if path.name.startswith(".") or path.suffix == ".tmp":
            path.unlink()


def _encode_units(partial: Path, source: Source, encoder: UnitEncoder, state: PartialState, report: Reporter) -> None:
    """Encode and write the units of this process that are not there yet.

    Args:
        partial: folder of the build.
        source: the data set.
        encoder: encodes one unit.
        state: the number of processes and the index of this one.
        report: shows the progress.
    """
    with report.task("encode pictures") as advance:
        for number in range(state.process_index, source.count_units(), state.num_processes):
            if read_facts(partial, number) is None:
                write_unit(partial, number, encoder.encode(source, number, advance))


def _finish(
    partial: Path,
    output: Path,
    source: Source,
    encoder: UnitEncoder,
    identity: dict[str, Any],
    report: Reporter,
) -> None:
    """Check the share of unusable pictures, write index and manifest, and rename the folder into its place.

    Args:
        partial: folder of the build, with all units.
        output: folder of the cache.
        source: the data set.
        encoder: encoded the units.
        identity: of the build.
        report: gets a summary in one line.

    Raises:
        DataError: nothing is usable, or too little.
    """
    totals = sum_units(partial, source.count_units())
    skipped = totals.skipped
    if skipped.read == 0:
        shutil.rmtree(partial)
    skipped.check(source.name, encoder.config.max_unusable)
    index = drop_duplicates(totals.columns)
    save_file(index, partial / INDEX)
    save_file(embed_absent_caption(encoder.pipeline), partial / EMPTY)
    pictures, duplicates = len(index["unit"]), len(totals.columns["unit"]) - len(index["unit"])
    size = sum(entry.bytes for entry in totals.hashed.values()) + (partial / INDEX).stat().st_size
    figures = {
        "pictures": pictures,
        "duplicates": duplicates,
        "captions": totals.captions,
        "bytes": size,
        "bytes_per_picture": round(size / pictures),
        "skipped": {reason: len(keys) for reason, keys in skipped.reasons.items()},
        "filtered": skipped.filtered,
        "tiled_views": totals.tiled,
        "drawn": totals.drawn,
        "not_drawn": totals.not_drawn,
    }
    sidecars = [*(path.name for path in partial.glob("unit-*.json")), BUILD]  # by which a killed build is continued
    _write_manifest(partial, source, encoder, identity, totals, figures, sidecars)
    replace_folder(partial, output)
    for name in sidecars:
        (output / name).unlink()
    parts = [f"{pictures:,} pictures", f"{figures['bytes_per_picture']:,} bytes each"]
    parts += [f"{len(keys)} left out: {reason}" for reason, keys in skipped.reasons.items()]
    parts += [f"{count} filtered out: {reason}" for reason, count in skipped.filtered.items()]
    parts += [f"{duplicates} duplicates"] if duplicates else []
    parts += [describe_latents(totals.drawn, totals.not_drawn)] if encoder.drawn is not None else []
    report.show_line(f"cache: {', '.join(parts)}")


def _write_manifest(
    folder: Path,
    source: Source,
    encoder: UnitEncoder,
    identity: dict[str, Any],
    totals: UnitTotals,
    figures: dict[str, Any],
    sidecars: list[str],
) -> None:
    """Write the manifest of a cache.

    Args:
        folder: with the units and the index.
        source: the data set.
        encoder: encoded the units.
        identity: of the build.
        totals: of the units.
        figures: what the manifest records about the pictures.
        sidecars: names of the files that only a build needs.
    """
    content = hashlib.sha256("".join(entry.sha256 for entry in totals.hashed.values()).encode()).hexdigest()
    write_manifest(
        folder,
        "cache",
        hashed=totals.hashed,
        without=sidecars,
        inputs={"teacher": identity["teacher"], "data": content},
        figures=figures,
        config={
            "size_px": identity["size_px"],
            "source": source.name,
            "files": identity["files"],
            "captions": identity["captions"],
            "data": identity["data"],
            "views": encoder.views,
            "shapes": encoder.shapes,
            "precision": identity["precision"],
            "tile_px": totals.tile_px,
            "latents": identity["latents"],
        },
    )
