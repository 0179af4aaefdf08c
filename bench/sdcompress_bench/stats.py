"""Figures from raw samples: quantiles, an interval for the median, and whether the samples can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NOISY_SPREAD = 0.10
"""A run whose interquartile range is over this share of its median is called noisy."""


@dataclass(frozen=True)
class Summary:
    """What a list of samples says, in the samples' unit.

    Attributes:
        low, high: 95% bootstrap interval of the median.
        spread: interquartile range over the median; `noisy` where it is over `NOISY_SPREAD`.
    """

    count: int
    median: float
    p90: float
    p99: float
    low: float
    high: float
    spread: float
    noisy: bool


def summarize(samples: Sequence[float], seed: int = 0) -> Summary:
    """The `Summary` of at least one sample; quantiles are linearly interpolated (type 7 of Hyndman and Fan 1996).

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("no samples")
    q25, median, q75, p90, p99 = np.quantile(np.asarray(samples, dtype=np.float64), [0.25, 0.5, 0.75, 0.9, 0.99]).tolist()
    low, high = median_interval(samples, seed)
    spread = (q75 - q25) / median if median else 0.0
    return Summary(len(samples), median, p90, p99, low, high, spread, spread > NOISY_SPREAD)


def median_interval(samples: Sequence[float], seed: int = 0, level: float = 0.95, resamples: int = 2000) -> tuple[float, float]:
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
