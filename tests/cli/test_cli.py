"""The command line: help without heavy imports, one line for every mistake, and whole stages on a small model."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from sdcompress_engines import thread_waiting

from sdcompress.cli import COMMANDS
from sdcompress.cli._console import ConsoleReporter
from sdcompress.cli._training import note_few_steps
from sdcompress.models.load import load_pipeline

from .conftest import Cli, one_line

HEAVY = {"torch", "numpy", "diffusers", "transformers", "onnx", "onnxruntime", "pydantic", "scipy", "PIL", "rich"}


def test_help_lists_every_command_and_imports_no_heavy_library() -> None:
    script = (
        "import sys\nfrom sdcompress.cli import cli\ntry:\n    cli(['--help'])\nfinally:\n"
        "    print('modules', *{name.partition('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    help_text, modules = done.stdout.rsplit("modules ", 1)
    assert not HEAVY & set(modules.split())
    assert [name for name in COMMANDS if f"\n  {name} " not in help_text] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_has_an_example(cli: Cli, name: str) -> None:
    code, out, _ = cli(name, "--help")
    assert code == 0
    assert f"sdcompress {name}" in out


@pytest.mark.parametrize("option", ["-h", "--help", "--version"])
def test_help_does_not_measure_the_load_of_the_machine(cli: Cli, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_waiting, "choose_waiting", lambda: pytest.fail("the load was measured"))
    assert cli(option)[0] == 0


def test_a_missing_path_is_a_usage_error(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("plan", tmp_path / "nowhere")
    assert code == 2
    assert "does not exist" in one_line(err)


def test_a_folder_that_is_not_a_pipeline_is_refused(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("plan", tmp_path)
    assert code == 1
    assert "model_index.json" in one_line(err)


def test_an_unknown_preset_lists_the_known_ones_and_names_the_nearest(cli: Cli, random_folder: Path) -> None:
    code, _, err = cli("plan", random_folder, "--preset", "bk-smal")
    assert code == 2
    assert "bk-base" in one_line(err)
    assert "Try: bk-small" in one_line(err)


def test_a_plan_that_the_unets_levels_do_not_allow_is_refused(cli: Cli, tmp_path: Path, random_folder: Path) -> None:
    import shutil

    shutil.copytree(random_folder, tmp_path / "model")
    config = tmp_path / "model/unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"block_out_channels": [48, 80, 96, 112]}))
    code, _, err = cli("plan", tmp_path / "model", "--preset", "bk-tiny")
    assert code == 1
    assert "112 channels and its neighbor 96" in one_line(err)


@pytest.mark.parametrize("captions", [False, True])
def test_a_data_folder_without_pictures_or_captions_is_refused(
    cli: Cli, tmp_path: Path, random_folder: Path, pictures: Path, captions: bool
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    if captions:
        (data / "a.png").write_bytes((pictures / "00.png").read_bytes())
    code, _, err = cli("distill", random_folder, "--data", data, "-o", tmp_path / "out")
    assert code == 1
    assert ("no captioned picture" if captions else "holds no picture") in one_line(err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


def test_an_output_folder_in_the_way_is_left_as_it_is(
    cli: Cli, tmp_path: Path, random_folder: Path, pictures: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    for command in (
        ["distill", random_folder, "--data", pictures],
        ["export", random_folder],
        ["bench", random_folder],
        ["run", random_folder, "--data", pictures],
    ):
        code, _, err = cli(*command, "-o", out)
        assert code == 1
        assert "--force" in one_line(err)
    assert [p.name for p in out.iterdir()] == ["precious"]


def test_an_output_below_a_file_is_refused(cli: Cli, tmp_path: Path, random_folder: Path, pictures: Path) -> None:
    (tmp_path / "file").write_text("x")
    code, _, err = cli("distill", random_folder, "--data", pictures, "-o", tmp_path / "file/out")
    assert code == 1
    assert "not a folder" in one_line(err)


def test_the_cache_of_a_training_in_this_folder_lies_beside_it(
    cli: Cli, tmp_path: Path, random_folder: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("out", "out-cache"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "out")
    code, _, err = cli("distill", random_folder, "--data", pictures, "-o", ".")
    assert code == 1
    assert one_line(err).startswith(f"sdcompress: {tmp_path / 'out-cache'}: ")  # it is there, and is not a cache


def test_a_disk_that_fills_during_a_save_leaves_nothing(
    cli: Cli, tmp_path: Path, random_folder: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sdcompress.data.cache_units.save_file", full)
    code, _, err = cli("distill", random_folder, "--data", pictures, "-o", tmp_path / "out")
    assert code == 1
    assert "no space left" in one_line(err)
    assert list(tmp_path.iterdir()) == []


def test_wrong_options_are_usage_errors(cli: Cli, random_folder: Path, pictures: Path, tmp_path: Path) -> None:
    assert cli("nonsense")[0] == 2
    assert cli("plan")[0] == 2
    code, _, err = cli("distill", random_folder, "--data", pictures, "-o", tmp_path / "out", "--recipe", "nanno")
    assert code == 2
    assert "nano" in one_line(err)
    code, _, err = cli("distill", random_folder, "--data", pictures, "-o", tmp_path / "out", "--steps", "0")
    assert code == 2
    assert "steps" in one_line(err)
    code, _, err = cli("generate", random_folder, "x", "--backend", "coreml", "-o", tmp_path / "a.png")
    assert code == 2
    assert "onnxruntime" in one_line(err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--artifacts", "graphs"), "the backend torch runs no artifacts"),
        (("--artifacts", "graphs", "--backend", "compile"), "the backend compile runs no artifacts"),
        (("--fallback", "torch"), "--fallback torch with the backend torch"),
        (
            ("--artifacts", "graphs", "--backend", "ort", "--precision", "fp16"),
            "--precision has no effect with --artifacts",
        ),
        (("--negative-prompt", "dog", "--guidance", "1"), "--negative-prompt has no effect with --guidance 1"),
    ],
)
def test_an_option_without_effect_is_refused(
    cli: Cli,
    random_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "graphs").mkdir()
    code, _, err = cli("generate", random_folder, "a cat", *options, "-o", "a.png")
    assert code == 2
    assert message in one_line(err)
    assert [path.name for path in tmp_path.iterdir()] == ["graphs"]


@pytest.mark.parametrize(
    ("command", "settings", "expected_code", "message"),
    [
        ("distill", ["batch_size=7", "gradient_accumulation=2"], 2, "expected a multiple of 2"),
        ("distill", ["optimizer=adamw8bit"], 1, "pip install bitsandbytes"),
        ("distill", ["tracker=wandb"], 1, "pip install wandb"),
        ("lora train", ["targets=[to_x]"], 2, "targets to_x match no layer"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_data_is_encoded(
    cli: Cli,
    random_folder: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    settings: list[str],
    expected_code: int,
    message: str,
) -> None:
    monkeypatch.setattr("sdcompress.train.accelerator.find_spec", lambda name: None)
    monkeypatch.setattr("sdcompress.train.accelerator.get_available_trackers", lambda: [])
    options = [option for setting in settings for option in ("--set", setting)]
    code, _, err = cli(*command.split(), random_folder, "--data", pictures, *options, "-o", tmp_path / "out")
    assert code == expected_code
    assert message in one_line(err)
    assert list(tmp_path.iterdir()) == []


def test_trt_without_tensorrt_names_what_to_install(
    cli: Cli, tmp_path: Path, random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = cli("export", random_folder, "--trt", "-o", tmp_path / "out")
    assert code == 1
    assert "pip install" in one_line(err)
    assert list(tmp_path.iterdir()) == []


def test_plan_prints_counts_and_writes_a_plan_that_distill_takes(
    cli: Cli, tmp_path: Path, random_folder: Path, pictures: Path
) -> None:
    code, out, _ = cli("plan", random_folder, "--preset", "sd-tiny", "-o", tmp_path / "plan.json")
    assert code == 0
    assert "level 3" in out
    assert "dropped" in out
    code, out, err = cli(
        "distill",
        random_folder,
        "--plan",
        tmp_path / "plan.json",
        "--data",
        pictures,
        "--steps",
        2,
        "--batch-size",
        2,
        "-o",
        tmp_path / "student",
    )
    assert code == 0, err
    assert "smaller" in out
    code, out, _ = cli("inspect", tmp_path / "student", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["kind"] == "student"
    assert facts["faults"] == []


def test_an_ordinary_training_of_a_few_step_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for name, lines in (("nano-tiny", 0), ("nano-tiny-4step", 1)):
        note_few_steps(load_pipeline(name), ConsoleReporter())
        err = capsys.readouterr().err
        assert err.count("draws in 4 steps, which this training does not keep up") == lines


def test_generate_draws_the_same_picture_for_the_same_seed(cli: Cli, tmp_path: Path, random_folder: Path) -> None:
    for name, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        code, _, err = cli(
            "generate", random_folder, "a flat icon of a cat", "--steps", 2, "--seed", seed, "-o", tmp_path / name
        )
        assert code == 0, err
    a, b, c = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b
    assert a != c


def test_generate_says_what_nano_does_not_know_and_draws_all_the_same(
    cli: Cli, tmp_path: Path, random_folder: Path
) -> None:
    code, _, err = cli("generate", "nano", "a flat icon of a puppy", "--steps", 1, "-o", tmp_path / "a.png")
    assert code == 0, err
    assert "nano was not trained on 'puppy'; the nearest that it knows is 'dog face'" in err
    assert (tmp_path / "a.png").is_file()
    _, _, err = cli("generate", random_folder, "a flat icon of a puppy", "--steps", 1, "-o", tmp_path / "b.png")
    assert "nano" not in err
