"""Comparing two results: a change beyond noise is reported, noise is not, and different scenarios are refused."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest
from sdcompress_bench.compare import compare, render, to_json
from sdcompress_bench.latency import STAGES, Latency
from sdcompress_bench.results import Results
from sdcompress_engines.errors import ArtifactError

ENVIRONMENT: dict[str, Any] = {
    "cpu": "Test CPU",
    "cores": 2,
    "torch_threads": 2,
    "gpu": [],
    "packages": {"torch": "2.13"},
    "commit": "aaa",
}


def run(model: str, backend: str, ms: float, seed: int, rounds: int = 5, failed: str | None = None) -> Latency:
    if failed:
        return Latency(f"{model}-{backend}", model, backend, "fp32", 128, 1, 2, 25, 4.0, failed=failed)
    random = np.random.default_rng(seed)
    samples = {
        stage: [(ms * random.lognormal(0, 0.005) * random.lognormal(0, 0.02, 20)).tolist() for _ in range(rounds)]
        for stage in STAGES
    }
    return Latency(f"{model}-{backend}", model, backend, "fp32", 128, 1, 2, 25, 4.0, samples)


def results(*latency: Latency, **changes: Any) -> Results:
    settings = {"steps": 25, "guidance_scale": 4.0, "rounds": 5, "baseline": ["torch", "fp32"]}
    models = [{"name": "nano", "sha256": "ab" * 32, "parameters": {"unet": 1}}]
    return dataclasses.replace(Results("", "", settings, ENVIRONMENT, models, list(latency)), **changes)


def test_a_slowdown_is_reported_and_noise_is_not() -> None:
    found = compare(
        results(run("nano", "torch", 100, 1), run("nano", "onnxruntime", 50, 2)),
        results(run("nano", "torch", 108, 3), run("nano", "onnxruntime", 50, 4)),
    )
    verdicts = {(line.scenario.split(",")[1].strip(), line.stage): line.change.verdict for line in found.lines}
    assert {verdict for (setup, _), verdict in verdicts.items() if setup == "PyTorch fp32"} == {"slower"}
    assert {verdict for (setup, _), verdict in verdicts.items() if setup == "ONNX Runtime fp32"} == {"same"}
    text = render(found)
    assert "▲ slower" in text
    assert "= same" in text
    assert re.search(r"\+[78]\.\d%", text)


def test_too_few_rounds_give_no_verdict() -> None:
    found = compare(results(run("nano", "torch", 100, 1, rounds=1)), results(run("nano", "torch", 150, 2, rounds=1)))
    assert {line.change.verdict for line in found.lines} == {"unknown"}
    assert "? unknown" in render(found)
    assert json.loads(to_json(found), parse_constant=pytest.fail)["lines"][0]["change"]["high"] is None


def test_different_scenarios_are_refused() -> None:
    base = results(run("nano", "torch", 100, 1))
    with pytest.raises(
        ArtifactError, match=r"nano is drawn in 25 steps, guidance 4 there and in 50 steps, guidance 4 here"
    ):
        compare(base, results(run("nano", "torch", 100, 1), settings=base.settings | {"steps": 50}))
    with pytest.raises(
        ArtifactError,
        match=r"no scenario in common .*it has nano, ONNX Runtime fp32, 128 px, batch 1; before has nano, PyTorch fp32",
    ):
        compare(base, results(run("nano", "onnxruntime", 100, 1)))
    with pytest.raises(ArtifactError, match="none that ran"):
        compare(base, results(run("nano", "torch", 0, 1, failed="no memory")))


def test_missing_scenarios_and_other_machines_are_noted() -> None:
    after = results(
        run("nano", "torch", 100, 3),
        run("tiny", "torch", 10, 5),
        environment=ENVIRONMENT | {"cpu": "Other CPU", "packages": {"torch": "2.14"}, "commit": "bbb"},
        models=[{"name": "nano", "sha256": "cd" * 32, "parameters": {"unet": 1}}],
    )
    found = compare(results(run("nano", "torch", 100, 1), run("nano", "onnxruntime", 50, 2)), after)
    assert found.only_before == ["nano, ONNX Runtime fp32, 128 px, batch 1"]
    assert found.only_after == ["tiny, PyTorch fp32, 128 px, batch 1"]
    text = " | ".join(found.notes)
    for expected in (
        "processor Test CPU and Other CPU",
        "torch 2.13 and 2.14",
        "commit aaa and bbb",
        "nano: other weights (abababababab and cdcdcdcdcdcd)",
    ):
        assert expected in text


def test_figures_are_compared_by_their_intervals() -> None:
    def with_kid(low: float, high: float) -> Results:
        return results(
            run("nano", "torch", 100, 1),
            students={
                "tiny": {
                    "kid": {"value": (low + high) / 2, "low": low, "high": high, "count": 50},
                    "relative_l2_mean": low,
                }
            },
        )

    kid, distance = compare(with_kid(0.01, 0.02), with_kid(0.03, 0.04)).figures
    assert (kid.figure, kid.apart) == ("kid", True)
    assert (distance.figure, distance.apart) == ("relative L2 to the teacher", None)
    assert compare(with_kid(0.01, 0.02), with_kid(0.015, 0.03)).figures[0].apart is False
