"""A data set made by a teacher itself: pictures of a list of prompts, in a folder that `distill` takes.

Pictures are drawn in batches at fixed places (0 to B-1, B to 2B-1, ...), each written whole or not at all. A stopped
run started again with the same settings draws the batches that lack a picture and so ends with the same bytes as one
that was never stopped.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sdcompress_engines.errors import ArtifactError, DataError, UsageError
from sdcompress_engines.files import replace_file
from sdcompress_engines.manifest import (
    FileEntry,
    Manifest,
    check_free,
    faults,
    read_manifest,
    sha256_file,
    sha256_tree,
    storage_errors,
    write_manifest,
)
from sdcompress_engines.progress import SILENT, Reporter

if TYPE_CHECKING:
    from PIL import Image

KIND = "dataset"
SETTINGS = "settings.json"
METADATA = "metadata.jsonl"
_TEMPORARY = ".part"
_SAVE: dict[str, dict[str, Any]] = {"webp": {"quality": 95}, "png": {}}


@dataclass(frozen=True)
class GenerateSettings:
    """What decides every byte of a made data set, besides the teacher, the prompts and the device.

    Attributes:
        count: pictures; picture i shows prompt i % len(prompts) and is drawn from seed + i.
        batch_size: pictures drawn at once. More is faster and takes more memory; sums in another order may change last
            bits.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance; 1 is none.
        size_px: side of the pictures, a multiple of 8; None is what the UNet was made for.
        seed: of the first picture.
        backend: torch, onnxruntime (ort) or tensorrt (trt).
        picture_format: webp (quality 95, a fifth of the disk) or png (lossless).
    """

    count: int
    batch_size: int = 16
    steps: int = 25
    guidance_scale: float = 7.5
    size_px: int | None = None
    seed: int = 0
    backend: str = "torch"
    picture_format: Literal["webp", "png"] = "webp"

    def check(self) -> None:
        """Refuse what cannot be drawn; every fault in one message.

        Raises:
            UsageError: a count, batch, size, seed or number of steps that cannot be; an unknown format or backend.
        """
        from sdcompress.backends.registry import backend_name

        backend_name(self.backend)
        wrong = [
            text
            for bad, text in (
                (self.count < 1, f"{self.count} pictures, at least 1 is needed"),
                (self.batch_size < 1, f"batches of {self.batch_size}, at least 1 is needed"),
                (not 1 <= self.steps <= 1000, f"{self.steps} steps, 1 to 1000 are possible"),
                (
                    not math.isfinite(self.guidance_scale) or self.guidance_scale < 0,
                    f"guidance {self.guidance_scale:g}, 0 or more is needed",
                ),
                (
                    self.size_px is not None and (self.size_px < 64 or self.size_px % 8 != 0),
                    f"{self.size_px} px, a multiple of 8 from 64 up is needed",
                ),
                (not 0 <= self.seed < 2**62, f"seed {self.seed}, 0 or more is needed"),
                (self.picture_format not in _SAVE, f"format {self.picture_format!r}, {' or '.join(_SAVE)} is needed"),
            )
            if bad
        ]
        if wrong:
            raise UsageError(f"cannot draw: {'; '.join(wrong)}")


@dataclass(frozen=True)
class GeneratedSet:
    """A finished data set.

    Attributes:
        manifest: figures `pictures`, `prompts`, `width_px`, `height_px`, `bytes` and `bytes_per_picture` (of the
            pictures).
        drawn: pictures this run wrote; the others were there.
        seconds: of loading the teacher, drawing and writing.
    """

    folder: Path
    manifest: Manifest
    drawn: int
    seconds: float


def read_prompts(file: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines are left out.

    Raises:
        UsageError: there is no such file. DataError: it is no UTF-8 text, cannot be read, or holds no prompt.
    """
    if not file.is_file():
        raise UsageError(
            "is a folder" if file.is_dir() else "does not exist",
            where=file,
            expected="a text file of prompts, one a line",
        )
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot be read ({type(error).__name__})", where=file, expected="a UTF-8 text file of prompts, one a line"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DataError("holds no prompt", where=file, expected="prompts, one a line")
    return prompts


def teacher_sha256(teacher: str | Path) -> str:
    """The sha256 that names a teacher in results; of an export folder, that of its files.

    Raises:
        UsageError, ModelError: as `resolve`.
    """
    from sdcompress.models.locate import resolve

    return sha256_tree(Path(teacher) if is_export(teacher) else resolve(teacher))


def is_export(teacher: str | Path) -> bool:
    """Whether this is a folder written by `sdcompress export`."""
    manifest = read_manifest(Path(teacher)) if Path(teacher).is_dir() else None
    return manifest is not None and manifest.kind in ("onnx", "engine")


