"""`sdcompress inspect` describes checkpoints, LoRAs and folders from their headers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from sdcompress_engines.errors import ModelError

from sdcompress.checkpoints.write import write_ldm
from sdcompress.export.export_model import ExportRequest, export_model
from sdcompress.models import nano
from sdcompress.models.describe import describe_model
from sdcompress.models.load import load_pipeline

from .small_models import diffusers_lora, full_size, kohya_lora, sparse


@pytest.fixture
def inspect(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs `sdcompress inspect PATH` for people, which must not fail, and with `--json`; returns the facts."""
    from sdcompress.cli import main

    def run(path: object) -> dict[str, Any]:
        for more in ([], ["--json"]):
            monkeypatch.setattr(sys, "argv", ["sdcompress", "inspect", str(path), *more])
            with pytest.raises(SystemExit) as stop:
                main()
            out, err = capfd.readouterr()
            assert not stop.value.code, err
        facts: dict[str, Any] = json.loads(out)
        return facts

    return run


@pytest.mark.parametrize(
    ("family", "preset", "parameters"),
    [
        ("sd1", None, {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
        ("sd2", "bk-tiny", {"unet": 326_825_604, "vae": 83_653_863, "text_encoder": 340_387_840}),
        (
            "sdxl",
            None,
            {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
        ),
    ],
)
def test_inspect_describes_a_checkpoint_from_its_header(
    family: str, preset: str | None, parameters: dict[str, int], inspect: Any, tmp_path: Path
) -> None:
    file = sparse(full_size(family, preset), tmp_path / "a.safetensors")
    facts = inspect(file)
    assert facts["family"] == family
    assert facts["parameters"] == parameters
    assert facts["prediction_type"] == "epsilon"
    assert facts["dtype"] == "float16"
    assert facts["student"] == preset
    assert facts["bytes"] == file.stat().st_size


def test_inspect_describes_the_naming_and_rank_of_a_lora(inspect: Any, tmp_path: Path) -> None:
    for tensors, naming in ((kohya_lora(), "kohya"), (diffusers_lora(), "diffusers")):
        save_file(tensors, tmp_path / "a.safetensors")
        facts = inspect(tmp_path / "a.safetensors")
        assert facts["holds"] == "a LoRA"
        assert facts["naming"] == naming
        assert facts["rank"] == [4]
        assert facts["components"] == {"unet": 1}


def test_inspect_describes_a_folder(inspect: Any, random_folder: Path) -> None:
    facts = inspect(random_folder)
    assert facts["class"] == "StableDiffusionPipeline"
    assert facts["parameters"]["unet"] == facts["unet_parameters"]
    assert facts["dtype"] == "float32"
    assert facts["student"] is None


def test_inspect_says_what_a_few_step_model_was_trained_for(inspect: Any, random_folder: Path, tmp_path: Path) -> None:
    assert "trained_for" not in inspect(random_folder)
    trained_for = "4 steps, CFG 1; AUTOMATIC1111 and Forge: Euler, Simple; ComfyUI: euler, simple"
    assert inspect("nano-tiny-4step")["trained_for"] == trained_for
    assert inspect(nano.ASSETS / "tiny-4step/lora.safetensors")["trained_for"] == trained_for
    file = write_ldm(load_pipeline("nano-tiny-4step").pipeline, tmp_path / "a.safetensors")
    assert inspect(file)["trained_for"] == trained_for
    export_model("nano-tiny-4step", tmp_path / "onnx", ExportRequest(components=("unet",)))
    assert inspect(tmp_path / "onnx")["trained_for"] == trained_for


def test_a_training_folder_is_described_by_its_pipeline(inspect: Any, random_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(random_folder, tmp_path / "pipeline")
    (tmp_path / "lora").mkdir()
    save_file(diffusers_lora(), tmp_path / "lora/lora.safetensors")
    assert inspect(tmp_path)["class"] == "StableDiffusionPipeline"


def test_a_truncated_scheduler_config_is_refused_by_its_name(random_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_folder, tmp_path / "model")
    (folder / "scheduler/scheduler_config.json").write_text('{"prediction_type": "eps')
    with pytest.raises(ModelError, match=r"scheduler_config\.json: is not JSON"):
        describe_model(str(folder))
