"""Idle threads sleep where other work keeps the cores busy, and only there; a person's own setting stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import psutil
import pytest
from sdcompress_engines.runners import OnnxRuntimeRunner
from sdcompress_engines.thread_waiting import (
    BUSY_PERCENT,
    COUNT,
    VARIABLE,
    choose_waiting,
    fair_threads,
    idle_threads_sleep,
)


@pytest.mark.parametrize(
    ("percent", "own", "expected"),
    [(BUSY_PERCENT, None, "PASSIVE"), (BUSY_PERCENT - 1, None, None), (100.0, "ACTIVE", "ACTIVE")],
)
def test_threads_sleep_on_a_busy_machine_unless_a_person_chose(
    percent: float, own: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: percent)  # stand-in for other work
    environment = {} if own is None else {VARIABLE: own}
    monkeypatch.setattr("os.environ", environment)
    choose_waiting()
    assert environment.get(VARIABLE) == expected
    assert (COUNT in environment) == (expected == "PASSIVE")


@pytest.mark.parametrize(
    ("cores", "percent", "threads"), [(2, 100, 1), (2, 50, 1), (16, 100, 8), (16, 50, 12), (1, 100, 1)]
)
def test_on_a_busy_machine_as_many_threads_compute_as_have_a_core(cores: int, percent: float, threads: int) -> None:
    assert fair_threads(cores, percent) == threads


def test_a_number_of_threads_that_a_person_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {COUNT: "7"}
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 100.0)
    monkeypatch.setattr("os.environ", environment)
    choose_waiting()
    assert environment == {COUNT: "7", VARIABLE: "PASSIVE"}


def test_a_program_that_is_just_ending_does_not_count_as_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    use, environment = [100.0, 100.0, 5.0], dict[str, str]()
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: use.pop(0))
    monkeypatch.setattr("os.environ", environment)
    choose_waiting()
    assert environment == {}
    assert use == []


@pytest.mark.parametrize(("policy", "spinning"), [("passive", "0"), ("ACTIVE", None), ("", None)])
def test_onnxruntime_follows_the_policy(
    policy: str, spinning: str | None, fp32_export: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, policy)
    entries: dict[str, str] = {}
    add_entry = onnxruntime.SessionOptions.add_session_config_entry

    def add_and_keep(options: Any, key: str, value: str) -> None:
        entries[key] = value
        add_entry(options, key, value)

    monkeypatch.setattr(onnxruntime.SessionOptions, "add_session_config_entry", add_and_keep)
    path: Path = fp32_export.folder / "text_encoder.onnx"
    with OnnxRuntimeRunner(path):
        assert entries.get("session.intra_op.allow_spinning") == spinning
        assert entries["session.force_spinning_stop"] == "1", "the sessions of a pipeline do not disturb each other"
    assert idle_threads_sleep() == (spinning == "0")
