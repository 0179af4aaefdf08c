"""A job in a process of its own: events arrive, the rest of the output is kept, and every end is explained."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from sdcompress_engines.child_process import ChildProcess, Ending, describe_exit, explain_exit, run_job

CHILD = """
import os, subprocess, sys, time
from sdcompress_engines.child_process import ignore_interrupts, receive_message, send_event

job = receive_message()
print("native code prints this", flush=True)
send_event(started=os.getpid())
{body}
"""


def write_child(folder: Path, body: str) -> None:
    (folder / "child_for_tests.py").write_text(CHILD.format(body=body))


def run(place: Path, body: str, job: dict[str, Any] | None = None, **options: Any) -> tuple[list[Any], Ending]:
    """Returns the events of a child with this body, and its end."""
    write_child(place, body)
    events: list[Any] = []
    paths = (place, Path(sys.modules["sdcompress_engines"].__file__ or "").parents[1])
    ending = run_job("child_for_tests", job or {}, events.append, paths=paths, **options)
    return [event for event in events if "started" not in event], ending


def test_a_job_goes_in_and_events_come_out_among_other_output(tmp_path: Path) -> None:
    events, ending = run(
        tmp_path, "send_event(half=job['number'] / 2); print('more'); send_event(done=True)", {"number": 3}
    )
    assert events == [{"half": 1.5}, {"done": True}]
    assert (ending.status, ending.timed_out) == (0, False)
    assert ending.output == ["native code prints this", "more"]


def test_the_environment_and_folder_reach_the_child(tmp_path: Path) -> None:
    events, _ = run(
        tmp_path,
        "send_event(value=os.environ['SDCOMPRESS_TEST'], folder=os.getcwd())",
        environment={"SDCOMPRESS_TEST": "7"},
        folder=tmp_path,
    )
    assert events == [{"value": "7", "folder": str(tmp_path)}]


def test_the_reason_of_a_failed_process_is_the_last_line_of_its_stderr(tmp_path: Path) -> None:
    _, ending = run(tmp_path, "print('printed before'); raise ValueError('no such driver')")
    assert explain_exit(ending.status, ending.output) == "its process ended with status 1: ValueError: no such driver"


@pytest.mark.skipif(sys.platform == "win32", reason="no signals there")
def test_a_killed_process_is_described_by_its_signal(tmp_path: Path) -> None:
    _, ending = run(tmp_path, "os.kill(os.getpid(), 9)")
    assert ending.status == -9
    assert describe_exit(-9, "the build process") == "the build process was ended by SIGKILL, as when memory runs out"
    assert explain_exit(-11, ["noise"]) == "its process was ended by SIGSEGV"
    assert describe_exit(-200) == "its process was ended by signal 200"


def test_an_event_that_is_cut_is_ordinary_output(tmp_path: Path) -> None:
    events, ending = run(tmp_path, "print('sdcompress:[1')")
    assert events == []
    assert ending.output[-1] == "sdcompress:[1"


def test_a_job_over_its_time_is_ended_with_all_that_it_has_started(tmp_path: Path) -> None:
    body = (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "send_event(grandchild=child.pid)\ntime.sleep(60)"
    )
    started = time.monotonic()
    events, ending = run(tmp_path, body, timeout_s=3)
    assert ending.timed_out
    assert time.monotonic() - started < 30
    assert not is_running(events[0]["grandchild"])


def test_an_exception_in_the_parent_ends_the_child(tmp_path: Path) -> None:
    write_child(tmp_path, "time.sleep(60)")
    seen: list[int] = []

    def stop(event: dict[str, Any]) -> None:
        seen.append(event["started"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job("child_for_tests", {}, stop, paths=(tmp_path, *map(Path, sys.path)))
    assert not is_running(seen[0])


def test_messages_go_back_and_forth_and_end_with_the_parent(tmp_path: Path) -> None:
    write_child(tmp_path, "while (message := receive_message()) is not None: send_event(twice=2 * message['number'])")
    with ChildProcess("child_for_tests", paths=(tmp_path, *map(Path, sys.path))) as child:
        child.send({})
        assert "started" in next(child.events())
        for number in (2, 5):
            child.send({"number": number})
            assert next(child.events()) == {"twice": 2 * number}
    child.close()


def is_running(process_id: int) -> bool:
    """Returns whether a process still runs after five seconds; a zombie does not run."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            if psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:
            return False
        time.sleep(0.05)
    return True
