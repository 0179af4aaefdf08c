"""What a suite found, as it is kept in `results.json`; the report is made from this alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import ArtifactError

from .latency import Latency
from .stats import Summary

RESULTS_SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One line of the answer: a model on a backend at a batch size. `speedup` is in pictures a second over the teacher in PyTorch."""

    model: str
    backend: str
    batch: int
    parameters: int
    unet_mib: float
    unet_step: Summary | None
    end_to_end: Summary | None
    images_per_s: float | None
    speedup: float | None
    peak_mib: float | None
    fidelity: float | None
    fidelity_passed: bool | None
    failed: str | None


@dataclass(frozen=True)
class Results:
    """Everything measured, raw samples included.

    Attributes:
        models: name, `sha256`, `parameters` by component, the teacher first.
        latency: a `Latency` for each scenario.
        backends: same weights, other backend: model, backend and the figures of `fidelity.distance`, `gate`, or `failed`.
        students: student → figures of `fidelity.distance` against the teacher, PyTorch fp32 both.
        quality: model, and `real` for real pictures → figures of `quality.judge`.
        captions: of the picture grid; `pictures`: "model / backend" → a file for each caption, beside the report.
        losses: model → loss name → [step, value] pairs.
        skipped: backend → why it was not measured.
        settings: the suite. `command`: what to type to do it again.
    """

    created: str
    command: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    models: list[dict[str, Any]]
    latency: list[Latency]
    backends: list[dict[str, Any]] = field(default_factory=list)
    students: dict[str, dict[str, Any]] = field(default_factory=dict)
    quality: dict[str, dict[str, Any]] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)
    pictures: dict[str, list[str]] = field(default_factory=dict)
    losses: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    schema: int = RESULTS_SCHEMA

    @property
    def teacher(self) -> str:
        return str(self.models[0]["name"])

    def rows(self) -> Iterator[Row]:
        """The answer, in the order measured."""
        parameters = {model["name"]: model["parameters"]["unet"] for model in self.models}
        baseline = {run.batch: run.images_per_s for run in self.latency if run.model == self.teacher and run.backend == "torch"}
        errors = {(entry["model"], entry["backend"]): entry for entry in self.backends}
        for run in self.latency:
            speed, reference, error = run.images_per_s, baseline.get(run.batch), errors.get((run.model, run.backend), {})
            yield Row(
                model=run.model, backend=run.backend, batch=run.batch, parameters=parameters[run.model], unet_mib=run.artifact_mib.get("unet", 0.0),
                unet_step=run.summary("unet_step"), end_to_end=run.summary("end_to_end"), images_per_s=speed, speedup=speed / reference if speed and reference else None,
                peak_mib=None if run.failed else run.peak_mib, fidelity=error.get("relative_l2"), fidelity_passed=error.get("gate", {}).get("passed"), failed=run.failed,
            )  # fmt: skip

    def failed_gates(self) -> list[str]:
        """The backends that are further from PyTorch than their limit, in words."""
        over = [entry for entry in self.backends if not entry.get("gate", {"passed": True})["passed"]]
        return [f"{e['model']} on {e['backend']}: relative L2 {e['relative_l2']:.2e} over {e['gate']['limit']:.2e}" for e in over]

    def save(self, path: Path) -> None:
        """Write `results.json`."""
        path.write_text(json.dumps(asdict(self), indent=1, default=str) + "\n")


def read_results(path: Path) -> Results:
    """Results written by `Results.save`.

    Raises:
        ArtifactError: not such a file, or of another schema.
    """
    try:
        raw = json.loads(path.read_text())
        if raw["schema"] != RESULTS_SCHEMA:
            raise ArtifactError(f"results schema {raw['schema']}", where=path, expected=f"schema {RESULTS_SCHEMA}", hint="measure again with the installed version")
        return Results(**raw | {"latency": [Latency(**run) for run in raw["latency"]]})
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"is no results file ({error})", where=path, expected="a results.json of `sdcompress bench`") from error


def read_losses(path: Path, points: int = 240) -> dict[str, list[list[float]]]:
    """Loss name → [step, value] pairs of a `metrics.jsonl`, thinned by the mean of equal runs of lines to at most `points`.

    Raises:
        ArtifactError: a line that is not JSON.
    """
    series: dict[str, list[list[float]]] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ArtifactError(f"line {number} is not JSON", where=path, expected="the metrics.jsonl of a training") from error
        for name, value in entry.items():
            if "loss" in name and isinstance(value, int | float) and "step" in entry:
                series.setdefault(name, []).append([entry["step"], value])
    return {name: _thin(pairs, points) for name, pairs in series.items()}


def _thin(pairs: list[list[float]], points: int) -> list[list[float]]:
    run = -(-len(pairs) // points)
    chunks = [pairs[start : start + run] for start in range(0, len(pairs), run)]
    return [[chunk[-1][0], sum(value for _, value in chunk) / len(chunk)] for chunk in chunks]
