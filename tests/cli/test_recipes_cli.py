"""`sdcompress recipes`: what it prints and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from sdcompress_engines.command import command_line

from sdcompress.train.recipes import recipe_names, recipe_path

from .conftest import Cli, one_line


def test_list_names_every_recipe(cli: Cli) -> None:
    code, out, _ = cli("recipes", "list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == recipe_names()
    facts = {fact["name"]: fact for fact in json.loads(cli("recipes", "list", "--json")[1])}
    assert facts["segmind-portrait"]["kind"] == "finetune"
    assert facts["segmind-portrait"]["steps"] == 131_000
    assert facts["bk-sdm-tiny"]["batch_size"] == 256
    assert "BK-SDM-Tiny" in facts["bk-sdm-tiny"]["purpose"]


def test_show_is_the_file_and_resolved_is_every_knob(cli: Cli) -> None:
    assert cli("recipes", "show", "nano-lora")[1] == recipe_path("nano-lora").read_text()
    code, out, _ = cli("recipes", "show", "nano-lora", "--resolved")
    assert code == 0
    assert yaml.safe_load(out)["rank"] == 8
    assert yaml.safe_load(out)["data"]["flip"] is False
    assert "# Rank of the adapter's matrices: higher learns more" in out


def test_copy_replaces_a_file_only_with_force(cli: Cli, tmp_path: Path) -> None:
    mine = tmp_path / "new recipes/mine.yaml"
    code, out, _ = cli("recipes", "copy", "nano", mine)
    assert code == 0
    assert out.splitlines()[-1] == f"next: sdcompress recipes validate {command_line([str(mine)])}"
    assert mine.read_text() == recipe_path("nano").read_text()
    mine.write_text("steps: 7\n")
    code, _, err = cli("recipes", "copy", "nano", mine)
    assert code == 1
    assert "--force" in one_line(err)
    assert mine.read_text() == "steps: 7\n"
    assert cli("recipes", "copy", "nano", mine, "--force")[0] == 0
    assert mine.read_text() == recipe_path("nano").read_text()
    assert cli("recipes", "copy", "nano", tmp_path / "mine.txt")[0] == 2
    assert cli("recipes", "copy", "nano", mine / "deeper.yaml")[0] == 1


def test_validate_names_all_errors_at_once_and_the_nearest_names(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("stepz: 3\nlearning_rate: -1\ndata:\n  flipp: true\n  size_px: 100\n")
    code, _, err = cli("recipes", "validate", path)
    assert code == 2
    for fault in (
        "stepz: unknown knob, did you mean steps?",
        "learning_rate",
        "data.flipp: unknown knob, did you mean flip?",
        "data.size_px",
    ):
        assert fault in one_line(err)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kind: finetun\n", "kind: finetune"),
        ("batch_size: 10\ngradient_accumulation: 4\n", "multiple of 4"),
        ("plan: bk-tny\n", "bk-tiny"),
        ("- steps\n", "not a mapping"),
        ("steps: [1\n", "not YAML"),
    ],
)
def test_validate_refuses_a_recipe_that_no_run_could_use(cli: Cli, tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    code, _, err = cli("recipes", "validate", path)
    assert code == 2
    assert fault in one_line(err)


def test_validate_prints_the_figures_with_the_settings(cli: Cli) -> None:
    code, out, _ = cli(
        "recipes",
        "validate",
        "segmind-tiny",
        "--set",
        "learning_rate=1e-5",
        "--set",
        "data.captions={generated_caption: 1}",
    )
    assert code == 0
    assert "128, in 4 passes of 32" in out
    assert "16,000,000" in out
    assert "1e-05, cosine" in out
    assert "task x 1, output x 0.5, feature x 0.5" in out
    resolved = json.loads(
        cli("recipes", "validate", "segmind-tiny", "--set", "data.captions={generated_caption: 1}", "--json")[1]
    )
    setting = command_line(["--set", "data.captions={generated_caption: 1}"])
    assert f" --recipe segmind-tiny --set learning_rate=1e-5 {setting} -o DIR" in out
    assert resolved["data"]["captions"] == {"generated_caption": 1.0}
    assert "rank 8, alpha 8, on to_q" in cli("recipes", "validate", "nano-lora")[1]


@pytest.mark.parametrize("command", [("show",), ("validate",), ("copy",)])
def test_an_unknown_recipe_names_the_nearest(cli: Cli, tmp_path: Path, command: tuple[str, ...]) -> None:
    code, _, err = cli("recipes", *command, "bk-sdm-tny", *([tmp_path / "a.yaml"] if command == ("copy",) else []))
    assert code == 2
    assert "bk-sdm-tiny" in one_line(err).split("Try:")[1]
