"""Runs a suite: latency first, in processes of its own, then pictures and distances in this one, then the report."""

from __future__ import annotations

import gc
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from PIL import Image
from sdcompress_engines.errors import BackendMissing, SdCompressError
from sdcompress_engines.manifest import sha256_file, staged, write_manifest
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.pipeline import generate

from . import fidelity, quality
from .environment import environment
from .latency import measure
from .report import write_report
from .results import Results, read_losses
from .scenario import BACKEND_NAMES, ModelUnderTest, Suite, slug

_EMBEDDED_PX = 256


def run_suite(suite: Suite, output: Path, report: Reporter = SILENT, force: bool = False, command: str | None = None, skipped: dict[str, str] | None = None) -> Results:
    """Measure everything the suite asks for and write `results.json`, `report.html`, `report.md`, `grid.webp` and pictures to `output`.

    The first model is the teacher: PyTorch on it is speed-up 1.0, and students are held against it. A scenario that fails is a row
    that says why. `command` is what the report says to type to do it again; `skipped`, backend → reason, is told in the report.

    Raises:
        ArtifactError: `output` is in the way. ModelError, UsageError: the teacher does not load. BackendMissing: no backend is left.
    """
    if not suite.backends:
        raise BackendMissing(f"no backend to measure: {skipped}", hint="--backend torch")
    with staged(output, force) as folder:
        facts = environment()
        latency = measure(suite, report)
        found = _compare(suite, folder, report)
        sources = [(model.name, model.metrics) for model in suite.models]
        results = Results(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=command or shlex.join(sys.argv),
            settings={k: v for k, v in asdict(suite).items() if k not in ("models", "metric", "real")} | {"backends": list(suite.backends)},
            environment=facts,
            latency=latency,
            losses={name: losses for name, path in sources if path is not None and (losses := read_losses(path))},
            skipped=dict(skipped or {}),
            warnings=_warnings(suite, facts),
            **found,
        )
        results.save(folder / "results.json")
        write_report(results, folder)
        inputs = {model.name: model.sha256 for model in suite.models} | (
            {"metric": sha256_file(suite.metric / "model.safetensors")} if suite.metric and (suite.metric / "model.safetensors").is_file() else {}
        )
        write_manifest(folder, "results", config=results.settings, inputs=inputs, seed=suite.seed)
    return results


def _compare(suite: Suite, folder: Path, report: Reporter) -> dict[str, Any]:
    """Pictures, distances and CLIP figures: the parts of `Results` that are not timed. One pipeline is alive at a time."""
    wanted = suite.prompts[: max(suite.pictures, suite.quality_pictures, suite.probes)]
    captions, seeds = [prompt.caption for prompt in wanted], [suite.seed + i for i in range(len(wanted))]
    shown = captions[: suite.pictures]
    metric = quality.ClipMetric(suite.metric, suite.device) if suite.metric and suite.quality_pictures else None
    found: dict[str, Any] = {"models": [], "backends": [], "students": {}, "quality": {}, "captions": shown, "pictures": {}}
    grid: list[list[Image.Image]] = []
    if metric and suite.real:
        found["quality"]["real"] = _plain(quality.judge(metric, *quality.real_pictures(suite.real, wanted[: suite.quality_pictures]), dict(suite.styles)))
    probe = teacher_prediction = teacher_images = None
    with report.task("pictures and distances", len(suite.models) * (1 + len([b for b in suite.backends if b != "torch"]))) as advance:
        for model in suite.models:
            pipeline = fidelity.load(model.path, "torch", device=suite.device)
            parts = {name: sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in ("unet", "text_encoder", "vae")}
            found["models"].append({"name": model.name, "sha256": model.sha256, "parameters": parts})
            images = generate(pipeline, captions, seeds=seeds, steps=suite.steps, guidance_scale=suite.guidance_scale, size_px=suite.size_px, batch_size=suite.quality_batch)
            if metric:
                count = suite.quality_pictures
                found["quality"][model.name] = _plain(quality.judge(metric, images[:count], wanted[:count], dict(suite.styles)))
            if probe is None or not _takes(pipeline, probe):
                own = fidelity.make_probe(pipeline, images[: suite.probes], captions[: suite.probes], suite.timesteps, suite.seed)
                probe = probe or own
            else:
                own = probe
            prediction = fidelity.predict(pipeline, own)
            if teacher_prediction is None or teacher_images is None:
                teacher_prediction, teacher_images = prediction, images
            elif own is probe:
                steps = fidelity.compare_steps(prediction, teacher_prediction, own.timesteps)
                found["students"][model.name] = fidelity.distance(steps, fidelity.compare_pictures(images[: suite.pictures], teacher_images[: suite.pictures]))
            if "torch" in suite.backends:
                found["pictures"][f"{model.name} / {BACKEND_NAMES['torch']}"] = _save(images[: suite.pictures], folder, f"{slug(model.name)}-torch")
                grid.append(images[: suite.pictures])
            del pipeline
            gc.collect()
            advance(note=model.name)
            floors: dict[str, float] = {}
            for backend in suite.backends:
                if backend != "torch" or suite.precision != "fp32":
                    entry, pictures = _other(suite, model, backend, own, prediction, images, floors)
                    found["backends"].append({"model": model.name, "backend": backend} | entry)
                    if pictures and backend != "torch":
                        found["pictures"][f"{model.name} / {BACKEND_NAMES[backend]}"] = _save(pictures, folder, f"{slug(model.name)}-{backend}")
                        grid.append(pictures)
                    advance(int(backend != "torch"), note=f"{model.name} {backend}")
    if grid and shown:
        _sheet(grid).save(folder / "grid.webp", quality=88)
    return found


