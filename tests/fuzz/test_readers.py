"""Every reader of a file that somebody else may have written answers with a value or one line, for any bytes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .samples import CORPUS, SAMPLES
from .targets import TARGETS, run_target

FILES = sorted(path for path in CORPUS.rglob("*") if path.is_file())


def test_every_target_has_a_sample() -> None:
    assert {path.parent.name for path in FILES if path.name == "sample"} == set(TARGETS) == set(SAMPLES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name[:20]}")
def test_samples_and_earlier_findings_are_read_or_refused_in_one_line(path: Path, tmp_path: Path) -> None:
    accepted = run_target(path.parent.name, tmp_path, path.read_bytes())
    assert accepted == (path.name == "sample" and path.parent.name not in ("single-file", "model-index"))


@pytest.mark.slow
def test_fuzzing_finds_nothing() -> None:
    pytest.importorskip("atheris", reason="atheris has wheels for Linux only")
    from .run import fuzz

    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda target: fuzz(target, seconds=20), TARGETS))
    assert {row["target"]: row["finding"] for row in rows if row["finding"]} == {}
    assert {row["target"]: row["executions"] for row in rows if row["executions"] < 500} == {}
