"""`sdcompress doctor` as a person types it: its text, its exit code, and the reason and command for each fault."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from sdcompress_engines.flavour import TENSORRT_RTX

from .conftest import Cli, one_line

Doctor = Callable[..., "subprocess.CompletedProcess[str]"]
BROKEN = """
import importlib.machinery, importlib.util

class Loader:
    def create_module(self, spec):
        return None

    def exec_module(self, module):
        {body}

real = importlib.machinery.PathFinder.find_spec

def find_spec(name, path=None, target=None):
    if name != {package!r}:
        return real(name, path, target)
    return importlib.util.spec_from_loader(name, Loader()) if {there} else None

importlib.machinery.PathFinder.find_spec = find_spec
"""


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    """Runs `sdcompress doctor ARGS` in a process of its own, as the user zaphod with another home folder.

    `broken` is (package, statement): in every process, an import of the package runs the statement instead. With an
    empty statement the package is not installed.
    """
    home = tmp_path / "zaphod"
    home.mkdir()

    def run(*args: str, broken: tuple[str, str] | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        users = dict.fromkeys(("LOGNAME", "USER", "LNAME", "USERNAME"), "zaphod")
        environment = os.environ | users | {"HOME": str(home), "USERPROFILE": str(home)} | more
        if broken:
            (tmp_path / "sitecustomize.py").write_text(
                BROKEN.format(package=broken[0], body=broken[1] or "pass", there=bool(broken[1]))
            )
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "sdcompress", "doctor", *args]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home, check=False)

    return run


def test_a_working_backend_is_shown_with_its_time_and_exits_with_0(doctor: Doctor, tmp_path: Path) -> None:
    done = doctor("--backend", "torch", SDCOMPRESS_CACHE=str(tmp_path / "zaphod" / "cache"))
    assert done.returncode == 0, done.stderr
    assert re.search(r"works +torch .*\d ms a UNet step", done.stdout)
    assert done.stdout.splitlines()[-1].startswith("next: sdcompress generate nano")
    assert f"torch {torch.__version__}" in done.stdout


@pytest.mark.slow
def test_without_onnxruntime_doctor_prints_the_command_and_exits_with_1(doctor: Doctor) -> None:
    done = doctor("--backend", "ort", "--json", broken=("onnxruntime", ""))
    assert done.returncode == 1, done.stderr
    diagnosis = json.loads(done.stdout, parse_constant=pytest.fail)
    torch_result, ort = diagnosis["backends"]
    assert torch_result["status"] == "works"
    assert (ort["status"], ort["reason"]) == ("fails", "onnxruntime is not installed")
    assert ort["command"] == 'pip install "sdcompress[cpu]"'
    assert diagnosis["healthy"] is False


@pytest.mark.slow
def test_the_text_names_nobody_even_if_an_error_does(doctor: Doctor, tmp_path: Path) -> None:
    fault = f"raise ImportError('{tmp_path}/zaphod/lib/libonnx.so and /srv/zaphod/x.so of zaphod: cannot open')"
    done = doctor("--backend", "ort", broken=("onnxruntime", fault))
    assert done.returncode == 1, done.stderr
    assert "onnxruntime does not load (~/lib/libonnx.so and .../x.so of USER: cannot open)" in done.stdout
    for secret in ("zaphod", str(tmp_path), os.uname().nodename if hasattr(os, "uname") else "zaphod"):
        assert secret not in done.stdout
    assert not re.search(r"(?<![\w.~/])/\w+/\w+", done.stdout), done.stdout
    assert done.stdout.splitlines()[-1] == "next: pip install --force-reinstall onnxruntime"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_backend_that_crashes_costs_one_line(doctor: Doctor) -> None:
    done = doctor("--backend", "ort", broken=("onnxruntime", "import os; os.kill(os.getpid(), 11)"))
    assert done.returncode == 1
    assert re.search(r"fails +packages +onnxruntime cannot be imported .*diffusers imports it too", done.stdout)
    assert re.search(r"works +torch", done.stdout)
    assert re.search(r"fails +onnxruntime .*its process was ended by SIGSEGV", done.stdout)
    assert "Traceback" not in done.stdout + done.stderr


def test_a_torch_that_does_not_import_is_reported_in_one_line(doctor: Doctor) -> None:
    done = doctor(broken=("torch", "raise OSError('[WinError 126] Error loading \"C:/zaphod/c10.dll\"')"))
    assert done.returncode == 1
    assert one_line(done.stderr).startswith("sdcompress: torch cannot be imported ([WinError 126]")
    assert "zaphod" not in done.stderr
    assert done.stdout == ""


@pytest.mark.skipif(TENSORRT_RTX.missing() is not None, reason="tensorrt-rtx is not installed")
def test_a_damaged_engine_exits_with_1_and_the_printed_command_removes_it(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdcompress_engines.store import EngineStore

    from tests.sdcompress.test_doctor import build_sum, flip_a_byte

    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path / "cache"))
    store = EngineStore()
    flip_a_byte(store.root / build_sum(store, tmp_path, "a" * 64) / "unet.engine")
    code, out, _ = cli("doctor", "--backend", "torch")
    assert code == 1
    assert re.search(r"fails +engines +1 of 1 in the store are damaged", out)
    last = out.splitlines()[-1]
    assert last.startswith("next: sdcompress engines prune ")
    assert cli("engines", "verify")[0] == 3
    assert cli(*last.removeprefix("next: sdcompress ").split())[0] == 0
    assert cli("engines", "verify")[0] == 0


def test_a_cache_that_cannot_be_written_to_is_the_only_fault(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path / "file" / "cache"))
    code, out, _ = cli("doctor", "--backend", "torch")
    assert code == 1
    assert re.search(r"fails +cache +\$SDCOMPRESS_CACHE cannot be written to", out)
    assert re.search(r"works +torch", out)


def test_an_unknown_backend_or_model_is_refused_in_one_line(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("doctor", "--backend", "cuda")
    assert (code, out) == (2, "")
    assert "tensorrt-rtx" in one_line(err)
    code, out, err = cli("doctor", "--model", tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert "does not exist" in one_line(err)


def test_a_users_own_model_is_tested_at_its_own_size(cli: Cli, random_folder: Path) -> None:
    code, out, err = cli("doctor", "--model", random_folder, "--backend", "torch", "--json")
    diagnosis = json.loads(out)
    assert code == 0, err
    assert diagnosis["model"] == "random"
    assert diagnosis["backends"][0]["subject"] == "whole"
    assert "at most 60 minutes" in err


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_an_interrupt_ends_doctor_and_all_its_processes(tmp_path: Path) -> None:
    cache = {"SDCOMPRESS_CACHE": str(tmp_path / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    command = [sys.executable, "-m", "sdcompress", "doctor", "--backend", "compile", "--backend", "ort"]
    # In the background of a shell the test suite ignores SIGINT, and its children would inherit that.
    restore_signal = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | cache, preexec_fn=restore_signal
    ) as process:
        started, children = time.monotonic(), list[psutil.Process]()
        while len(children) < 2 and time.monotonic() - started < 60:  # torch is done, and the others have started
            time.sleep(0.5)
            children = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert len(children) == 2
    assert process.returncode == 130
    assert not [each for each in children if each.is_running()]


@pytest.mark.alone
@pytest.mark.slow
def test_doctor_keeps_to_two_minutes_and_with_more_time_finishes_every_backend(doctor: Doctor, tmp_path: Path) -> None:
    caches = {"SDCOMPRESS_CACHE": str(tmp_path / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = doctor("--json", **caches)
    diagnosis = json.loads(done.stdout)
    assert diagnosis["seconds"] < 120
    unfinished = [result for result in diagnosis["backends"] if result["status"] == "unfinished"]
    for result in unfinished:  # a slow machine, or one with other work
        assert result["command"] == f"sdcompress doctor --minutes 10 --backend {result['backend']}"
    if unfinished:
        done = doctor("--json", "--minutes", "7", **caches)
        diagnosis = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert diagnosis["healthy"]
    results = {result["backend"]: result for result in diagnosis["backends"] if result["device"] == "cpu"}
    for name in ("torch", "compile", "aot", "onnxruntime"):
        assert results[name]["unet_step_ms"] > 0
        assert results[name]["relative_l2"] <= results[name]["limit"]
    assert results["compile"]["subject"] == "small"
    assert results["onnxruntime"]["subject"] == "whole"
