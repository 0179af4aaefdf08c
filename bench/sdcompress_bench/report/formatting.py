"""How figures are written in the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..latency import Latency
from ..results import Results, Row

NO_FIGURE = "–"


def format_ms(value: float) -> str:
    """Returns milliseconds with three digits, or without decimals from 100 on."""
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def format_millions(count: float) -> str:
    return f"{count / 1e6:,.1f} M"


def format_rate(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def format_seconds(value: float) -> str:
    """Returns seconds with three digits, or without decimals from 100 on, for a unit to follow."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def format_large(value: float) -> str:
    """Returns a number of operations or bytes with its SI prefix, for a unit to follow."""
    return f"{value / 1e12:,.1f} T" if value >= 1e12 else f"{value / 1e9:,.1f} G"


def format_or_dash(value: float | None, form: str) -> str:
    """Returns the value in a `str.format` form, or a dash where there is none."""
    return NO_FIGURE if value is None else form.format(value)


def format_figure(figure: Any) -> str:
    """Returns a share or an estimate (as plain values) with its interval, or a number with three decimals."""
    if not isinstance(figure, dict):
        return format_or_dash(figure, "{:.3f}")
    if "share" in figure:
        return f"{figure['share']:.1%} ({figure['low']:.0%}–{figure['high']:.0%})"
    return format_estimate(figure)


def format_estimate(estimate: Mapping[str, Any]) -> str:
    """Returns an estimate with its interval; the number of decimals depends on its size.

    Args:
        estimate: `metrics.Estimate` as plain values.
    """
    size = max(abs(estimate["low"]), abs(estimate["high"]))
    digits = 1 if size >= 10 else 3 if size >= 0.1 else 4
    # + 0.0 removes the minus of a rounded zero
    value, low, high = (f"{round(estimate[key], digits) + 0.0:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def format_setup(results: Results, run: Row | Latency) -> str:
    """Returns the backend setup of a row; with its size and batch where the results have several."""
    sizes, batches = {each.size_px for each in results.latency}, {each.batch for each in results.latency}
    size = f", {run.size_px} px" if len(sizes) > 1 else ""
    batch = f", batch {run.batch}" if len(batches) > 1 else ""
    return f"{run.setup}{size}{batch}"


def format_row_name(results: Results, run: Row | Latency) -> str:
    """Returns the model and the backend setup of a row."""
    return f"{run.model} · {format_setup(results, run)}"
