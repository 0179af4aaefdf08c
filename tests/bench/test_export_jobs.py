"""Exports side by side: each is done once, takes over what is there, and an error is the error of the export."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from sdcompress_bench import export_jobs
from sdcompress_bench.export_jobs import ExportJob, count_workers, run_exports
from sdcompress_engines.errors import ExportError, GateFailed

WORKER = """
import json, os, time
from pathlib import Path
from sdcompress_engines.child_process import receive_message, send_event
from sdcompress_engines.leftovers import temporary_path

while (job := receive_message()) is not None:
    folder = Path(job["folder"])
    partial = temporary_path(folder)
    partial.mkdir()
    if job["model"] == "dies":
        os._exit(7)
    if job["model"] == "fails":
        time.sleep(1)
        send_event(error="GateFailed", reason={"what": "too far", "where": None, "expected": "less", "hint": "this"})
        continue
    time.sleep(60 if job["model"] == "long" else 0.3)
    partial.rename(folder)
    (folder / "job.json").write_text(json.dumps(job | {"process": os.getpid()}))
    send_event(done=True)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to export to, with a worker that only notes its jobs."""
    (tmp_path / "worker_for_tests.py").write_text(WORKER)
    monkeypatch.setattr(export_jobs, "_MODULE", "worker_for_tests")
    monkeypatch.setattr(export_jobs, "_ROOTS", (tmp_path, *export_jobs._ROOTS))
    return tmp_path


def jobs(folder: Path, *models: str) -> list[ExportJob]:
    return [ExportJob(model, "fp32", folder / f"{i}-{model}", {"pipeline": "0" * 64}) for i, model in enumerate(models)]


def run(todo: Sequence[ExportJob], workers: int, **reuse: Path) -> list[Path]:
    done: list[Path] = []
    run_exports(todo, workers, reuse, lambda job: done.append(job.folder))
    return done


def test_every_export_is_done_once_by_as_many_processes_as_there_are_workers(folder: Path) -> None:
    todo = jobs(folder, *"abcdef")
    assert sorted(run(todo, 2)) == sorted(job.folder for job in todo)
    notes = [json.loads((job.folder / "job.json").read_text()) for job in todo]
    assert len({note["process"] for note in notes}) == 2


def test_later_exports_take_over_from_the_first_that_is_finished_in_their_precision(folder: Path) -> None:
    first, second, half = (*jobs(folder, "a", "b"), ExportJob("c", "fp16", folder / "c", {}))
    run([first, second, half], 1, fp16=folder / "there")
    reuse = [json.loads((job.folder / "job.json").read_text())["reuse"] for job in (first, second, half)]
    assert reuse == [None, str(first.folder), str(folder / "there")]


def test_the_error_of_an_export_is_raised_and_ends_the_others_which_leave_nothing(folder: Path) -> None:
    started = time.monotonic()
    with pytest.raises(GateFailed, match=r"too far; expected less\. Try: this") as failure:
        run(jobs(folder, "long", "fails"), 2)
    assert failure.value.exit_code == 3
    assert time.monotonic() - started < 30
    assert sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__") == []


def test_a_process_that_dies_is_an_error_that_says_so(folder: Path) -> None:
    with pytest.raises(ExportError, match="ended early: its process ended with status 7"):
        run(jobs(folder, "dies"), 1)


@pytest.mark.parametrize(
    ("jobs", "cores", "gib", "parameters", "workers"),
    [(5, 2, 24, 5_000_000, 2), (1, 2, 24, 5_000_000, 1), (5, 16, 24, 1_000_000_000, 1), (5, 16, 64, 1_000_000_000, 2)],
)
def test_large_models_are_exported_side_by_side_only_where_memory_allows(
    monkeypatch: pytest.MonkeyPatch, jobs: int, cores: int, gib: int, parameters: int, workers: int
) -> None:
    monkeypatch.setattr(export_jobs.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(export_jobs, "available_memory_bytes", lambda: gib * 2**30)
    assert count_workers(jobs, parameters) == workers
