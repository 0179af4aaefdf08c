"""Every scenario is timed in a process of its own: figures come back, rounds take turns, and one that fails costs only its own row."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from sdcompress_bench.journal import Journal
from sdcompress_bench.latency import STAGES, Latency, measure, prepare, time_case
from sdcompress_bench.scenario import Gate, ModelUnderTest, Prompt, Suite, Way
from sdcompress_engines.errors import UsageError

QUICK = Suite(
    models=(ModelUnderTest("teacher", "nowhere"),), ways=(Way("torch"),), sizes_px=(64,), steps=1, prompts=(Prompt("a cat"),),
    rounds=1, samples=3, end_to_end_samples=1, stage_budget_s=0.5, threads=1,
)  # fmt: skip


def test_one_model_is_measured_and_one_that_is_not_there_is_recorded(pipeline_folder: Path, tmp_path: Path) -> None:
    suite = dataclasses.replace(QUICK, models=(ModelUnderTest("missing", tmp_path / "missing"), ModelUnderTest("teacher", pipeline_folder)))
    journal = Journal()
    missing, teacher = measure(suite, prepare(suite, journal), journal)
    assert missing.failed is not None
    assert "does not exist" in missing.failed
    assert missing.images_per_s is None
    assert teacher.failed is None
    assert set(teacher.samples_ms) == set(STAGES)
    for stage in STAGES:
        summary = teacher.summary(stage)
        assert summary is not None
        assert summary.median > 0
    step, whole = teacher.summary("unet_step"), teacher.summary("end_to_end")
    assert step is not None
    assert whole is not None
    assert step.count == 3
    assert teacher.images_per_s == pytest.approx(1000 / whole.median)
    assert teacher.unet_batch == 2
    assert 50 < teacher.peak_mib == teacher.peak_rss_mib < 5000
    assert 0 < teacher.artifact_mib["unet"] < 10
    assert teacher.threads == 1
    assert teacher.build_s is None


def test_values_that_are_not_finite_fail_the_case(pipeline_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pipeline_folder, broken)
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.bias"][0] = float("nan")
    save_file(weights, file)
    suite = dataclasses.replace(QUICK, models=(ModelUnderTest("broken", broken),))
    (run,) = measure(suite, prepare(suite, Journal()), Journal())
    assert run.failed is not None
    assert "the unet step gives values that are not finite in fp32" in run.failed


class Recorded(Journal):
    """A journal whose cases are answered here, in the order asked."""

    def __init__(self, answers: Callable[[str], dict[str, Any]]) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.answers = answers

    def call(self, name: str, function: Any, argument: Any, timeout_s: float) -> dict[str, Any]:
        assert function is time_case
        json.dumps(argument)
        self.asked.append(name)
        return self.answers(name)


def outcome(ms: float) -> dict[str, Any]:
    samples = {"unet_step": [ms], "text_encoder": [1.0], "vae_decode": [1.0], "end_to_end": [4 * ms]}
    return {"samples_ms": samples, "unsteady": [], "load_ms": 1.0, "first_image_ms": 1.0, "peak_rss_mib": 1.0, "cuda_peak_mib": None, "artifact_mib": {}, "threads": 1}


def test_rounds_take_turns_and_a_case_that_failed_is_not_started_again() -> None:
    suite = dataclasses.replace(QUICK, models=(ModelUnderTest("a", "a"), ModelUnderTest("b", "b")), rounds=2)
    journal = Recorded(lambda name: outcome(10.0) if " a-" in name else {"failed": "out of memory"})
    ready: dict[tuple[str, Way], dict[str, Any]] = {(m.name, way): {"build_s": 7.0} for m in suite.models for way in suite.ways}
    a, b = measure(suite, ready, journal)
    assert [name.split()[1].split("-")[0] for name in journal.asked] == ["a", "b", "a"]
    assert a.samples_ms["unet_step"] == [[10.0], [10.0]]
    assert a.images_per_s == 25.0
    assert a.build_s == 7.0
    assert (b.failed, b.images_per_s) == ("out of memory", None)


def test_what_cannot_be_made_is_a_failed_row_and_is_not_timed() -> None:
    journal = Recorded(lambda name: outcome(1.0))
    (run,) = measure(QUICK, {("teacher", Way("torch")): {"failed": "no graph"}}, journal)
    assert run.failed == "no graph"
    assert journal.asked == []


def test_guidance_doubles_the_unet_batch() -> None:
    for guidance, doubled in ((7.5, 8), (1.0, 4)):
        (scenario,) = dataclasses.replace(QUICK, batch=(4,), guidance_scale=guidance).scenarios()
        assert scenario.unet_batch == doubled


def test_scenarios_are_models_by_ways_by_sizes_by_batches_with_names_of_their_own() -> None:
    suite = dataclasses.replace(QUICK, models=(ModelUnderTest("a", "a"), ModelUnderTest("b b", "b")), ways=(Way("torch"), Way("torch", "bf16")), sizes_px=(64, 128), batch=(1, 4))
    keys = [scenario.key for scenario in suite.scenarios()]
    assert len(keys) == len(set(keys)) == 16
    assert keys[-1] == "b_b-torch-bf16-128px-b4"


def test_suite_that_cannot_be_run_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown backend 'tpu'"):
        dataclasses.replace(QUICK, ways=(Way("tpu"),))
    with pytest.raises(UsageError, match="unknown precision 'int4'"):
        dataclasses.replace(QUICK, ways=(Way("torch", "int4"),))
    with pytest.raises(UsageError, match="model names"):
        dataclasses.replace(QUICK, models=(ModelUnderTest("x", "a"), ModelUnderTest("x", "b")))


def test_peak_memory_is_the_childs_own() -> None:
    assert Latency("k", "m", "torch", "fp32", 64, 1, 2, 1, 7.5, peak_rss_mib=10.0).peak_mib == 10.0
    assert Latency("k", "m", "torch", "fp32", 64, 1, 2, 1, 7.5, peak_rss_mib=10.0, cuda_peak_mib=3.0).peak_mib == 3.0


def test_a_gate_holds_only_for_numbers_inside() -> None:
    gate = Gate("kid", at_least=0.1, at_most=0.2)
    assert [gate.holds(value) for value in (0.1, 0.15, 0.2, 0.09, 0.21, float("nan"))] == [True, True, True, False, False, False]
