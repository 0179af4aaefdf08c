"""Every scenario runs in its own process: figures come back, and one that dies costs only its own row."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from sdcompress_bench.latency import STAGES, Latency, measure, run_child
from sdcompress_bench.scenario import ModelUnderTest, Prompt, Suite
from sdcompress_engines.errors import UsageError

QUICK = Suite(
    models=(ModelUnderTest("teacher", "nowhere"),), backends=("torch",), size_px=64, steps=1, prompts=(Prompt("a cat"),),
    rounds=1, samples=3, end_to_end_samples=1, stage_budget_s=0.5, threads=1,
)  # fmt: skip


def test_one_model_is_measured_and_one_that_is_not_there_is_recorded(pipeline_folder: Path, tmp_path: Path) -> None:
    models = (ModelUnderTest("missing", tmp_path / "missing"), ModelUnderTest("teacher", pipeline_folder))
    missing, teacher = measure(dataclasses.replace(QUICK, models=models))
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


@pytest.mark.parametrize(
    ("script", "reason"),
    [("kill -9 $$", "SIGKILL; out of memory"), ("echo 'CUDA error: boom' >&2; exit 3", "status 3: CUDA error: boom"), ("exec sleep 30", "took over 0.3 s")],
)
def test_child_that_dies_is_recorded_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\n{script}\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    suite = dataclasses.replace(QUICK, scenario_timeout_s=0.3 if "sleep" in script else 20.0)
    assert reason in run_child(next(suite.scenarios()), suite)["failed"]


def test_rounds_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    interpreter = tmp_path / "python"
    outcome = '{"precision": "fp32", "samples_ms": {"unet_step": [1.0], "text_encoder": [1.0], "vae_decode": [1.0], "end_to_end": [4.0]}, "unsteady": [], "load_ms": 1.0, "first_image_ms": 1.0, "peak_rss_mib": 1.0, "cuda_peak_mib": null, "artifact_mib": {}, "threads": 1}'
    interpreter.write_text(f'#!/bin/sh\ngrep -o \'"path": "[a-z]*"\' "$3" >> {log}\ncat <<\'END\'\n{outcome}\nEND\n')
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    suite = dataclasses.replace(QUICK, models=(ModelUnderTest("a", "a"), ModelUnderTest("b", "b")), rounds=2)
    first, _ = measure(suite)
    assert [line.split('"')[3] for line in log.read_text().splitlines()] == ["a", "b", "a", "b"]
    assert first.samples_ms["unet_step"] == [[1.0], [1.0]]
    assert first.images_per_s == 250.0


def test_guidance_doubles_the_unet_batch() -> None:
    for guidance, doubled in ((7.5, 8), (1.0, 4)):
        (scenario,) = dataclasses.replace(QUICK, batch=(4,), guidance_scale=guidance).scenarios()
        assert scenario.unet_batch == doubled


def test_suite_that_cannot_be_run_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown backend 'tpu'"):
        dataclasses.replace(QUICK, backends=("tpu",))
    with pytest.raises(UsageError, match="model names"):
        dataclasses.replace(QUICK, models=(ModelUnderTest("x", "a"), ModelUnderTest("x", "b")))


def test_peak_memory_is_the_childs_own() -> None:
    assert Latency("k", "m", "torch", "fp32", 64, 1, 2, 1, 7.5, peak_rss_mib=10.0).peak_mib == 10.0
    assert Latency("k", "m", "torch", "fp32", 64, 1, 2, 1, 7.5, peak_rss_mib=10.0, cuda_peak_mib=3.0).peak_mib == 3.0
