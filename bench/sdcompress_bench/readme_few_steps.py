"""What few steps cost and gain, as Markdown: the study of nano, whole pictures, and the small decoder."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .markdown import Cells, section
from .readme_table import machine
from .report.formatting import NO_FIGURE, format_seconds
from .results import Results, Row

Figures = Mapping[str, Any]
_STEPS = (1, 2, 4, 8)
_UNTRAINED = {
    "not trained for it, with guidance, the better of DPM++ 2M and UniPC": "with guidance",
    "the same without guidance": "no guidance",
}
_OTHERS = {
    "phases, from itself": "along its own trajectory in place of nano's",
    "phases, loss of samples": "with the loss of samples that the papers have",
    "phases, average 0.95 as target": "with a moving average of 0.95 as the target",
    "phases, guidance 1": "with guidance 1 in the weights, which is none",
    "phases, guidance 4": "with guidance 4",
}


def few_step_section(found: Figures) -> str:
    """Returns the section of `bench/studies/few_step.py`.

    Args:
        found: its result.
    """
    rows: Sequence[Figures] = found["rows"]
    whole = next(row for row in rows if row["arm"] == "untrained, its own solver")
    bare = next(row for row in rows if row["arm"] == "untrained, its own solver, no guidance")
    seeds = len({row["seed"] for row in rows} - {None})
    return section(
        f"nano-tiny in few steps, {found['prompts']} held-out prompts: right caption in the judge's top 5, and right"
        f" style. The trained ones learned for {found['train_steps']:,} steps and draw without guidance; mean of"
        f" {seeds} seeds. In 25 steps nano-tiny has {_pair([whole])} with guidance and {_pair([bare])} without.",
        (None, "calls of the UNet a step", *(f"{steps} step{'s' if steps > 1 else ''}" for steps in _STEPS)),
        _methods(rows),
        _sentence(rows),
    )


def _methods(rows: Sequence[Figures]) -> Iterator[Cells]:
    """Yields a row for each way to draw in few steps."""
    for title, end in _UNTRAINED.items():
        cells = []
        for steps in _STEPS:
            known = [row for row in rows if row["arm"].startswith("untrained") and row["arm"].endswith(f", {end}")]
            known = [row for row in known if row["steps"] == steps]
            cells.append(_pair([max(known, key=lambda row: (row["retrieval_top5"], row["style_accuracy"]))]))
        yield [title, "2" if end == "with guidance" else "1", *cells]
    for title, arm in (("consistency (LCM)", "one phase (LCM)"), ("consistency in as many phases as steps", "phases")):
        found = [[row for row in rows if (row["arm"], row["steps"]) == (arm, steps)] for steps in _STEPS]
        yield [title, "1", *(_pair(known) if known else NO_FIGURE for known in found)]


def _sentence(rows: Sequence[Figures]) -> str:
    """Returns how near four steps come to the student's own pictures, and what other settings change."""
    lines = []
    for arm, title in {"phases": "Four phases", **_OTHERS}.items():
        known = [row for row in rows if row["arm"] == arm and row["steps"] == 4]
        if known:
            lpips, error = (statistics.fmean(row[name] for row in known) for name in ("lpips", "relative_l2"))
            shown = f"LPIPS {lpips:.3f} and relative L2 {error:.2f}"
            lines.append(f"{title}: {_pair(known)}, {shown}{' to its 25 steps' if arm == 'phases' else ''}")
    return "; ".join(lines) + "."


def _pair(rows: Sequence[Figures]) -> str:
    return " / ".join(
        f"{statistics.fmean(row[name] for row in rows):.0%}" for name in ("retrieval_top5", "style_accuracy")
    )


def whole_pictures_section(found: Results, what: str) -> str:
    """Returns the times of whole pictures, over the teacher at its own steps.

    Args:
        found: results of `sdcompress bench`.
        what: that was drawn, such as `SD1.5 at 512 px`.
    """
    return section(
        f"{what}, whole pictures ({machine(found.environment)}; `{found.command.partition(' -o ')[0]}`):",
        ("model", "drawn in", "backend", "a picture, s", "of which decoding, s", "times as fast"),
        (_picture_cells(found, row) for row in found.rows()),
    )


def _picture_cells(found: Results, row: Row) -> Cells:
    cells = [row.model, str(row.sampling), str(row.setup)]
    if row.end_to_end is None or row.speedup is None:
        return [*cells, f"failed: {row.failed}", None, None]
    run = next(run for run in found.latency if (run.model, run.setup) == (row.model, row.setup))
    decoding = run.summary("vae_decode")
    times_ms = (row.end_to_end.median, None if decoding is None else decoding.median)
    seconds = (NO_FIGURE if ms is None else format_seconds(ms / 1000) for ms in times_ms)
    return [*cells, *seconds, f"{row.speedup:.1f}×"]


def decoder_section(found: Figures, full_size: Results) -> str:
    """Returns a paragraph about the small decoder: how near it comes, and how much faster it is.

    Args:
        found: the result of `bench/studies/decoder.py` for nano.
        full_size: results of a suite in which the last two models differ only in the decoder.
    """
    own, small = (each["name"] for each in full_size.models[-2:])
    times = []
    for setup in dict.fromkeys(run.setup for run in full_size.latency):
        runs = {run.model: run.summary("vae_decode") for run in full_size.latency if run.setup == setup}
        if (slow := runs.get(own)) and (fast := runs.get(small)):
            times.append(f"{slow.median / fast.median:.1f} times as fast on {setup}")
    counts, judged = found["sd1_parameters"], found["judged"]
    shares = ", ".join(
        f"{words} {judged['vae'][key][0]:.1%} with the VAE and {judged['small'][key][0]:.1%} with the small one"
        for key, words in (("top5", "top 5"), ("style", "style"))
    )
    lpips, counted = found["lpips_alex"], found["parameters"]
    return (
        f"The small decoder: at SD1.5's shape {counts['small']:,} parameters for {counts['vae']:,}"
        f" ({counts['small'] / counts['vae']:.1%}), {', '.join(times)}. nano's, with {counted['small']:,} for"
        f" {counted['vae']:,}, comes within LPIPS {lpips[0]:.3f} ({lpips[1]:.3f} to {lpips[2]:.3f}) of its VAE's"
        f" pictures, and the judge finds in nano's: {shares}.\n"
    )
