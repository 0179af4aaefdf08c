"""`bench/gpu.py` runs every part from a checkout with few packages, and what one part does costs no other part
anything.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from sdcompress_bench.gpu import part_execution, part_tests
from sdcompress_bench.gpu.child import PartRun
from sdcompress_bench.gpu.part_picture import best_variant
from sdcompress_bench.gpu.program import PARTS, RESERVE_S, Part, Program, cap_seconds
from sdcompress_bench.gpu.results import ResultFile, best_step, format_row, headline
from sdcompress_bench.gpu.timing import time_call
from sdcompress_engines.errors import UsageError

from ..engines.fake_cuda import FakeCuda, fake_cuda  # noqa: F401 (a fixture)

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
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


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def packages_with_needs(roots: tuple[str, ...]) -> dict[str, metadata.Distribution]:
    """Returns the installed distributions that `roots` need, themselves included, without those that are to be absent."""
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
    """A folder with what a rented machine has: links to the needed packages, and nothing else."""
    folder = tmp_path_factory.mktemp("packages")
    for distribution in packages_with_needs(NEEDED).values():
        for file in distribution.files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return folder


def run_script(output: Path, packages: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run bench/gpu.py with these packages alone: `-S` leaves out what is installed."""
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
    environment = os.environ | {"PYTHONPATH": str(packages)}
    return subprocess.run(
        command, cwd=output.parent, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    return found


def check_rows(found: dict[str, Any]) -> None:
    """Every part has ended with rows; none failed; every figure is finite and every error below its limit."""
    for number, part in found["parts"].items():
        assert part["state"] == "ended", (number, part)
        assert [row for row in found["rows"] if row["part"] == int(number)], number
    for row in found["rows"]:
        assert "failed" not in row, row
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float)), row
        assert "relative_l2" not in row or row["relative_l2"] <= row["limit_relative_l2"], row
        assert "skipped" in row or not row.get("cuda_graph"), row


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
    began = time.monotonic()
    done = run_script(folder, few_packages)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < 180
    return folder


@pytest.mark.slow
def test_every_part_runs_small_on_a_cpu_in_under_three_minutes(smoke: Path) -> None:
    found = read(smoke)
    assert list(found["parts"]) == [str(part.number) for part in PARTS]
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
    for name in ("sd15 eager", "bk-tiny best", "bk-tiny eager"):
        row = rows[5, name]
        assert row["picture_ms"] > row["unet_ms"] + row["vae_ms"] > 0
        assert row["unet_calls"] >= 3
    assert rows[5, "bk-tiny best"]["relative_l2"] < 0.5
    assert rows[6, "public manner"]["samples_per_s"] > 0
    assert found["headline"].keys() >= {"unet_step_speedup", "picture_speedup", "training_speedup"}


@pytest.mark.slow
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


def test_the_readme_has_no_figure_of_a_gpu_where_no_file_has_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = load_script(ROOT / "tools/results_to_readme.py")
    monkeypatch.setattr(tool, "RESULTS", tmp_path)
    assert tool.gpu() == "It has not been run yet, so there is no GPU figure here.\n"


# What the program promises whatever its parts do.

