"""The program of `bench/gpu.py`: a part that fails, hangs or dies costs no other part anything."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sdcompress_bench import isolated
from sdcompress_bench.gpu.child import describe
from sdcompress_bench.gpu.program import PARTS, RESERVE_S, Part, Program, cap_seconds
from sdcompress_bench.gpu.results import ResultFile
from sdcompress_engines.errors import UsageError

from .gpu_script import read

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


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    """Start the fork server, whose imports would take the time of the first program."""
    isolated.call(describe, {"device": "cpu"}, 120)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Program]:
    """Creates a program of functions of `INJECTED`: (name, cap_s, kept_s)."""
    (tmp_path / "injected_parts.py").write_text(INJECTED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sdcompress_bench.gpu.program.LEAST_S", 1.0)

    def make(*functions: tuple[Any, ...], minutes: float = 5, smoke: bool = True) -> Program:
        parts = [Part(i, name, f"injected_parts:{name}", *limits) for i, (name, *limits) in enumerate(functions)]
        return Program(tmp_path / "out", "cpu", smoke, minutes, parts=parts, show=print)

    return make


def test_a_part_that_raises_hangs_or_dies_costs_only_itself(
    program: Callable[..., Program], capsys: pytest.CaptureFixture[str]
) -> None:
    run = program(("raises", 30), ("hangs", 4), ("dies", 30), ("good", 30))
    began = time.monotonic()
    assert not run.run()
    assert time.monotonic() - began < 60, "a hang of 60 s was cut"
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


def test_a_finished_part_is_not_repeated_and_a_cut_one_continues_where_it_was(program: Callable[..., Program]) -> None:
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


def test_no_part_begins_when_the_minutes_are_over(program: Callable[..., Program]) -> None:
    run = program(("hangs", 30), ("good", 30), minutes=0.3)
    began = time.monotonic()
    assert not run.run()
    assert time.monotonic() - began < 40
    parts = read(run.results.folder)["parts"]
    assert parts["0"]["state"] == "cut"
    assert parts["1"]["state"] == "not begun"
    assert "0 s were left of 0.3 minutes" in parts["1"]["reason"]


def test_a_part_that_hangs_leaves_later_parts_the_time_kept_for_them(program: Callable[..., Program]) -> None:
    run = program(("hangs", 60), ("good", 30, 16), minutes=0.5)
    assert not run.run()
    parts = read(run.results.folder)["parts"]
    assert parts["0"]["state"] == "cut"
    assert parts["0"]["cap_s"] < 11  # of 30 s, less the reserve and the 16 s
    assert parts["1"]["state"] == "ended"


def test_all_parts_begin_within_nine_minutes_if_each_takes_its_cap() -> None:
    left = 9 * 60 - RESERVE_S
    usual = [part for part in PARTS if not part.on_request]
    for index, part in enumerate(usual[:-1]):  # the last takes what is left
        cap_s = cap_seconds(part, usual[index + 1 :], left)
        assert cap_s >= max(30, part.kept_s)
        left -= cap_s


def test_a_folder_of_other_settings_is_refused(program: Callable[..., Program]) -> None:
    program(("good", 30)).run()
    with pytest.raises(UsageError, match=r"has results of .*another -o"):
        program(("good", 30), smoke=False)


def test_a_line_cut_by_a_kill_is_left_out_and_does_not_damage_the_next(tmp_path: Path) -> None:
    settings = {"device": "cpu", "smoke": True}
    first = ResultFile(tmp_path, settings)
    first.add({"part": 3, "row": "whole", "step_ms": 1.0})
    with first.rows_path.open("a") as file:
        file.write('{"part": 3, "row": "cut", "st')
    first.write()
    again = ResultFile(tmp_path, settings)
    again.add({"part": 3, "row": "next", "step_ms": 2.0})
    assert [row["row"] for row in again.read_new()] == ["whole", "next"]