def generate_dataset(
    teacher: str | Path,
    prompts: Sequence[str],
    output: Path,
    settings: GenerateSettings,
    *,
    force: bool = False,
    report: Reporter = SILENT,
) -> GeneratedSet:
    """Draw `settings.count` pictures with the teacher into `output`: picture files, `metadata.jsonl`, the settings and
    a manifest.

    An unfinished or damaged set of the same settings is completed, a whole one is left as it is; the manifest comes
    last.

    Args:
        teacher: what `open_pipeline` takes.
        force: replace what is in `output` where it is something else, or a set of other settings.

    Raises:
        DataError: no prompts. UsageError: settings that cannot be, no such teacher. ArtifactError: something else is in
            `output`, or a set
        of other settings. ModelError, BackendMissing: as `open_pipeline`. StorageError: `output` cannot be written.
    """
    from sdcompress.backends.registry import backend_name

    settings.check()
    if not prompts:
        raise DataError("no prompt to draw", expected="at least one")
    output = output.absolute()
    identity = asdict(settings) | {
        "backend": backend_name(settings.backend),
        "device": _device(),
        "teacher": teacher_sha256(teacher),
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
    }
    names = [f"{i:06d}.{settings.picture_format}" for i in range(settings.count)]
    manifest = _claim(output, identity, names, force)
    if manifest is not None:
        report.say(f"{output}: there already, and whole")
        return GeneratedSet(output, manifest, 0, 0.0)
    started = time.monotonic()
    drawn = _draw(teacher, prompts, output, names, settings, report)
    rows = (
        {
            "file_name": name,
            "text": prompts[i % len(prompts)],
            "seed": settings.seed + i,
            "prompt_index": i % len(prompts),
            "steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
        }
        for i, name in enumerate(names)
    )
    with storage_errors(output):
        _write(output / METADATA, "".join(json.dumps(row) + "\n" for row in rows).encode())
        manifest = _finish(output, identity, names, min(len(prompts), settings.count))
    return GeneratedSet(output, manifest, drawn, time.monotonic() - started)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _claim(output: Path, identity: dict[str, Any], names: list[str], force: bool) -> Manifest | None:
    """Make `output` this run's own, empty or with whole pictures of the same settings; its manifest where nothing is
    left to do.
    """
    if not force or output.is_file():
        _refuse_other(output, identity)
    theirs = _settings(output)
    with storage_errors(output):
        if theirs != identity:
            if output.exists():
                shutil.rmtree(output)
            output.mkdir(parents=True)
            _write(output / SETTINGS, json.dumps(identity, indent=1).encode())
            return None
        for stray in output.glob(f"*{_TEMPORARY}"):
            stray.unlink()
        manifest = _manifest(output)
        if manifest is None:
            return None
        if not faults(output, KIND):
            return manifest
        for name in names:
            path, entry = output / name, manifest.files.get(name)
            if path.is_file() and (
                entry is None or path.stat().st_size != entry.bytes or sha256_file(path) != entry.sha256
            ):
                path.unlink()
    return None


def _refuse_other(output: Path, identity: dict[str, Any]) -> None:
    begun = output.is_dir() and any(
        path.name != SETTINGS and not path.name.endswith(_TEMPORARY) for path in output.iterdir()
    )
    theirs = _settings(output)
    if theirs is None:
        if begun or not output.is_dir():
            check_free(output)
        return
    differing = [
        f"{key}: {_shown(theirs.get(key))} there, {_shown(value)} here"
        for key, value in identity.items()
        if theirs.get(key) != value
    ]
    if differing and begun:
        raise ArtifactError(
            f"holds a data set of other settings ({'; '.join(differing)})",
            where=output,
            hint="the same settings to go on with it, --force to begin anew, or another -o",
        )


def _shown(value: object) -> str:
    text = "the default" if value is None else str(value)
    return text[:12] if len(text) == 64 else text


def _settings(output: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((output / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "prompts" in found and "picture_format" in found else None


def _manifest(output: Path) -> Manifest | None:
    """The manifest, None where there is none yet or a stop cut it short."""
    try:
        return read_manifest(output)
    except ArtifactError:
        return None


def _draw(
    teacher: str | Path,
    prompts: Sequence[str],
    output: Path,
    names: list[str],
    settings: GenerateSettings,
    report: Reporter,
) -> int:
    """Draw every batch that lacks a picture and write those it lacks; returns how many."""
    from sdcompress.backends.assemble import open_pipeline
    from sdcompress.sampling import generate
    from sdcompress.support.quiet import quiet

    with storage_errors(output):
        there = {path.name for path in output.iterdir() if path.stat().st_size}
    missing = [i for i, name in enumerate(names) if name not in there]
    if not missing:
        return 0
    if len(missing) < len(names):
        report.say(f"data set: going on after {len(names) - len(missing):,} of {len(names):,} pictures")
    pipeline = open_pipeline(teacher, settings.backend, report=report)
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
            written = [i for i in batch if i in lacking]
            with storage_errors(output):
                for i in written:
                    _write(output / names[i], _encoded(pictures[i - first], settings.picture_format))
            advance(len(written))
    return len(missing)


def _encoded(picture: Image.Image, picture_format: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, picture_format, **_SAVE[picture_format])
    return buffer.getvalue()


def _write(path: Path, payload: bytes) -> None:
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        temporary.write_bytes(payload)
        replace_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _finish(output: Path, identity: dict[str, Any], names: list[str], shown_prompts: int) -> Manifest:
    from PIL import Image

    hashed = {name: FileEntry(sha256_file(output / name), (output / name).stat().st_size) for name in names}
    with Image.open(output / names[0]) as picture:
        width, height = picture.size
    size = sum(entry.bytes for entry in hashed.values())
    figures = {
        "pictures": len(names),
        "prompts": shown_prompts,
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
