"""Figures from raw samples: quantiles, an interval for the median, whether the samples can be trusted, and whether two
sets differ.

A round is one fresh process. Its samples share a memory layout and a clock, so the unit of evidence is the round: what
only says how samples scatter inside one is blind to most of what makes two runs of the same thing differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

NOISY_SPREAD = 0.10
"""A run whose interquartile range is over this share of its median is called noisy."""
LEVEL = 0.95
"""Of every interval."""
SIGNIFICANCE = 0.02
"""A change is told only where chance alone would give one as clear in fewer than this share of comparisons."""
LEAST_CHANGE = 0.01
"""The smallest change worth telling: a surer but smaller one is `same`."""
SAME_WITHIN = 0.05
"""The change a bench must not miss: `same` is said only where the interval rules it out."""
LEAST_ROUNDS = 3
"""On each side, for a verdict."""

Verdict = Literal["faster", "slower", "same", "unknown"]


@dataclass(frozen=True)
class Summary:
    """What samples say, in their unit.

    Attributes:
        low, high: 95% interval of the median: over rounds where there are two or more, else by bootstrap over the
            samples.
        spread: interquartile range over the median; `noisy` where it is over `NOISY_SPREAD`.
        rounds: how many processes the samples are of; from 1 the interval cannot know how processes differ.
    """

    count: int
    median: float
    p90: float
    p99: float
    low: float
    high: float
    spread: float
    noisy: bool
    rounds: int = 1


@dataclass(frozen=True)
class Change:
    """How the time of one scenario changed.

    Attributes:
        ratio: after over before, of the geometric means of the round medians; `low`, `high`: its 95% interval.
        p_value: of Welch's test that nothing changed. Where a side has one round there is none, and the interval is 0
            to infinity.
        verdict: `unknown` where the rounds are too few or too unlike to tell; `note` says which.
    """

    ratio: float
    low: float
    high: float
    p_value: float | None
    verdict: Verdict
    note: str = ""


def summarize(samples: Sequence[float], seed: int = 0) -> Summary:
    """The `Summary` of at least one sample; quantiles are linearly interpolated (type 7 of Hyndman and Fan 1996).

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("no samples")
    return _summary(samples, 1, *median_interval(samples, seed))


def summarize_rounds(rounds: Sequence[Sequence[float]], seed: int = 0) -> Summary:
    """The `Summary` of all samples of all rounds (rounds x samples; empty ones do not count), its interval widened by
    what differs from round to round.

    From two rounds on the interval is Student's over the logs of the round medians, about the median of all samples:
    with two or three rounds, where it matters, a bootstrap over rounds covers 88% to 92% (bench/studies/stats.py).

    Raises:
        ValueError: no samples, or with several rounds one that is not positive.
    """
    filled = [of_round for of_round in rounds if len(of_round)]
    samples = [sample for of_round in filled for sample in of_round]
    if len(filled) < 2:
        return summarize(samples, seed)
    from scipy.special import stdtrit

    logs = _log_medians(filled)
    half = float(stdtrit(len(logs) - 1, (1 + LEVEL) / 2) * logs.std(ddof=1)) / math.sqrt(len(logs))
    median = float(np.median(samples))
    return _summary(samples, len(filled), median * math.exp(-half), median * math.exp(half))


def change(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> Change:
    """How `after` differs from `before`, each rounds x samples of one scenario, ms: Welch's t-test (1947) on the logs
    of the round medians.

    The median of a round shrugs off its spikes; logs make a change of a share the same at every speed and the interval
    that of a ratio.

    Raises:
        ValueError: a side has no samples, or one that is not positive.
    """
    sides = [_log_medians([of_round for of_round in side if len(of_round)]) for side in (before, after)]
    counts = [len(side) for side in sides]
    shift = float(sides[1].mean() - sides[0].mean())
    ratio = math.exp(shift)
    if min(counts) < 2:
        return Change(ratio, 0.0, math.inf, None, "unknown", _few(counts))
    from scipy.special import stdtr, stdtrit

    parts = [float(side.var(ddof=1)) / len(side) for side in sides]
    error = math.sqrt(sum(parts))
    if error == 0.0:
        low, high, p_value = ratio, ratio, float(shift == 0.0)
    else:
        freedom = sum(parts) ** 2 / sum(part**2 / (count - 1) for part, count in zip(parts, counts, strict=True))
        half = float(stdtrit(freedom, (1 + LEVEL) / 2)) * error
        low, high, p_value = (
            math.exp(shift - half),
            math.exp(shift + half),
            2 * float(stdtr(freedom, -abs(shift) / error)),
        )
    if min(counts) < LEAST_ROUNDS:
        return Change(ratio, low, high, p_value, "unknown", _few(counts))
    if p_value < SIGNIFICANCE and abs(shift) >= math.log1p(LEAST_CHANGE):
        return Change(ratio, low, high, p_value, "slower" if shift > 0 else "faster")
    if -math.log1p(SAME_WITHIN) < math.log(low) and math.log(high) < math.log1p(SAME_WITHIN):
        return Change(ratio, low, high, p_value, "same")
    return Change(
        ratio,
        low,
        high,
        p_value,
        "unknown",
        f"the rounds differ too much: the change may be anything from {low - 1:+.0%} to {high - 1:+.0%}",
    )


def _summary(samples: Sequence[float], rounds: int, low: float, high: float) -> Summary:
    q25, median, q75, p90, p99 = np.quantile(
        np.asarray(samples, dtype=np.float64), [0.25, 0.5, 0.75, 0.9, 0.99]
    ).tolist()
    spread = (q75 - q25) / median if median else 0.0
    return Summary(len(samples), median, p90, p99, low, high, spread, spread > NOISY_SPREAD, rounds)


def _log_medians(rounds: Sequence[Sequence[float]]) -> np.ndarray:
    if not rounds:
        raise ValueError("no samples")
    if min(min(of_round) for of_round in rounds) <= 0:
        raise ValueError("a sample that is not positive is no time")
    return np.log([np.median(of_round) for of_round in rounds])


def _few(counts: Sequence[int]) -> str:
    return f"{counts[0]} and {counts[1]} rounds, {LEAST_ROUNDS} each are needed"


def median_interval(
    samples: Sequence[float], seed: int = 0, level: float = LEVEL, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the median (Efron 1979): the same samples and seed give the same interval."""
    values = np.asarray(samples, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(np.median(values[drawn], axis=1), [(1 - level) / 2, (1 + level) / 2]).tolist()
    return low, high


def share_interval(hits: int, count: int) -> tuple[float, float]:
    """95% interval of a share of `hits` in `count` (Wilson 1927), both in [0, 1]."""
    if not count:
        return 0.0, 1.0
    z = 1.959964
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)
