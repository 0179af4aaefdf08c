"""`bench/gpu.py` runs every part from a checkout with few packages, and the README gets a table of its results."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from sdcompress_bench.gpu.program import PARTS

from .gpu_script import ROOT, load_script, read

NEEDED = (
    "torch",
    "triton",
    "numpy",
    "accelerate",
    "transformers",
    "onnx",
    "safetensors",
    "huggingface_hub",
    "pillow",
    "psutil",
    "click",
    "diffusers",
    "pydantic",
)
ABSENT = {"rich", "polygraphy", "peft", "scipy", "onnxscript", "onnxruntime", "datasets", "pytest"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def packages_with_needs(roots: tuple[str, ...]) -> dict[str, metadata.Distribution]:
    """Returns the installed distributions that `roots` need, with the roots, without those in `ABSENT`."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [normal(root) for root in roots]
    while waiting:
        name = waiting.pop()
        if name in found or name in ABSENT:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        needs = [Requirement(text) for text in found[name].requires or []]
        waiting += [normal(need.name) for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def few_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages of a rented machine: links to the needed ones, and nothing else."""
    folder = tmp_path_factory.mktemp("packages")
    for distribution in packages_with_needs(NEEDED).values():
        for file in distribution.files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return folder


def run_script(output: Path, packages: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run bench/gpu.py with these packages alone; `-S` hides the installed ones."""
    command = [
        sys.executable,
        "-S",
        str(ROOT / "bench/gpu.py"),
        "--device",
        "cpu",
        "--smoke",
        "-o",
        str(output),
        *options,
    ]
    # One thread: on a busy machine, several wait for each other so long that the time limit passes.
    environment = os.environ | {"PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=output.parent, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def check_rows(found: dict[str, Any]) -> None:
    """Every part has ended with rows; none failed; every figure is finite and every error below its limit."""
    for number, part in found["parts"].items():
        assert part["state"] == "ended", (number, part)
        assert [row for row in found["rows"] if row["part"] == int(number)], number
    for row in found["rows"]:
        assert "failed" not in row, row
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float)), row
        if "relative_l2" in row:
            assert row["relative_l2"] <= row["limit_relative_l2"], row
        if "skipped" not in row:
            assert not row.get("cuda_graph"), row


