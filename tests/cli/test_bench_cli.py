"""`sdcompress bench` as a person types it: suites and models, what is refused, the dry run and the comparison."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from sdcompress_bench.results import Results

from sdcompress.cli import cli
from sdcompress.families.family import Family
from sdcompress.families.registry import families


def type_in(*arguments: object) -> Result:
    """Runs `sdcompress bench ARGUMENTS` in this process."""
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "a suite or a model is missing; `sdcompress bench --list` names the suites"),
        (("nowhere",), 2, "nowhere: does not exist"),
        (("nano", "--backend", "tpu"), 2, "no backend 'tpu'"),
        (("nano", "--backend", "torch:int3"), 2, "no precision 'int3'"),
        (("nano", "--size", "big"), 2, "'big' is not a list of whole numbers"),
        (("nano", "--batch", "0"), 2, "0 is not in the range"),
        (("nano", "--prompts", "gone.txt"), 2, "gone.txt: no such file of prompts"),
        (("nano", "--clip", "gone"), 2, "--clip does not exist"),
        (("nano", "--reference", "gone"), 2, "--reference does not exist"),
        (("nano", "--clip", str(Path(__file__).parent)), 1, "not a CLIP model"),
        (("nano", "--reference", str(Path(__file__).parent)), 1, "has no pictures"),
        (("gone.yaml",), 2, "gone.yaml: no such suite"),
        (("compare", "gone.json", "gone.json"), 2, "gone.json: no such file"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = type_in(*arguments)
    error = result.exception
    assert error is not None
    assert getattr(error, "exit_code", error.args[0] if isinstance(error, SystemExit) else None) == code
    assert message in f"{result.output} {error}"
    assert list(tmp_path.iterdir()) == []


def test_all_faults_of_a_suite_are_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("models: [nano]\nbackend: [torch]\nrounds: 0")
    message = str(type_in(tmp_path / "mine.yaml").exception)
    assert "backend: unknown setting, did you mean backends?" in message
    assert "rounds" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_a_gpu_suite_without_a_gpu_names_the_command_to_type() -> None:
    assert "there is none. Try: sdcompress bench sd15-cpu" in str(type_in("sd15").exception)
    assert "tensorrt" in str(type_in("nano-tiny", "--backend", "trt", "--strict", "--dry-run").exception).lower()


def test_the_help_names_the_guidance_that_nano_gets() -> None:
    (nano,) = {family.guidance_scale for family in families().values()} - {Family.guidance_scale}
    expected = f"[default: {Family.guidance_scale:g}; nano and its students {nano:g}"
    for command in ("bench", "generate"):
        assert expected in " ".join(CliRunner().invoke(cli, [command, "--help"]).output.split())


def test_suites_are_listed_by_name() -> None:
    lines = type_in("--list").output.splitlines()
    assert [line.split()[0] for line in lines] == sorted(line.split()[0] for line in lines)
    assert any(line.startswith("nano ") for line in lines)
    listed = json.loads(type_in("--list", "--json").stdout)
    width = max(len(suite["name"]) for suite in listed)
    assert [f"{suite['name']:<{width}}  {suite['title']}" for suite in listed] == lines


def test_a_model_whose_path_has_an_equals_sign_is_no_name(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=1e-5").symlink_to(random_folder.parent)
    for model, name in ((f"lr=1e-5/{random_folder.name}", random_folder.name), ("mine=nano", "mine")):
        rows = json.loads(type_in(model, "--backend", "torch", "--dry-run", "--json").stdout)["scenarios"]
        assert {row["model"] for row in rows} == {name}


def test_a_dry_run_lists_scenarios_and_memory_and_writes_nothing(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = type_in("sd15-cpu", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    scenarios = json.loads(result.stdout)["scenarios"]
    held = {(row["model"], row["backend"], row["precision"]): row["memory_bytes"] for row in scenarios}
    assert len(held) == 12
    assert held["SD1.5", "torch", "fp32"] > 4 * (859_520_964 + 123_000_000)
    assert 1.8 < held["SD1.5", "torch", "fp32"] / held["SD1.5", "torch", "bf16"] < 2.2
    assert (
        held["bk-tiny", "torch", "fp32"]
        < held["bk-small", "torch", "fp32"]
        < held["bk-base", "torch", "fp32"]
        < held["SD1.5", "torch", "fp32"]
    )
    text = type_in(random_folder, "--dry-run", "--batch", "1,4", "--backend", "torch").stdout
    assert "batch 4" in text
    assert re.search(r"^2 scenarios × 5 rounds, ", text, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_models_are_measured_and_results_compare_with_themselves(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ("--backend", "torch", "--steps", 1, "--quick", "--threads", 1)
    result = type_in(f"mine={random_folder}", *common, "--prompts", write_prompts(tmp_path))
    assert result.exit_code == 0, result.output + str(result.exception)
    assert "mine / PyTorch fp32" in result.output
    assert (tmp_path / "bench-mine" / "report.html").is_file()
    same = type_in("compare", "bench-mine", "bench-mine")
    assert same.exit_code == 0, str(same.exception)
    assert "mine, PyTorch fp32" in same.output
    raw = json.loads((tmp_path / "bench-mine" / "results.json").read_text())
    raw["schema"] = 1
    (tmp_path / "old.json").write_text(json.dumps(raw))
    assert "results schema 1" in str(type_in("compare", "old.json", "bench-mine").exception)
    taken = type_in(f"mine={random_folder}", "-o", "bench-mine")
    assert "exists and is not empty" in str(taken.exception)


def write_prompts(folder: Path) -> Path:
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    return folder / "prompts.txt"


def test_a_slower_result_is_reported_and_fails_with_the_option(tmp_path: Path) -> None:
    for name, ms in (("a", 100.0), ("b", 130.0)):
        samples: dict[str, Any] = {
            stage: [[ms + n + r for n in range(5)] for r in range(5)]
            for stage in ("unet_step", "text_encoder", "vae_decode", "end_to_end")
        }
        latency = {
            "key": "k",
            "model": "nano",
            "backend": "torch",
            "precision": "fp32",
            "size_px": 128,
            "batch": 1,
            "unet_batch": 2,
            "steps": 25,
            "guidance_scale": 4.0,
            "samples_ms": samples,
        }
        settings = {"steps": 25, "guidance_scale": 4.0, "rounds": 5, "baseline": ["torch", "fp32"]}
        environment = {"cpu": "x", "cores": 2, "torch_threads": 2, "gpu": [], "packages": {}, "commit": None}
        results = Results("", "", settings, environment, [{"name": "nano", "sha256": "", "parameters": {}}], [])
        raw = json.loads(json.dumps(results.__dict__)) | {"latency": [latency]}
        (tmp_path / f"{name}.json").write_text(json.dumps(raw))
    plain = type_in("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert plain.exit_code == 0, str(plain.exception)
    assert "slower" in plain.output
    failed = type_in("compare", tmp_path / "a.json", tmp_path / "b.json", "--fail-on-slower")
    assert getattr(failed.exception, "exit_code", None) == 3
    assert type_in("compare", tmp_path / "b.json", tmp_path / "a.json", "--fail-on-slower").exit_code == 0
