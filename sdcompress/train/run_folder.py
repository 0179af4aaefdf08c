"""The folder of a training run: locked by one run at a time, and left as it was when a run cannot begin."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate import PartialState
from sdcompress_engines.errors import (
    ArtifactError,
    BackendMissing,
    ModelError,
    PlanError,
    StorageError,
    UsageError,
    storage_errors,
)
from sdcompress_engines.locks import HeldLock, try_lock
from sdcompress_engines.manifest import check_free

from sdcompress.train.checkpoint import CHECKPOINTS
from sdcompress.train.config import TrainConfig

LOCK = ".lock"
RECIPE = "recipe.json"


@contextmanager
def run_folder(output: Path, *, resume: bool, force: bool) -> Iterator[None]:
    """Create and lock the training folder, for the block; the processes of one run enter and leave it together.

    If the run cannot begin, because of a wrong option, plan or model or a missing backend, a new folder is removed
    again. A folder with checkpoints is never removed.

    Args:
        output: the training folder.
        resume: continue the run in the folder.
        force: delete what is in the folder.

    Raises:
        ArtifactError: the folder is not empty (with neither `resume` nor `force`), or another run is using it.
        StorageError: no space, no permission, or a file system without locks.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    lock, new = _lock_folder(output, resume, force) if state.is_main_process else (None, False)
    state.wait_for_everyone()
    try:
        yield
        state.wait_for_everyone()
    except (UsageError, BackendMissing, ModelError, PlanError):
        if lock is not None and new and not (output / CHECKPOINTS).is_dir():
            _remove_folder(output, lock)
            lock = None
        raise
    finally:
        if lock is not None:
            lock.release()


def write_recipe(config: TrainConfig, output: Path) -> None:
    """Write the resolved recipe to the training folder, where it is not there yet."""
    write_once(output / RECIPE, json.dumps(config.model_dump(mode="json"), indent=1) + "\n")


def write_once(path: Path, text: str) -> None:
    """Write a file, on the main process, unless it exists: a refused resume must leave the run's own file unchanged."""
    if PartialState().is_main_process and not path.is_file():
        path.write_text(text, encoding="utf-8")


def _lock_folder(output: Path, resume: bool, force: bool) -> tuple[HeldLock, bool]:
    """Create and lock the folder; with `force`, empty it.

    Returns the lock, and whether everything in the folder is this run's.
    """
    with storage_errors(output):
        if not resume:
            check_free(output, force)
        new = not output.exists()
        output.mkdir(parents=True, exist_ok=True)
        try:
            lock = try_lock(output / LOCK, hint="choose another -o, on a local disk")
        except StorageError:
            if new:
                shutil.rmtree(output, ignore_errors=True)
            raise
        if lock is None:
            raise ArtifactError(
                "another run is using this folder", where=output, hint="wait for it, or choose another -o"
            )
        if force and not resume:
            try:
                _empty_folder(output)
            except BaseException:
                lock.release()
                raise
            new = True
    return lock, new


def _empty_folder(output: Path) -> None:
    """Remove all but the lock file: while it is held, Windows removes neither the file nor the folder."""
    for path in output.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _remove_folder(output: Path, lock: HeldLock) -> None:
    """Remove the folder and release its lock, as far as possible: the caller raises another error already."""
    with suppress(OSError):
        _empty_folder(output)
    with suppress(OSError):
        lock.discard()
        output.rmdir()
