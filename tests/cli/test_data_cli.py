"""The `sdcompress data` commands."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from .conftest import Cli, one_line


@pytest.mark.parametrize("name", ["inspect", "cache", "generate"])
def test_the_help_of_every_subcommand_has_an_example(cli: Cli, name: str) -> None:
    code, out, _ = cli("data", name, "--help")
    assert code == 0
    assert f"sdcompress data {name}" in out


def test_inspect_for_people_and_for_programs(cli: Cli, pictures: Path, tmp_path: Path) -> None:
    code, out, err = cli("data", "inspect", pictures, "--size", 64, "--flip", "--sheet", tmp_path / "sheets/a.png")
    assert code == 0, err
    assert "24 pictures" in out
    assert out.splitlines()[-1] == f"next: sdcompress data cache {pictures} TEACHER -o cache --size 64 --flip"
    with Image.open(tmp_path / "sheets/a.png") as sheet:
        assert sheet.size == (8 * 172, 3 * 172)
    code, out, _ = cli("data", "inspect", pictures, "--json", "--limit", 5)
    figures = json.loads(out)
    assert figures["usable"] == 5
    assert figures["width_px"]["median"] == 128
    assert figures["fault"] is None


def test_an_option_of_zero_is_in_the_next_command(cli: Cli, pictures: Path) -> None:
    _, out, _ = cli("data", "inspect", pictures, "--max-unusable", 0)
    assert out.splitlines()[-1].endswith("TEACHER -o cache --max-unusable 0.0")


@pytest.mark.parametrize(
    ("arguments", "arguments_after"),
    [
        (("data", "inspect", "--", "-dash"), ("data", "inspect")),
        (("data", "inspect", 'it\'s "mine"'), ("data", "inspect")),
        (("recipes", "copy", "nano", "./-mine.yaml"), ("recipes", "validate")),
        (("recipes", "copy", "nano", "a b.yaml"), ("recipes", "validate")),
    ],
)
def test_the_next_command_works_when_it_is_typed(
    cli: Cli,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    arguments_after: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("-dash", 'it\'s "mine"'):
        shutil.copytree(pictures, name)
    code, out, err = cli(*arguments)
    assert code == 0, err
    typed = shlex.split(out.splitlines()[-1].removeprefix("next: sdcompress "))
    code, _, err = cli(*arguments_after, typed[2])
    assert code == 0, err


@pytest.mark.parametrize("variable", ["WORLD_SIZE=2", "WORLD_SIZE=x", "LOCAL_RANK=", "RANK=²"])
def test_a_launchers_variables_that_nobody_can_read_are_one_line(
    cli: Cli, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    name, _, value = variable.partition("=")
    monkeypatch.setenv(name, value)
    code, _, err = cli("data", "cache", pictures, "nano", "-o", tmp_path / "cache")
    assert code == 2
    assert f"{name} in the environment is " in one_line(err)
    assert cli("recipes", "validate", "nano")[1] != ""


def test_some_of_a_launchers_variables_hide_no_output(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert "bk-tiny for nano" in cli("plan", "nano", "--preset", "bk-tiny")[1]


def test_hints_quote_the_names_in_them(cli: Cli, tmp_path: Path, pictures: Path) -> None:
    _, _, err = cli("generate", "nano", "x", "--artifacts", tmp_path / "no such")
    assert err.endswith(f"sdcompress export nano -o '{tmp_path}/no such'\n")
    data = shutil.copytree(pictures, tmp_path / "my pictures")
    _, _, err = cli("data", "cache", data, "nano", "-o", data / "cache")
    assert err.endswith("such as -o 'my pictures-output'\n")


def test_inspect_reports_when_training_would_stop(cli: Cli, tmp_path: Path) -> None:
    Image.new("RGB", (70, 70)).save(tmp_path / "a.png")
    code, out, _ = cli("data", "inspect", tmp_path)
    assert code == 0
    assert "no captioned picture" in out
    assert "next:" not in out


def test_a_cache_is_built_and_distill_takes_it(cli: Cli, pictures: Path, random_folder: Path, tmp_path: Path) -> None:
    data = shutil.copytree(pictures, tmp_path / "data")
    for suffix in ("png", "txt"):
        shutil.copy(data / f"00.{suffix}", data / f"again.{suffix}")
    options = ["--size", 64, "--flip"]
    code, out, err = cli("data", "cache", data, random_folder, "-o", tmp_path / "cache", *options)
    assert code == 0, err
    assert "24 (1 duplicates left out)" in out
    assert "bytes a picture" in out
    typed = out.splitlines()[-1].removeprefix("next: sdcompress ").split()
    assert typed[0] == "distill"
    code, _, err = cli(*typed[:-1], tmp_path / "student", "--steps", 1, "--batch-size", 2)
    assert code == 0, err
    code, _, err = cli("data", "cache", data, random_folder, "-o", tmp_path / "cache", *options)
    assert code == 1
    assert "--force" in one_line(err)


def test_inspect_reads_what_generate_makes(cli: Cli, random_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    command = [
        "data",
        "generate",
        random_folder,
        "--prompts",
        tmp_path / "prompts.txt",
        "-n",
        3,
        "--steps",
        2,
        "--size",
        64,
        "--batch-size",
        2,
        "-o",
        tmp_path / "made",
    ]
    code, out, err = cli(*command)
    assert code == 0, err
    assert out.splitlines()[-1] == f"next: sdcompress distill {random_folder} --data {tmp_path / 'made'} -o student"
    code, out, err = cli(*command)
    assert code == 0
    assert "complete already" in err
    code, out, _ = cli("data", "inspect", tmp_path / "made", "--json")
    assert json.loads(out)["usable"] == 3
    assert json.loads(out)["fields"]["seed"]["most"] == 2
    code, _, err = cli(*command, "--seed", 5)
    assert code == 1
    assert "seed: 0 in the folder, 5 now" in one_line(err)


def test_pictures_of_a_student_are_for_a_finetuning(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a flat icon of a cat\n")
    code, out, err = cli(
        "data", "generate", "nano-tiny-4step", "--prompts", tmp_path / "prompts.txt", "-n", 1, "-o", tmp_path / "made"
    )
    assert code == 0, err
    assert out.splitlines()[-1] == f"next: sdcompress finetune MODEL --data {tmp_path / 'made'} -o finetuned"


def test_mistakes_are_one_line(cli: Cli, random_folder: Path, pictures: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n")
    generate = ["data", "generate", random_folder, "-o", tmp_path / "out", "--prompts"]
    for arguments, code, message in (
        ([*generate, prompts, "-n", 1], 1, "holds no prompt"),
        ([*generate, tmp_path / "gone", "-n", 1], 2, "does not exist"),
        ([*generate, prompts, "-n", 0], 2, "'--count': 0 is not in the range"),
        ([*generate, prompts, "-n", 1, "--size", 65], 2, "65 is not a multiple of 8"),
        ([*generate, prompts, "-n", 1, "--backend", "coreml"], 2, "onnxruntime"),
        (["data", "inspect", pictures, "--size", 65], 2, "65 is not a multiple of 8"),
        (["data", "inspect", pictures, "--where", "score is 3"], 2, "--where"),
        (["data", "inspect", pictures, "--sheet", "a.txt"], 2, "not a picture file name"),
        (["data", "inspect", pictures, "--limit", 0], 2, "--limit"),
        (["data", "inspect", tmp_path / "gone"], 2, "does not exist"),
        (["data", "cache", pictures, tmp_path / "gone", "-o", tmp_path / "out"], 2, "does not exist"),
    ):
        exit_code, _, err = cli(*arguments)
        assert exit_code == code, (arguments, err)
        assert message in one_line(err)
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.txt"]
