"""Artifacts of an earlier version (`tests/fixtures`) are read, verified, resumed and uninstalled."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from sdcompress_engines.manifest import faults, read_manifest

from sdcompress.cli import cli
from sdcompress.train.precision import resolve_precision

FIXTURE = Path(__file__).parent / "fixtures/artifacts-a086a6f.tar.xz"
Command = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked artifacts."""
    target = tmp_path_factory.mktemp("earlier")
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(target, filter="data")
    return target


@pytest.fixture
def command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command line in the folder, with the earlier version's cache; returns its output."""

    def run(*words: str) -> str:
        result = CliRunner().invoke(cli, list(words))
        assert result.exit_code == 0, result.output
        return result.output

    monkeypatch.chdir(folder)
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(folder / "cache-home"))
    return run


def test_a_demo_is_whole_and_no_stage_runs_again(command: Command, folder: Path) -> None:
    words = ["run", "teacher", "--data", "pictures", "--plan", "bk-small", "--steps", "4"]
    output = command(*words, "--compute-capability", "8.6", "--quick", "-o", "demo")
    stages = [line for line in output.splitlines() if line.startswith("[")]
    assert len(stages) == 7
    assert [line for line in stages[:6] if "there already" not in line] == []


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("demo/cache", "cache"),
        ("demo/teacher/onnx", "onnx"),
        ("demo/bk-small/pipeline", "student"),
        ("demo/bk-small/onnx-fp16", "onnx"),
        ("demo/bk-small/engine", "engine"),
        ("demo/report", "results"),
    ],
)
def test_a_manifest_is_read_and_every_file_is_as_it_says(folder: Path, path: str, kind: str) -> None:
    manifest = read_manifest(folder / path)
    assert manifest is not None
    assert manifest.kind == kind
    assert faults(folder / path, kind) == []


def test_a_store_is_listed_and_verified(command: Command) -> None:
    entries = json.loads(command("engines", "list", "--json"))
    assert len(entries) == 4
    command("engines", "verify")


def test_a_student_is_recognized_and_draws(command: Command, folder: Path) -> None:
    facts = json.loads(command("inspect", "demo/bk-small/pipeline", "--json"))
    assert (facts["family"], facts["student"]) == ("sd1", "bk-small")
    command("generate", "demo/bk-small/pipeline", "squares", "--steps", "2", "-o", str(folder / "drawn.png"))
    assert (folder / "drawn.png").is_file()


def test_a_killed_run_is_resumed_with_its_losses_and_to_its_weights(command: Command, folder: Path) -> None:
    before = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    words = ["distill", "teacher", "--plan", "bk-small", "--data", "pictures", "--size", "64", "--steps", "4"]
    command(*words, "--set", "checkpoint_every=2", "--set", "sample_every=0", "-o", "run", "--resume")
    after = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in after] == [row["step"] for row in before]
    assert after[0] == before[0]  # not computed again
    for name in ("loss", "task_loss", "output_kd_loss", "feature_kd_loss", "grad_norm"):
        assert after[-1][name] == pytest.approx(before[-1][name], rel=1e-2), name
    resumed = load_file(folder / "run/pipeline/unet/diffusion_pytorch_model.safetensors")
    expected = load_file(folder / "resumed-unet.safetensors")
    assert resumed.keys() == expected.keys()
    # Adam's step is at most the learning rate, so in two steps each run moves at most so far from the checkpoint.
    furthest = 2 * after[-1]["learning_rate"]
    if resolve_precision("auto", "cpu") == "fp32":
        furthest *= 2  # the earlier run was in bf16: weights may move in opposite directions
    for name, weight in expected.items():  # attention is computed in another order since then
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=furthest, msg=name)


def test_a_result_file_is_compared_with_itself(command: Command) -> None:
    lines = json.loads(command("bench", "compare", "demo/report/results.json", "demo/report/results.json", "--json"))
    assert lines["lines"]


def test_an_installed_plugin_is_recognized_and_taken_away_whole(command: Command, folder: Path) -> None:
    status = json.loads(command("status", "webui", "host", "--json"))
    assert status["changed"] == {}
    assert [engine["name"] for engine in status["engines"]] == ["bk-small"]
    command("uninstall", "webui", "host")
    left = sorted(
        path.relative_to(folder / "host").as_posix() for path in (folder / "host").rglob("*") if path.is_file()
    )
    assert left == ["modules/sd_unet.py", "webui.py"]
