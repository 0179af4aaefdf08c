"""Runs a suite: what is prepared, then latency, then pictures and distances, then the report.

Every model is loaded in a process of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from PIL import Image
from sdcompress_engines.errors import BackendMissing, ModelError, SdCompressError
from sdcompress_engines.manifest import canonical, check_free, installed_versions, sha256_file, staged, write_manifest
from sdcompress_engines.progress import SILENT, Reporter

from . import fidelity, outputs
from .environment import environment, load_average
from .journal import Journal
from .judge import judge
from .latency import Latency, measure, prepare
from .metrics import Lpips
from .models import made
from .report import write_report
from .results import Results, read_losses
from .scenario import ModelUnderTest, Suite, Way, slug
from .work import Peaks, count_pipeline, measure_peaks, roofline

_EMBEDDED_PX = 256
_REFERENCE = Way("torch", "fp32")


def run_suite(
    suite: Suite,
    output: Path,
    report: Reporter = SILENT,
    force: bool = False,
    command: str | None = None,
    skipped: dict[str, str] | None = None,
) -> Results:
    """Measure everything the suite asks for and write `results.json`, `report.html`, `report.md`, `grid.webp` and
    pictures to `output`.

    The first model is the teacher: PyTorch on it is speed-up 1.0, and students are held against it. A scenario that
    fails is a row that says why. A suite that was stopped goes on where it was, from a hidden folder beside `output`.
    `command` is what the report says to type to do it again; `skipped`, what → reason, is told in the report.

    Raises:
        ArtifactError: `output` is in the way. ModelError, UsageError: a model is none, or the teacher does not run.
            BackendMissing: no backend is left.
    """
    if not suite.ways:
        raise BackendMissing(f"no backend to measure: {skipped}", hint="--backend torch")
    check_free(output, force)
    started = time.monotonic()
    work = output.absolute().with_name(f".{output.name}.work")
    suite = dataclasses.replace(suite, models=tuple(made(model, report) for model in suite.models))
    facts = environment()
    journal = Journal(work / "journal.jsonl", _fingerprint(suite, facts))
    if journal.continued:
        report.say(f"going on with what an earlier start has measured ({work.name})")
    ready = prepare(suite, journal, report)
    peaks = _peaks(suite, journal, report)
    latency = [_with_roofline(run, suite, peaks) for run in measure(suite, ready, journal, report)]
    found = _Comparison(suite, ready, journal, work, report).run()
    sources = [(model.name, model.metrics) for model in suite.models]
    skipped = dict(skipped or {}) | found.pop("skipped")
    with staged(output, force) as folder:
        shown = _keep_pictures(found.pop("shown"), folder)
        results = Results(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=command or shlex.join(sys.argv),
            settings=suite.settings()
            | {"baseline": None if suite.baseline is None else [suite.baseline.backend, suite.baseline.precision]},
            environment=facts | {"load_average_after": load_average()},
            latency=latency,
            peaks={precision: asdict(peak) for precision, peak in peaks.items()},
            losses={name: losses for name, path in sources if path is not None and (losses := read_losses(path))},
            pictures=shown,
            skipped=skipped,
            warnings=_warnings(suite, facts, journal),
            seconds=None if journal.continued else round(time.monotonic() - started, 1),
            **found,
        )
        results = dataclasses.replace(results, gates=results.judge(suite.gates))
        results.save(folder / "results.json")
        write_report(results, folder)
        inputs = {model.name: model.sha256 for model in suite.models}
        if suite.metric and (suite.metric / "model.safetensors").is_file():
            inputs["metric"] = sha256_file(suite.metric / "model.safetensors")
        write_manifest(folder, "results", config=results.settings, inputs=inputs, seed=suite.seed)
    shutil.rmtree(work, ignore_errors=True)
    return results


def _fingerprint(suite: Suite, facts: Mapping[str, Any]) -> str:
    """What outcomes hold for: the suite, the weights, the machine and the versions."""
    models = [[m.name, m.sha256, str(m.onnx), str(m.engine)] for m in suite.models]
    machine = [
        facts["cpu"],
        facts["cores"],
        [gpu["name"] for gpu in facts["gpu"]],
        installed_versions(),
        facts["commit"],
    ]
    return hashlib.sha256(
        canonical(
            [suite.settings(), models, machine, [asdict(p) for p in suite.prompts], str(suite.metric), str(suite.real)]
        )
    ).hexdigest()


def peak_case(case: dict[str, Any]) -> dict[str, Any]:
    """`work.measure_peaks` as plain values."""
    import torch

    if case["threads"]:
        torch.set_num_threads(case["threads"])
    return asdict(measure_peaks(case["device"], case["precision"]))


def _peaks(suite: Suite, journal: Journal, report: Reporter) -> dict[str, Peaks]:
    found = {}
    precisions = sorted({way.precision for way in suite.ways})
    with report.task("measuring what the device can do", len(precisions)) as advance:
        for precision in precisions:
            outcome = journal.call(
                f"peaks {precision}",
                peak_case,
                {"device": suite.device, "precision": precision, "threads": suite.threads},
                300,
            )
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
    except SdCompressError:  # a model that cannot be counted is measured all the same
        return run
    share = roofline(work, peaks[run.precision], step.median / 1000)
    return dataclasses.replace(run, roofline={"macs": work.macs, "moved_bytes": work.moved_bytes, **share})


class _Comparison:
    """Pictures, distances and CLIP figures: the parts of `Results` that are not timed."""

    def __init__(
        self,
        suite: Suite,
        ready: Mapping[tuple[str, Way], Mapping[str, Any]],
        journal: Journal,
        work: Path,
        report: Reporter,
    ) -> None:
        self.suite, self.ready, self.journal, self.work, self.report = suite, ready, journal, work, report
        self.drawn = suite.prompts[: max(suite.pictures, suite.quality_pictures)]
        self.shown = min(suite.pictures, len(self.drawn))
        self.draws = suite.baseline or _REFERENCE  # whose pictures stand for the model
        self.probe: Path | None = None
        self.lpips = _lpips(suite)

    def run(self) -> dict[str, Any]:
        suite = self.suite
        found: dict[str, Any] = {
            "models": [],
            "backends": [],
            "students": {},
            "quality": {},
            "captions": [p.caption for p in self.drawn[: self.shown]],
            "shown": [],
            "skipped": {},
        }
        # The reference first; then every way, and PyTorch in each lower precision, whose own error is the noise floor.
        asked = list(dict.fromkeys([_REFERENCE, *suite.ways, *(Way("torch", way.precision) for way in suite.ways)]))
        with self.report.task("pictures and distances", len(suite.models) * len(asked) + 1) as advance:
            for model in suite.models:
                answers = {way: self._answer(model, way, advance) for way in asked}
                reference = answers[_REFERENCE]
                if model is suite.models[0] and "failed" in reference and "failed" in answers[self.draws]:
                    raise ModelError(f"the teacher does not run in PyTorch: {reference['failed']}", where=model.path)
                parameters: dict[str, int] = next(
                    (a["parameters"] for a in (reference, *answers.values()) if a.get("parameters", {}).get("unet")), {}
                )
                found["models"].append(
                    {
                        "name": model.name,
                        "sha256": model.sha256,
                        "parameters": parameters,
                        "random": model.random is not None,
                    }
                )
                found["backends"] += [
                    {"model": model.name, "backend": way.backend, "precision": way.precision}
                    | self._distance(model, way, answers)
                    for way in suite.ways
                    if way != _REFERENCE
                ]
                found["shown"] += [
                    (model.name, way, self._pictures(model, way)) for way in suite.ways if "failed" not in answers[way]
                ]
                if model is not suite.models[0] and not model.random and (distance := self._to_teacher(model)):
                    found["students"][model.name] = distance
            self._judge(found)
            advance(note="figures of sets")
        return found

    def _answer(self, model: ModelUnderTest, way: Way, advance: Any) -> dict[str, Any]:
        suite, ready = self.suite, self.ready.get((model.name, way), {})
        advance(0, note=f"{model.name}, {way}")
        if "failed" in ready:
            advance()
            return dict(ready)
        makes_probe = self.probe is None and way == _REFERENCE
        count = len(self.drawn) if way == self.draws else self.shown if way in suite.ways or way == _REFERENCE else 0
        case = {
            "path": str(model.path),
            "backend": way.backend,
            "artifacts": ready.get("artifacts"),
            "device": suite.device,
            "precision": way.precision,
            "threads": suite.threads,
            "folder": str(self._folder(model, way)),
            "captions": [p.caption for p in self.drawn[:count]],
            "seeds": [suite.seed + i for i in range(count)],
            "steps": suite.steps,
            "guidance_scale": suite.guidance_scale,
            "size_px": suite.sizes_px[0],
            "batch": min(suite.quality_batch, max(count, 1)),
            "seed": suite.seed,
            "timesteps": list(suite.timesteps),
            "probe": str(self.probe) if self.probe else None,
            "make_probe": suite.probes if makes_probe else 0,
            "random": model.random is not None,
            "probe_captions": [suite.prompts[i % len(suite.prompts)].caption for i in range(suite.probes)],
        }
        outcome = self.journal.call(f"answers {model.name} {way}", outputs.produce, case, suite.scenario_timeout_s)
        if makes_probe and "failed" not in outcome:
            self.probe = self._folder(model, way) / outputs.PROBE
        advance()
        return outcome

    def _folder(self, model: ModelUnderTest, way: Way) -> Path:
        return self.work / f"{slug(model.name)}-{way.backend}-{way.precision}"

    def _pictures(self, model: ModelUnderTest, way: Way) -> list[Image.Image]:
        return outputs.read_pictures(self._folder(model, way), self.shown)

    def _distance(self, model: ModelUnderTest, way: Way, answers: Mapping[Way, Mapping[str, Any]]) -> dict[str, Any]:
        """The same weights another way: figures against PyTorch fp32. A failure is a figure too."""
        for needed in (way, _REFERENCE):
            if "failed" in answers[needed]:
                return {"failed": answers[needed]["failed"]}
        if "unlike" in answers[way] or self.probe is None:
            return {"failed": answers[way].get("unlike", "there is no probe")}
        if not answers[way]["finite"]:
            return {
                "failed": f"its output in {way.precision} has values that are not finite",
                "gate": {"limit": None, "passed": False},
            }
        timesteps = self.suite.timesteps
        reference = outputs.read_prediction(self._folder(model, _REFERENCE))
        steps = fidelity.compare_steps(outputs.read_prediction(self._folder(model, way)), reference, timesteps)
        drawn, wanted = self._pictures(model, way), self._pictures(model, _REFERENCE)
        entry = fidelity.distance(
            steps, fidelity.compare_pictures(drawn, wanted, self.lpips) if len(drawn) == len(wanted) else []
        )
        floors = None
        if way.precision != "fp32":
            torch_way = Way("torch", way.precision)
            if "failed" in answers[torch_way]:
                return entry  # PyTorch could not say what this precision costs
            floors = fidelity.compare_steps(
                outputs.read_prediction(self._folder(model, torch_way)), reference, timesteps
            )
        asked = fidelity.gate_steps(steps, floors)
        if way.backend != "torch":  # which is the floor itself
            entry["gate"] = asked
        if floors is not None and self.suite.sensitivity and model is self.suite.models[0] and asked["passed"]:
            case = {
                "path": str(model.path),
                "device": self.suite.device,
                "probe": str(self.probe),
                "limits": asked["limits"],
                "floors": [step.relative_l2 for step in steps],
                "count": self.suite.sensitivity,
                "seed": self.suite.seed,
                "threads": self.suite.threads,
            }
            felt = self.journal.call(
                f"sensitivity {model.name} {way}", outputs.feel, case, self.suite.scenario_timeout_s
            )
            entry |= {} if "failed" in felt else {"sensitivity": felt}
        return entry

    def _to_teacher(self, model: ModelUnderTest) -> dict[str, Any]:
        """A student's noise prediction beside the teacher's, PyTorch fp32 both; empty where one of them gave none."""
        folders = [self._folder(m, _REFERENCE) for m in (model, self.suite.models[0])]
        if not all((folder / outputs.PREDICTION).is_file() for folder in folders):
            return {}
        own, teachers = map(outputs.read_prediction, folders)
        steps = fidelity.compare_steps(own, teachers, self.suite.timesteps)
        return {key: value for key, value in fidelity.distance(steps, []).items() if not key.startswith("picture")}

    def _judge(self, found: dict[str, Any]) -> None:
        """What the pictures as sets say, of the models that drew them all."""
        suite, count = self.suite, self.suite.quality_pictures or self.shown
        folders = {
            model.name: str(self._folder(model, self.draws))
            for model in suite.models
            if outputs.count_pictures(self._folder(model, self.draws)) >= count > 0
        }
        if suite.models[0].name not in folders or any(model.random for model in suite.models):
            return
        case = {
            "folders": folders,
            "prompts": [[p.caption, p.style] for p in self.drawn[:count]],
            "metric": str(suite.metric) if suite.metric else None,
            "styles": [list(s) for s in suite.styles],
            "real": str(suite.real) if suite.real else None,
            "device": suite.device,
            "size_px": suite.sizes_px[0],
        }
        outcome = self.journal.call("judge", judge, case, suite.scenario_timeout_s)
        if "failed" in outcome:
            found["skipped"]["figures of sets"] = outcome["failed"]
            return
        found["quality"] = {name: figures for name, figures in outcome["quality"].items() if figures}
        found["skipped"] |= outcome["skipped"]
        for name, figures in outcome["students"].items():
            found["students"].setdefault(name, {}).update(figures)


def _lpips(suite: Suite) -> Lpips | None:
    try:
        return Lpips(device="cpu") if suite.pictures and suite.sizes_px[0] >= 31 else None
    except BackendMissing:
        return None


def _keep_pictures(shown: Sequence[tuple[str, Way, list[Image.Image]]], folder: Path) -> list[dict[str, Any]]:
    """The grid's pictures as WebP beside the report, and all of them as one sheet."""
    kept: list[dict[str, Any]] = []
    rows = [(name, way, images) for name, way, images in shown if images]
    for name, way, images in rows:
        files = []
        for number, image in enumerate(images):
            path = folder / "pictures" / f"{slug(name)}-{way.backend}-{way.precision}-{number:02}.webp"
            path.parent.mkdir(exist_ok=True)
            _small(image).save(path, quality=88)
            files.append(path.relative_to(folder).as_posix())
        kept.append({"model": name, "backend": way.backend, "precision": way.precision, "files": files})
    if rows:
        side = _small(rows[0][2][0]).width
        sheet = Image.new("RGB", (side * max(len(images) for _, _, images in rows), side * len(rows)), "white")
        for y, (_, _, images) in enumerate(rows):
            for x, image in enumerate(images):
                sheet.paste(_small(image).resize((side, side)), (x * side, y * side))
        sheet.save(folder / "grid.webp", quality=88)
    return kept


def _small(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((_EMBEDDED_PX, _EMBEDDED_PX), Image.Resampling.LANCZOS)
    return image


def _warnings(suite: Suite, facts: dict[str, Any], journal: Journal) -> list[str]:
    found = []
    if (
        facts["load_average"] is not None
        and facts["load_average"] > 0.5 * (facts["cores"] or 1)
        and suite.device == "cpu"
    ):
        found.append(
            f"The machine was busy before measuring began (load average {facts['load_average']} on {facts['cores']}"
            " cores)"
        )
    if journal.continued:
        found.append("The suite was stopped and went on later: its rounds are not all of one stretch of time")
    if random := [model.name for model in suite.models if model.random]:
        found.append(
            f"The weights of {', '.join(random)} are random: latency and memory do not depend on them, pictures and"
            " distances to a teacher would mean nothing and are left out"
        )
    return found
