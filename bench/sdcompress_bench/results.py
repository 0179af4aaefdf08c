"""The results of a suite, as `results.json` holds them. The report is written from nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict
from sdcompress_engines.errors import ArtifactError, UsageError, shorten
from sdcompress_engines.files import write_atomically
from sdcompress_engines.json_files import read_json_lines, read_json_object
from sdcompress_engines.paths import file_inside

from .latency import LORA_SWAP, Latency
from .results_schema import check_results
from .scenario import BackendSetup, Gate, Sampling
from .stats import Summary

RESULTS_SCHEMA = 2
LARGEST = 1e300
"""Largest loss that is read; whole numbers in JSON have no limit, and NaN is below nothing."""
RESULTS_NAME = "results.json"


@dataclass(frozen=True)
class Row:
    """One line of the main table: a model in a backend setup, at a size and a batch.

    Attributes:
        sampling: how its pictures were drawn.
        speedup: in pictures a second, over the teacher in the baseline setup; each in its own steps and guidance.
        share_of_peak: of the device's measured matrix product peak, in [0, 1].
        fidelity: relative L2 to PyTorch fp32 with the same weights, worst timestep.
        fidelity_passed: whether its gate holds; None where there is no gate.
        loras: that it draws with, in words; empty where there are none.
        lora_swap_ms: median time to put them into the open pipeline and take them out again.
    """

    model: str
    sampling: Sampling
    setup: BackendSetup
    size_px: int
    batch: int
    parameters: int
    unet_mib: float
    unet_step: Summary | None
    end_to_end: Summary | None
    images_per_s: float | None
    speedup: float | None
    peak_mib: float | None
    share_of_peak: float | None
    fidelity: float | None
    fidelity_passed: bool | None
    failed: str | None
    loras: str = ""
    lora_swap_ms: float | None = None


@dataclass(frozen=True)
class Results:
    """Everything that was measured, with the raw samples.

    Attributes:
        created: time, ISO 8601, UTC.
        command: what to type to measure it again.
        settings: the suite, and its `baseline` as [backend, precision].
        environment: see `environment.environment`.
        models: name, `sha256`, `parameters` by component, `random` weights or not, `steps` and `guidance_scale` of its
            pictures; the teacher first. A model with LoRAs has their names and hashes in `loras`.
        latency: a `Latency` for each scenario.
        peaks: precision → the device's limits, as `peaks.Peaks`.
        backends: the same weights in another setup, compared with PyTorch fp32: model, backend, precision, and the
            figures of `fidelity.distance`, `gate` and `sensitivity`, or `failed`.
        students: student → figures of `fidelity.distance` against the teacher, both in PyTorch fp32, and of its
            pictures against the teacher's (`judge`).
        quality: model, or `real` for real pictures → figures of `judge`.
        captions: of the picture grid.
        pictures: model, backend, precision, and a file for each caption, in the folder of the report.
        losses: model → loss name → [step, value] pairs.
        gates: figure, model, way, value, limit in words, `passed`. `way` is the backend setup in words.
        skipped: what was not measured → why.
        warnings: one sentence each.
        seconds: time of the whole run; None where it was stopped and continued.
        schema: of this file.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    created: str
    command: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    models: list[dict[str, Any]]
    latency: list[Latency]
    peaks: dict[str, dict[str, Any]] = field(default_factory=dict)
    backends: list[dict[str, Any]] = field(default_factory=list)
    students: dict[str, dict[str, Any]] = field(default_factory=dict)
    quality: dict[str, dict[str, Any]] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)
    pictures: list[dict[str, Any]] = field(default_factory=list)
    losses: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    gates: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seconds: float | None = None
    schema: int = RESULTS_SCHEMA

    @property
    def teacher(self) -> str:
        return str(self.models[0]["name"])

    @property
    def baseline(self) -> BackendSetup | None:
        """The setup in which the teacher's speed is 1.0."""
        found = self.settings.get("baseline")
        return BackendSetup(*found) if found else None

    def sampling(self) -> dict[str, Sampling]:
        """Returns model → how its pictures were drawn. Older results have one answer for all, in their settings."""
        found = {}
        for model in self.models:
            given = {name: value for name, value in model.items() if value is not None}
            known = {**self.settings, **given}
            found[model["name"]] = Sampling(int(known["steps"]), float(known["guidance_scale"]))
        return found

    def loras(self) -> dict[str, str]:
        """Returns model → its LoRAs in words, of the models that draw with some."""
        return {m["name"]: ", ".join(lora["name"] for lora in m["loras"]) for m in self.models if m.get("loras")}

    def rows(self) -> Iterator[Row]:
        """Yields the rows of the main table, in the order in which they were measured."""
        parameters = {model["name"]: model["parameters"].get("unet", 0) for model in self.models}
        reference = {
            (run.size_px, run.batch): run.images_per_s
            for run in self.latency
            if run.model == self.teacher and run.setup == self.baseline
        }
        loras = self.loras()
        errors = {(entry["model"], entry["backend"], entry["precision"]): entry for entry in self.backends}
        for run in self.latency:
            speed, base = run.images_per_s, reference.get((run.size_px, run.batch))
            error = errors.get((run.model, run.backend, run.precision), {})
            swap = run.summary(LORA_SWAP)
            yield Row(
                model=run.model,
                sampling=Sampling(run.steps, run.guidance_scale),
                setup=run.setup,
                size_px=run.size_px,
                batch=run.batch,
                parameters=parameters.get(run.model, 0),
                unet_mib=run.artifact_mib.get("unet", 0.0),
                unet_step=run.summary("unet_step"),
                end_to_end=run.summary("end_to_end"),
                images_per_s=speed,
                speedup=speed / base if speed and base else None,
                peak_mib=None if run.failed else run.peak_mib,
                share_of_peak=run.roofline.get("share_of_matmul_peak"),
                fidelity=error.get("relative_l2"),
                fidelity_passed=error.get("gate", {}).get("passed"),
                failed=run.failed,
                loras=loras.get(run.model, ""),
                lora_swap_ms=None if swap is None else swap.median,
            )

    def judge(self, gates: Sequence[Gate]) -> list[dict[str, Any]]:
        """Returns an entry for each gate and each figure that it limits: figure, model, way, value, limit, passed.

        A gate that matches no figure has not passed.
        """
        judged = []
        for gate in gates:
            found = [
                (model, setup, value)
                for model, setup, value in self._figures(gate.figure)
                if gate.model in (None, model) and (setup is None or gate.setup in (None, setup))
            ]
            for model, setup, value in found or [(gate.model or "", gate.setup, None)]:
                judged.append(
                    {
                        "figure": gate.figure,
                        "model": model,
                        "way": str(setup) if setup else "",
                        "value": value,
                        "limit": str(gate),
                        "passed": value is not None and gate.holds(value),
                    }
                )
        return judged

    def _figures(self, name: str) -> Iterator[tuple[str, BackendSetup | None, float | None]]:
        """Yields every value of a figure of `scenario.FIGURES`: model, backend setup if it has one, value."""
        if name == "lora_swap_ms":
            for row in self.rows():
                if row.loras:
                    yield row.model, row.setup, row.lora_swap_ms
        elif name in ("speedup", "unet_step_ms", "peak_mib"):
            for row in self.rows():
                values = {
                    "speedup": row.speedup,
                    "unet_step_ms": row.unet_step.median if row.unet_step else None,
                    "peak_mib": row.peak_mib,
                }
                yield row.model, row.setup, values[name]
        elif name == "relative_l2":
            for entry in self.backends:
                yield entry["model"], BackendSetup(entry["backend"], entry["precision"]), entry.get("relative_l2")
        elif name in ("clip_score", "style", "top5"):
            for model, figures in self.quality.items():
                if model != "real" and name in figures:
                    yield model, None, point(figures[name])
        else:
            for model, figures in self.students.items():
                key = "relative_l2_mean" if name == "teacher_relative_l2" else name
                if key in figures:
                    yield model, None, point(figures[key])
            real = self.quality.get(self.teacher, {}).get(f"{name}_real")
            if real is not None:
                yield self.teacher, None, point(real)

    def failed_gates(self) -> list[str]:
        """Returns a sentence for each exceeded limit: backends too far from PyTorch first, then the suite's gates."""
        found = []
        for entry in self.backends:
            gate = entry.get("gate", {"passed": True})
            if not gate["passed"]:
                name = f"{entry['model']} on {BackendSetup(entry['backend'], entry['precision'])}"
                found.append(f"{name}: {entry['failed'] if 'failed' in entry else _excess(gate)}")
        for gate in self.gates:
            if not gate["passed"]:
                name = " on ".join(part for part in (gate["model"], gate["way"]) if part)
                value = "was not measured" if gate["value"] is None else f"is {gate['value']:.4g}"
                limit = gate["limit"].removeprefix(gate["figure"]).strip()
                found.append(f"{name}: {gate['figure']} {value}, wanted {limit}".lstrip(": "))
        return found

    def save(self, path: Path) -> None:
        """Write `results.json`."""
        write_atomically(path, json.dumps(asdict(self), indent=1, default=str) + "\n")


