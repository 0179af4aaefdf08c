"""Runs a suite: prepare, measure latency, compare outputs, write the report.

Every model is loaded in its own process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from PIL import Image
from sdcompress_engines.command import command_line
from sdcompress_engines.errors import BackendMissing, SdCompressError
from sdcompress_engines.files import parents_made
from sdcompress_engines.manifest import canonical, installed_versions, sha256_file, write_manifest
from sdcompress_engines.output_folders import check_free, locked, staged
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.support.pictures import save_picture

from .artifacts import prepare_artifacts
from .environment import environment, load_average
from .journal import Journal
from .latency import Latency, measure
from .models import prepare_model
from .output_comparison import OutputComparison, OutputFigures
from .peaks import Peaks, measure_peaks, roofline
from .report import write_report
from .results import Results, read_losses
from .scenario import Suite, slug
from .work import count_pipeline

_EMBEDDED_PX = 256


def _check_request(
    suite: Suite, output: Path, force: bool, inputs: Sequence[Path], skipped: Mapping[str, str] | None
) -> None:
    """Refuse what `run_suite` refuses before any work; `inputs` are the files and folders that it reads."""
    if not suite.setups:
        raise BackendMissing(f"no backend to measure: {skipped}", hint="--backend torch")
    check_free(output, force, inputs)


def run_suite(
    suite: Suite,
    output: Path,
    report: Reporter = SILENT,
    force: bool = False,
    command: str | None = None,
    skipped: dict[str, str] | None = None,
    files: Sequence[Path] = (),
) -> Results:
    """Measure what the suite asks for; write `results.json`, `report.html`, `report.md`, `grid.webp` and pictures.

    A scenario that fails is a row with the reason. A stopped suite continues from a hidden folder beside `output`.

    Args:
        suite: what is measured.
        output: the folder of the report.
        report: shows progress.
        force: replace what is in `output`.
        command: the command for a new measurement that the report shows; None is this process's command line.
        skipped: backend → reason why it is not measured, for the report.
        files: that the suite was read from.

    Raises:
        ArtifactError: `output` is not empty, holds an input, or another process is writing it.
        BackendMissing: no backend is left.
        ModelError, UsageError: a model does not exist, or the teacher does not run.
    """
    inputs = [*files, *list_inputs(suite)]
    _check_request(suite, output, force, inputs, skipped)
    with locked(output):
        return _run_alone(suite, output, report, force, command, skipped, inputs)


def _run_alone(
    suite: Suite,
    output: Path,
    report: Reporter,
    force: bool,
    command: str | None,
    skipped: dict[str, str] | None,
    inputs: Sequence[Path],
) -> Results:
    """Measure as `run_suite` does, while no other process writes the output; `inputs` are what the suite reads."""
    started = time.monotonic()
    work = output.absolute().with_name(f".{output.name}.work")
    suite = dataclasses.replace(suite, models=tuple(prepare_model(model, report) for model in suite.models))
    facts = environment()
    with _open_journal(suite, facts, work, report) as journal:
        artifacts = prepare_artifacts(suite, journal, report)
        peaks = _measure_peaks(suite, journal, report)
        latency = [_with_roofline(run, suite, peaks) for run in measure(suite, artifacts, journal, report)]
        figures = OutputComparison(suite, artifacts, journal, work, report).run()
    with staged(output, force, inputs) as folder:
        results = Results(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=command or command_line(sys.argv),
            settings=_settings(suite),
            environment=facts | {"load_average_after": load_average()},
            models=figures.models,
            latency=latency,
            peaks={precision: asdict(peak) for precision, peak in peaks.items()},
            backends=figures.backends,
            students=figures.students,
            quality=figures.quality,
            captions=figures.captions,
            pictures=_save_pictures(figures, folder),
            losses=_read_losses(suite),
            skipped=dict(skipped or {}) | figures.skipped,
            warnings=collect_warnings(suite, facts, journal),
            seconds=None if journal.continued else round(time.monotonic() - started, 1),
        )
        results = _write_results(results, suite, folder)
    shutil.rmtree(work, ignore_errors=True)
    return results


def list_inputs(suite: Suite) -> list[Path]:
    """Returns the files and folders that a suite reads."""
    from sdcompress.models.locate import local_paths

    found = [path for model in suite.models for path in (model.onnx, model.engine, model.metrics, model.decoder)]
    found += [lora.file for model in suite.models for lora in model.loras]
    found += local_paths(*(model.path for model in suite.models if model.random is None))
    found += [suite.prompts_file, suite.metric, suite.real]
    return [path for path in found if path is not None]


@contextmanager
def _open_journal(suite: Suite, facts: Mapping[str, Any], work: Path, report: Reporter) -> Iterator[Journal]:
    """Yield the journal in the hidden folder, which an error removes, or names where it holds measurements."""
    with parents_made(work):
        journal = Journal(work / "journal.jsonl", fingerprint(suite, facts))
        if journal.continued:
            report.show_line(f"continuing with the measurements of an earlier start ({work.name})")
        try:
            yield journal
        except BaseException as error:
            if not journal.known:
                shutil.rmtree(work, ignore_errors=True)
            elif isinstance(error, SdCompressError):
                raise error.with_hint(f"the same command continues with the measurements in {work}") from error
            raise


def _write_results(results: Results, suite: Suite, folder: Path) -> Results:
    """Write the results and the report. Returns the results with the gates' verdicts."""
    results = dataclasses.replace(results, gates=results.judge(suite.gates))
    results.save(folder / "results.json")
    write_report(results, folder)
    write_manifest(folder, "results", config=describe_suite(suite), inputs=_input_hashes(suite), seed=suite.seed)
    return results


