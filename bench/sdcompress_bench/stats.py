"""Figures from raw samples: quantiles, intervals of medians, whether samples are noisy, and whether two sets differ.

A round is one new process. Its samples share a memory layout and a clock, so the unit of evidence is the round. The
scatter of samples inside one round does not show most of what makes two runs of the same thing differ.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

NOISY_SPREAD = 0.10
"""Samples are noisy if their interquartile range is over this share of their median."""
LEVEL = 0.95
"""Confidence level of every interval."""
SIGNIFICANCE = 0.02
"""A change is reported only if chance alone gives one as clear in less than this share of comparisons."""
LEAST_CHANGE = 0.01
"""The smallest change that is reported. A significant but smaller one is `same`."""
SAME_WITHIN = 0.05
"""The change that must not be missed. The verdict is `same` only if the interval excludes it."""
LEAST_ROUNDS = 3
"""Rounds that each side needs for a verdict."""

Verdict = Literal["faster", "slower", "same", "unknown"]


@dataclass(frozen=True)
class Summary:
    """Summary of samples, in their unit.

    Attributes:
        low, high: 95% interval of the median: over rounds if there are two or more, else by bootstrap over the samples.
        spread: interquartile range over the median.
        noisy: whether `spread` is over `NOISY_SPREAD`.
        rounds: number of processes that the samples come from. The interval of one round does not show how processes
            differ.
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
        ratio: after over before, of the geometric means of the round medians.
        low, high: 95% interval of the ratio; 0 to infinity where a side has one round.
        p_value: of Welch's test that nothing changed; None where a side has one round.
        verdict: `unknown` where there are too few rounds or they differ too much; `note` has the reason.
    """

    ratio: float
    low: float
    high: float
    p_value: float | None
    verdict: Verdict
    note: str = ""


def summarize(samples: Sequence[float], seed: int = 0) -> Summary:
    """Returns the `Summary` of at least one sample; quantiles interpolate linearly (type 7 of Hyndman and Fan 1996).

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("no samples")
    return _summary(samples, 1, *median_interval(samples, seed))


def summarize_rounds(rounds: Sequence[Sequence[float]], seed: int = 0) -> Summary:
    """Returns the `Summary` of all samples of all rounds; the interval includes how rounds differ.

    From two rounds on the interval is Student's over the logs of the round medians, about the median of all samples.
    With two or three rounds, where it matters, a bootstrap over rounds covers only 88% to 92% (bench/studies/stats.py).

    Args:
        rounds: rounds × samples; empty rounds do not count.
        seed: of the bootstrap, if there is one round.

    Raises:
        ValueError: there are no samples, or one of several rounds has a sample that is not positive.
    """
    filled = [samples for samples in rounds if len(samples)]
    samples = [sample for of_round in filled for sample in of_round]
    if len(filled) < 2:
        return summarize(samples, seed)
    from scipy import stats

    logs = _log_medians(filled)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(logs) - 1) * stats.sem(logs))
    median = float(np.median(samples))
    return _summary(samples, len(filled), median * math.exp(-half), median * math.exp(half))


def change(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> Change:
    """Returns how the times of one scenario changed: Welch's t-test (1947) on the logs of the round medians.

    Spikes do not move the median of a round. With logs, the same relative change counts the same at every speed, and
    the interval is that of a ratio.

    Args:
        before, after: rounds × samples, ms.

    Raises:
        ValueError: a side has no samples, or one that is not positive.
    """
    sides = [_log_medians([samples for samples in side if len(samples)]) for side in (before, after)]
    counts = [len(side) for side in sides]
    shift = float(sides[1].mean() - sides[0].mean())
    ratio = math.exp(shift)
    if min(counts) < 2:
        return Change(ratio, 0.0, math.inf, None, "unknown", _few(counts))
    low, high, p_value = _welch(sides[0], sides[1], shift)
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


def _welch(before: np.ndarray, after: np.ndarray, shift: float) -> tuple[float, float, float]:
    """Returns the interval of the ratio, and the p-value that nothing changed, from the logs of both sides."""
    if not before.std() and not after.std():  # scipy has no answer where nothing varies
        return math.exp(shift), math.exp(shift), float(shift == 0.0)
    from scipy import stats

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)  # of a side that does not vary
        test = stats.ttest_ind(after, before, equal_var=False)
    bounds = test.confidence_interval(LEVEL)
    return math.exp(bounds.low), math.exp(bounds.high), float(test.pvalue)


def _summary(samples: Sequence[float], rounds: int, low: float, high: float) -> Summary:
    q25, median, q75, p90, p99 = np.quantile(
        np.asarray(samples, dtype=np.float64), [0.25, 0.5, 0.75, 0.9, 0.99]
    ).tolist()
    spread = (q75 - q25) / median if median else 0.0
    return Summary(len(samples), median, p90, p99, low, high, spread, spread > NOISY_SPREAD, rounds)


def _log_medians(rounds: Sequence[Sequence[float]]) -> np.ndarray:
    if not rounds:
        raise ValueError("no samples")
    if min(min(samples) for samples in rounds) <= 0:
        raise ValueError("a sample that is not positive is no time")
    return np.log([np.median(samples) for samples in rounds])


def _few(counts: Sequence[int]) -> str:
    return f"{counts[0]} and {counts[1]} rounds, {LEAST_ROUNDS} each are needed"


def median_interval(
    samples: Sequence[float], seed: int = 0, level: float = LEVEL, resamples: int = 2000
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of the median (Efron 1979).

    This does not call `scipy.stats.bootstrap`: it draws other resamples, so intervals in committed results would
    change.

    Args:
        samples: at least one.
        seed: of the resamples; the same samples and seed give the same interval.
        level: confidence level, in (0, 1).
        resamples: how many are drawn.
    """
    values = np.asarray(samples, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(np.median(values[drawn], axis=1), [(1 - level) / 2, (1 + level) / 2]).tolist()
    return low, high


def share_interval(hits: int, count: int) -> tuple[float, float]:
    """Returns the 95% interval of a share of `hits` in `count` (Wilson 1927), in [0, 1]."""
    if not count:
        return 0.0, 1.0
    from scipy.stats import binomtest

    interval = binomtest(hits, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
