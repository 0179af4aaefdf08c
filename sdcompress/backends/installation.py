"""Checks of the installation: packages that do not fit, a card that torch does not see, the cache and the store."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from sdcompress_engines.child_process import explain_exit, python_code
from sdcompress_engines.command import command_line
from sdcompress_engines.engine_files import engine_faults
from sdcompress_engines.errors import SdCompressError
from sdcompress_engines.manifest import cache_folder
from sdcompress_engines.runners.onnxruntime_install import INSTALL, INSTALL_GPU
from sdcompress_engines.store import EngineStore
from sdcompress_engines.store_entries import BrokenEngine

NEEDED_BYTES = 512 * 2**20
"""Space for what a diagnosis of nano leaves in the cache: its graph, a compiled package and engines."""
IMPORTED_BY_DIFFUSERS = "onnxruntime"
"""An optional package. While it is broken, no model loads: see `diffusers.pipelines.onnx_utils`."""
_READ_S = 10.0


@dataclass(frozen=True)
class Check:
    """The check of one part of the installation.

    Attributes:
        name: of the part.
        ok: whether it is in order.
        text: its state.
        command: the command that repairs it; None where nothing has to be repaired.
    """

    name: str
    ok: bool
    text: str
    command: str | None = None


@dataclass(frozen=True)
class Driver:
    """A working NVIDIA driver: its version, and the names of its cards."""

    version: str
    cards: tuple[str, ...]


def find_driver() -> Driver | None:
    """Returns the driver that `nvidia-smi` reports, or None where there is none or it has no card."""
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.partition(",") for line in output.splitlines() if "," in line]
    return Driver(rows[0][0].strip(), tuple(name.strip() for _, _, name in rows)) if rows else None


def check_installation(driver: Driver | None, needed_bytes: int = NEEDED_BYTES) -> list[Check]:
    """Returns the checks of packages, card, cache folder and stored engines, in this order.

    Args:
        driver: see `find_driver`.
        needed_bytes: the space that has to be free in the cache folder.
    """
    return [
        check_packages(driver is not None),
        check_card(driver),
        check_cache(needed_bytes),
        check_store(EngineStore()),
    ]


def check_packages(has_driver: bool) -> Check:
    """Returns the check of the packages: sdcompress has those that it requires, and none overwrites another's files.

    Args:
        has_driver: whether there is an NVIDIA driver, which decides between the two packages of ONNX Runtime.
    """
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    if len(both) > 1:
        install = INSTALL_GPU if has_driver else INSTALL
        command = f"pip uninstall -y {' '.join(both)} && {install}"
        return Check("packages", False, f"{' and '.join(both)} are both installed, and write the same files", command)
    if fault := import_fault(IMPORTED_BY_DIFFUSERS):
        text = f"{IMPORTED_BY_DIFFUSERS} cannot be imported ({fault}); diffusers imports it too, so no model loads"
        return Check(
            "packages", False, text, f"pip install --force-reinstall {' '.join(both) or IMPORTED_BY_DIFFUSERS}"
        )
    wrong = _unmet_requirements()
    if not wrong:
        return Check("packages", True, "as sdcompress requires")
    text = "; ".join(f"{name} {version or 'is missing'}, {needed} is needed" for name, version, needed in wrong)
    command = command_line(["pip", "install", *(f"{name}{needed}" for name, _, needed in wrong)])
    return Check("packages", False, text, command)


def import_fault(module: str) -> str | None:
    """Returns why importing an installed module fails, tried in a process of its own; None if it is not installed."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        done = subprocess.run(python_code(f"import {module}"), capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "the import did not finish within 60 s"
    return explain_exit(done.returncode, done.stderr.splitlines()) if done.returncode else None


def _unmet_requirements() -> list[tuple[str, str | None, str]]:
    """Returns (name, installed version, required versions) of each package that does not fit.

    Optional packages count only if they are installed.
    """
    from packaging.requirements import Requirement

    try:
        stated = metadata.requires("sdcompress") or []
    except metadata.PackageNotFoundError:  # run from a checkout
        return []
    wrong = []
    for requirement in map(Requirement, stated):
        installed = _version(requirement.name)
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        fits = installed is not None and requirement.specifier.contains(installed, prereleases=True)
        if not fits and (needed or installed is not None):
            wrong.append((requirement.name, installed, str(requirement.specifier)))
    return wrong


