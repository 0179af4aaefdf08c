"""Draw a data set with the teacher itself: pictures of a list of prompts, in a folder that `distill` takes.

Pictures are drawn in batches at fixed places (0 to B-1, B to 2B-1, ...), and each is written whole or not at all. A
stopped run that is started again with the same settings draws the batches that lack a picture. So it ends with the same
bytes as a run that was never stopped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from sdcompress_engines.errors import DataError, storage_errors
from sdcompress_engines.files import write_atomically
from sdcompress_engines.manifest import FileEntry, Manifest, read_manifest, sha256_file, write_manifest
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.backends.registry import backend_name
from sdcompress.generate.output_folder import KIND, METADATA, check_claim, claim_folder, list_missing
from sdcompress.generate.settings import SAVE_OPTIONS, GenerateSettings
from sdcompress.models.locate import hash_pipeline, local_paths, locate_pipeline
from sdcompress.support.pictures import encode_picture
from sdcompress.support.quiet import quiet


@dataclass(frozen=True)
class GeneratedSet:
    """A finished data set.

    Attributes:
        folder: of the pictures.
        manifest: with the figures `pictures`, `prompts`, `width_px`, `height_px`, and of the pictures `bytes` and
            `bytes_per_picture`.
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
    """Draw a data set: picture files, `metadata.jsonl`, the settings and, last, a manifest.

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
        UsageError: invalid settings, or no such teacher.
        ArtifactError: something else is in `output`, or a set of other settings.
        ModelError, BackendMissing: as `open_pipeline`.
        StorageError: `output` cannot be written.
    """
    settings.check()
    if not prompts:
        raise DataError("no prompt to draw", expected="at least one")
    output = output.absolute()
    identity = asdict(settings) | {
        "backend": backend_name(settings.backend),
        "device": _find_device(),
        "teacher": hash_teacher(teacher),
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
    }
    names = [f"{i:06d}.{settings.picture_format}" for i in range(settings.count)]
    with claim_folder(output, identity, names, force, [*local_paths(teacher), *inputs]) as manifest:
        if manifest is not None:
            report.show_line(f"data set: {output} is complete already")
            return GeneratedSet(output, manifest, 0, 0.0)
        started = time.monotonic()
        drawn = _draw_missing(teacher, prompts, output, identity, names, settings, report)
        check_claim(output, identity)
        rows = (json.dumps(row) + "\n" for row in _describe(names, prompts, settings))
        write_atomically(output / METADATA, "".join(rows))
        manifest = _write_manifest(output, identity, names, min(len(prompts), settings.count))
    return GeneratedSet(output, manifest, drawn, time.monotonic() - started)


def _describe(names: list[str], prompts: Sequence[str], settings: GenerateSettings) -> Iterator[dict[str, Any]]:
    """Yields the row of each picture in `metadata.jsonl`."""
    for i, name in enumerate(names):
        yield {
            "file_name": name,
            "text": prompts[i % len(prompts)],
            "seed": settings.seed + i,
            "prompt_index": i % len(prompts),
            "steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
        }


def _find_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _draw_missing(
    teacher: str | Path,
    prompts: Sequence[str],
    output: Path,
    identity: dict[str, Any],
    names: list[str],
    settings: GenerateSettings,
    report: Reporter,
) -> int:
    """Draw every batch that lacks a picture, and write the missing pictures. Returns their number.

    Args:
        teacher, prompts, output, settings, report: as of `generate_dataset`.
        identity: what decides the pictures.
        names: file names of all pictures.
    """
    from sdcompress.backends.assemble import close_pipeline, open_pipeline
    from sdcompress.sampling import generate

    missing = list_missing(output, names)
    if not missing:
        return 0
    if len(missing) < len(names):
        report.show_line(f"data set: continuing after {len(names) - len(missing):,} of {len(names):,} pictures")
    suffix, options = f".{settings.picture_format}", SAVE_OPTIONS[settings.picture_format]
    pipeline = open_pipeline(teacher, settings.backend, report=report)
    try:
        lacking = set(missing)
        with report.task("draw pictures", len(missing)) as advance:
            for first in sorted({i // settings.batch_size * settings.batch_size for i in missing}):
                batch = range(first, min(first + settings.batch_size, len(names)))
                with quiet():
                    pictures = generate(
                        pipeline,
                        [prompts[i % len(prompts)] for i in batch],
                        seeds=[settings.seed + i for i in batch],
                        steps=settings.steps,
                        guidance_scale=settings.guidance_scale,
                        size_px=settings.size_px,
                        batch_size=settings.batch_size,
                    )
                check_claim(output, identity)
                written = [i for i in batch if i in lacking]
                with storage_errors(output):
                    for i in written:
                        write_atomically(output / names[i], encode_picture(pictures[i - first], suffix, **options))
                advance(len(written))
    finally:
        close_pipeline(pipeline)
    return len(missing)


def _write_manifest(output: Path, identity: dict[str, Any], names: list[str], prompt_count: int) -> Manifest:
    """Write the manifest of a complete set. Returns it.

    Args:
        output: folder of the set.
        identity: what decides the pictures.
        names: file names of all pictures.
        prompt_count: number of prompts that pictures show.
    """
    hashed = {name: FileEntry(sha256_file(output / name), (output / name).stat().st_size) for name in names}
    with Image.open(output / names[0]) as picture:
        width, height = picture.size
    size = sum(entry.bytes for entry in hashed.values())
    figures = {
        "pictures": len(names),
        "prompts": prompt_count,
        "width_px": width,
        "height_px": height,
        "bytes": size,
        "bytes_per_picture": round(size / len(names)),
    }
    config = {key: value for key, value in identity.items() if key not in ("teacher", "prompts")}
    return write_manifest(
        output,
        KIND,
        config=config,
        inputs={"teacher": identity["teacher"], "prompts": identity["prompts"]},
        figures=figures,
        seed=identity["seed"],
        hashed=hashed,
    )
