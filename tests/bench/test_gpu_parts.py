"""The parts of `bench/gpu.py`: headline, timing, tests as rows, and checks over the stand-in engine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sdcompress_bench.gpu import part_execution, part_tests
from sdcompress_bench.gpu.child import PartRun
from sdcompress_bench.gpu.part_picture import best_variant
from sdcompress_bench.gpu.results import best_step, format_row, headline
from sdcompress_bench.gpu.timing import time_call

from ..engines.fake_cuda import FakeCuda, fake_cuda  # noqa: F401 (a fixture)

CPU = torch.device("cpu")


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


def test_a_call_is_timed_with_its_true_duration() -> None:
    found = time_call(lambda: time.sleep(0.004), CPU, budget_s=0.3)
    assert 4.0 <= found["step_ms"] < 40.0
    assert 4.0 <= found["host_ms"] < 40.0
    assert found["blocks"] >= 7
    assert found["step_low_ms"] <= found["step_ms"] <= found["step_high_ms"]


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
def test_the_promises_of_part_2_hold_over_stand_ins_of_streams_and_graphs(
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
def test_the_imports_of_the_fork_server_do_not_start_cuda(prepare: str, started: bool) -> None:
    """torch's own functions pretend that there is a card. If CUDA starts, a forked process cannot use it."""
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
