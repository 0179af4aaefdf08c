"""What a run of the whole chain reads, and which of its stages it does again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from sdcompress_bench.chain import _encode_data
from sdcompress_bench.chain_inputs import ChainSettings, Inputs, read_inputs
from sdcompress_bench.chain_stages import Stage, StageRunner
from sdcompress_bench.scenario import ModelUnderTest, Prompt, Suite
from sdcompress_bench.suite import _settings, hash_inputs
from sdcompress_engines.errors import UsageError
from sdcompress_engines.manifest import write_manifest
from sdcompress_engines.progress import SILENT

from sdcompress.data.config import DataConfig
from sdcompress.data.sources import open_source
from sdcompress.models.load import load_pipeline
from sdcompress.models.locate import read_unet_config
from sdcompress.prune.presets import make_plan
from sdcompress.train.config import DistillConfig


def write_plan(path: Path, name: str, preset: str = "bk-tiny") -> str:
    path.parent.mkdir(exist_ok=True)
    content = json.loads(make_plan(read_unet_config("nano"), preset).to_json())
    path.write_text(json.dumps(content | {"name": name}))
    return str(path)


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/b", "..", ".hidden", "cache", "Report", "nano", "con"])
def test_a_plan_cannot_name_another_folder_than_one_of_its_own(tmp_path: Path, name: str) -> None:
    plan = write_plan(tmp_path / "plan.json", name)
    with pytest.raises(UsageError, match="is named"):
        read_inputs(ChainSettings("nano", "nano", (plan,), None, {}, tmp_path / "out"))


def test_two_plans_of_one_name_are_refused_and_one_given_twice_is_one(tmp_path: Path) -> None:
    plans = [write_plan(tmp_path / f"{preset}/mine.json", "custom", preset) for preset in ("bk-tiny", "bk-base")]
    with pytest.raises(UsageError, match="two --plan are named 'mine'"):
        read_inputs(ChainSettings("nano", "nano", tuple(plans), None, {}, tmp_path / "out"))
    same = read_inputs(ChainSettings("nano", "nano", ("bk-tiny", "sd-tiny"), None, {}, tmp_path / "out"))
    assert list(same.plans) == ["bk-tiny"]


def test_data_are_encoded_again_when_their_settings_have_changed(
    random_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    teacher = load_pipeline(random_folder)
    counts, runner = [], StageRunner(SILENT, 1)
    for flip in (False, True, True):
        runner = StageRunner(SILENT, 1)
        config = DistillConfig(data=DataConfig(size_px=64, flip=flip))
        inputs = Inputs(config, {}, open_source(pictures, config.data))
        counts.append(_encode_data(runner, teacher, inputs, tmp_path).views)
    assert counts == [1, 2, 2]
    assert runner.seconds == {}  # the third time nothing was encoded


def test_a_report_of_other_prompts_is_not_the_same(tmp_path: Path) -> None:
    suite = Suite((ModelUnderTest("nano", "nano", sha256="0" * 64),), prompts=(Prompt("a cat"),))
    other = dataclasses.replace(suite, prompts=(Prompt("a dog"),))
    write_manifest(tmp_path, "results", config=_settings(suite), inputs=hash_inputs(suite), seed=suite.seed)
    done = [Stage("", tmp_path, "results", hash_inputs(each), each.settings()).is_done() for each in (suite, other)]
    assert done == [True, False]
