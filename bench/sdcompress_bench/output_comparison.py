"""Pictures, distances and CLIP figures of a suite: the parts of `Results` that are not timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from sdcompress_engines.errors import BackendMissing, ModelError
from sdcompress_engines.progress import Reporter

from . import fidelity, outputs
from .artifacts import Artifacts
from .journal import Journal
from .judge import judge
from .metrics import Lpips
from .scenario import BackendSetup, ModelUnderTest, Prompt, Suite, slug

REFERENCE = BackendSetup("torch", "fp32")
"""The setup that every other one is compared with, with the same weights."""


@dataclass
class OutputFigures:
    """The result of `OutputComparison.run`; the fields are those of `Results`.

    Attributes:
        shown: model, setup and pictures of each column of the grid.
    """

    models: list[dict[str, Any]] = field(default_factory=list)
    backends: list[dict[str, Any]] = field(default_factory=list)
    students: dict[str, dict[str, Any]] = field(default_factory=dict)
    quality: dict[str, dict[str, Any]] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    shown: list[tuple[str, BackendSetup, list[Image.Image]]] = field(default_factory=list)


@dataclass(frozen=True)
class DrawnPrompts:
    """What the models draw: the grid's prompts first, then those that are only judged.

    Attributes:
        prompts: all of them.
        seeds: one for each.
        grid_count: how many of the first are the grid's.
        judged: those of the figures of picture sets.
    """

    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    grid_count: int
    judged: slice


def choose_drawn(suite: Suite) -> DrawnPrompts:
    """Returns what the models of a suite draw; the pictures of the grid are judged where nothing else is."""
    grid = (suite.shown or suite.prompts)[: suite.pictures]
    judged = suite.prompts[: suite.quality_pictures]
    apart = bool(suite.shown and judged)
    parts = (grid, judged) if apart else (max(grid, judged, key=len),)
    first = len(grid) if apart else 0
    return DrawnPrompts(
        tuple(prompt for part in parts for prompt in part),
        tuple(suite.seed + i for part in parts for i in range(len(part))),
        len(grid),
        slice(first, first + len(judged or grid)),
    )


class OutputComparison:
    """Runs every model in every setup, each in its own process, and compares what they write.

    Args:
        suite: what is compared.
        artifacts: what `prepare_artifacts` returned.
        journal: runs the cases and keeps their outcomes.
        work: folder for the outputs.
        report: shows progress.
    """

    def __init__(self, suite: Suite, artifacts: Artifacts, journal: Journal, work: Path, report: Reporter) -> None:
        self.suite, self.artifacts, self.journal, self.work, self.report = suite, artifacts, journal, work, report
        self.drawn = choose_drawn(suite)
        self.drawing_setup = suite.baseline or REFERENCE  # its pictures represent the model in the quality figures
        self.probe: Path | None = None
        self.lpips = _open_lpips(suite)

    def run(self) -> OutputFigures:
        """Returns the figures of all models.

        Raises:
            ModelError: the teacher does not run in PyTorch.
        """
        suite, found = self.suite, OutputFigures()
        found.captions = [prompt.caption for prompt in self.drawn.prompts[: self.drawn.grid_count]]
        # The reference first. PyTorch also runs in each lower precision: its own error there is the noise floor.
        in_torch = (BackendSetup("torch", setup.precision) for setup in suite.setups)
        setups = list(dict.fromkeys([REFERENCE, *suite.setups, *in_torch]))
        with self.report.task("pictures and distances", len(suite.models) * len(setups) + 1) as advance:
            for model in suite.models:
                answers = {setup: self._run_model(model, setup, advance) for setup in setups}
                if model is suite.models[0] and all("failed" in answers[s] for s in (REFERENCE, self.drawing_setup)):
                    reason = answers[REFERENCE]["failed"]
                    raise ModelError(f"the teacher does not run in PyTorch: {reason}", where=model.path)
                self._add_model(found, model, answers)
            self._judge_pictures(found)
            advance(note="figures of sets")
        return found

    def _add_model(
        self, found: OutputFigures, model: ModelUnderTest, answers: Mapping[BackendSetup, Mapping[str, Any]]
    ) -> None:
        every = (answers[REFERENCE], *answers.values())
        parameters: dict[str, Any] = next((a["parameters"] for a in every if a.get("parameters", {}).get("unet")), {})
        described = {
            "name": model.name,
            "sha256": model.sha256,
            "parameters": parameters,
            "random": model.random is not None,
            "steps": model.sampling.steps,
            "guidance_scale": model.sampling.guidance_scale,
        }
        if model.loras:
            described["loras"] = [{"name": str(lora), "sha256": lora.sha256} for lora in model.loras]
        found.models.append(described)
        for setup in self.suite.setups:
            if setup != REFERENCE:
                entry = {"model": model.name, "backend": setup.backend, "precision": setup.precision}
                found.backends.append(entry | self._distance(model, setup, answers))
            if "failed" not in answers[setup]:
                found.shown.append((model.name, setup, self._pictures(model, setup)))
        if model is not self.suite.models[0] and not model.random and (distance := self._distance_to_teacher(model)):
            found.students[model.name] = distance

    def _run_model(self, model: ModelUnderTest, setup: BackendSetup, advance: Any) -> dict[str, Any]:
        """Returns the outcome of `outputs.write_outputs`, in a process of its own."""
        suite, artifacts = self.suite, self.artifacts.get((model.name, setup), {})
        advance(0, note=f"{model.name}, {setup}")
        if "failed" in artifacts:
            advance()
            return dict(artifacts)
        makes_probe = self.probe is None and setup == REFERENCE
        in_grid = setup in suite.setups or setup == REFERENCE
        drawn = self.drawn
        count = len(drawn.prompts) if setup == self.drawing_setup else drawn.grid_count if in_grid else 0
        case = {
            "path": str(model.path),
            "decoder": model.decoder and str(model.decoder),
            "loras": model.weighted_loras,
            "backend": setup.backend,
            "artifacts": artifacts.get("artifacts"),
            "device": suite.device,
            "precision": setup.precision,
            "threads": suite.threads,
            "folder": str(self._folder(model, setup)),
            "captions": [prompt.caption for prompt in drawn.prompts[:count]],
            "seeds": list(drawn.seeds[:count]),
            "steps": model.sampling.steps,
            "guidance_scale": model.sampling.guidance_scale,
            "size_px": suite.sizes_px[0],
            "batch": min(suite.pictures_at_once(model), max(count, 1)),
            "probes_at_once": suite.probes_at_once(model),
            "seed": suite.seed,
            "timesteps": list(suite.timesteps),
            "probe": str(self.probe) if self.probe else None,
            "make_probe": suite.probes if makes_probe else 0,
            "random": model.random is not None,
            "probe_captions": [suite.prompts[i % len(suite.prompts)].caption for i in range(suite.probes)],
        }
        name = f"answers {model.name} {setup}"
        outcome = self.journal.call(name, outputs.write_outputs, case, suite.scenario_timeout_s)
        if makes_probe and "failed" not in outcome:
            self.probe = self._folder(model, setup) / outputs.PROBE
        advance()
        return outcome

    def _folder(self, model: ModelUnderTest, setup: BackendSetup) -> Path:
        return self.work / f"{slug(model.name)}-{setup.backend}-{setup.precision}"

    def _pictures(self, model: ModelUnderTest, setup: BackendSetup) -> list[Image.Image]:
        return outputs.read_pictures(self._folder(model, setup), self.drawn.grid_count)

    def _distance(
        self, model: ModelUnderTest, setup: BackendSetup, answers: Mapping[BackendSetup, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Returns the figures of the same weights in another setup against PyTorch fp32, or `failed` with the reason.

        A setup in a lower precision has no gate where PyTorch does not run in that precision.
        """
        if failed := self._reason_without_distance(setup, answers):
            return failed
        timesteps = self.suite.timesteps
        reference = outputs.read_prediction(self._folder(model, REFERENCE))
        steps = fidelity.compare_steps(outputs.read_prediction(self._folder(model, setup)), reference, timesteps)
        drawn, expected = self._pictures(model, setup), self._pictures(model, REFERENCE)
        pictures = fidelity.compare_pictures(drawn, expected, self.lpips) if len(drawn) == len(expected) else []
        entry = fidelity.distance(steps, pictures)
        floors = None
        if setup.precision != "fp32":
            in_torch = BackendSetup("torch", setup.precision)
            if "failed" in answers[in_torch]:
                return entry
            own = outputs.read_prediction(self._folder(model, in_torch))
            floors = fidelity.compare_steps(own, reference, timesteps)
        gate = fidelity.gate_steps(steps, floors)
        if setup.backend != "torch":  # PyTorch itself is the floor
            entry["gate"] = gate
        if floors is not None and self.suite.sensitivity and model is self.suite.models[0] and gate["passed"]:
            entry |= self._sensitivity(model, setup, gate["limits"], [step.relative_l2 for step in steps])
        return entry

    def _reason_without_distance(
        self, setup: BackendSetup, answers: Mapping[BackendSetup, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Returns the entry of a setup that cannot be compared, or an empty one where it can."""
        for needed in (setup, REFERENCE):
            if "failed" in answers[needed]:
                return {"failed": answers[needed]["failed"]}
        if "unlike" in answers[setup] or self.probe is None:
            return {"failed": answers[setup].get("unlike", "there is no probe")}
        if not answers[setup]["finite"]:
            return {
                "failed": f"its output in {setup.precision} has values that are not finite",
                "gate": {"limit": None, "passed": False},
            }
        return {}

    def _sensitivity(
        self, model: ModelUnderTest, setup: BackendSetup, limits: list[float], floors: list[float]
    ) -> dict[str, Any]:
        """Returns `sensitivity`: the smallest fault that the gate detects; empty where that cannot be measured."""
        case = {
            "path": str(model.path),
            "loras": model.weighted_loras,
            "device": self.suite.device,
            "probe": str(self.probe),
            "limits": limits,
            "floors": floors,
            "count": self.suite.sensitivity,
            "seed": self.suite.seed,
            "threads": self.suite.threads,
        }
        name, limit_s = f"sensitivity {model.name} {setup}", self.suite.scenario_timeout_s
        outcome = self.journal.call(name, outputs.measure_sensitivity, case, limit_s)
        return {} if "failed" in outcome else {"sensitivity": outcome}

    def _distance_to_teacher(self, model: ModelUnderTest) -> dict[str, Any]:
        """Returns a student's noise prediction against the teacher's, both in PyTorch fp32.

        Empty where one of them has no prediction.
        """
        folders = [self._folder(m, REFERENCE) for m in (model, self.suite.models[0])]
        if not all((folder / outputs.PREDICTION).is_file() for folder in folders):
            return {}
        student, teacher = map(outputs.read_prediction, folders)
        steps = fidelity.compare_steps(student, teacher, self.suite.timesteps)
        return {key: value for key, value in fidelity.distance(steps, []).items() if not key.startswith("picture")}

    def _judge_pictures(self, found: OutputFigures) -> None:
        """Add the figures of picture sets, for the models that have all pictures."""
        suite, drawn = self.suite, self.drawn
        folders = {model.name: self._folder(model, self.drawing_setup) for model in suite.models}
        count = len(drawn.prompts)
        complete = {n: str(folder) for n, folder in folders.items() if outputs.count_pictures(folder) >= count > 0}
        if suite.models[0].name not in complete or any(model.random for model in suite.models):
            return
        case = {
            "folders": complete,
            "prompts": [[prompt.caption, prompt.style] for prompt in drawn.prompts[drawn.judged]],
            "first": drawn.judged.start,
            "metric": str(suite.metric) if suite.metric else None,
            "styles": [list(pair) for pair in suite.styles],
            "real": str(suite.real) if suite.real else None,
            "device": suite.device,
            "size_px": suite.sizes_px[0],
        }
        outcome = self.journal.call("judge", judge, case, suite.scenario_timeout_s)
        if "failed" in outcome:
            found.skipped["figures of sets"] = outcome["failed"]
            return
        found.quality = {name: figures for name, figures in outcome["quality"].items() if figures}
        found.skipped |= outcome["skipped"]
        for name, figures in outcome["students"].items():
            found.students.setdefault(name, {}).update(figures)


def _open_lpips(suite: Suite) -> Lpips | None:
    try:
        return Lpips(device="cpu") if suite.pictures and suite.sizes_px[0] >= 31 else None
    except BackendMissing:
        return None
