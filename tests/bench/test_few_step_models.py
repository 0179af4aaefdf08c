"""Models of other steps and guidance are measured as they draw: each in its own, and compared as whole pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from sdcompress_bench import fidelity, suite
from sdcompress_bench.build_suite import build_suite
from sdcompress_bench.compare import compare
from sdcompress_bench.report import headline
from sdcompress_bench.results import Results, read_results
from sdcompress_bench.scenario import BackendSetup, ModelUnderTest, Prompt, Sampling, Suite
from sdcompress_engines.errors import ArtifactError, UsageError

from sdcompress.families.sampling_defaults import set_defaults
from sdcompress.train.config import FewStepConfig
from sdcompress.train.few_step import make_few_step_scheduler


@pytest.fixture(scope="module")
def few_step_folder(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher as a model that was trained for four steps without guidance."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    pipeline.register_modules(scheduler=make_few_step_scheduler(pipeline.scheduler, FewStepConfig()))
    set_defaults(pipeline, 4, 1.0)
    folder = tmp_path_factory.mktemp("few") / "few"
    pipeline.save_pretrained(folder)
    return folder


def drawn_in(*models: Any, **settings: Any) -> list[Sampling]:
    described = {"models": list(models), "backends": ["torch"], "device": "cpu", **settings}
    return [model.sampling for model in build_suite(described)[0].models]


def test_each_model_is_drawn_in_its_own_steps_and_with_its_own_guidance(
    pipeline_folder: Path, few_step_folder: Path
) -> None:
    models = f"teacher={pipeline_folder}", f"few={few_step_folder}"
    assert drawn_in(*models) == [Sampling(25, 7.5), Sampling(4, 1.0)]
    assert drawn_in({"random": "sd1"}) == [Sampling(25, 7.5)]
    assert drawn_in(*models, steps=10) == [Sampling(10, 7.5), Sampling(10, 1.0)]
    assert drawn_in(*models, guidance_scale=1.0) == [Sampling(25, 1.0), Sampling(4, 1.0)]
    own = {"name": "own", "path": str(pipeline_folder), "steps": 7, "guidance_scale": 3.0}
    assert drawn_in(own, models[1], steps=8) == [Sampling(7, 3.0), Sampling(8, 1.0)]


def test_guidance_for_a_model_that_was_trained_without_is_refused(pipeline_folder: Path, few_step_folder: Path) -> None:
    with pytest.raises(UsageError, match="guidance 5 for few, which was trained for 4 steps without guidance") as error:
        drawn_in(f"teacher={pipeline_folder}", f"few={few_step_folder}", guidance_scale=5.0)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def measured(
    pipeline_folder: Path, few_step_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Results]:
    """The teacher in five steps with guidance, and the few-step model, in PyTorch in two precisions."""
    models = (
        ModelUnderTest("teacher", pipeline_folder, sampling=Sampling(5, 3.0)),
        ModelUnderTest("few", few_step_folder, sampling=Sampling(4, 1.0)),
    )
    described = Suite(
        models=models,
        setups=(BackendSetup("torch"), BackendSetup("torch", "bf16")),
        sizes_px=(64,),
        prompts=(Prompt("a cat"), Prompt("a dog")),
        rounds=1,
        samples=3,
        end_to_end_samples=1,
        stage_budget_s=0.2,
        pictures=2,
        timesteps=(1, 501),
        probes=2,
        threads=1,
    )
    folder = tmp_path_factory.mktemp("few-step-suite") / "report"
    return folder, suite.run_suite(described, folder)


def test_results_keep_the_steps_and_the_guidance_of_each_model(measured: tuple[Path, Results]) -> None:
    folder, results = measured
    assert [run.failed for run in results.latency] == [None] * 4
    assert [(run.model, run.steps, run.unet_batch) for run in results.latency[::2]] == [
        ("teacher", 5, 2),
        ("few", 4, 1),
    ]
    assert results.sampling() == {"teacher": Sampling(5, 3.0), "few": Sampling(4, 1.0)}
    assert read_results(folder / "results.json").sampling() == results.sampling()


def test_the_speed_up_is_of_whole_pictures_over_the_teacher_in_its_own_steps(measured: tuple[Path, Results]) -> None:
    rows = {(row.model, row.setup.precision): row for row in measured[1].rows()}
    base, few = rows["teacher", "fp32"], rows["few", "fp32"]
    assert base.speedup == 1.0
    assert few.speedup == pytest.approx((few.images_per_s or 0) / (base.images_per_s or 1))


def test_the_report_says_how_each_model_draws(measured: tuple[Path, Results]) -> None:
    folder, results = measured
    for name in ("report.html", "report.md"):
        page = (folder / name).read_text(encoding="utf-8")
        assert page.count("4 steps, no guidance") >= 2
        assert "5 steps, guidance 3" in page
    (column,) = [
        line for line in (folder / "report.md").read_text("utf-8").splitlines() if line.startswith("| model | d")
    ]
    assert column.index("pictures/s") < column.index("speed-up") < column.index("one UNet step")
    fast = dataclasses.replace(results, latency=[results.latency[0], *(_faster(run) for run in results.latency[1:])])
    assert "few (4 steps, no guidance) on PyTorch" in headline(fast)
    assert "as fast as teacher (5 steps, guidance 3) in PyTorch fp32" in headline(fast)


def _faster(run: Any) -> Any:
    scale = 100 if run.model == "few" else 1
    return dataclasses.replace(
        run, samples_ms={name: [[ms / scale for ms in r] for r in rounds] for name, rounds in run.samples_ms.items()}
    )


def test_runs_are_compared_by_the_steps_of_each_model(measured: tuple[Path, Results]) -> None:
    results = measured[1]
    assert compare(results, results).lines
    teacher, few = results.models
    other = dataclasses.replace(results, models=[teacher, few | {"steps": 8}])
    with pytest.raises(ArtifactError, match="few is drawn in 4 steps, no guidance there and in 8 steps, no guidance"):
        compare(results, other)
    older = dataclasses.replace(
        results,
        models=[{k: v for k, v in teacher.items() if k not in ("steps", "guidance_scale")}],
        settings=results.settings | {"steps": 5, "guidance_scale": 3.0},
    )
    assert compare(older, results).lines


def test_a_model_without_guidance_gets_its_probes_one_at_a_time(
    few_step_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that is built for one picture takes no more."""
    pipeline: Any = fidelity.load(few_step_folder, "torch")
    probe = fidelity.make_random_probe(pipeline, 64, ["a cat", "a dog", "a fox"], (1, 501), 0)
    batches: list[int] = []
    call = fidelity.UNetInputs.call

    def recorded(self: Any, unet: Any, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        batches.append(len(sample))
        return call(self, unet, sample, timestep)

    monkeypatch.setattr(fidelity.UNetInputs, "call", recorded)
    whole, apart = (fidelity.predict(pipeline, probe, at_once) for at_once in (None, 1))
    assert batches == [3, 3] + [1] * 6
    torch.testing.assert_close(whole, apart)
    model = ModelUnderTest("few", few_step_folder, sampling=Sampling(4, 1.0))
    described = Suite(models=(model,), probes=4)
    assert (described.probes_at_once(model), described.pictures_at_once(model)) == (1, 1)
