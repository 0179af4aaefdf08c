"""Part 7: the tests that need a GPU; each becomes a row as soon as it has ended."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sdcompress_engines.child_process import python_command
from sdcompress_engines.errors import shorten

from .child import PartRun

ROOT = Path(__file__).resolve().parents[3]
MARK = "gpu"
SMOKE_TESTS = ("tests/engines/test_cuda_graphs.py",)
LEFT_S = 5.0
"""The tests stop this many seconds before the part's cap, so that the counts can be written."""
OPTIONS = ("-v", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-W", "default")
"""The last option, because warnings are errors only with the pinned versions."""
_OUTCOME = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
_SUMMARY = re.compile(r"^(FAILED|ERROR) (tests/.+?)(?: - (.+))?$")
_SECTION = re.compile(r"^__+ (?:ERROR collecting )?(.+) __+$")


def tests(run: PartRun) -> None:
    """Write the outcome of each test, and their counts."""
    name = f"pytest -m {MARK}"
    if not (ROOT / "tests").is_dir():
        run.skip(name, "needs a checkout, which has the tests")
        return
    if importlib.util.find_spec("pytest") is None:
        run.skip(name, "pytest is not installed")
        return
    began, ended = time.monotonic(), {}
    for test, outcome, reason in outcomes(run, SMOKE_TESTS if run.smoke else ("tests",)):
        ended[test] = outcome
        if outcome in ("FAILED", "ERROR"):
            run.row(test, failed=reason or outcome.lower())
        elif outcome == "SKIPPED":
            run.row(test, skipped="by the test itself", silent=True)
        else:
            run.row(test, silent=True)
    counts = Counter(ended.values())
    not_passed = counts["FAILED"] + counts["ERROR"]
    figures = {"passed": counts["PASSED"], "not_passed": not_passed, "skipped_tests": counts["SKIPPED"]}
    late = run.seconds_left() <= LEFT_S
    failure = {"failed": "stopped at the part's cap" if late else "no test was found"} if late or not counts else {}
    run.row(name, **figures, took_s=round(time.monotonic() - began, 1), **failure)


def outcomes(run: PartRun, paths: tuple[str, ...]) -> Iterator[tuple[str, str, str | None]]:
    """Yields (test, outcome, None) when a test has ended; at the end (test, outcome, reason) for each failure."""
    with subprocess.Popen(
        [*python_command("pytest"), *paths, "-m", MARK, *OPTIONS],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            assert process.stdout is not None
            yield from read_outcomes(run, process.stdout)
        finally:
            process.kill()


def read_outcomes(run: PartRun, lines: Iterator[str]) -> Iterator[tuple[str, str, str | None]]:
    """Yields the outcomes in pytest's verbose output, as `outcomes` does, until the part's time is over."""
    at, errors = "", dict[str, str]()  # section of the report → its last error
    for line in lines:
        run.log(line)
        if found := _OUTCOME.match(line):
            yield found[1], found[2], None
        elif found := _SUMMARY.match(line.rstrip()):
            yield found[2], found[1], shorten(found[3] or errors.get(found[2], "see gpu.log"))
        elif found := _SECTION.match(line.rstrip()):
            at = found[1]
        elif line.startswith("E  "):
            errors[at] = line.removeprefix("E").strip()
        if run.seconds_left() <= LEFT_S:
            return
