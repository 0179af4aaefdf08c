"""Figures from samples: known quantiles, seeded intervals, noisy samples, and planted changes in known noise."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sdcompress_bench.stats import SAME_WITHIN, change, median_interval, share_interval, summarize, summarize_rounds


@pytest.fixture(scope="module")
def study() -> Any:
    """bench/studies/stats.py, whose noise and counts these tests repeat on fewer seeds."""
    spec = importlib.util.spec_from_file_location("stats_study", Path(__file__).parents[2] / "bench/studies/stats.py")
    assert spec
    assert spec.loader
    sys.modules["stats_study"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_interval_covers_the_true_median_at_its_level() -> None:
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


def test_quantiles_of_known_distributions_are_recovered(study: Any) -> None:
    rows = study.check_quantiles(5000)
    assert len(rows) == 12
    assert all(abs(row["standard_errors"]) < 4 for row in rows)


def test_intervals_over_rounds_cover_at_their_level_and_those_over_samples_do_not(study: Any) -> None:
    covered = study.measure_coverage(study.Noise(), rounds=3, seeds=150)
    for name in ("over rounds, Student", "ratio, Welch"):
        assert 0.90 <= covered[name] <= 0.995, name
    assert covered["over samples, bootstrap"] < 0.90


def test_a_slowdown_of_5_percent_is_detected_and_no_change_where_none_was_planted(study: Any) -> None:
    slower, equal = (study.compare_planted(study.Noise(), 5, factor) for factor in (1.05, 1.0))
    assert slower["slower"] >= 0.95
    assert equal["slower"] + equal["faster"] <= 0.05
    assert equal["same"] >= 0.90, "quiet rounds are enough to rule a change out"
    assert study.compare_planted(study.Noise(), 5, 1 / 1.05)["faster"] >= 0.95


def test_a_busy_machine_gives_unknown_not_same_or_changed(study: Any) -> None:
    assert study.compare_planted(study.NOISES["busy"], 5, 1.0)["unknown"] >= 0.90


def test_change_is_welchs_test_on_logs_of_round_medians(study: Any) -> None:
    from scipy.stats import ttest_ind

    random = np.random.default_rng(5)
    before, after = study.Noise().draw(random, 4, 9), study.Noise(between=0.05).draw(random, 7, 12, 11.0)
    found = change(before, after)
    expected = ttest_ind(*(np.log(np.median(side, axis=1)) for side in (after, before)), equal_var=False)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx(np.exp(expected.confidence_interval()), rel=1e-9)
    back = change(after, before)
    assert (back.ratio, back.low, back.high) == pytest.approx((1 / found.ratio, 1 / found.high, 1 / found.low))


def test_too_few_rounds_are_unknown_with_a_note() -> None:
    one, two, three = ([[10.0, 10.1, 10.2]] * count for count in (1, 2, 3))
    alone = change(one, three)
    assert (alone.verdict, alone.p_value, alone.low, alone.high) == ("unknown", None, 0.0, math.inf)
    for before, after in ((one, three), (two, three), (three, two)):
        found = change(before, after)
        assert found.verdict == "unknown"
        assert "3 each are needed" in found.note
    assert change(three, [*two, []]).verdict == "unknown", "a round without samples is none"


def test_a_small_significant_change_is_the_same_and_a_wide_interval_is_not() -> None:
    before = [[10.0], [10.001], [10.002]]
    small = change(before, [[10.05], [10.051], [10.052]])
    assert small.p_value is not None
    assert small.p_value < 0.001
    assert small.verdict == "same"
    wide = change([[8.0], [10.0], [12.0]], [[8.1], [10.1], [12.1]])
    assert wide.verdict == "unknown"
    assert wide.high > 1 + SAME_WITHIN
    assert "%" in wide.note


def test_rounds_without_any_spread_are_compared_exactly() -> None:
    still = [[10.0, 10.0]] * 3
    assert change(still, still).verdict == "same"
    assert change(still, [[10.5, 10.5]] * 3).verdict == "slower"


def test_summary_of_rounds_has_the_quantiles_of_all_samples_and_a_wider_interval() -> None:
    rounds = [[10.0, 10.1, 10.2, 10.1], [11.0, 11.1, 11.2, 11.1], [9.0, 9.1, 9.2, 9.1], []]
    of_rounds, pooled = summarize_rounds(rounds), summarize([sample for of_round in rounds for sample in of_round])
    for name in ("count", "median", "p90", "p99", "spread", "noisy"):
        assert getattr(of_rounds, name) == getattr(pooled, name)
    assert (of_rounds.rounds, pooled.rounds) == (3, 1)
    assert of_rounds.low < pooled.low <= pooled.high < of_rounds.high
    assert summarize_rounds(rounds[:1]) == summarize(rounds[0])


def test_no_rounds_and_impossible_times_are_refused() -> None:
    for bad in ([], [[]]):
        with pytest.raises(ValueError, match="no samples"):
            summarize_rounds(bad)
        with pytest.raises(ValueError, match="no samples"):
            change([[1.0]], bad)
    with pytest.raises(ValueError, match="not positive"):
        change([[1.0], [0.0]], [[1.0], [1.0]])


def test_spread_of_real_rounds_is_read_from_any_results_file(study: Any, tmp_path: Path) -> None:
    noise, random = study.Noise(within=0.05, between=0.08), np.random.default_rng(0)
    drawn = noise.draw(random, 40, 40)
    (tmp_path / "latency.json").write_text(json.dumps({"latency": [{"key": "a", "samples_ms": {"unet_step": drawn}}]}))
    (tmp_path / "study.json").write_text(
        json.dumps({"models": {"a": {"torch": {"batch": {"1": {"rounds": [{"ms": of_round} for of_round in drawn]}}}}}})
    )
    for name in ("latency.json", "study.json"):
        (row,) = study.measure_noise(tmp_path / name)
        assert (row["rounds"], row["samples"]) == (40, 40)
        assert row["within"] == pytest.approx(0.05, rel=0.15)
        assert row["between"] == pytest.approx(0.08, rel=0.35)
