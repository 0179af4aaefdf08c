"""A run reads what was given, continues only in a folder of its own, and only with artifacts of the same settings."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sdcompress_bench import chain
from sdcompress_bench.chain_inputs import ChainSettings, FewStepSettings, FewStepStudent, Inputs, read_inputs
from sdcompress_bench.chain_stages import Stage, StageRunner
from sdcompress_bench.scenario import ModelUnderTest
from sdcompress_engines.errors import ArtifactError, ModelError, UsageError
from sdcompress_engines.output_folders import locked
from sdcompress_engines.progress import SILENT

from sdcompress.data.config import DataConfig
from sdcompress.data.sources import open_source
from sdcompress.models.load import load_pipeline
from sdcompress.models.locate import read_unet_config
from sdcompress.prune.presets import make_plan
from sdcompress.train.config import DistillConfig, FewStepConfig


class Recorder(StageRunner):
    """A stand-in that records the stages and runs none."""

    def __init__(self) -> None:
        super().__init__(SILENT, 1)
        self.stages: list[Stage] = []

    def run(self, stage: Stage, make: Callable[[], Any]) -> None:
        self.stages.append(stage)


def settings(output: Path, *plans: str, teacher: Path | str = "nano", **changes: Any) -> ChainSettings:
    return ChainSettings(str(teacher), "nano", plans or ("bk-tiny",), None, {}, output, **changes)


def write_plan(path: Path, name: str, preset: str = "bk-tiny") -> str:
    path.parent.mkdir(exist_ok=True)
    content = json.loads(make_plan(read_unet_config("nano"), preset).to_json())
    path.write_text(json.dumps(content | {"name": name}))
    return str(path)


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/b", "..", ".hidden", "cache", "Report", "nano", "con"])
def test_a_plan_cannot_name_another_folder_than_one_of_its_own(tmp_path: Path, name: str) -> None:
    plan = write_plan(tmp_path / "plan.json", name)
    with pytest.raises(UsageError, match="is named"):
        read_inputs(settings(tmp_path / "out", plan))


@pytest.mark.parametrize("names", [("mine", "mine"), ("mine", "Mine")])
def test_two_plans_of_one_name_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    presets = zip(names, ("bk-tiny", "bk-base"), strict=True)
    plans = [write_plan(tmp_path / f"{preset}.json", name, preset) for name, preset in presets]
    with pytest.raises(UsageError, match=r"named '[mM]ine'"):
        read_inputs(settings(tmp_path / "out", *plans))


def test_a_plan_that_is_given_twice_is_one(tmp_path: Path) -> None:
    assert list(read_inputs(settings(tmp_path / "out", "bk-tiny", "sd-tiny")).plans) == ["bk-tiny"]


def test_a_run_json_of_another_program_is_kept(random_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/run.json").write_text('{"mine": true}')
    with pytest.raises(ArtifactError, match="did not write"):
        chain.run_chain(settings(tmp_path / "mine", teacher=random_folder))
    assert (tmp_path / "mine/run.json").read_text() == '{"mine": true}'


@pytest.mark.parametrize("force", [False, True])
def test_one_process_at_a_time_runs_in_a_folder_and_none_takes_it_from_another(
    random_folder: Path, tmp_path: Path, force: bool
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "run.json").write_text('{"teacher": "", "data": "", "plans": []}')
    with locked(output), pytest.raises(ArtifactError, match="another process"):
        chain.run_chain(settings(output, teacher=random_folder, force=force))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out", "run.json"]


def test_a_run_that_fails_at_once_leaves_an_empty_folder_as_it_was(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise ModelError("no memory")

    monkeypatch.setattr(chain, "_encode_data", fail)
    (tmp_path / "empty").mkdir()
    for output in ("empty", "new/run"):
        with pytest.raises(ModelError, match="no memory"):
            chain.run_chain(settings(tmp_path / output, teacher=random_folder))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty"]


def test_data_are_encoded_again_when_their_settings_have_changed(
    random_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    teacher = load_pipeline(random_folder)
    counts, runner = [], StageRunner(SILENT, 1)
    for flip in (False, True, True):
        runner = StageRunner(SILENT, 1)
        config = DistillConfig(data=DataConfig(size_px=64, flip=flip))
        inputs = Inputs(config, {}, open_source(pictures, config.data))
        counts.append(chain._encode_data(runner, teacher, inputs, tmp_path).views)
    assert counts == [1, 2, 2]
    assert runner.seconds == {}  # the third time nothing was encoded


def test_the_smallest_student_learns_to_draw_in_few_steps(tmp_path: Path) -> None:
    few = FewStepSettings(4, "nano-few-step", {"steps": 7})
    for plans in (("bk-base", "bk-tiny"), ("bk-tiny", "bk-base")):
        found = read_inputs(settings(tmp_path / "out", *plans, few_step=few)).few_step
        assert found is not None
        assert (found.name, found.student) == ("bk-tiny-4step", "bk-tiny")
        assert (found.config.num_inference_steps, found.config.steps) == (4, 7)
    assert read_inputs(settings(tmp_path / "out")).few_step is None


def test_a_plan_cannot_have_the_name_of_the_few_step_student(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan.json", "BK-tiny-4step", "bk-base")
    with pytest.raises(UsageError, match="--few-step makes 'bk-tiny-4step', and a --plan has this name"):
        read_inputs(settings(tmp_path / "out", "bk-tiny", plan, few_step=FewStepSettings(4)))


def test_steps_that_do_not_fit_are_refused_before_anything_is_written(random_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="3 steps"):
        chain.run_chain(settings(tmp_path / "out", teacher=random_folder, few_step=FewStepSettings(3)))
    assert list(tmp_path.iterdir()) == []


def test_a_few_step_student_is_trained_again_for_another_student_or_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher: Any = SimpleNamespace(sha256="0", pipeline=None)
    cache: Any = SimpleNamespace(sha256="1")
    stages = Recorder()
    monkeypatch.setattr(chain, "sha256_tree", lambda folder: "2")
    for sha256, config in (("a", FewStepConfig()), ("b", FewStepConfig()), ("a", FewStepConfig(steps=7))):
        student, wanted = ModelUnderTest("bk-tiny", "x", sha256=sha256), FewStepStudent("few", "bk-tiny", config)
        made = chain._train_few_steps(stages, teacher, student, wanted, cache, tmp_path)
        assert (made.name, made.path) == ("few", str(tmp_path / "few/pipeline"))
    keys = [(stage.inputs, stage.config) for stage in stages.stages]
    assert all(one != other for one, other in itertools.combinations(keys, 2))


def test_a_student_of_another_plan_is_another_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher: Any = SimpleNamespace(sha256="0", pipeline=None)
    cache: Any = SimpleNamespace(sha256="1")
    stages = Recorder()
    monkeypatch.setattr(chain, "sha256_tree", lambda folder: "2")
    for preset in ("bk-base", "bk-tiny"):
        plan = make_plan(read_unet_config("nano"), preset)
        chain._distill_student(stages, teacher, "mine", plan, cache, DistillConfig(), tmp_path)
    one, other = (stage.config for stage in stages.stages)
    assert one != other


def test_a_report_of_other_prompts_or_of_a_first_look_is_measured_again(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    models, stages = [ModelUnderTest("random", random_folder, sha256="0")], Recorder()
    monkeypatch.setattr(chain, "read_results", lambda path: None)
    for changes in ({}, {"quick": True}, {"prompts_file": tmp_path / "prompts.txt"}):
        chain._measure(stages, settings(tmp_path, teacher=random_folder, **changes), models, 64, None)
    assert all(one.config != other.config for one, other in itertools.combinations(stages.stages, 2))
