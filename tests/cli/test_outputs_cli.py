"""Every command that writes leaves what it reads, and what a person put into the output, as it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sdcompress_engines.manifest import write_manifest

from sdcompress.models.locate import read_unet_config
from sdcompress.models.nano import teacher_folder
from sdcompress.prune.presets import make_plan

from .conftest import Cli, one_line

Command = Callable[[Path], list[object]]


def commands() -> dict[str, Command]:
    """Each command with all its inputs in one folder, without `-o`."""
    return {
        "cache": lambda at: ["data", "cache", at / "pics", at / "model"],
        "data generate": lambda at: ["data", "generate", at / "model", "--prompts", at / "prompts.txt", "-n", 1],
        "export": lambda at: ["export", at / "model"],
        "distill": lambda at: ["distill", at / "model", "--data", at / "pics"],
        "finetune": lambda at: ["finetune", at / "model", "--data", at / "pics"],
        "lora train": lambda at: ["lora", "train", at / "model", "--data", at / "pics"],
        "bench": lambda at: ["bench", at / "model", "--quick", "--backend", "torch"],
        "run": lambda at: ["run", at / "model", "--data", at / "pics"],
    }


def file_commands() -> dict[str, Command]:
    """Each command that writes one file, with the option for it."""
    return {
        "plan": lambda at: ["plan", at / "model", "-o"],
        "generate": lambda at: ["generate", at / "model", "a cat", "-o"],
        "sheet": lambda at: ["data", "inspect", at / "pics", "--sheet"],
        "ldm": lambda at: ["export", at / "model", "--ldm", "--force", "-o"],
    }


@pytest.fixture
def place(tmp_path: Path, random_folder: Path, pictures: Path) -> Path:
    """A folder with a model, pictures and prompts, and a link to it."""
    at = tmp_path / "at"
    shutil.copytree(random_folder, at / "model")
    shutil.copytree(pictures, at / "pics")
    (at / "prompts.txt").write_text("a cat\n")
    (tmp_path / "alias").symlink_to(at)
    return at


def contents(folder: Path) -> dict[str, int]:
    """Every path below a folder with its size and time of change, without reading weights."""
    return {
        path.relative_to(folder).as_posix(): path.lstat().st_mtime_ns for path in folder.rglob("*") if path != folder
    }


@pytest.mark.parametrize("name", commands())
def test_no_folder_command_touches_its_inputs(cli: Cli, tmp_path: Path, place: Path, name: str) -> None:
    before = contents(tmp_path)
    for output in ("at/model", "at/pics", "at", "at/model/new", "at/pics/new", "alias", "alias/model", "."):
        if output == "at/pics/new" and name in ("export", "bench", "data generate"):
            continue
        for force in ([], ["--force"]):
            code, _, err = cli(*commands()[name](place), "-o", tmp_path / output, *force)
            assert (output, code) == (output, 1), err
            one_line(err)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", file_commands())
def test_no_file_command_touches_its_inputs(cli: Cli, tmp_path: Path, place: Path, name: str) -> None:
    suffix = {"plan": ".json", "generate": ".png", "sheet": ".png", "ldm": ".safetensors"}[name]
    inside = place / ("pics" if name == "sheet" else "model")
    (tmp_path / f"link{suffix}").symlink_to(tmp_path / "nothing")
    (tmp_path / f"folder{suffix}").mkdir()
    os.mkfifo(tmp_path / f"fifo{suffix}")
    before = contents(tmp_path)
    for output in (
        inside / f"new{suffix}",
        tmp_path / "alias" / inside.name / f"new{suffix}",
        tmp_path / f"link{suffix}",
        tmp_path / f"folder{suffix}",
        tmp_path / f"fifo{suffix}",
    ):
        code, _, err = cli(*file_commands()[name](place), output)
        assert code in (1, 2), output
        assert "Traceback" not in err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "command",
    [
        ["bench", "suite.yaml"],
        ["bench", "nano", "--prompts", "old/prompts.txt", "--quick", "--backend", "torch"],
        ["export", "nano", "--precision", "int8", "--calibration-prompts", "old/prompts.txt"],
        ["data", "generate", "nano", "--prompts", "old/prompts.txt", "-n", 1],
        ["run", "nano", "--data", "pics", "--prompts", "old/prompts.txt"],
        ["run", "nano", "--data", "pics", "--plan", "old/plan.json"],
        ["distill", "nano", "--data", "pics", "--plan", "old/plan.json"],
        ["lora", "train", "nano", "--data", "pics", "--recipe", "old/recipe.yaml"],
    ],
    ids=lambda command: " ".join(map(str, command)),
)
def test_force_keeps_an_output_of_which_a_file_is_read(
    cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch, command: list[object]
) -> None:
    monkeypatch.chdir(place)
    (place / "suite.yaml").write_text("models: [nano]\nprompts: old/prompts.txt\nbackends: [torch]\n")
    old = place / "old"
    old.mkdir()
    shutil.copy("prompts.txt", old)
    (old / "plan.json").write_text(make_plan(read_unet_config("nano"), "bk-tiny").to_json())
    (old / "recipe.yaml").write_text("kind: lora\nrank: 4\n")
    write_manifest(old, "dataset")
    before = contents(place)
    code, _, err = cli(*command, "-o", "old", "--force")
    assert code == 1
    assert "which this command reads" in one_line(err)
    assert contents(place) == before


def test_the_root_and_the_folder_of_a_built_in_model_are_refused(cli: Cli) -> None:
    for command in (
        ["distill", "nano", "--data", "nano", "-o", "/"],
        ["distill", "nano", "--data", "nano", "-o", "/", "--resume"],
        ["plan", "nano", "-o", teacher_folder() / "plan.json"],
        ["data", "generate", "nano", "--prompts", Path(__file__), "-n", 1, "-o", teacher_folder() / "new"],
    ):
        code, _, err = cli(*command)
        assert code == 1, command
        assert "which this command reads" in one_line(err)


def test_a_plan_replaces_a_plan_only(cli: Cli, tmp_path: Path) -> None:
    for _ in range(2):
        assert cli("plan", "nano", "-o", tmp_path / "plan.json")[0] == 0
    (tmp_path / "notes.json").write_text("mine")
    code, _, err = cli("plan", "nano", "-o", tmp_path / "notes.json")
    assert code == 1
    assert "is no plan" in one_line(err)
    assert (tmp_path / "notes.json").read_text() == "mine"


@pytest.mark.slow
def test_force_repeats_every_command_in_its_place(cli: Cli, tmp_path: Path, place: Path) -> None:
    training = ["--steps", 1, "--batch-size", 2, "--cache", tmp_path / "cache"]
    for name, options in (("cache", []), ("export", []), ("distill", training), ("data generate", ["--steps", 1])):
        output = tmp_path / ("cache" if name == "cache" else f"out-{name}")
        for _ in range(2):
            code, _, err = cli(*commands()[name](place), *options, "-o", output, "--force")
            assert code == 0, err
        if name == "distill":  # what a later stage puts there does not stand in the way
            assert cli("export", output, "-o", output / "onnx")[0] == 0
            assert cli(*commands()[name](place), *options, "-o", output, "--force")[0] == 0
            assert not (output / "onnx").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_training_that_cannot_begin_leaves_the_run_that_force_would_replace(
    cli: Cli, tmp_path: Path, place: Path
) -> None:
    command = commands()["distill"](place)
    options = ["--steps", 1, "--batch-size", 2, "--cache", tmp_path / "cache", "-o", tmp_path / "run"]
    assert cli(*command, *options)[0] == 0
    before = contents(tmp_path)
    code, _, err = cli(*command, *options, "--force", "--set", "gradient_accumulation=2", "--batch-size", 3)
    assert code == 2, err
    assert contents(tmp_path / "run").keys() == {
        name.removeprefix("run/") for name in before if name.startswith("run/")
    }
    assert not list(tmp_path.glob(".*"))
