"""No process of sdcompress imports what lies in the working folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sdcompress_engines.child_process import python_code, python_command, run_job
from sdcompress_engines.flavour import TENSORRT_RTX

NAMES = (
    *("json", "statistics", "torch", "numpy", "random", "pickle", "tempfile", "socket", "onnx", "onnxruntime"),
    *("diffusers", "modelopt", "psutil", "multiprocessing", "sitecustomize", "usercustomize", "sdcompress_engines"),
)
"""Modules that our processes import at once or later, and those that Python imports by itself."""


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of this test, with modules that leave a file where they are imported."""
    folder = tmp_path / "working"
    folder.mkdir()
    note = str(tmp_path / "imported")
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"open({note!r}, 'a').write({name!r} + ' ')\nraise ImportError('not it')\n")
    monkeypatch.chdir(folder)
    return folder


def imported(folder: Path) -> list[str]:
    """Returns the modules of the working folder that were imported."""
    note = folder.parent / "imported"
    return note.read_text().split() if note.exists() else []


def run(command: list[str], **variables: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_modules_of_the_working_folder_would_break_a_process_that_imports_them(working_folder: Path) -> None:
    variables = os.environ | {"PYTHONSAFEPATH": ""}
    done = subprocess.run([sys.executable, "-c", "import json"], capture_output=True, check=False, env=variables)
    assert done.returncode == 1
    assert "json" in imported(working_folder)


def test_a_job_imports_nothing_from_the_working_folder(working_folder: Path) -> None:
    path = os.pathsep + os.environ.get("PYTHONPATH", "")  # whose first part is empty
    variables = {"PYTHONSAFEPATH": "", "PYTHONPATH": path}
    ending = run_job("sdcompress.backends.fastest_worker", {}, lambda event: None, environment=variables)
    assert "KeyError: 'model'" in ending.output[-1]  # it read the empty job, so that all of its imports are done
    assert imported(working_folder) == []


def test_python_before_3_11_imports_nothing_from_the_working_folder(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10))
    assert python_code("import json")[1:] == ["-c", "import sys; del sys.path[0]; import json"]
    run(python_code("import json, statistics"))
    command = python_command("json.tool")
    assert "-P" not in command
    done = subprocess.run(command, input="[1]", capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[", "1", "]"]
    assert imported(working_folder) == []


def test_a_folder_that_the_user_puts_on_the_path_stays_there(tmp_path: Path) -> None:
    (tmp_path / "of_the_user.py").write_text("")
    run(python_code("import of_the_user"), PYTHONPATH=str(tmp_path))


@pytest.mark.parametrize("start", [["-m", "sdcompress"], ["-c", "from sdcompress.cli import main; main()"]])
def test_the_command_line_imports_nothing_from_the_working_folder(working_folder: Path, start: list[str]) -> None:
    safe = ["-P"] if "-c" in start else []  # as the console script, which has its own folder on the path
    run([sys.executable, *safe, *start, "inspect", "nano"])
    assert imported(working_folder) == []


@pytest.mark.parametrize("fork", [True, False])
def test_a_process_of_a_bench_imports_nothing_from_the_working_folder(working_folder: Path, fork: bool) -> None:
    code = f"from sdcompress_bench import isolated; print(isolated.call(dict, {{'answer': 7}}, 120, fork={fork}))"
    guarded = f"if __name__ == '__main__':\n {code}"
    script = working_folder.parent / "script" / "start.py"
    script.parent.mkdir()
    script.write_text(guarded)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert "{'answer': 7}" in done.stdout
    assert imported(working_folder) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "generate nano-tiny cat --steps 1 --backend auto",
        "export nano-tiny -o int8 --precision int8 --component unet",
        # the name makes it a model: the suite `nano` has limits of speed, which a busy machine misses
        "bench teacher=nano --backend torch,ort --quick --steps 1 --prompt-count 1 -o bench",
        "doctor --backend ort",
        pytest.param(
            "export nano-tiny -o engines --trt --component unet",
            marks=pytest.mark.skipif(TENSORRT_RTX.missing() is not None, reason="tensorrt-rtx is not installed"),
        ),
    ],
)
def test_no_command_imports_from_the_working_folder(working_folder: Path, command: str) -> None:
    run([sys.executable, "-m", "sdcompress", *command.split()])
    assert imported(working_folder) == []
