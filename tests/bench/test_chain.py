"""A run continues only in a folder of its own, and only with artifacts of the same settings."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
from sdcompress_bench import chain
from sdcompress_bench.chain import ChainSettings
from sdcompress_bench.chain_stages import Stage, StageRunner
from sdcompress_bench.scenario import ModelUnderTest
from sdcompress_engines.errors import ArtifactError, ModelError, UsageError
from sdcompress_engines.progress import Reporter

from sdcompress.models.load import load_pipeline
from sdcompress.models.locate import read_unet_config
from sdcompress.prune.presets import make_plan


def settings(teacher: Path, data: Path, output: Path, **changes: Any) -> ChainSettings:
    return ChainSettings(
        **{
            "teacher": str(teacher),
            "data": str(data),
            "plans": ("bk-tiny",),
            "recipe": None,
            "overrides": {},
            "output": output,
        }
        | changes
    )


def test_a_run_json_of_another_program_is_kept(random_folder: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/run.json").write_text('{"mine": true}')
    with pytest.raises(ArtifactError, match="did not write"):
        chain.run_chain(settings(random_folder, pictures, tmp_path / "mine"))
    assert (tmp_path / "mine/run.json").read_text() == '{"mine": true}'


def test_a_run_that_fails_at_once_leaves_an_empty_folder_as_it_was(
    random_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise ModelError("no memory")

    monkeypatch.setattr(chain, "_encode_data", fail)
    (tmp_path / "empty").mkdir()
    for output in ("empty", "new/run"):
        with pytest.raises(ModelError, match="no memory"):
            chain.run_chain(settings(random_folder, pictures, tmp_path / output))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty"]


@pytest.mark.parametrize(
    "names", [["cache"], ["Report"], ["random"], ["same", "same"], ["../above"], ["/root"], ["custom"]]
)
def test_each_student_has_a_folder_of_its_own_in_the_run(
    random_folder: Path, pictures: Path, tmp_path: Path, names: list[str]
) -> None:
    config, files = read_unet_config(random_folder), []
    for number, (name, preset) in enumerate(zip(names, ("bk-tiny", "bk-base"), strict=False)):
        files.append(str(tmp_path / str(number) / "cache.json"))
        Path(files[-1]).parent.mkdir()
        Path(files[-1]).write_text(dataclasses.replace(make_plan(config, preset), name=name).to_json())
    with pytest.raises(UsageError, match="its student would be named"):
        chain._read_inputs(settings(random_folder, pictures, tmp_path / "out", plans=tuple(files)))


def test_a_cache_of_other_data_settings_is_encoded_again(random_folder: Path, pictures: Path, tmp_path: Path) -> None:
    teacher, output = load_pipeline(random_folder), tmp_path / "out"
    output.mkdir()
    hashes = []
    for flip in (False, True, True):
        inputs = chain._read_inputs(settings(random_folder, pictures, output, overrides={"data": {"flip": flip}}))
        stages = StageRunner(Reporter(), 1)
        hashes.append((chain._encode_data(stages, teacher, inputs, output).views, bool(stages.seconds)))
    assert hashes == [(1, True), (2, True), (2, False)]


def test_a_report_of_other_prompts_or_of_a_first_look_is_measured_again(random_folder: Path, tmp_path: Path) -> None:
    class Asked(Exception):
        pass

    class Stages(StageRunner):
        def run(self, stage: Stage, make: Any) -> None:
            raise Asked(stage.config)

    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    models, asked = [ModelUnderTest("random", random_folder, sha256="0")], []
    for changes in ({}, {"quick": True}, {"prompts_file": tmp_path / "prompts.txt"}):
        asking = settings(random_folder, tmp_path, tmp_path, **changes)
        with pytest.raises(Asked) as stop:
            chain._measure(Stages(Reporter(), 1), asking, models, 64, None)
        asked.append(stop.value.args[0])
    assert all(one != other for one, other in itertools.combinations(asked, 2))
