"""Draws plots as inline SVG.

Positions along x are percentages and text is in pixels, so one drawing is sharp and legible at any width. This is why
the plots are ours: a plotting library's SVG scales its text with the width, and would be a further dependency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Bar:
    """A horizontal bar with its interval; `tone` is a color class of the page."""

    label: str
    value: float
    low: float
    high: float
    text: str
    tone: str


@dataclass(frozen=True)
class Dot:
    """A point with an interval along y; `label` may be empty."""

    x: float
    y: float
    low: float
    high: float
    label: str
    tone: str


@dataclass(frozen=True)
class Line:
    """A curve of (x, y) points."""

    label: str
    points: Sequence[tuple[float, float]]
    tone: str


_ROW = 44
_PLOT = 240
_LEFT, _RIGHT = 11.0, 98.0


def bars(title: str, rows: Sequence[Bar]) -> str:
    """Returns a plot with a bar for each row: label above, value behind, a whisker for the interval.

    Args:
        title: above the plot.
        rows: the bars, from top to bottom; they share a zero.
    """
    # The widest bar must leave room for its value, also on a phone.
    top = max(max(row.value, row.high) for row in rows) / 0.74
    out = []
    for index, row in enumerate(rows):
        y = index * _ROW
        width, low, high = (100 * v / top for v in (row.value, row.low, row.high))
        out.append(
            f'<text x="0" y="{y + 14}" class="label">{escape(row.label)}</text><rect x="0" y="{y + 20}"'
            f' width="{width:.2f}%" height="12" rx="2" class="{escape(row.tone)}"/>'
        )
        out.append(f'<line x1="{low:.2f}%" x2="{high:.2f}%" y1="{y + 26}" y2="{y + 26}" class="whisker"/>')
        out += [
            f'<line x1="{end:.2f}%" x2="{end:.2f}%" y1="{y + 22}" y2="{y + 30}" class="whisker"/>'
            for end in (low, high)
        ]
        out.append(f'<text x="{max(width, high):.2f}%" dx="8" y="{y + 30}" class="value">{escape(row.text)}</text>')
    return _figure(title, len(rows) * _ROW, "".join(out))


def scatter(title: str, dots: Sequence[Dot], x_name: str, y_name: str, level: tuple[float, str] | None = None) -> str:
    """Returns a plot of dots with whiskers along y.

    Args:
        title: above the plot.
        dots: the points.
        x_name, y_name: of the axes.
        level: a horizontal line and its name, such as a ceiling.
    """
    xs = [dot.x for dot in dots]
    ys = [value for dot in dots for value in (dot.low, dot.high)] + ([level[0]] if level else [])
    x_axis, y_axis = _Axis(0, max(xs) * 1.15), _Axis(*_padded(min(ys), max(ys)))
    out = [_grid(x_axis, y_axis, x_name, y_name)]
    if level:
        out.append(_level_line(level, y_axis))
    labels: list[tuple[float, float]] = []
    for dot in dots:
        x, y, low, high = x_axis.x(dot.x), y_axis.y(dot.y), y_axis.y(dot.low), y_axis.y(dot.high)
        anchor, shift = ("end", -9) if x > 70 else ("start", 9)
        out.append(
            f'<line x1="{x:.2f}%" x2="{x:.2f}%" y1="{low:.1f}" y2="{high:.1f}" class="whisker faint"/><circle'
            f' cx="{x:.2f}%" cy="{y:.1f}" r="5" class="{escape(dot.tone)}"/>'
        )
        if not dot.label:
            continue
        labels.append((x, _free_height(x, y, labels)))
        out.append(
            f'<text x="{x:.2f}%" dx="{shift}" y="{labels[-1][1]:.1f}" text-anchor="{anchor}" class="label'
            f' small">{escape(dot.label)}</text>'
        )
    return _figure(title, _PLOT + 44, "".join(out))


def _free_height(x: float, y: float, labels: Sequence[tuple[float, float]]) -> float:
    """Returns the baseline of a dot's label, in px: above the dot, or below where another label is in the way.

    Args:
        x: of the dot, in percent of the width.
        y: of the dot, in px.
        labels: positions of the labels that are there.
    """
    above, below = y - 7, y + 17
    near = (abs(x - other_x) < 20 and abs(above - other_y) < 13 for other_x, other_y in labels)
    return below if any(near) else above


def lines(
    title: str,
    series: Sequence[Line],
    x_name: str,
    y_name: str,
    log: bool = False,
    level: tuple[float, str] | None = None,
) -> str:
    """Returns a plot of curves over a shared x, with a legend below; empty if there are no points.

    Args:
        title: above the plot.
        series: the curves.
        x_name, y_name: of the axes.
        log: a logarithmic y axis, which leaves out values that are not positive.
        level: a horizontal line and its name.
    """
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points if not log or y > 0] + ([level[0]] if level else [])
    if not xs or not ys:
        return ""
    x_axis = _Axis(min(xs), max(xs))
    y_axis = (
        _Axis(10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(ys) * 1.0001)), log=True)
        if log
        else _Axis(*_padded(min(0.0, *ys), max(ys)))
    )
    out = [_grid(x_axis, y_axis, x_name, y_name)]
    if level:
        out.append(_level_line(level, y_axis))
    # Polylines accept no percentages, so curves are drawn in a box of 1000 units that stretches with the page.
    for line in series:
        points = " ".join(f"{x_axis.x(x) * 10:.1f},{y_axis.y(y):.1f}" for x, y in line.points if not log or y > 0)
        out.append(
            f'<svg x="0" y="0" width="100%" height="{_PLOT}" viewBox="0 0 1000 {_PLOT}"'
            f' preserveAspectRatio="none"><polyline points="{points}" class="curve {escape(line.tone)}"/></svg>'
        )
    legend = "".join(f'<span><i class="{escape(line.tone)}"></i>{escape(line.label)}</span>' for line in series)
    return _figure(title, _PLOT + 44, "".join(out), f'<div class="legend">{legend}</div>')


@dataclass(frozen=True)
class _Axis:
    """Maps data to percent along x and to pixels along y."""

    low: float
    high: float
    log: bool = False

    def part(self, value: float) -> float:
        low, high, value = (
            (math.log10(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return (value - low) / (high - low) if high > low else 0.5

    def x(self, value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * self.part(value)

    def y(self, value: float) -> float:
        return 8 + (_PLOT - 8) * (1 - self.part(value))

    def ticks(self) -> list[float]:
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            return [10.0**power for power in range(first, last + 1, max(1, -(-(last - first) // 5)))]
        if self.high <= self.low:
            return [self.low]
        raw = (self.high - self.low) / 6
        unit = 10 ** math.floor(math.log10(raw))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
        return [step * i for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def _padded(low: float, high: float) -> tuple[float, float]:
    """Returns a wider range: more room above, and also below unless the axis starts at zero."""
    air = 0.12 * (high - low) or abs(high) * 0.1 or 1.0
    return (0.0 if 0 <= low < air else low - air), high + air


def _level_line(level: tuple[float, str], y_axis: _Axis) -> str:
    """Returns a horizontal line with its name above it."""
    y = y_axis.y(level[0])
    return (
        f'<line x1="{_LEFT}%" x2="{_RIGHT}%" y1="{y:.1f}" y2="{y:.1f}" class="level"/><text x="{_LEFT + 1}%"'
        f' y="{y - 6:.1f}" class="tick">{escape(level[1])}</text>'
    )


def _grid(x_axis: _Axis, y_axis: _Axis, x_name: str, y_name: str) -> str:
    out = [
        f'<text x="0" y="{_PLOT + 38}" class="tick">↑ {escape(y_name)}</text><text x="100%" y="{_PLOT + 38}"'
        f' text-anchor="end" class="tick">{escape(x_name)} →</text>'
    ]
    for tick in y_axis.ticks():
        y = y_axis.y(tick)
        out.append(
            f'<line x1="{_LEFT}%" x2="{_RIGHT}%" y1="{y:.1f}" y2="{y:.1f}" class="rule"/><text x="{_LEFT - 1}%"'
            f' y="{y + 4:.1f}" text-anchor="end" class="tick">{_tick(tick, y_axis.log)}</text>'
        )
    out += [
        f'<text x="{x_axis.x(tick):.2f}%" y="{_PLOT + 18}" text-anchor="middle"'
        f' class="tick">{_tick(tick, x_axis.log)}</text>'
        for tick in x_axis.ticks()
    ]
    return "".join(out)


def _tick(value: float, log: bool) -> str:
    if log:
        return "1" if value == 1 else f"10<tspan dy='-4' font-size='8'>{round(math.log10(value))}</tspan>"
    return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3g}"


def _figure(title: str, height: int, body: str, below: str = "") -> str:
    svg = f'<svg role="img" aria-label="{escape(title)}" width="100%" height="{height}">{body}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}{below}</figure>"
