"""`run` runs every stage once, and the next time only those whose artifact is missing or damaged."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from sdcompress_engines.flavour import TENSORRT_RTX
from sdcompress_engines.manifest import faults, read_manifest

from sdcompress.cli import main

from .conftest import Cli, one_line


@pytest.mark.slow
@pytest.mark.alone  # it keeps all cores busy by itself
def test_run_makes_every_artifact_and_remakes_only_what_is_missing(
    random_folder: Path,
    pictures: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "prompts.txt").write_text("a flat icon of a cat\na cartoon of a dog\n")

    (tmp_path / "few.yaml").write_text("kind: few-step\nsteps: 2\nbatch_size: 2\n")

    def run() -> tuple[str, str]:
        prompts, recipe = ("--prompts", tmp_path / "prompts.txt"), ("--few-step-recipe", tmp_path / "few.yaml")
        trained = ("--plan", "bk-tiny", "--steps", 2, "--few-step", 2, *recipe)
        command = ["run", random_folder, "--data", pictures, *trained, "--quick", *prompts, "-o", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", ["sdcompress", *map(str, command)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        assert not stop.value.code, err
        return out, err

    out, _ = run()
    kinds = {
        "cache": "cache",
        "random/onnx": "onnx",
        "bk-tiny/pipeline": "student",
        "bk-tiny/onnx": "onnx",
        "bk-tiny-2step/pipeline": "few-step",
        "bk-tiny-2step/onnx": "onnx",
        "report": "results",
    }
    if TENSORRT_RTX.missing() is None:
        for student in ("bk-tiny", "bk-tiny-2step"):
            kinds |= {f"{student}/onnx-fp16": "onnx", f"{student}/engine": "engine"}
        engine = read_manifest(tmp_path / "out/bk-tiny-2step/engine")
        assert engine is not None
        (profile,) = engine.config["profiles"]["unet"]
        assert {shape[0] for shape in profile["sample"]} == {1}
    for folder, kind in kinds.items():
        assert faults(tmp_path / "out" / folder, kind) == []
    assert "report.html" in out
    assert "2 steps, no guidance" in out
    stamps = {folder: (tmp_path / "out" / folder / "sdcompress.json").stat().st_mtime_ns for folder in kinds}
    shutil.rmtree(tmp_path / "out/random/onnx")
    (tmp_path / "out/report/report.html").write_text("cut")
    _, err = run()
    assert err.count("there already") == len(kinds) - 2
    stamps_now = {folder: (tmp_path / "out" / folder / "sdcompress.json").stat().st_mtime_ns for folder in kinds}
    assert {folder for folder in kinds if stamps_now[folder] != stamps[folder]} == {"random/onnx", "report"}


@pytest.mark.parametrize("text", ["-8.9", "8.99", "8"])
def test_what_is_not_a_compute_capability_is_refused(cli: Cli, tmp_path: Path, text: str) -> None:
    code, _, err = cli("run", "nano", "--data", "nano", "-o", tmp_path / "out", f"--compute-capability={text}")
    assert code == 2
    assert "is not a compute capability; 8.9 is one" in err


def test_settings_of_a_few_step_training_without_one_are_refused(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("run", "nano", "--data", "nano", "--few-step-recipe", "few-step", "-o", tmp_path / "out")
    assert code == 2
    assert "--few-step-recipe without --few-step. Try: add --few-step 4" in one_line(err)


def test_what_is_needed_last_is_checked_first(cli: Cli, random_folder: Path, pictures: Path, tmp_path: Path) -> None:
    run = ("run", random_folder, "--data", pictures, "-o", tmp_path / "out")
    code, _, err = cli(*run, "--prompts", tmp_path / "gone.txt")
    assert code == 2
    assert "no such file of prompts" in one_line(err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(TENSORRT_RTX.missing() is not None, reason="tensorrt-rtx is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_a_card_that_no_engine_can_be_built_for_is_refused_first(
    cli: Cli, random_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    run = ("run", random_folder, "--data", pictures, "-o", tmp_path / "out")
    code, _, err = cli(*run, "--compute-capability", "3.5")
    assert code == 1
    assert "builds for no compute capability 3.5" in one_line(err)
    assert list(tmp_path.iterdir()) == []
