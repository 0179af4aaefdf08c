"""Are the bench's statistics right? They are tested on samples with known truth, and compared with real rounds.

    python bench/studies/stats.py -o bench/results/statistics.json

The tests are quantiles, intervals and planted changes. The thresholds are constants of sdcompress_bench/stats.py. They
were chosen from the power of Welch's test before any seed was drawn: with the noise below, a planted 5% should be
detected in at least 95% of the runs, and a change in at most 5% of the runs where nothing was planted. Nothing is
timed, so the study takes seconds and its results are the same every time.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sdcompress_bench import stats

RESULTS = Path(__file__).parents[1] / "results"
REAL = ("demo.json", "backends-cpu.json")
RUNS = 200
DETECTED_LEAST, FALSE_MOST = 0.95, 0.05


@dataclass(frozen=True)
class Noise:
    """How the times of one scenario scatter.

    Attributes:
        within: standard deviation of the logs of a round's samples.
        between: standard deviation of the logs of the rounds.
        spikes: share of samples that other work on the machine delays, to 1.5 to 4 times their time.
    """

    within: float = 0.03
    between: float = 0.01
    spikes: float = 0.02

    def draw(
        self, random: np.random.Generator, rounds: int, samples: int, median_ms: float = 10.0
    ) -> list[list[float]]:
        """Returns rounds × samples, ms.

        Args:
            random: the source.
            rounds: how many.
            samples: in each round.
            median_ms: the median without spikes.
        """
        logs = (
            math.log(median_ms)
            + random.normal(0, self.between, (rounds, 1))
            + random.normal(0, self.within, (rounds, samples))
        )
        delays = np.where(
            random.random((rounds, samples)) < self.spikes, random.uniform(1.5, 4.0, (rounds, samples)), 1.0
        )
        drawn: list[list[float]] = (np.exp(logs) * delays).tolist()
        return drawn


NOISES = {"quiet": Noise(), "busy": Noise(within=0.15, between=0.05, spikes=0.05)}


def check_quantiles(count: int = 20_000) -> list[dict[str, Any]]:
    """Returns quantiles of known distributions: the truth, the result of `summarize_rounds`, and the difference.

    The difference is in standard errors of the quantile.
    """
    from scipy import stats as distributions

    shapes: dict[str, tuple[Callable[[np.random.Generator], np.ndarray], Any]] = {
        "normal": (lambda r: r.normal(10, 1, count), distributions.norm(loc=10)),
        "lognormal": (lambda r: r.lognormal(0, 0.3, count), distributions.lognorm(s=0.3)),
        "exponential": (lambda r: r.exponential(1, count), distributions.expon()),
        "uniform": (lambda r: r.uniform(1, 2, count), distributions.uniform(loc=1)),
    }
    rows = []
    for name, (draw, truth) in shapes.items():
        summary = stats.summarize_rounds([draw(np.random.default_rng(0)).tolist()])
        for share, value in ((0.5, summary.median), (0.9, summary.p90), (0.99, summary.p99)):
            true = float(truth.ppf(share))
            error = math.sqrt(share * (1 - share) / count) / float(truth.pdf(true))
            rows.append(
                {
                    "distribution": name,
                    "quantile": share,
                    "true": true,
                    "found": value,
                    "standard_errors": (value - true) / error,
                }
            )
    return rows


def bootstrap_rounds(
    rounds: list[list[float]], random: np.random.Generator, resamples: int = 300
) -> tuple[float, float]:
    """Returns the interval that `summarize_rounds` does not use: a bootstrap over rounds and their samples.

    Args:
        rounds: rounds × samples, as many in each round.
        random: the source of the draws.
        resamples: how many are drawn.
    """
    values = np.asarray(rounds)
    count, samples = values.shape
    drawn = values[random.integers(0, count, (resamples, count))]
    again = np.take_along_axis(drawn, random.integers(0, samples, drawn.shape), axis=2)
    low, high = np.quantile(
        np.median(again.reshape(resamples, -1), axis=1), [(1 - stats.LEVEL) / 2, (1 + stats.LEVEL) / 2]
    ).tolist()
    return low, high


def measure_coverage(noise: Noise, rounds: int, seeds: int, samples: int = 20) -> dict[str, float]:
    """Returns the shares of runs whose interval contains the true value: three intervals of a median, one of a ratio.

    `width` is the median width of the first interval.

    Args:
        noise: of the samples.
        rounds: in a run.
        seeds: number of runs.
        samples: in a round.
    """
    # Spikes lift the true median: it is where half of the samples of all possible rounds lie below.
    truth = float(np.median(noise.draw(np.random.default_rng(1 << 40), 40_000, 20)))
    hits: Counter[str] = Counter()
    widths = []
    for seed in range(seeds):
        random = np.random.default_rng((seed, rounds))
        drawn = noise.draw(random, rounds, samples)
        summary = stats.summarize_rounds(drawn)
        ratio = stats.change(drawn, noise.draw(random, rounds, samples, 10.0 * 1.05))
        pooled = stats.median_interval([sample for of_round in drawn for sample in of_round], seed, resamples=300)
        intervals = {
            "over rounds, Student": (summary.low, summary.high),
            "over rounds, bootstrap": bootstrap_rounds(drawn, random),
            "over samples, bootstrap": pooled,
        }
        hits.update(name for name, (low, high) in intervals.items() if low <= truth <= high)
        hits["ratio, Welch"] += ratio.low <= 1.05 <= ratio.high
        widths.append((summary.high - summary.low) / summary.median)
    return {
        name: hits[name] / seeds
        for name in ("over rounds, Student", "over rounds, bootstrap", "over samples, bootstrap", "ratio, Welch")
    } | {"width": float(np.median(widths))}


def compare_planted(noise: Noise, rounds: int, factor: float, runs: int = RUNS, samples: int = 20) -> dict[str, float]:
    """Returns verdict → share of pairs of runs, the second of which is slower by `factor`.

    Args:
        noise: of the samples.
        rounds: in a run.
        factor: of the times.
        runs: number of pairs, each with its own seed.
        samples: in a round.
    """
    verdicts: Counter[str] = Counter()
    for seed in range(runs):
        random = np.random.default_rng((seed, rounds, 7))
        verdicts[
            stats.change(
                noise.draw(random, rounds, samples), noise.draw(random, rounds, samples, 10.0 * factor)
            ).verdict
        ] += 1
    return {verdict: verdicts[verdict] / runs for verdict in ("faster", "slower", "same", "unknown")}


def measure_noise(path: Path) -> list[dict[str, Any]]:
    """Returns rounds, samples, and the spread within and between rounds of each case in a results file.

    The spreads are those of `Noise`. Within: from the interquartile range, which spikes do not move. Between: the
    standard deviation of the logs of the round medians, without the scatter of a median of so many samples.
    """
    rows = []
    for name, rounds in _find_rounds(json.loads(path.read_text(encoding="utf-8"))):
        logs = [np.log(of_round) for of_round in rounds if len(of_round) >= 5]
        if not logs:
            continue
        within = float(np.median([np.subtract(*np.quantile(of_round, [0.75, 0.25])) / 1.349 for of_round in logs]))
        own = within * math.sqrt(math.pi / 2 / min(len(of_round) for of_round in logs))
        between = (
            math.sqrt(max(0.0, float(np.var([np.median(of_round) for of_round in logs], ddof=1)) - own**2))
            if len(logs) > 1
            else None
        )
        rows.append(
            {
                "file": path.name,
                "case": name,
                "rounds": len(logs),
                "samples": len(logs[0]),
                "within": within,
                "between": between,
            }
        )
    return rows


def _find_rounds(value: Any, name: str = "") -> Iterator[tuple[str, list[list[float]]]]:
    """Yield name and rounds of each case, in either format: `samples_ms` by stage, or `rounds` with their `ms`."""
    if isinstance(value, dict):
        own = value.get("key") or name
        for stage, rounds in value.get("samples_ms", {}).items():
            yield f"{own} {stage}", rounds
        if isinstance(value.get("rounds"), list) and all(isinstance(of_round, dict) for of_round in value["rounds"]):
            yield own, [of_round["ms"] for of_round in value["rounds"] if "ms" in of_round]
        for key, inner in value.items():
            yield from _find_rounds(inner, name if key in ("models", "batch", "latency") else f"{name} {key}".strip())
    elif isinstance(value, list):
        for inner in value:
            yield from _find_rounds(inner, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    quantiles = check_quantiles()
    print(
        f"quantiles of {len({row['distribution'] for row in quantiles})} known distributions: at most"
        f" {max(abs(row['standard_errors']) for row in quantiles):.1f} standard errors off"
    )
    covered: list[dict[str, Any]] = []
    for name, noise in NOISES.items():
        for rounds in (2, 3, 5, 10):
            shares = measure_coverage(noise, rounds, 500)
            covered.append({"noise": name, "rounds": rounds} | shares)
            print(
                f"95% intervals hold the truth, {name:<5} {rounds:2d} rounds: "
                + ", ".join(f"{key} {share:.1%}" for key, share in shares.items())
            )
    verdicts: list[dict[str, Any]] = []
    for name, noise in NOISES.items():
        for rounds in (3, 5, 10):
            for factor in (1.0, 1.02, 1.05, 1.10):
                shares = compare_planted(noise, rounds, factor)
                verdicts.append({"noise": name, "rounds": rounds, "planted": factor} | shares)
                print(
                    f"planted {factor - 1:.0%}, {name:<5} {rounds:2d} rounds: "
                    + ", ".join(f"{verdict} {share:.1%}" for verdict, share in shares.items())
                )
    real = [row for file in REAL for row in measure_noise(RESULTS / file)]
    for file in REAL:
        rows = [row for row in real if row["file"] == file]
        between = [row["between"] for row in rows if row["between"] is not None]
        spread = f", between rounds {_format_spread(between)}" if between else ", one round each"
        print(f"{file}: {len(rows)} cases, inside a round {_format_spread([row['within'] for row in rows])}{spread}")
    constants = {
        name: getattr(stats, name) for name in ("LEVEL", "SIGNIFICANCE", "LEAST_CHANGE", "SAME_WITHIN", "LEAST_ROUNDS")
    }
    document = {
        "constants": constants,
        "noises": {name: asdict(noise) for name, noise in NOISES.items()},
        "runs": RUNS,
        "quantiles": quantiles,
        "coverage": covered,
        "planted": verdicts,
        "real": real,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    quiet = {row["planted"]: row for row in verdicts if (row["noise"], row["rounds"]) == ("quiet", 5)}
    if quiet[1.05]["slower"] < DETECTED_LEAST or 1 - quiet[1.0]["same"] - quiet[1.0]["unknown"] > FALSE_MOST:
        raise SystemExit("a planted change was missed, or found where there was none, too often")


def _format_spread(values: list[float]) -> str:
    """Returns the median, and the range of the middle 80%."""
    low, median, high = np.quantile(values, [0.1, 0.5, 0.9]).tolist()
    return f"{median:.1%} ({low:.1%} to {high:.1%} for eight in ten)"


if __name__ == "__main__":
    main()
