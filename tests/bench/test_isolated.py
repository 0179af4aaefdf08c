"""What runs in a process of its own: its answer comes back, its death is a reason, nothing of it is left, and what is
known is not run again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
    """Says how often it was called: by a file that grows."""
    with Path(case["file"]).open("a") as file:
        file.write("x")
    return {"calls": len(Path(case["file"]).read_text())}


def threads(case: dict[str, Any]) -> dict[str, Any]:
    """Whether torch computes with several threads after the fork, as in a process that was never forked."""
    import torch

    torch.set_num_threads(2)
    x = torch.randn(256, 256)
    return {"sum": float((x @ x).isfinite().all()), "threads": torch.get_num_threads()}


def test_every_call_is_a_fresh_process_and_its_words_are_not_its_answer() -> None:
    first, second = (isolated.call(double, {"number": n}, 60) for n in (2, 3))
    assert (first["twice"], second["twice"]) == (4, 6)
    assert len({first["process"], second["process"], os.getpid()}) == 3


def test_torch_computes_in_it_with_threads() -> None:
    assert isolated.call(threads, {}, 60) == {"sum": 1.0, "threads": 2}


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
def test_what_dies_is_recorded_with_its_reason(how: str, reason: str, fork: bool) -> None:
    assert reason in isolated.call(misbehave, {"how": how}, 60, fork=fork)["failed"]


@pytest.mark.parametrize("fork", [True, False], ids=["forked", "spawned"])
def test_what_hangs_is_ended_with_all_it_has_started(tmp_path: Path, fork: bool) -> None:
    limit_s = 3 if fork else 8  # a spawned one imports first
    started = time.monotonic()
    outcome = isolated.call(misbehave, {"how": "hangs", "file": str(tmp_path / "pid")}, limit_s, fork=fork)
    assert outcome == {"failed": f"took over {limit_s} s"}
    assert time.monotonic() - started < limit_s + 17
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    deadline = time.monotonic() + 5
    while state.is_file() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not state.is_file() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_a_journal_runs_nothing_twice_and_tries_failures_again(tmp_path: Path) -> None:
    path, case = tmp_path / "work" / "journal.jsonl", {"file": str(tmp_path / "calls")}
    first = Journal(path, "a")
    assert first.call("one", count, case, 60) == {"calls": 1}
    assert "failed" in first.call("two", misbehave, {"how": "status"}, 60)
    path.write_text(path.read_text() + '{"case": "cut')
    again = Journal(path, "a")
    assert again.continued
    assert again.call("one", count, case, 60) == {"calls": 1}
    assert "two" not in again.known
    left = path.parent / "picture.png"
    left.touch()
    other = Journal(path, "b")
    assert not other.continued
    assert other.call("one", count, case, 60) == {"calls": 2}
    assert not left.exists()
    assert json.loads(path.read_text().splitlines()[0]) == {"fingerprint": "b"}
