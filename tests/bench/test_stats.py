"""Figures from samples: known quantiles, seeded intervals, and the flag for samples that cannot be trusted."""

from __future__ import annotations

import pytest
from sdcompress_bench.stats import median_interval, share_interval, summarize


def test_quantiles_of_known_samples() -> None:
    summary = summarize([float(i) for i in range(101)])
    assert (summary.count, summary.median, summary.p90, summary.p99) == (101, 50.0, 90.0, 99.0)


def test_one_sample_is_its_own_interval() -> None:
    summary = summarize([7.0])
    assert (summary.median, summary.low, summary.high, summary.noisy) == (7.0, 7.0, 7.0, False)


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        summarize([])


def test_interval_holds_the_median_and_repeats_with_its_seed() -> None:
    samples = [10.0, 11.0, 9.5, 10.2, 10.1, 30.0, 9.9]
    low, high = median_interval(samples, seed=3)
    assert low <= summarize(samples).median <= high
    assert (low, high) == median_interval(samples, seed=3)
    assert high < 30.0, "one outlier must not carry the interval of a median"


def test_interval_covers_the_true_median_as_often_as_it_says() -> None:
    import numpy as np

    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = median_interval(random.normal(5.0, 1.0, 25).tolist(), resamples=400)
        covered += low <= 5.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_scattered_samples_are_noisy_and_close_ones_are_not() -> None:
    assert summarize([10.0, 14.0, 10.0, 14.0]).noisy
    assert not summarize([10.0, 10.1, 10.2, 10.1, 50.0]).noisy


def test_share_interval_stays_in_range_and_narrows() -> None:
    assert share_interval(0, 10)[0] == 0.0
    assert share_interval(10, 10)[1] == pytest.approx(1.0)
    few, many = share_interval(5, 10), share_interval(500, 1000)
    assert many[1] - many[0] < few[1] - few[0]
    assert share_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)
