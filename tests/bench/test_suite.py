"""A whole suite on a tiny pipeline: the files it writes, the cost of a failure, and continuing after a stop."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sdcompress_bench import suite
from sdcompress_bench.journal import Journal
from sdcompress_bench.results import Results, read_results
from sdcompress_bench.scenario import BackendSetup, Gate, ModelUnderTest, Prompt, Random, Sampling, Suite
from sdcompress_engines.errors import ArtifactError, BackendMissing, ModelError
from sdcompress_engines.manifest import faults, read_manifest

PROMPTS = tuple(
    Prompt(f"{phrase} a {thing}", style)
    for thing in ("cat", "dog", "tree", "boat", "cup", "hat")
    for style, phrase in (("flat", "a flat icon of"), ("line", "a line drawing of"))
)


@pytest.fixture(scope="module")
def student_folder(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with slightly changed weights."""
    folder = tmp_path_factory.mktemp("students") / "student"
    shutil.copytree(pipeline_folder, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    noise = torch.Generator().manual_seed(1)
    save_file(
        {
            name: weight * (1 + 0.2 * torch.randn(weight.shape, generator=noise))
            for name, weight in load_file(file).items()
        },
        file,
    )
    return folder


@pytest.fixture(scope="module")
def settings(pipeline_folder: Path, student_folder: Path, clip_folder: Path) -> Suite:
    return Suite(
        models=(
            ModelUnderTest("teacher", pipeline_folder, sampling=Sampling(1, 1.0)),
            ModelUnderTest("student", student_folder, sampling=Sampling(1, 1.0)),
        ),
        setups=(BackendSetup("torch"), BackendSetup("torch", "bf16"), BackendSetup("onnxruntime")),
        sizes_px=(64,),
        prompts=PROMPTS,
        rounds=1,
        samples=3,
        end_to_end_samples=1,
        stage_budget_s=0.2,
        pictures=2,
        quality_pictures=12,
        timesteps=(1, 501),
        probes=2,
        sensitivity=2,
        threads=1,
        metric=clip_folder,
        styles=(("flat", "a flat icon of"), ("line", "a line drawing of")),
        gates=(Gate("speedup", at_least=0.0), Gate("lpips", "student", at_most=-1.0)),
    )


@pytest.fixture(scope="module")
def measured(settings: Suite, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("suite") / "report"
    return folder, suite.run_suite(settings, folder)


@pytest.mark.slow
def test_all_measurements_are_in_the_results_and_the_results_in_the_folder(measured: tuple[Path, Results]) -> None:
    folder, results = measured
    assert faults(folder, "results") == []
    again = read_results(folder / "results.json")
    assert list(again.rows()) == list(results.rows())
    assert again.backends == json.loads(json.dumps(results.backends))
    assert [run.failed for run in results.latency] == [None] * 6
    assert {run.backend for run in results.latency if run.build_s} == {"onnxruntime"}
    assert all(run.roofline["share_of_matmul_peak"] > 0 for run in results.latency)
    assert set(results.peaks) == {"fp32", "bf16"}
    assert [(p["model"], p["backend"], p["precision"], len(p["files"])) for p in results.pictures][:3] == [
        ("teacher", "torch", "fp32", 2),
        ("teacher", "torch", "bf16", 2),
        ("teacher", "onnxruntime", "fp32", 2),
    ]
    assert (folder / "report.html").stat().st_size > 10_000
    assert not [p.name for p in folder.parent.iterdir() if p.name.startswith(".")]


@pytest.mark.slow
def test_the_manifest_tells_a_report_from_one_with_other_settings(
    measured: tuple[Path, Results], settings: Suite
) -> None:
    manifest = read_manifest(measured[0])
    assert manifest is not None
    other = dataclasses.replace(settings, prompts=(Prompt("a cup"), *settings.prompts[1:]))
    assert suite.describe_suite(settings).items() <= manifest.config.items()
    assert not suite.describe_suite(other).items() <= manifest.config.items()


def test_the_same_weights_are_compared_with_pytorch_fp32(measured: tuple[Path, Results]) -> None:
    entries = {(e["model"], e["backend"], e["precision"]): e for e in measured[1].backends}
    assert set(entries) == {
        (m, b, p) for m in ("teacher", "student") for b, p in (("torch", "bf16"), ("onnxruntime", "fp32"))
    }
    ort, half = entries["teacher", "onnxruntime", "fp32"], entries["teacher", "torch", "bf16"]
    assert (ort["gate"]["limits"], ort["gate"]["passed"]) == ([1e-4] * 2, True)
    assert ort["relative_l2"] < 1e-4 < half["relative_l2"]
    assert "gate" not in half
    assert ort["picture_psnr_db"] > 40
    assert ort["picture_lpips"] < 0.01
    assert "sensitivity" not in ort
    sensitivity = half["sensitivity"]
    assert sensitivity["places"] == len(sensitivity["scaled"]) == 2
    assert "sensitivity" not in entries["student", "torch", "bf16"]


@pytest.mark.slow
def test_a_student_is_compared_with_its_teacher_and_both_are_judged(measured: tuple[Path, Results]) -> None:
    results = measured[1]
    assert set(results.students) == {"student"}
    student = results.students["student"]
    assert 0.01 < student["relative_l2_mean"] < 2
    assert {"lpips", "psnr_db", "ssim", "fid", "kid"} <= student.keys()
    assert student["fid"]["count"] == 12
    assert "biased" in student["fid"]["warning"]
    assert student["kid"]["low"] <= student["kid"]["value"] <= student["kid"]["high"]
    assert set(results.quality) == {"teacher", "student"}
    assert {"clip_score", "top1", "top5", "style"} <= results.quality["teacher"].keys()


@pytest.mark.slow
def test_gates_are_judged_and_the_failed_ones_reported(measured: tuple[Path, Results]) -> None:
    results = measured[1]
    assert [gate["passed"] for gate in results.gates] == [True] * 6 + [False]
    (failed,) = results.failed_gates()
    assert failed.startswith("student: lpips is ")


def test_a_stopped_suite_continues_where_it_was(
    settings: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = dataclasses.replace(
        settings, setups=(BackendSetup("torch"),), quality_pictures=0, pictures=1, metric=None, gates=(), sensitivity=0
    )
    started: list[str] = []

    class Interrupted(suite.Journal):
        def call(self, name: str, *rest: Any) -> dict[str, Any]:
            if name not in self.known:
                started.append(name)
                if name.startswith("answers student"):
                    raise KeyboardInterrupt
            return super().call(name, *rest)

    monkeypatch.setattr(suite, "Journal", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        suite.run_suite(short, tmp_path / "report")
    assert not (tmp_path / "report").exists()
    first = list(started)
    monkeypatch.undo()
    results = suite.run_suite(short, tmp_path / "report")
    assert len(first) == 5
    assert any("continued later" in warning for warning in results.warnings)
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


def test_a_suite_that_is_stopped_before_its_first_measurement_leaves_nothing(
    settings: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "prepare_artifacts", stop)
    with pytest.raises(KeyboardInterrupt):
        suite.run_suite(settings, tmp_path / "new" / "report")
    assert not list(tmp_path.iterdir())


def test_a_missing_model_costs_its_own_row_and_a_setup_that_overflows_fails_its_gate(
    settings: Suite, pipeline_folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pipeline_folder, broken)
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.weight"][0] = 7e4  # too large only for half precision
    save_file(weights, file)
    models = (
        ModelUnderTest("teacher", broken, sampling=Sampling(1, 1.0)),
        ModelUnderTest("missing", tmp_path / "missing", sha256="0"),
    )
    short = dataclasses.replace(
        settings,
        models=models,
        setups=(BackendSetup("torch"), BackendSetup("torch", "fp16")),
        quality_pictures=0,
        pictures=0,
        metric=None,
        gates=(),
        sensitivity=0,
    )
    results = suite.run_suite(short, tmp_path / "report")
    failed = {(run.model, run.precision): run.failed for run in results.latency}
    assert failed["teacher", "fp32"] is None
    assert "not finite in float16" in str(failed["teacher", "fp16"])
    assert "does not exist" in str(failed["missing", "fp32"])
    assert any("not finite" in failure for failure in results.failed_gates())
    assert results.students == {}


@pytest.mark.slow
def test_a_teacher_too_large_for_fp32_costs_only_the_distances(
    settings: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TooLarge(suite.Journal):
        def call(self, name: str, *rest: Any) -> dict[str, Any]:
            return {"failed": "out of memory"} if name == "answers teacher PyTorch fp32" else super().call(name, *rest)

    monkeypatch.setattr(suite, "Journal", TooLarge)
    half = dataclasses.replace(
        settings,
        setups=(BackendSetup("torch", "bf16"),),
        quality_pictures=0,
        pictures=1,
        metric=None,
        gates=(),
        sensitivity=0,
    )
    results = suite.run_suite(half, tmp_path / "report")
    assert [run.failed for run in results.latency] == [None, None]
    assert results.backends[0] == {
        "model": "teacher",
        "backend": "torch",
        "precision": "bf16",
        "failed": "out of memory",
    }
    assert "relative_l2" not in results.students.get("student", {})
    assert len(results.pictures) == 2


def test_a_teacher_that_does_not_run_ends_the_suite_and_leaves_no_report(settings: Suite, tmp_path: Path) -> None:
    short = dataclasses.replace(
        settings,
        models=(ModelUnderTest("gone", tmp_path / "gone", sha256="0"),),
        setups=(BackendSetup("torch"),),
        metric=None,
    )
    with pytest.raises(ModelError, match="the teacher does not run in PyTorch"):
        suite.run_suite(short, tmp_path / "report")
    assert not (tmp_path / "report").exists()
    with pytest.raises(BackendMissing, match="no backend to measure"):
        suite.run_suite(dataclasses.replace(short, setups=()), tmp_path / "report")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="not empty"):
        suite.run_suite(short, tmp_path / "taken")


@pytest.mark.slow
def test_sdxl_is_measured_with_both_text_encoders_and_its_sizes(
    settings: Suite, sdxl_folder: Path, tmp_path: Path
) -> None:
    models = tuple(ModelUnderTest(name, sdxl_folder, sampling=Sampling(1, 5.0)) for name in ("sdxl", "copy"))
    results = suite.run_suite(
        dataclasses.replace(
            settings,
            models=models,
            setups=(BackendSetup("torch"),),
            sizes_px=(128,),
            quality_pictures=0,
            pictures=1,
            metric=None,
            gates=(),
            sensitivity=0,
        ),
        tmp_path / "report",
    )
    assert [run.failed for run in results.latency] == [None, None]
    assert results.models[0]["parameters"]["text_encoder_2"] > 0
    assert results.students["copy"]["relative_l2"] == 0.0
    assert results.students["copy"]["psnr_db"]["value"] == 100


def test_the_fingerprint_changes_with_everything_that_figures_depend_on(settings: Suite) -> None:
    facts = {"cpu": "x", "cores": 2, "gpu": [], "commit": "a"}
    base = suite.fingerprint(settings, facts)
    assert base == suite.fingerprint(settings, dict(facts))
    others = [
        dataclasses.replace(
            settings, models=tuple(dataclasses.replace(m, sampling=Sampling(2, 1.0)) for m in settings.models)
        ),
        dataclasses.replace(settings, prompts=PROMPTS[:3]),
        dataclasses.replace(settings, models=settings.models[:1]),
    ]
    assert (
        len(
            {
                base,
                *(suite.fingerprint(other, facts) for other in others),
                suite.fingerprint(settings, facts | {"cores": 4}),
            }
        )
        == 5
    )


def test_random_weights_are_reported_and_not_judged() -> None:
    random = Suite(models=(ModelUnderTest("x", "nowhere", random=Random("sd1")),), setups=(BackendSetup("torch"),))
    assert random.settings()["random"] == {"x": "sd1"}
    (warning,) = suite.collect_warnings(random, {"load_average": 0.0, "cores": 2}, Journal())
    assert "weights of x are random" in warning