@pytest.fixture(scope="module")
def quick(
    few_packages: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Parts 0 to 2, small, on a CPU."""
    folder = tmp_path_factory.mktemp("quick") / "gpu"
    return run_script(folder, few_packages, "--parts", "0-2"), folder


def test_the_first_parts_run_from_a_checkout_with_few_packages(
    quick: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    done, folder = quick
    assert done.returncode == 0, done.stdout + done.stderr
    found = read(folder)
    assert list(found["parts"]) == ["0", "1", "2"]
    check_rows(found)
    rows = {(row["part"], row["row"]): row for row in found["rows"]}
    assert rows[0, "package onnxscript"]["skipped"] == "not installed"
    assert rows[1, "fp32"]["matmul_tflops"] > 0
    assert rows[1, "bf16"]["copy_gb_per_s"] > 0
    assert rows[2, "shared memory grows and moves"]["relative_l2"] < 1e-5


def test_a_line_is_printed_for_each_row_and_the_last_is_json(
    quick: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    done, folder = quick
    lines = done.stdout.splitlines()
    last = json.loads(lines[-1])
    rows = read(folder)["rows"]
    assert last["rows"] == len(rows)
    assert last["parts"] == {"0": "ended", "1": "ended", "2": "ended"}
    assert sum(re.match(r"\d+ .+: ", line) is not None for line in lines) == len(rows)


@pytest.fixture(scope="module")
def smoke(few_packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole smoke run."""
    folder = tmp_path_factory.mktemp("smoke") / "gpu"
    done = run_script(folder, few_packages)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.alone
def test_every_part_runs_small_on_a_cpu(smoke: Path) -> None:
    found = read(smoke)
    assert list(found["parts"]) == [str(part.number) for part in PARTS if not part.on_request]
    check_rows(found)
    rows = {(row["part"], row["row"]): row for row in found["rows"]}
    for model in ("sd15", "bk-tiny", "bk-small", "bk-base"):
        for variant in ("eager", "channels_last"):
            row = rows[3, f"{model} b2 {variant}"]
            assert row["step_low_ms"] <= row["step_ms"] <= row["step_high_ms"]
            assert 0 < row["share_of_peak"] < 2
            assert row["relative_l2"] > 0
        assert rows[3, f"{model} b2 eager graph"]["skipped"] == "needs CUDA graphs"
    assert rows[3, "bk-tiny b2 eager"]["step_ms"] < rows[3, "sd15 b2 eager"]["step_ms"]
    for name in ("compile", "AOTInductor"):
        assert rows[4, f"one-level b2 {name}"]["compile_s"] > 0
    few = "bk-tiny 4 steps small decoder"
    for name in ("sd15 eager", "bk-tiny best", "bk-tiny eager", f"{few} best", f"{few} eager"):
        row = rows[5, name]
        parts = [row["unet_ms"], row["text_encoder_ms"], row["vae_ms"]]
        assert min(parts) > 0
        assert row["picture_ms"] > sum(parts)
        assert row["unet_calls"] == 2
    assert rows[5, "bk-tiny best"]["relative_l2"] < 0.5
    assert rows[6, "public manner"]["samples_per_s"] > 0
    assert found["headline"].keys() >= {"unet_step_speedup", "picture_speedup", "few_step_speedup", "training_speedup"}


@pytest.mark.slow
@pytest.mark.alone
def test_the_readme_gets_a_table_of_a_result_file(smoke: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = load_script(ROOT / "tools/results_to_readme.py")
    monkeypatch.setattr(tool, "RESULTS", tmp_path)
    found = read(smoke)
    (tmp_path / "gpu-none.json").write_text(json.dumps(found))
    table = tool.gpu()
    assert table.splitlines()[0].startswith(f"{found['environment']['cpu']}, no GPU, torch ")
    line = next(line for line in table.splitlines() if line.startswith("| bk-tiny | 2 |"))
    assert f"| {found['headline']['unet_step_speedup']:.2f}× |" in line
    assert "Training samples a second: public manner " in table
    assert table.count("\n| ") == 1 + 5, "the head, and one row a model"


@pytest.mark.slow
def test_an_exported_unet_is_measured_on_onnx_runtime(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "bench/gpu.py"),
        "--device",
        "cpu",
        "--smoke",
        "--parts",
        "8",
        "-o",
        str(tmp_path),
    ]
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=300, check=True)
    rows = {row["row"]: row for row in read(tmp_path)["rows"]}
    row = rows["bk-tiny b2 onnxruntime"]
    assert "failed" not in row, row
    assert row["step_ms"] > 0
    assert row["relative_l2"] <= row["limit_relative_l2"]


@pytest.mark.slow
def test_all_of_nano_is_trained_part_by_part(few_packages: Path, tmp_path: Path) -> None:
    done = run_script(tmp_path / "gpu", few_packages, "--parts", "nano", "--minutes", "4.7")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["row"]: row for row in read(tmp_path / "gpu")["rows"]}
    assert not [row for row in rows.values() if "failed" in row], rows
    assert set(rows) == {"VAE", "text encoder", "UNet", "judge"}
    assert [row["step"] for row in rows.values()] == [10, 10, 10, 10]
    assert rows["VAE"]["psnr_heldout"] > 5
    assert {"vae.pt", "unet.pt", "clip-teacher", "clip-metric"} <= {
        path.name for path in (tmp_path / "gpu/nano").iterdir()
    }


def test_the_readme_has_no_figure_of_a_gpu_where_no_file_has_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = load_script(ROOT / "tools/results_to_readme.py")
    monkeypatch.setattr(tool, "RESULTS", tmp_path)
    assert tool.gpu() == "`bench/gpu.py` has not been run yet, so there are no GPU figures here.\n"


@pytest.mark.parametrize(
    ("text", "numbers"), [("3,4", [3, 4]), ("0-2", [0, 1, 2]), ("7,0-1,1", [0, 1, 7]), ("nano,0", [0, 9])]
)
def test_parts_are_read_as_numbers_and_ranges(text: str, numbers: list[int]) -> None:
    assert load_script(ROOT / "bench/gpu.py").parse_parts(text) == numbers


@pytest.mark.parametrize(
    ("options", "reason"), [(["--device", "cpu"], "needs --smoke"), (["--parts", "x"], "expected numbers")]
)
def test_usage_errors_say_what_is_expected(
    options: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    with pytest.raises(SystemExit, match="2"):
        load_script(ROOT / "bench/gpu.py").main()
    assert reason in capsys.readouterr().err
