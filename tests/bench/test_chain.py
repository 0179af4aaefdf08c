"""The inputs of a run, and what its stages are made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sdcompress_bench import chain
from sdcompress_bench.chain import ChainSettings
from sdcompress_bench.chain_stages import Stage, StageRunner, check_names
from sdcompress_engines.errors import UsageError
from sdcompress_engines.progress import SILENT

from sdcompress.models.locate import read_unet_config
from sdcompress.prune.presets import make_plan
from sdcompress.train.config import DistillConfig


def write_plan(path: Path, name: str, preset: str = "bk-tiny") -> str:
    plan = json.loads(make_plan(read_unet_config("nano"), preset).to_json())
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(plan | {"name": name}))
    return str(path)


def read_names(output: Path, *plans: str) -> list[str]:
    return list(chain._read_inputs(ChainSettings("nano", "nano", plans, None, {}, output)).plans)


@pytest.mark.parametrize("name", ["../escaped", "/escaped", "custom", "..", "cache"])
def test_a_student_is_called_by_its_preset_or_its_plans_file(name: str, tmp_path: Path) -> None:
    plans = [write_plan(tmp_path / "mine.json", name), write_plan(tmp_path / "other.json", "bk-base", "bk-base")]
    assert read_names(tmp_path / "out", *plans, "sd-tiny") == ["mine", "bk-base", "bk-tiny"]


def test_two_plans_of_one_name_are_refused(tmp_path: Path) -> None:
    plans = [write_plan(tmp_path / f"{preset}/mine.json", "custom", preset) for preset in ("bk-base", "bk-tiny")]
    with pytest.raises(UsageError, match="two plans are called mine"):
        read_names(tmp_path / "out", *plans)


@pytest.mark.parametrize("names", [["a", "A"], ["a", "Cache"], ["a", "."], ["report"]])
def test_models_without_a_folder_of_their_own_are_refused(names: list[str]) -> None:
    with pytest.raises(UsageError, match="has no folder of its own"):
        check_names(names, reserved=("cache", "report"))


class Recorder(StageRunner):
    """A stand-in that records the stages and runs none."""

    def __init__(self) -> None:
        super().__init__(SILENT, 1)
        self.stages: list[Stage] = []

    def run(self, stage: Stage, make: Callable[[], Any]) -> None:
        self.stages.append(stage)


def test_another_plan_and_other_data_settings_are_another_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher: Any = SimpleNamespace(sha256="0", pipeline=None)
    cache: Any = SimpleNamespace(sha256="1")
    stages = Recorder()
    monkeypatch.setattr(chain, "sha256_tree", lambda folder: "2")
    for preset in ("bk-base", "bk-tiny"):
        plan = make_plan(read_unet_config("nano"), preset)
        chain._distill_student(stages, teacher, "mine", plan, cache, DistillConfig(), tmp_path)
    monkeypatch.setattr("sdcompress.data.cache.LatentCache.open", lambda *arguments: cache)
    for flip in (False, True):
        inputs: Any = SimpleNamespace(
            config=DistillConfig.model_validate({"data": {"size_px": 64, "flip": flip}}),
            source=SimpleNamespace(fingerprint=lambda: "3"),
        )
        chain._encode_data(stages, teacher, inputs, tmp_path)
    student, other_student, encoded, otherwise_encoded = (stage.config for stage in stages.stages)
    assert student != other_student
    assert encoded != otherwise_encoded
