"""Compares two results files: what changed, and whether the change is more than noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sdcompress_engines.errors import ArtifactError
from sdcompress_engines.json_files import format_json

from .latency import LORA_SWAP, STAGES, Latency
from .results import Results, point
from .scenario import BackendSetup
from .stats import LEAST_CHANGE, SIGNIFICANCE, Change, change

_SETS = ("fid", "kid", "lpips", "clip_score", "style", "top5")


@dataclass(frozen=True)
class TimeLine:
    """One stage of one scenario: its medians before and after in ms, and the change."""

    scenario: str
    stage: str
    before_ms: float
    after_ms: float
    change: Change


@dataclass(frozen=True)
class FigureLine:
    """One figure of fidelity or quality: both values.

    Attributes:
        apart: whether the two intervals are disjoint; None where one value has no interval.
    """

    what: str
    figure: str
    before: float
    after: float
    apart: bool | None


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes:
        before, after: names of the two files.
        lines: one for each stage of each scenario that both files have, and for the swap of its LoRAs.
        figures: fidelity and quality figures that both files have.
        only_before, only_after: scenarios that the other file lacks, failed ones included.
        notes: differences that a reader must know: machine, versions, weights, number of rounds.
    """

    before: str
    after: str
    lines: list[TimeLine]
    figures: list[FigureLine]
    only_before: list[str]
    only_after: list[str]
    notes: list[str]


def compare(before: Results, after: Results, before_name: str = "before", after_name: str = "after") -> Comparison:
    """Returns what changed between two runs.

    Args:
        before, after: the two runs.
        before_name, after_name: their names in the answer and in messages.

    Raises:
        ArtifactError: they have no scenario in common, or a model has other steps or another guidance scale.
    """
    drawn = [results.sampling() for results in (before, after)]
    unlike = [
        f"{name} is drawn in {drawn[0][name]} there and in {drawn[1][name]} here"
        for name in drawn[0]
        if name in drawn[1] and drawn[0][name] != drawn[1][name]
    ]
    if unlike:
        raise ArtifactError(
            f"cannot be compared with {before_name}: {'; '.join(unlike)}",
            where=after_name,
            expected="equal steps and guidance of each model that both have",
            hint="measure one of them again with the other's settings",
        )
    sides = [{_key(run): run for run in results.latency if not run.failed} for results in (before, after)]
    shared = [key for key in sides[0] if key in sides[1]]
    if not shared:
        names = [", ".join(map(_named, side)) or "none that ran" for side in sides]
        raise ArtifactError(
            f"has no scenario in common with {before_name}: it has {names[1]}; {before_name} has {names[0]}",
            where=after_name,
            expected="equal model names, backends, precisions, sizes and batches",
        )
    lines = []
    for key in shared:
        for stage in (*STAGES, LORA_SWAP):
            x, y = (side[key].rounds(stage) for side in sides)
            medians = [side[key].summary(stage) for side in sides]
            if medians[0] and medians[1]:
                lines.append(TimeLine(_named(key), stage, medians[0].median, medians[1].median, change(x, y)))
    return Comparison(
        before_name,
        after_name,
        lines,
        list(_figures(before, after)),
        [_named(_key(run)) for run in before.latency if _key(run) not in shared],
        [_named(_key(run)) for run in after.latency if _key(run) not in shared],
        _notes(before, after),
    )


def _key(run: Latency) -> tuple[str, BackendSetup, int, int]:
    return run.model, run.setup, run.size_px, run.batch


def _named(key: tuple[str, BackendSetup, int, int]) -> str:
    model, setup, size_px, batch = key
    return f"{model}, {setup}, {size_px} px, batch {batch}"


def _figures(before: Results, after: Results) -> Iterator[FigureLine]:
    sides: list[dict[tuple[str, str], Any]] = []
    for results in (before, after):
        found: dict[tuple[str, str], Any] = {}
        for entry in results.backends:
            if "relative_l2" in entry:
                setup = BackendSetup(entry["backend"], entry["precision"])
                found[f"{entry['model']}, {setup}", "relative L2 to PyTorch fp32"] = entry["relative_l2"]
        for name, figures in [*results.students.items(), *results.quality.items()]:
            found |= {(name, key): figures[key] for key in _SETS if key in figures}
            if "relative_l2_mean" in figures:
                found[name, "relative L2 to the teacher"] = figures["relative_l2_mean"]
        sides.append(found)
    for (what, figure), x in sides[0].items():
        y = sides[1].get((what, figure))
        if y is None:
            continue
        bands = [(v["low"], v["high"]) if isinstance(v, dict) else None for v in (x, y)]
        apart = None if bands[0] is None or bands[1] is None else bands[0][1] < bands[1][0] or bands[1][1] < bands[0][0]
        yield FigureLine(what, figure, point(x), point(y), apart)