def _other(
    suite: Suite, model: ModelUnderTest, backend: str, probe: fidelity.Probe, reference: Any, images: Sequence[Image.Image], floors: dict[str, float]
) -> tuple[dict[str, Any], list[Image.Image]]:
    """The same weights on another backend, or in a lower precision: figures against PyTorch fp32, and the pictures. A failure is a figure too."""
    try:
        pipeline = fidelity.load(model.path, backend, model.artifacts(backend), suite.device, suite.precision)
        precision = fidelity.precision_of(pipeline)
        output = fidelity.predict(pipeline, probe)
        count = len(images[: suite.pictures])
        captions, seeds = [p.caption for p in suite.prompts[:count]], [suite.seed + i for i in range(count)]
        pictures = generate(pipeline, captions, seeds=seeds, steps=suite.steps, guidance_scale=suite.guidance_scale, size_px=suite.size_px, batch_size=max(suite.batch))
        del pipeline
        entry = {"precision": precision} | fidelity.distance(fidelity.compare_steps(output, reference, probe.timesteps), fidelity.compare_pictures(pictures, images[:count]))
        if backend != "torch":
            if precision != "fp32" and precision not in floors:
                floors[precision] = _floor(suite, model, precision, probe, reference)
            entry["gate"] = fidelity.gate(entry["relative_l2"], floors.get(precision))
        return entry, pictures
    except (SdCompressError, RuntimeError, ValueError, OSError) as error:
        return {"failed": " ".join(str(error).split())[:400]}, []


def _floor(suite: Suite, model: ModelUnderTest, precision: str, probe: fidelity.Probe, reference: Any) -> float:
    """PyTorch's own worst relative L2 in a lower precision."""
    output = fidelity.predict(fidelity.load(model.path, "torch", None, suite.device, precision), probe)
    return max(step.relative_l2 for step in fidelity.compare_steps(output, reference, probe.timesteps))


def _takes(pipeline: Any, probe: fidelity.Probe) -> bool:
    """Whether the UNet answers the teacher's inputs: equal latent channels and text width."""
    config = pipeline.unet.config
    return bool(config.in_channels == probe.latents.shape[2] and config.cross_attention_dim == probe.encoder_hidden_states.shape[-1])


def _plain(figures: dict[str, Any]) -> dict[str, Any]:
    """`quality.judge`'s figures as plain values."""
    return {key: asdict(value) if isinstance(value, quality.Share) else value for key, value in figures.items()}


def _warnings(suite: Suite, facts: dict[str, Any]) -> list[str]:
    busy = facts["load_average"] is not None and facts["load_average"] > 0.5 * (facts["cores"] or 1)
    return [f"The machine was busy before measuring began (load average {facts['load_average']} on {facts['cores']} cores)"] if busy and suite.device == "cpu" else []


def _save(images: Sequence[Image.Image], folder: Path, name: str) -> list[str]:
    """Pictures as WebP of at most 256 px, for the page; their paths in `folder`."""
    (folder / "pictures").mkdir(exist_ok=True)
    paths = [f"pictures/{name}-{index:02d}.webp" for index in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.copy().resize((min(image.width, _EMBEDDED_PX),) * 2, Image.Resampling.LANCZOS).save(folder / path, quality=84)
    return paths


def _sheet(columns: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures side by side: a column for each model and backend, a row for each prompt."""
    side, gap = min(columns[0][0].width, _EMBEDDED_PX), 6
    sheet = Image.new("RGB", (len(columns) * (side + gap) - gap, len(columns[0]) * (side + gap) - gap), "white")
    for x, column in enumerate(columns):
        for y, image in enumerate(column):
            sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x * (side + gap), y * (side + gap)))
    return sheet
