"""Memory figures are of this process and this machine, whatever started it and whichever system it is."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from sdcompress_engines.builder import require_memory
from sdcompress_engines.errors import StorageError
from sdcompress_engines.resources import available_memory_bytes, peak_rss_mib

PEAK = (
    "from sdcompress_engines.resources import peak_rss_mib; held = b'x' * ({mib} * 2**20); del held;"
    " print(peak_rss_mib())"
)
PARENT = """
import subprocess, sys
held = b"x" * (400 * 2**20)
print(subprocess.run([sys.executable, "-c", sys.argv[1]], capture_output=True, text=True, check=True).stdout)
"""


def peak(*command: str) -> float:
    return float(subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True).stdout)


def test_the_peak_is_the_most_that_was_held_and_not_what_is_held_now() -> None:
    assert peak("-c", PEAK.format(mib=100)) - peak("-c", PEAK.format(mib=0)) == pytest.approx(100, abs=20)


@pytest.mark.skipif(sys.platform != "linux", reason="getrusage carries it on Linux")
def test_the_peak_leaves_out_what_the_parent_held() -> None:
    assert peak("-c", PARENT, PEAK.format(mib=0)) < 200


def test_the_peak_of_windows_is_that_of_its_working_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for psutil on Windows."""

    def absent(*_: Any, **__: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr("pathlib.Path.read_text", absent)
    monkeypatch.setattr(
        psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=3 * 2**29))
    )
    assert peak_rss_mib() == 1536


def test_the_free_memory_is_the_systems_with_and_without_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    found = available_memory_bytes()
    assert found is not None
    monkeypatch.setitem(sys.modules, "psutil", None)
    without = available_memory_bytes()
    assert without == pytest.approx(found, rel=0.2)


def test_a_build_that_needs_more_memory_than_there_is_is_refused() -> None:
    with pytest.raises(StorageError, match=r"needs about 1048576\.0 GiB of memory"):
        require_memory(2**50, "unet.engine")
    require_memory(2**20, "unet.engine")
