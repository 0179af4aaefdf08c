"""The plots of the report, as SVG."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from ..results import Results, Row
from ..scenario import BackendSetup
from . import svg
from .formatting import format_ms, format_row_name

_COLORS = 6
"""How many colors of lines the page has."""
_QUALITY_AXES = (
    ("style", "style recognized, %"),
    ("top1", "caption found first, %"),
    ("clip_score", "CLIP score"),
    ("fid_real", "FID to real pictures (lower is better)"),
)
"""The figures of quality that are plotted against speed; the first that the results have is taken."""


def speed_plots(results: Results) -> list[Markup]:
    """Returns the bars of whole pictures and of UNet steps, and speed against quality."""
    rows = [row for row in results.rows() if not row.failed]
    steps = [(row, row.unet_step) for row in rows]
    whole = [(row, row.end_to_end) for row in rows]
    counts = " or ".join(map(str, dict.fromkeys(row.sampling.steps for row in rows)))
    plots = []
    for title, summaries in (
        ("Prompt to picture, ms (median, 95% interval)", whole),
        (f"One of a picture's {counts} UNet steps, ms (median, 95% interval)", steps),
    ):
        bars = [
            svg.Bar(format_row_name(results, row), s.median, s.low, s.high, format_ms(s.median), row.setup.backend)
            for row, s in summaries
            if s
        ]
        if bars:
            plots.append(Markup(svg.bars(title, bars)))
    if trade_off := _trade_off_plot(results, rows):
        plots.append(trade_off)
    return plots


def _trade_off_plot(results: Results, rows: list[Row]) -> Markup | None:
    """Returns the speed of every row against its model's quality, or None without a figure of quality."""
    axes = ((key, name) for key, name in _QUALITY_AXES if any(key in figures for figures in results.quality.values()))
    key, y_name = next(axes, ("", ""))
    marks = {name: _bounds(figures[key]) for name, figures in results.quality.items() if key in figures}
    # All dots of a model have the same height, so its name is written once, at the fastest.
    fastest = {row.model: max(r.images_per_s or 0 for r in rows if r.model == row.model) for row in rows}
    dots = [
        svg.Dot(
            row.images_per_s,
            *marks[row.model],
            row.model if row.images_per_s == fastest[row.model] else "",
            row.setup.backend,
        )
        for row in rows
        if row.images_per_s and row.model in marks
    ]
    if not dots:
        return None
    ceiling = (marks["real"][0], "real pictures") if "real" in marks else None
    y_name = f"{y_name}; color: what runs it"
    return Markup(svg.scatter("Speed against quality", dots, "pictures/s", y_name, ceiling))


def _bounds(figure: Any) -> tuple[float, float, float]:
    """Returns a figure and its interval; a share in percent."""
    if not isinstance(figure, dict):
        return figure, figure, figure
    if "share" in figure:
        return 100 * figure["share"], 100 * figure["low"], 100 * figure["high"]
    return figure["value"], figure["low"], figure["high"]


def error_plots(results: Results) -> list[Markup]:
    """Returns the relative L2 by timestep: of the same weights in other setups, and of students to the teacher."""
    backends = [
        _line(f"{entry['model']} · {BackendSetup(entry['backend'], entry['precision'])}", entry, index)
        for index, entry in enumerate(results.backends)
        if "steps" in entry
    ]
    students = [
        _line(name, figures, index)
        for index, (name, figures) in enumerate(results.students.items())
        if "steps" in figures
    ]
    exact = [entry for entry in results.backends if entry["precision"] == "fp32"]
    limits = {limit for entry in exact for limit in entry.get("gate", {}).get("limits", [])}
    level = (limits.pop(), "limit in fp32") if len(limits) == 1 else None
    plots = []
    if backends:
        title = "Same weights on other backends, relative to PyTorch fp32"
        plots.append(Markup(svg.lines(title, backends, "timestep", "relative L2", log=True, level=level)))
    if students:
        title = f"Student against {results.teacher}"
        plots.append(Markup(svg.lines(title, students, "timestep", "relative L2")))
    return plots


def _line(label: str, figures: dict[str, Any], index: int) -> svg.Line:
    points = [(step["timestep"], step["relative_l2"]) for step in figures["steps"]]
    return svg.Line(label, points, f"s{index % _COLORS}")


def loss_plots(results: Results) -> list[Markup]:
    """Returns the loss curves of each model's training."""
    plots = []
    for model, series in results.losses.items():
        lines = [
            svg.Line(name, [(step, value) for step, value in pairs], f"s{index % _COLORS}")
            for index, (name, pairs) in enumerate(series.items())
        ]
        plots.append(Markup(svg.lines(model, lines, "step", "loss", log=True)))
    return plots
