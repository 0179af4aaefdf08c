"""Calls in a process of their own: the answer comes back, a death has a reason, nothing is left, nothing runs twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from sdcompress_bench import isolated
from sdcompress_bench.journal import Journal
from sdcompress_engines.errors import ModelError


def double(case: dict[str, Any]) -> dict[str, Any]:
    print("noise on stdout")
    return {"twice": 2 * case["number"], "process": os.getpid()}


def misbehave(case: dict[str, Any]) -> dict[str, Any]:
    if case["how"] == "model error":
        raise ModelError("is no pipeline", where="somewhere")
    if case["how"] == "memory":
        raise MemoryError("no room")
    if case["how"] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if case["how"] == "status":
        os.write(2, b"CUDA error: boom\n")
        os._exit(3)
    if case["how"] == "hangs":
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as helper:
            Path(case["file"]).write_text(str(helper.pid))
            time.sleep(60)
    return {}


def count(case: dict[str, Any]) -> dict[str, Any]:
    """Returns how often it was called, from a file that grows with each call."""
    with Path(case["file"]).open("a") as file:
        file.write("x")
    return {"calls": len(Path(case["file"]).read_text())}


def use_threads(case: dict[str, Any]) -> dict[str, Any]:
    """Returns a result that torch computes with several threads after the fork."""
    import torch

    torch.set_num_threads(2)
    x = torch.randn(256, 256)
    return {"sum": float((x @ x).isfinite().all()), "threads": torch.get_num_threads()}


def test_every_call_has_a_new_process_and_its_output_is_not_its_answer() -> None:
    first, second = (isolated.call(double, {"number": n}, 60) for n in (2, 3))
    assert (first["twice"], second["twice"]) == (4, 6)
    assert len({first["process"], second["process"], os.getpid()}) == 3


def test_torch_computes_with_threads_in_the_process() -> None:
    assert isolated.call(use_threads, {}, 60) == {"sum": 1.0, "threads": 2}


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("model error", "somewhere: is no pipeline"),
        ("memory", "MemoryError: no room"),
        ("killed", "SIGKILL; out of memory is the usual cause"),
        ("status", "status 3: CUDA error: boom"),
    ],
)
@pytest.mark.parametrize("fork", [True, False], ids=["forked", "spawned"])
def test_a_process_that_dies_is_recorded_with_its_reason(how: str, reason: str, fork: bool) -> None:
    assert reason in isolated.call(misbehave, {"how": how}, 60, fork=fork)["failed"]


def runs(pid: int) -> bool:
    """Returns whether a process runs; one that has ended but was not waited for does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("fork", [True, False], ids=["forked", "spawned"])
def test_a_process_that_hangs_is_ended_with_its_descendants(tmp_path: Path, fork: bool) -> None:
    limit_s = 6 if fork else 15  # a spawned process imports first
    started = time.monotonic()
    outcome = isolated.call(misbehave, {"how": "hangs", "file": str(tmp_path / "pid")}, limit_s, fork=fork)
    assert outcome == {"failed": f"took over {limit_s} s"}
    assert time.monotonic() - started < limit_s + 17
    helper = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while runs(helper) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(helper)


def test_a_process_that_begins_after_its_caller_was_stopped_does_nothing(tmp_path: Path) -> None:
    code = f"from sdcompress_bench.isolated import _run; _run(print, {{}}, {str(tmp_path / 'removed')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout + done.stderr == b""


def test_a_journal_runs_no_case_twice_but_tries_failures_again(tmp_path: Path) -> None:
    path, case = tmp_path / "work" / "journal.jsonl", {"file": str(tmp_path / "calls")}
    first = Journal(path, "a")
    assert first.call("one", count, case, 60) == {"calls": 1}
    assert "failed" in first.call("two", misbehave, {"how": "status"}, 60)
    path.write_text(path.read_text() + '{"case": "cut')
    again = Journal(path, "a")
    assert again.continued
    assert again.call("one", count, case, 60) == {"calls": 1}
    assert "two" not in again.known
    assert again.call("three", count, case, 60) == {"calls": 2}
    assert Journal(path, "a").known.keys() == {"one", "three"}, "the line after a cut one is kept"
    left = path.parent / "picture.png"
    left.touch()
    other = Journal(path, "b")
    assert not other.continued
    assert other.call("one", count, case, 60) == {"calls": 3}
    assert not left.exists()
    assert json.loads(path.read_text().splitlines()[0]) == {"fingerprint": "b"}