def check_card(driver: Driver | None) -> Check:
    """Returns the check of the cards: torch sees the NVIDIA cards that the driver has."""
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return Check("card", True, f"torch sees {names}")
    if driver is None:
        return Check("card", True, "no NVIDIA driver, so everything runs on the CPU")
    seen = f"nvidia-smi sees {', '.join(driver.cards)} (driver {driver.version})"
    if torch.version.cuda is None:
        return Check(
            "card", False, f"{seen}, and torch {torch.__version__} is built for the CPU only", _install_torch()
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        unset = "set CUDA_VISIBLE_DEVICES=" if sys.platform == "win32" else "unset CUDA_VISIBLE_DEVICES"
        return Check("card", False, f"{seen}, and CUDA_VISIBLE_DEVICES={hidden!r} hides it from torch", unset)
    try:
        torch.cuda.init()
        reason = "torch does not see it"
    except (RuntimeError, AssertionError) as error:
        reason = f"torch cannot start CUDA {torch.version.cuda} ({str(error).splitlines()[0]})"
    return Check("card", False, f"{seen}, and {reason}", "install a newer NVIDIA driver, then: sdcompress doctor")


def _install_torch() -> str:
    if sys.platform == "win32":
        return "install torch with CUDA from PyTorch's own index, as its start page describes"
    return f"pip install --force-reinstall torch=={torch.__version__.partition('+')[0]}"


def check_cache(needed_bytes: int) -> Check:
    """Returns the check of the cache folder: it can be written to and has enough space."""
    folder = cache_folder()
    other = "set SDCOMPRESS_CACHE=DIR" if sys.platform == "win32" else "export SDCOMPRESS_CACHE=DIR"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"sdcompress")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        text = f"{folder} cannot be written to ({error.strerror or error})"
        return Check("cache", False, text, f"{other}, with a folder that can be written to")
    sizes = f"{free / 2**30:,.1f} GiB free"
    if free < needed_bytes:
        text = f"{folder} has {sizes}, and {needed_bytes / 2**30:,.1f} GiB are needed"
        return Check("cache", False, text, f"{other}, with a folder on a larger disk")
    return Check("cache", True, f"{folder} can be written to, {sizes}")


def check_store(store: EngineStore, read_s: float = _READ_S) -> Check:
    """Returns the check of the stored engines: none is damaged. Unlike `EngineStore.verify`, it removes nothing.

    Args:
        store: of the engines.
        read_s: time for reading engines, those used last first. The sizes of all are checked.
    """
    name, started = "engines", time.monotonic()
    try:
        entries = sorted(store.entries(), key=lambda entry: -entry.used)
    except SdCompressError as error:
        return Check(name, False, error.what, error.hint or "export SDCOMPRESS_CACHE=DIR")
    damaged, read = {}, 0
    for entry in entries:
        if isinstance(entry, BrokenEngine):
            damaged[entry.digest] = entry.fault
        elif time.monotonic() - started < read_s:
            read += 1
            if faults := _list_faults(entry.folder):
                damaged[entry.digest] = "; ".join(faults)
    if damaged:
        listed = "; ".join(f"{digest[:8]}: {fault}" for digest, fault in damaged.items())
        command = f"sdcompress engines prune {' '.join(digest[:8] for digest in damaged)}"
        return Check(name, False, f"{len(damaged)} of {len(entries)} in the store are damaged ({listed})", command)
    if not entries:
        return Check(name, True, "none in the store")
    if read < len(entries):
        return Check(
            name, True, f"{len(entries)} in the store, {read} read and intact; sdcompress engines verify reads all"
        )
    return Check(name, True, f"{len(entries)} in the store, intact")


def _list_faults(folder: Path) -> list[str]:
    try:
        return engine_faults(folder)
    except SdCompressError as error:
        return [error.what]
    except OSError as error:
        return [f"cannot be read ({error.strerror or error})"]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def remove_command(folder: Path) -> str:
    """Returns the command that removes a folder."""
    return f'rmdir /s /q "{folder}"' if sys.platform == "win32" else f"rm -r {shlex.quote(str(folder))}"
