"""Draw a data set with the teacher itself: pictures of a list of prompts, in a folder that `distill` takes.

Pictures are drawn in batches at fixed places (0 to B-1, B to 2B-1, ...). Each picture is written whole or not at all,
and so is the file with the latents of a batch, which comes before its pictures. A stopped run that is started again
with the same settings draws the batches that lack a file. So it ends with the same bytes as a run that was never
stopped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from sdcompress_engines.errors import DataError, ModelError, storage_errors
from sdcompress_engines.files import write_atomically
from sdcompress_engines.manifest import FileEntry, Manifest, read_manifest, sha256_file, write_manifest
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.backends.registry import backend_name
from sdcompress.data.drawn import DATASET, hash_vae, pack_latents, read_vae_hash
from sdcompress.families.sampling_defaults import SamplingDefaults, read_defaults
from sdcompress.families.schemas.check import is_tiny_vae
from sdcompress.families.schemas.tiny_vae import TinyVaeSchema
from sdcompress.families.schemas.vae import VaeSchema
from sdcompress.generate.layout import Batch, Layout
from sdcompress.generate.output_folder import METADATA, check_claim, claim_folder, find_missing
from sdcompress.generate.settings import SAVE_OPTIONS, GenerateSettings
from sdcompress.models.locate import hash_pipeline, local_paths, locate_pipeline, read_config_in, read_model_index
from sdcompress.sampling import choose_sampling, generate
from sdcompress.support.pictures import encode_picture
from sdcompress.support.pipeline import latent_scale
from sdcompress.support.quiet import quiet


@dataclass(frozen=True)
class GeneratedSet:
    """A finished data set.

    Attributes:
        folder: of the pictures.
        manifest: with the figures `pictures`, `prompts`, `width_px`, `height_px`, of the pictures `bytes` and
            `bytes_per_picture`, and `latents_bytes`.
        drawn: number of pictures that this run wrote; the others were there before.
        seconds: for loading the teacher, drawing and writing.
    """

    folder: Path
    manifest: Manifest
    drawn: int
    seconds: float


def hash_teacher(teacher: str | Path) -> str:
    """Returns the sha256 that names a teacher in results; for an export folder, the hash of its files.

    Raises:
        UsageError, ModelError: as `locate_pipeline`.
    """
    return hash_pipeline(Path(teacher) if is_export(teacher) else locate_pipeline(teacher))


def is_export(teacher: str | Path) -> bool:
    """Returns whether a path is a folder that `sdcompress export` wrote."""
    manifest = read_manifest(Path(teacher)) if Path(teacher).is_dir() else None
    return manifest is not None and manifest.kind in ("onnx", "engine")


def generate_dataset(
    teacher: str | Path,
    prompts: Sequence[str],
    output: Path,
    settings: GenerateSettings,
    *,
    force: bool = False,
    inputs: Iterable[Path] = (),
    report: Reporter = SILENT,
) -> GeneratedSet:
    """Draw a data set: picture files, their latents, `metadata.jsonl`, the settings and, last, a manifest.

    An unfinished or damaged set of the same settings is completed. A whole one is left as it is.

    Args:
        teacher: what `open_pipeline` takes.
        prompts: what the pictures show, in turn.
        output: folder of the data set.
        settings: of the pictures.
        force: replace a set of other settings, or another output of sdcompress, in `output`.
        inputs: files that the prompts came from.
        report: shows the progress.

    Raises:
        DataError: there are no prompts.
        UsageError: invalid settings, no such teacher, or guidance of one that was trained without.
        ModelError: as `open_pipeline`, or the teacher has no VAE in whose scale its latents can be written.
        ArtifactError: something else is in `output`, or a set of other settings.
        BackendMissing: as `open_pipeline`.
        StorageError: `output` cannot be written.
    """
    settings.check()
    if not prompts:
        raise DataError("no prompt to draw", expected="at least one")
    output = output.absolute()
    model = _read_teacher(teacher, latents=settings.latents)
    steps, guidance_scale = choose_sampling(model.defaults, settings.steps, settings.guidance_scale)
    layout = Layout(prompts, replace(settings, steps=steps, guidance_scale=guidance_scale))
    identity = asdict(layout.settings) | {
        "backend": backend_name(settings.backend),
        "device": _find_device(),
        "teacher": hash_teacher(teacher),
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
    }
    with claim_folder(output, identity, layout.files(), force, [*local_paths(teacher), *inputs]) as manifest:
        if manifest is not None:
            report.show_line(f"data set: {output} is complete already")
            return GeneratedSet(output, manifest, 0, 0.0)
        started = time.monotonic()
        drawn = _draw_missing(teacher, model, output, identity, layout, report)
        check_claim(output, identity)
        write_atomically(output / METADATA, "".join(json.dumps(row) + "\n" for row in layout.rows()))
        manifest = _write_manifest(output, identity, model, layout)
    return GeneratedSet(output, manifest, drawn, time.monotonic() - started)


@dataclass(frozen=True)
class _TeacherFacts:
    """What is known of a teacher before it is loaded.

    Attributes:
        defaults: its own steps and guidance.
        scaling_factor: of its VAE, or of the small decoder in its place.
        factor, mean: of its latents, see `latent_scale`.
        pipeline: sha256 of the pipeline that it is an export of; None where it is no export.
    """

    defaults: SamplingDefaults
    scaling_factor: float
    factor: Any
    mean: Any
    pipeline: str | None


def _read_teacher(teacher: str | Path, *, latents: bool) -> _TeacherFacts:
    """Returns what the configs of a teacher say; no weights are read.

    Args:
        teacher: as of `generate_dataset`.
        latents: its latents are needed in the scale of its VAE.

    Raises:
        UsageError, ModelError: as `locate_pipeline`, or a config is broken, or there is no VAE.
    """
    exported = read_manifest(Path(teacher)) if is_export(teacher) else None
    folder = locate_pipeline(teacher) if exported is None else Path(teacher) / "pipeline"
    index, config = read_model_index(folder), read_config_in(folder, "vae")
    if latents and is_tiny_vae(config):
        raise ModelError(
            "has a small decoder in the place of its VAE, so the VAE's scale of its latents is not known",
            where=teacher,
            expected="a model with its own VAE",
            hint="--no-latents, or the model from before it got the small decoder",
        )
    vae = (TinyVaeSchema if is_tiny_vae(config) else VaeSchema).model_validate(config)
    factor, mean = latent_scale(vae.model_dump(), index)
    defaults = read_defaults(index, read_config_in(folder, "unet"))
    pipeline = None if exported is None else exported.inputs.get("pipeline")
    return _TeacherFacts(defaults, vae.scaling_factor, factor, mean, pipeline)


def _find_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _draw_missing(
    teacher: str | Path, model: _TeacherFacts, output: Path, identity: dict[str, Any], layout: Layout, report: Reporter
) -> int:
    """Draw every batch that lacks a file, and write the missing files. Returns the number of pictures written.

    Args:
        teacher, output, report: as of `generate_dataset`.
        model: the teacher's configs.
        identity: what decides the pictures.
        layout: which file holds what.
    """
    from sdcompress.backends.assemble import close_pipeline, open_pipeline

    missing = find_missing(output, layout.files())
    if not missing:
        return 0
    pictures = sum(len(missing.intersection(batch.pictures)) for batch in layout.batches)
    if pictures < layout.settings.count:
        existing = layout.settings.count - pictures
        report.show_line(f"data set: continuing after {existing:,} of {layout.settings.count:,} pictures")
    pipeline = open_pipeline(teacher, layout.settings.backend, report=report)
    try:
        vae = hash_vae(pipeline.vae)
        with report.task("draw pictures", pictures) as advance:
            for batch in layout.batches:
                if missing.isdisjoint(batch.files):
                    continue
                content = _draw(pipeline, batch, layout, model, vae)
                check_claim(output, identity)
                with storage_errors(output):
                    for name in [name for name in content if name in missing]:
                        write_atomically(output / name, content[name])
                advance(len(missing.intersection(batch.pictures)))
    finally:
        close_pipeline(pipeline)
    return pictures


def _draw(pipeline: Any, batch: Batch, layout: Layout, model: _TeacherFacts, vae: str) -> dict[str, bytes]:
    """Draw a batch. Returns its files by name, the latents first.

    Args:
        pipeline: draws.
        batch, layout: which pictures.
        model: gives the scale of the latents.
        vae: hash of the VAE.

    Raises:
        ModelError: the latents do not fit in half precision.
    """
    import torch

    settings, kept = layout.settings, list[torch.Tensor]()
    with quiet():
        pictures = generate(
            pipeline,
            [layout.prompt_of(i) for i in batch.numbers],
            seeds=[settings.seed + i for i in batch.numbers],
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            size_px=settings.size_px,
            batch_size=settings.batch_size,
            take_latents=kept.append,
        )
    suffix, options = f".{settings.picture_format}", SAVE_OPTIONS[settings.picture_format]
    encoded = [encode_picture(picture, suffix, **options) for picture in pictures]
    content = dict(zip(batch.pictures, encoded, strict=True))
    if batch.latents is None:
        return content
    latents = (kept[0].float().cpu() / model.factor + model.mean).half()
    if not latents.isfinite().all():
        raise ModelError("the latents of a picture do not fit in half precision", hint="--no-latents")
    return {batch.latents: pack_latents(latents, encoded, vae)} | content


def _write_manifest(output: Path, identity: dict[str, Any], model: _TeacherFacts, layout: Layout) -> Manifest:
    """Write the manifest of a complete set. Returns it.

    Args:
        output: folder of the set.
        identity: what decides the pictures.
        model: the teacher's configs.
        layout: which file holds what.
    """
    hashed = {name: FileEntry(sha256_file(output / name), (output / name).stat().st_size) for name in layout.files()}
    pictures = [name for batch in layout.batches for name in batch.pictures]
    with Image.open(output / pictures[0]) as picture:
        width, height = picture.size
    size = sum(hashed[name].bytes for name in pictures)
    figures = {
        "pictures": len(pictures),
        "prompts": min(len(layout.prompts), len(pictures)),
        "width_px": width,
        "height_px": height,
        "bytes": size,
        "bytes_per_picture": round(size / len(pictures)),
        "latents_bytes": sum(entry.bytes for entry in hashed.values()) - size,
    }
    config = {key: value for key, value in identity.items() if key not in ("teacher", "prompts")}
    if layout.batches[0].latents is not None:
        config |= {"scaling_factor": model.scaling_factor, "vae": read_vae_hash(output / layout.batches[0].latents)}
    inputs = {name: identity[name] for name in ("teacher", "prompts")}
    return write_manifest(
        output,
        DATASET,
        config=config,
        inputs=inputs | ({} if model.pipeline is None else {"pipeline": model.pipeline}),
        figures=figures,
        seed=identity["seed"],
        hashed=hashed,
    )
