"""Every scenario is timed in its own process: figures come back, rounds take turns, a failure costs one row."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sdcompress_bench import scenario_timer
from sdcompress_bench.artifacts import build_artifacts, picture_profile, prepare_artifacts, static_profile
from sdcompress_bench.journal import Journal
from sdcompress_bench.latency import STAGES, Latency, case_of, measure
from sdcompress_bench.scenario import BackendSetup, Gate, ModelUnderTest, Prompt, Sampling, Suite
from sdcompress_bench.scenario_timer import _needs_no_second, cuda_peak_mib, time_case
from sdcompress_engines.errors import UsageError
from sdcompress_engines.profiles import check_ranges, component_profile, parse_profile

from sdcompress import sampling
from sdcompress.sampling import generate

UNET = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 768, "block_out_channels": [320, 640, 1280, 1280]}
VAE = {"latent_channels": 4, "in_channels": 3, "out_channels": 3, "block_out_channels": [128, 256, 512, 512]}
QUICK = Suite(
    models=(ModelUnderTest("teacher", "nowhere", sampling=Sampling(1)),),
    setups=(BackendSetup("torch"),),
    sizes_px=(64,),
    prompts=(Prompt("a cat"),),
    rounds=1,
    samples=3,
    end_to_end_samples=1,
    stage_budget_s=0.5,
    threads=1,
)


def test_a_model_is_measured_and_a_missing_one_is_recorded(pipeline_folder: Path, tmp_path: Path) -> None:
    suite = dataclasses.replace(
        QUICK,
        models=(
            ModelUnderTest("missing", tmp_path / "missing"),
            ModelUnderTest("teacher", pipeline_folder, sampling=Sampling(1)),
        ),
    )
    journal = Journal()
    missing, teacher = measure(suite, prepare_artifacts(suite, journal), journal)
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
    weights["conv_out.weight"].fill_(1e38)  # finite, but its sums are not
    save_file(weights, file)
    suite = dataclasses.replace(QUICK, models=(ModelUnderTest("broken", broken, sampling=Sampling(1)),))
    (run,) = measure(suite, prepare_artifacts(suite, Journal()), Journal())
    assert run.failed is not None
    assert "values that are not finite in float32" in run.failed


class Recorded(Journal):
    """A journal that answers the cases itself and records their order."""

    def __init__(self, answers: Callable[[str], dict[str, Any]]) -> None:
        super().__init__()
        self.names: list[str] = []
        self.answers = answers

    def call(self, name: str, function: Any, argument: Any, timeout_s: float) -> dict[str, Any]:
        assert function is time_case
        json.dumps(argument)
        self.names.append(name)
        return self.answers(name)


def outcome(ms: float) -> dict[str, Any]:
    samples = {"unet_step": [ms], "text_encoder": [1.0], "vae_decode": [1.0], "end_to_end": [4 * ms]}
    return {
        "samples_ms": samples,
        "unsteady": [],
        "load_ms": 1.0,
        "first_image_ms": 1.0,
        "peak_rss_mib": 1.0,
        "cuda_peak_mib": None,
        "artifact_mib": {},
        "threads": 1,
    }


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize("batches", [(1,), (1, 2, 8), (3,)])
@pytest.mark.parametrize("pictures", [0, 6, 80])
def test_engine_profiles_accept_every_shape_of_a_suite(
    guidance_scale: float, batches: tuple[int, ...], pictures: int
) -> None:
    suite = dataclasses.replace(
        QUICK,
        setups=(BackendSetup("tensorrt", "fp16"),),
        sizes_px=(512, 768),
        batch=batches,
        models=(ModelUnderTest("teacher", "nowhere", sampling=Sampling(1, guidance_scale)),),
        pictures=min(pictures, 6),
        quality_pictures=pictures,
        probes=4,
    )
    for scenario in suite.scenarios():
        static = parse_profile(static_profile(scenario), 512, 64)
        check_ranges(static, 64)
        assert all(least == most for least, _, most in component_profile("unet", UNET, static, 8).shapes.values())
        assert static.height == (scenario.size_px,) * 3
        assert component_profile("unet", UNET, static, 8).shapes["sample"][0][0] == scenario.unet_batch
        assert component_profile("vae_decoder", VAE, static, 8).shapes["latent_sample"][0][0] == scenario.batch
        assert (
            component_profile("text_encoder", {"hidden_size": 768}, static, 8).shapes["input_ids"][2][0]
            >= scenario.batch
        )
    free = parse_profile(picture_profile(suite, suite.models[0]), 512, 64)
    at_once = min(suite.pictures_at_once(suite.models[0]), max(1, pictures))
    least, _, most = component_profile("unet", UNET, free, 8).shapes["sample"]
    assert least[0] == 1
    assert most[0] == (1 if guidance_scale <= 1 else max(suite.probes, 2 * at_once))
    assert component_profile("vae_decoder", VAE, free, 8).shapes["latent_sample"][2][0] == at_once


def test_each_timed_shape_runs_on_the_engine_for_that_shape_alone() -> None:
    suite = dataclasses.replace(QUICK, setups=(BackendSetup("tensorrt", "fp16"),), batch=(1, 2))
    built, timed_on = [], {}

    class Builds(Journal):
        def call(self, name: str, function: Any, argument: Any, timeout_s: float) -> dict[str, Any]:
            if function is build_artifacts:
                built.append(argument["profiles"])
                return {"artifacts": f"engine {len(built)}", "build_s": float(len(built))}
            assert function is time_case
            timed_on[argument["batch"]] = argument["artifacts"]
            return outcome(1.0)

    runs = measure(suite, prepare_artifacts(suite, Builds()), Builds())
    assert timed_on == {1: "engine 2", 2: "engine 3"}
    assert [run.build_s for run in runs] == [2.0, 3.0]
    assert [len(profiles) for profiles in built] == [1, 1, 1]


def test_a_compiled_unet_is_compiled_once_for_pictures_and_steps(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.testing import CompileCounter

    counter, compiled = CompileCounter(), []
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    drawn = generate

    def generate_and_count(*args: Any, **options: Any) -> Any:
        found = drawn(*args, **options)
        compiled.append(counter.frame_count)
        return found

    monkeypatch.setattr(sampling, "generate", generate_and_count)
    torch._dynamo.reset()
    suite = dataclasses.replace(
        QUICK,
        models=(ModelUnderTest("teacher", pipeline_folder, sampling=Sampling(1)),),
        setups=(BackendSetup("compile"),),
    )
    (scenario,) = suite.scenarios()
    time_case(case_of(scenario, suite, {("teacher", BackendSetup("compile")): {}}))
    assert compiled[0] >= 1
    assert counter.frame_count == compiled[0]
    torch._dynamo.reset()


def test_the_peak_of_a_gpu_counts_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3 * 2**30)
    monkeypatch.setattr(scenario_timer, "gpu_memory_used_mib", lambda: 4608.0)
    assert cuda_peak_mib(2048.0, 12 * 2**30) == 512 + 3072  # 2 GiB taken since the context, 2.5 in all
    assert cuda_peak_mib(None, 12 * 2**30) == 3072
    monkeypatch.setattr(scenario_timer, "gpu_memory_used_mib", lambda: None)
    assert cuda_peak_mib(2048.0, 16 * 2**30) == 6144


def test_rounds_take_turns_and_a_case_that_failed_is_not_started_again() -> None:
    suite = dataclasses.replace(QUICK, models=(ModelUnderTest("a", "a"), ModelUnderTest("b", "b")), rounds=2)
    journal = Recorded(lambda name: outcome(10.0) if " a-" in name else {"failed": "out of memory"})
    ready: dict[tuple[str, BackendSetup], dict[str, Any]] = {
        (model.name, setup): {"build_s": 7.0} for model in suite.models for setup in suite.setups
    }
    a, b = measure(suite, ready, journal)
    assert [name.split()[1].split("-")[0] for name in journal.names] == ["a", "b", "a"]
    assert a.samples_ms["unet_step"] == [[10.0], [10.0]]
    assert a.images_per_s == 25.0
    assert a.build_s == 7.0
    assert (b.failed, b.images_per_s) == ("out of memory", None)


def test_artifacts_that_cannot_be_built_are_a_failed_row_and_are_not_timed() -> None:
    journal = Recorded(lambda name: outcome(1.0))
    (run,) = measure(QUICK, {("teacher", BackendSetup("torch")): {"failed": "no graph"}}, journal)
    assert run.failed == "no graph"
    assert journal.names == []


def test_guidance_doubles_the_unet_batch() -> None:
    for guidance, doubled in ((7.5, 8), (1.0, 4)):
        model = ModelUnderTest("teacher", "nowhere", sampling=Sampling(1, guidance))
        (scenario,) = dataclasses.replace(QUICK, batch=(4,), models=(model,)).scenarios()
        assert scenario.unet_batch == doubled


def test_scenarios_are_models_by_setups_by_sizes_by_batches_with_unique_names() -> None:
    suite = dataclasses.replace(
        QUICK,
        models=(ModelUnderTest("a", "a"), ModelUnderTest("b b", "b")),
        setups=(BackendSetup("torch"), BackendSetup("torch", "bf16")),
        sizes_px=(64, 128),
        batch=(1, 4),
    )
    keys = [scenario.key for scenario in suite.scenarios()]
    assert len(keys) == len(set(keys)) == 16
    assert keys[-1] == "b_b-torch-bf16-128px-b4"


def test_an_impossible_suite_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown backend 'tpu'"):
        dataclasses.replace(QUICK, setups=(BackendSetup("tpu"),))
    with pytest.raises(UsageError, match="unknown precision 'int4'"):
        dataclasses.replace(QUICK, setups=(BackendSetup("torch", "int4"),))
    with pytest.raises(UsageError, match="model names"):
        dataclasses.replace(QUICK, models=(ModelUnderTest("x", "a"), ModelUnderTest("x", "b")))


def test_peak_memory_is_the_gpus_if_there_is_one() -> None:
    assert Latency("k", "m", "torch", "fp32", 64, 1, 2, 1, 7.5, peak_rss_mib=10.0).peak_mib == 10.0
    assert Latency("k", "m", "torch", "fp32", 64, 1, 2, 1, 7.5, peak_rss_mib=10.0, cuda_peak_mib=3.0).peak_mib == 3.0


def test_a_gate_holds_only_for_numbers_within_it() -> None:
    gate = Gate("kid", at_least=0.1, at_most=0.2)
    assert [gate.holds(value) for value in (0.1, 0.15, 0.2, 0.09, 0.21, float("nan"))] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("first_ms", "is_timed"),
    [(3050.0, True), (2900.0, False), (90_000.0, False)],
    ids=["minutes", "soon drawn again", "with a compilation"],
)
def test_a_long_first_picture_without_one_time_work_is_the_timed_one(first_ms: float, is_timed: bool) -> None:
    samples = {"unet_step": [95.0, 100.0, 300.0], "text_encoder": [10.0], "vae_decode": [400.0]}
    assert _needs_no_second(first_ms, samples, {"steps": 25, "stage_budget_s": 0.5}) == is_timed