def _notes(before: Results, after: Results) -> list[str]:
    notes = []
    x, y = before.environment, after.environment
    for name, what in (("cpu", "processor"), ("cores", "cores"), ("torch_threads", "PyTorch threads")):
        if x.get(name) != y.get(name):
            notes.append(f"another machine: {what} {x.get(name)} and {y.get(name)}")
    cards = [", ".join(f"{gpu['name']}, driver {gpu['driver']}" for gpu in env["gpu"]) or "none" for env in (x, y)]
    if cards[0] != cards[1]:
        notes.append(f"another GPU or driver: {cards[0]} and {cards[1]}")
    packages = [env.get("packages", {}) for env in (x, y)]
    notes += [
        f"{name} {packages[0].get(name, 'none')} and {packages[1].get(name, 'none')}"
        for name in sorted({*packages[0], *packages[1]})
        if packages[0].get(name) != packages[1].get(name)
    ]
    if x.get("commit") != y.get("commit"):
        notes.append(f"commit {x.get('commit')} and {y.get('commit')}")
    weights = [{model["name"]: model["sha256"] for model in results.models} for results in (before, after)]
    notes += [
        f"{name}: other weights ({weights[0][name][:12]} and {weights[1][name][:12]})"
        for name in weights[0]
        if name in weights[1] and weights[0][name] != weights[1][name]
    ]
    chosen = [{m["name"]: m.get("loras", []) for m in results.models} for results in (before, after)]
    notes += [
        f"{name}: other LoRAs ({_list_loras(chosen[0][name])} and {_list_loras(chosen[1][name])})"
        for name in chosen[0]
        if name in chosen[1] and chosen[0][name] != chosen[1][name]
    ]
    if before.settings["rounds"] != after.settings["rounds"]:
        notes.append(f"rounds {before.settings['rounds']} and {after.settings['rounds']}")
    return notes


def _list_loras(loras: list[dict[str, str]]) -> str:
    return ", ".join(f"{lora['name']}, {lora['sha256'][:12]}" for lora in loras) or "none"


def to_json(found: Comparison) -> str:
    """Returns the comparison as JSON. An infinite bound of an interval, as with one round, becomes null."""
    return format_json(asdict(found), indent=1)


def render(found: Comparison) -> str:
    """Returns the comparison as text: a line for each stage, then the figures, then the notes."""
    out = [f"{found.before} → {found.after}", ""]
    width = max(len(line.scenario) for line in found.lines)
    signs = {"faster": "▼ faster", "slower": "▲ slower", "same": "= same", "unknown": "? unknown"}
    for line in found.lines:
        text = f"{line.change.ratio - 1:+7.1%}"
        if line.change.p_value is not None:
            text += f"  ({line.change.low - 1:+.1%} to {line.change.high - 1:+.1%})"
        note = f": {line.change.note}" if line.change.note else ""
        out.append(
            f"{line.scenario:<{width}}  {line.stage:<13}{line.before_ms:>11,.2f} → {line.after_ms:>10,.2f} ms "
            f" {text:<30}{signs[line.change.verdict]}{note}"
        )
    if found.figures:
        out.append("")
        wide = max(len(f"{line.what}  {line.figure}") for line in found.figures)
        for figure in found.figures:
            verdict = {True: "changed", False: "within the intervals", None: ""}[figure.apart]
            label = f"{figure.what}  {figure.figure}"
            out.append(f"{label:<{wide}}  {figure.before:>10.4g} → {figure.after:<10.4g}  {verdict}")
    out += [
        "",
        *(f"only before: {name}" for name in found.only_before),
        *(f"only after: {name}" for name in found.only_after),
        *(f"note: {note}" for note in found.notes),
    ]
    out.append(
        f"A change is reported if it is at least {LEAST_CHANGE:.0%} and its p-value is under {SIGNIFICANCE:.0%}"
        " (Welch's test on the round medians). Drift of the machine between the two runs is not detected."
    )
    return "\n".join(out)