def describe_suite(suite: Suite) -> dict[str, Any]:
    """Returns the settings in the manifest of a report: those of its results, and a hash of the prompts."""
    return _settings(suite) | {"prompts_sha256": _hash([asdict(prompt) for prompt in suite.prompts])}


def _hash(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def _settings(suite: Suite) -> dict[str, Any]:
    base = suite.baseline
    return suite.settings() | {"baseline": None if base is None else [base.backend, base.precision]}


def _read_losses(suite: Suite) -> dict[str, dict[str, list[list[float]]]]:
    sources = [(model.name, model.metrics) for model in suite.models]
    return {name: losses for name, path in sources if path is not None and (losses := read_losses(path))}


def _input_hashes(suite: Suite) -> dict[str, str]:
    hashes = {model.name: model.sha256 for model in suite.models}
    hashes |= {f"decoder of {model.name}": model.decoder_sha256 for model in suite.models if model.decoder}
    hashes |= {f"LoRA {lora} of {model.name}": lora.sha256 for model in suite.models for lora in model.loras}
    if suite.metric and (suite.metric / "model.safetensors").is_file():
        hashes["metric"] = sha256_file(suite.metric / "model.safetensors")
    return hashes


def fingerprint(suite: Suite, facts: Mapping[str, Any]) -> str:
    """Returns a hash of everything that outcomes depend on: the suite, the weights, the machine and the versions.

    Args:
        suite: what is measured.
        facts: see `environment.environment`.
    """
    models = [
        [
            *(m.name, m.sha256, str(m.onnx), str(m.engine), m.decoder_sha256, asdict(m.sampling)),
            *([lora.sha256, lora.weight] for lora in m.loras),
        ]
        for m in suite.models
    ]
    gpus = [gpu["name"] for gpu in facts["gpu"]]
    machine = [facts["cpu"], facts["cores"], gpus, installed_versions(), facts["commit"]]
    prompts = [asdict(prompt) for prompt in suite.prompts]
    whole = [suite.settings(), models, machine, prompts, str(suite.metric), str(suite.real)]
    return _hash(whole)


def peak_case(case: dict[str, Any]) -> dict[str, Any]:
    """Returns `peaks.measure_peaks` as plain values."""
    import torch

    if case["threads"]:
        torch.set_num_threads(case["threads"])
    return asdict(measure_peaks(case["device"], case["precision"]))


def _measure_peaks(suite: Suite, journal: Journal, report: Reporter) -> dict[str, Peaks]:
    found = {}
    precisions = sorted({setup.precision for setup in suite.setups})
    with report.task("measuring the device's limits", len(precisions)) as advance:
        for precision in precisions:
            case = {"device": suite.device, "precision": precision, "threads": suite.threads}
            outcome = journal.call(f"peaks {precision}", peak_case, case, 300)
            if "failed" not in outcome:
                found[precision] = Peaks(**outcome)
            advance(note=precision)
    return found


def _with_roofline(run: Latency, suite: Suite, peaks: Mapping[str, Peaks]) -> Latency:
    step = run.summary("unet_step")
    if step is None or run.precision not in peaks:
        return run
    model = next(model for model in suite.models if model.name == run.model)
    try:
        work = count_pipeline(model.path, run.size_px, run.batch, run.guidance_scale > 1, run.precision)["unet"]
    except SdCompressError:  # a model whose work cannot be counted is measured all the same
        return run
    share = roofline(work, peaks[run.precision], step.median / 1000)
    return dataclasses.replace(run, roofline={"macs": work.macs, "moved_bytes": work.moved_bytes, **share})


def _save_pictures(figures: OutputFigures, folder: Path) -> list[dict[str, Any]]:
    """Write the grid's pictures as WebP files, and all of them on one sheet; returns `Results.pictures`."""
    saved: list[dict[str, Any]] = []
    columns = [(name, setup, images) for name, setup, images in figures.shown if images]
    for name, setup, images in columns:
        files = []
        for number, image in enumerate(images):
            path = folder / "pictures" / f"{slug(name)}-{setup.backend}-{setup.precision}-{number:02}.webp"
            path.parent.mkdir(exist_ok=True)
            save_picture(_shrink(image), path, quality=88)
            files.append(path.relative_to(folder).as_posix())
        saved.append({"model": name, "backend": setup.backend, "precision": setup.precision, "files": files})
    if columns:
        save_picture(_draw_sheet([images for _, _, images in columns]), folder / "grid.webp", quality=88)
    return saved


def _draw_sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    side = _shrink(rows[0][0]).width
    sheet = Image.new("RGB", (side * max(map(len, rows)), side * len(rows)), "white")
    for y, images in enumerate(rows):
        for x, image in enumerate(images):
            sheet.paste(_shrink(image).resize((side, side)), (x * side, y * side))
    return sheet


def _shrink(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((_EMBEDDED_PX, _EMBEDDED_PX), Image.Resampling.LANCZOS)
    return image


def collect_warnings(suite: Suite, facts: Mapping[str, Any], journal: Journal) -> list[str]:
    """Returns the warnings of a run for its report: a busy machine, a stop in between, random weights.

    Args:
        suite: what was measured.
        facts: see `environment.environment`, from before the run.
        journal: of the run.
    """
    found = []
    load, cores = facts["load_average"], facts["cores"]
    if load is not None and load > 0.5 * (cores or 1) and suite.device == "cpu":
        found.append(f"The machine was busy before measuring began (load average {load} on {cores} cores)")
    if journal.continued:
        found.append(
            "The suite was interrupted and continued later, so its rounds were not all measured in one session"
        )
    if random := [model.name for model in suite.models if model.random]:
        found.append(
            f"The weights of {', '.join(random)} are random: latency and memory do not depend on them, pictures and"
            " distances to a teacher would mean nothing and are left out"
        )
    return found