def picture_files(results: Results, folder: Path) -> Iterator[list[Path]]:
    """Yields the files of each column of the picture grid, one a caption.

    Args:
        results: that name them.
        folder: of the results file, which the pictures lie in.

    Raises:
        ArtifactError: a name leads out of the folder or to a link, or the captions are more.
    """
    for entry in results.pictures:
        names = entry["files"]
        if len(names) < len(results.captions):
            raise ArtifactError(
                f"names {len(names)} pictures of {shorten(entry['model'], 60)}",
                where=folder / RESULTS_NAME,
                expected=f"{len(results.captions)}, one a caption",
            )
        yield [file_inside(folder, name, source=folder / RESULTS_NAME) for name in names]


def _excess(gate: Mapping[str, Any]) -> str:
    return f"relative L2 {gate['error']:.2e} over {gate['limit']:.2e} at timestep {gate['timestep']}"


def point(figure: Any) -> float:
    """Returns the value of a figure: of a `Share` or an `Estimate` as plain values, or the number itself."""
    return float(figure.get("value", figure.get("share")) if isinstance(figure, Mapping) else figure)


def read_results(path: Path) -> Results:
    """Returns the results in a file that `Results.save` wrote.

    Raises:
        UsageError: there is no such file.
        ArtifactError: it is no results file, has another schema, or names pictures outside its folder; one message
            names the faults.
    """
    if not path.exists():
        raise UsageError("no such file", where=path, expected="a results.json of `sdcompress bench`")
    raw = read_json_object(path)
    if (schema := raw.get("schema")) != RESULTS_SCHEMA:
        raise ArtifactError(
            "is no results file: it has no schema" if schema is None else f"results schema {shorten(schema, 40)}",
            where=path,
            expected=f"schema {RESULTS_SCHEMA}",
            hint="measure again with the installed version: sdcompress bench SUITE",
        )
    found: Results = check_results(raw, Results, path)
    list(picture_files(found, path.parent))
    return found


