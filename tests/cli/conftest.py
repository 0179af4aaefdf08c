"""Runs the command line in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from sdcompress.cli import main

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs `sdcompress ARGS` in this process; returns the exit code, stdout and stderr."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sdcompress", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def one_line(err: str) -> str:
    """Returns the one line that a user's mistake prints on stderr."""
    lines = [line for line in err.splitlines() if line.startswith("sdcompress: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]