INJECTED = """
import os, signal, time

def good(run):
    run.measure("one", lambda: {"value": run.facts is not None})
    run.measure("two", lambda: {"step_ms": float(len(run.earlier))})

def count(run):
    for name in ("a", "b"):
        run.measure(name, lambda: {"value": _count(run, name)})

def _count(run, name):
    with (run.folder / f"count-{name}").open("a") as file:
        file.write("x")
    if name == "b" and (run.folder / "wait").exists():
        time.sleep(60)
    return len((run.folder / f"count-{name}").read_text())

def raises(run):
    run.row("before", value=1)
    raise KeyError("a fault outside of a row")

def fails(run):
    run.measure("bad", lambda: 1 / 0)
    run.measure("worse", lambda: {"step_ms": float("nan")})
    run.measure("good", lambda: {"value": 1})

def hangs(run):
    run.row("before", value=1)
    run.measure("slow", lambda: time.sleep(60))

def dies(run):
    run.measure("first", lambda: {"value": 1})
    run.measure("deadly", lambda: os.kill(os.getpid(), signal.SIGKILL))
    run.measure("last", lambda: {"value": 3})
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Program]:
    """Makes a program of functions of `INJECTED`: (function, its cap and what is kept for it, in seconds)."""
    (tmp_path / "injected_parts.py").write_text(INJECTED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sdcompress_bench.gpu.program.LEAST_S", 1.0)

    def make(*functions: tuple[Any, ...], minutes: float = 5, smoke: bool = True) -> Program:
        parts = [Part(i, name, f"injected_parts:{name}", *limits) for i, (name, *limits) in enumerate(functions)]
        return Program(tmp_path / "out", "cpu", smoke, minutes, parts=parts, say=print)

    return make


def test_a_part_that_raises_hangs_or_dies_costs_only_itself(
    program: Callable[..., Program], capsys: pytest.CaptureFixture[str]
) -> None:
    run = program(("raises", 30), ("hangs", 4), ("dies", 30), ("good", 30))
    began = time.monotonic()
    assert not run.run()
    assert time.monotonic() - began < 40
    found = read(run.results.folder)
    parts, rows = found["parts"], {(row["part"], row["row"]): row for row in found["rows"]}
    assert [parts[number]["state"] for number in "0123"] == ["failed", "cut", "ended", "ended"]
    assert "KeyError: 'a fault outside of a row'" in parts["0"]["reason"]
    assert parts["1"]["reason"] == "over its cap in row 'slow'"
    assert rows[0, "before"]["value"] == rows[1, "before"]["value"] == 1, "what was flushed before is kept"
    assert "SIGKILL" in rows[2, "deadly"]["failed"]
    assert rows[2, "last"]["value"] == 3, "behind the row that killed it, the part goes on"
    assert rows[3, "one"]["value"] is True
    assert "3 one: True" in capsys.readouterr().out


def test_a_row_that_fails_costs_only_itself_and_is_a_result(program: Callable[..., Program]) -> None:
    run = program(("fails", 30))
    assert run.run(), "a part with failed rows has ended"
    rows = {row["row"]: row for row in read(run.results.folder)["rows"]}
    assert rows["bad"]["failed"] == "ZeroDivisionError: division by zero"
    assert rows["worse"]["failed"] == "step_ms is nan"
    assert rows["worse"]["step_ms"] is None
    assert rows["good"]["value"] == 1
    assert "Traceback" in (run.results.folder / "gpu.log").read_text()


def test_a_finished_part_is_not_repeated_and_a_cut_one_goes_on_where_it_was(program: Callable[..., Program]) -> None:
    parts = (("good", 30), ("count", 4))
    run = program(*parts)
    folder = run.results.folder
    (folder / "wait").touch()
    assert not run.run()
    before = read(folder)
    assert before["parts"]["1"]["state"] == "cut"
    (folder / "wait").unlink()
    assert program(*parts).run()
    found = read(folder)
    rows = {(row["part"], row["row"]): row for row in found["rows"]}
    assert rows[0, "one"] == before["rows"][0]
    assert found["parts"]["0"] == before["parts"]["0"]
    assert rows[1, "a"]["value"] == 1, "measured once"
    assert rows[1, "b"]["value"] == 2
    assert program(*parts).run([1], again=True)
    again = {(row["part"], row["row"]): row for row in read(folder)["rows"]}
    assert again[1, "a"]["value"] == 2
    assert again[0, "one"] == rows[0, "one"]


def test_parts_are_chosen_by_number_and_an_unknown_one_is_refused(program: Callable[..., Program]) -> None:
    run = program(("raises", 30), ("good", 30))
    assert run.run([1])
    assert list(read(run.results.folder)["parts"]) == ["1"]
    with pytest.raises(UsageError, match="no part 7; expected 0 to 1"):
        run.run([7])


def test_nothing_is_begun_when_the_minutes_are_over(program: Callable[..., Program]) -> None:
    run = program(("hangs", 30), ("good", 30), minutes=0.15)
    began = time.monotonic()
    assert not run.run()
    assert time.monotonic() - began < 20
    parts = read(run.results.folder)["parts"]
    assert parts["0"]["state"] == "cut"
    assert parts["1"]["state"] == "not begun"
    assert "0 s were left of 0.15 minutes" in parts["1"]["reason"]


def test_a_part_that_hangs_leaves_the_later_ones_what_is_kept_for_them(program: Callable[..., Program]) -> None:
    run = program(("hangs", 60), ("good", 30, 20), minutes=0.5)
    assert not run.run()
    parts = read(run.results.folder)["parts"]
    assert parts["0"]["state"] == "cut"
    assert parts["0"]["cap_s"] < 7  # of 30 s, less the reserve and the 20 s
    assert parts["1"]["state"] == "ended"


def test_the_parts_of_nine_minutes_all_begin_where_each_takes_its_cap() -> None:
    left = 9 * 60 - RESERVE_S
    for index, part in enumerate(PARTS[:-1]):  # the last takes what is left
        cap_s = cap_seconds(part, PARTS[index + 1 :], left)
        assert cap_s >= max(30, part.kept_s)
        left -= cap_s


def test_a_folder_of_other_settings_is_refused(program: Callable[..., Program]) -> None:
    program(("good", 30)).run()
    with pytest.raises(UsageError, match=r"has results of .*another -o"):
        program(("good", 30), smoke=False)


def test_a_line_cut_by_a_kill_is_left_out_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    settings = {"device": "cpu", "smoke": True}
    first = ResultFile(tmp_path, settings)
    first.add({"part": 3, "row": "whole", "step_ms": 1.0})
    with first.rows_path.open("a") as file:
        file.write('{"part": 3, "row": "cut", "st')
    first.write()
    again = ResultFile(tmp_path, settings)
    again.add({"part": 3, "row": "next", "step_ms": 2.0})
    assert [row["row"] for row in again.read_new()] == ["whole", "next"]


def test_the_headline_compares_the_teacher_in_eager_mode_with_the_students_best() -> None:
    def step(part: int, model: str, name: str, ms: float, **more: Any) -> dict[str, Any]:
        return {
            "part": part,
            "row": f"{model} b2 {name}",
            "model": model,
            "batch": 2,
            "step_ms": ms,
            "share_of_peak": 0.5,
        } | more

    rows = [
        step(3, "sd15", "eager", 20.0),
        step(3, "bk-tiny", "eager", 12.0, mode="eager", cuda_graph=False),
        step(4, "bk-tiny", "compile graph", 4.0, mode="compile", cuda_graph=True),
        step(4, "bk-tiny", "AOTInductor", 1.0, failed="off by 1"),
        {"part": 6, "row": "public manner", "samples_per_s": 10.0},
        {"part": 6, "row": "sdcompress", "samples_per_s": 25.0, "share_of_peak": 0.3},
        {"part": 6, "row": "sdcompress compile", "samples_per_s": 40.0, "share_of_peak": 0.4},
    ]
    assert headline(rows) == {
        "unet_step_speedup": 5.0,
        "unet_step_row": "bk-tiny b2 compile graph",
        "unet_step_share_of_peak": 0.5,
        "training_speedup": 4.0,
        "training_share_of_peak": 0.4,
    }
    assert best_step(rows, "bk-base", 2) is None
    assert format_row(rows[3]) == "4 bk-tiny b2 AOTInductor: 1.00 ms, 50.0% of peak, FAILED off by 1"
    argument = {
        "part": 5,
        "smoke": True,
        "device": "cpu",
        "folder": ".",
        "scratch": ".",
        "facts": {},
        "rows": rows,
        "done": [],
        "deadline": 0.0,
    }
    assert best_variant(PartRun(argument)).name == "compile graph"


def test_a_call_is_timed_as_long_as_it_takes() -> None:
    found = time_call(lambda: time.sleep(0.004), CPU, budget_s=0.3)
    assert 4.0 <= found["step_ms"] < 8.0
    assert 4.0 <= found["host_ms"] < 8.0
    assert found["blocks"] >= 7
    assert found["step_low_ms"] <= found["step_ms"] <= found["step_high_ms"]


@pytest.mark.parametrize(("text", "numbers"), [("3,4", [3, 4]), ("0-2", [0, 1, 2]), ("7,0-1,1", [0, 1, 7])])
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


PASSING = """
import pytest
@pytest.mark.gpu
def test_passes(): pass
@pytest.mark.gpu
def test_fails(): assert 1 == 2
@pytest.mark.gpu
@pytest.mark.skip(reason="not here")
def test_is_skipped(): pass
def test_needs_no_gpu(): assert False
"""


def test_gpu_tests_are_rows_with_their_reasons_and_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_some.py").write_text(PASSING)
    (tmp_path / "tests/test_broken.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -ra\nmarkers = gpu\n")
    monkeypatch.setattr(part_tests, "ROOT", tmp_path)
    argument = {
        "part": 7,
        "smoke": False,
        "device": "cpu",
        "folder": str(tmp_path),
        "scratch": ".",
        "facts": {},
        "rows": [],
        "done": [],
        "deadline": time.time() + 60,
    }
    run = PartRun(argument)
    part_tests.tests(run)
    rows = {row["row"]: row for row in run.earlier}
    assert "assert 1 == 2" in rows["tests/test_some.py::test_fails"]["failed"]
    assert "failed" not in rows["tests/test_some.py::test_passes"]
    assert "a_package_that_is_not_there" in rows["tests/test_broken.py"]["failed"]
    counts = rows["pytest -m gpu"]
    assert (counts["passed"], counts["not_passed"], counts["skipped_tests"]) == (1, 2, 1)


@pytest.mark.parametrize(
    "promise",
    [
        part_execution.replay,
        part_execution.move,
        part_execution.reserve,
        part_execution.take_turns,
        part_execution.evict,
        part_execution.fail_in_capture,
    ],
    ids=lambda promise: promise.__name__,
)
def test_what_part_2_checks_holds_over_stand_ins_of_streams_and_graphs(
    promise: Callable[[torch.device], dict[str, Any]],
    fake_cuda: FakeCuda,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        torch.cuda, "ExternalStream", lambda handle, _device: fake_cuda.stream_of(handle), raising=False
    )
    monkeypatch.setattr(part_execution, "_gives_memory_back", lambda _: True)
    assert part_execution.judged(promise(CPU))["relative_l2"] < 1e-5
    assert len(fake_cuda.graphs) >= 1


SPY = """
import torch
started = []
torch.cuda._is_compiled = lambda: True
torch.cuda._device_count_nvml = lambda: 1
torch._C._cuda_getCurrentRawStream = None
torch._C._cuda_getDeviceCount = lambda: started.append(1) or 1
torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")
torch.accelerator.is_available = lambda: torch.cuda.is_available()
from sdcompress_bench import isolated
{prepare}
import sdcompress_bench.preload
print("started", len(started))
"""


@pytest.mark.parametrize(("prepare", "started"), [("isolated._context(True)", False), ("", True)])
def test_what_the_fork_server_imports_does_not_start_cuda(prepare: str, started: bool) -> None:
    """On a machine with a card, as far as torch's own functions show it; a forked process could not use CUDA otherwise."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTORCH_NVML_BASED_CUDA_CHECK"}
    done = subprocess.run(
        [sys.executable, "-c", SPY.format(prepare=prepare)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout.split()[-1] != "0") == started