def read_losses(path: Path, points: int = 240) -> dict[str, list[list[float]]]:
    """Returns loss name → [step, value] pairs of a `metrics.jsonl`.

    Args:
        path: the file.
        points: at most this many pairs a loss; each is the mean of an equal number of lines.

    Raises:
        ArtifactError: there is no such file, or a line is not JSON, or no object.
    """
    if not path.exists():
        raise ArtifactError("does not exist", where=path, expected="the metrics.jsonl of a training")
    series: dict[str, list[list[float]]] = {}
    for number, entry in enumerate(read_json_lines(path), 1):
        if not isinstance(entry, dict):
            raise ArtifactError(f"entry {number} is no object", where=path, expected="the metrics.jsonl of a training")
        step: Any = entry.get("step")
        for name, value in entry.items():
            if "loss" in name and _is_finite(value) and _is_finite(step):
                series.setdefault(name, []).append([step, value])
    return {name: _thin(pairs, points) for name, pairs in series.items()}


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _thin(pairs: list[list[float]], points: int) -> list[list[float]]:
    run = -(-len(pairs) // points)
    chunks = [pairs[start : start + run] for start in range(0, len(pairs), run)]
    return [[chunk[-1][0], sum(value for _, value in chunk) / len(chunk)] for chunk in chunks]
