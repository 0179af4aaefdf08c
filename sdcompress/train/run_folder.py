"""The folder of a training run: locked by one run at a time, and left as it was when a run cannot begin."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from accelerate import PartialState
from sdcompress_engines.errors import ArtifactError, SdCompressError, StorageError, shorten, storage_errors
from sdcompress_engines.files import parents_made, replace_file, write_atomically
from sdcompress_engines.json_files import read_json_object
from sdcompress_engines.leftovers import OLD, is_temporary, remove_leftovers, remove_partial_files, temporary_path
from sdcompress_engines.locks import HeldLock, try_lock
from sdcompress_engines.output_folders import check_free, check_inputs
from sdcompress_engines.output_marks import TRAINING

from sdcompress.train.checkpoint import CHECKPOINTS, PREFIX, check_identity, is_intact, list_checkpoints
from sdcompress.train.config import LoopConfig

LOCK = ".lock"
RECIPE = "recipe.json"


@contextmanager
def run_folder(
    output: Path, *, resume: bool, force: bool, inputs: Iterable[Path] = (), result: str | None = None
) -> Iterator[None]:
    """Create and lock the training folder, for the block; the processes of one run enter and leave it together.

    A run that ends by an error before its first checkpoint leaves nothing: what it wrote is removed, and with `force`
    the older run is put back. A folder with checkpoints is never removed.

    Args:
        output: the training folder.
        resume: continue the run in the folder.
        force: replace the run in the folder.
        inputs: what the run reads.
        result: the folder in `output` that a finished run replaces.

    Raises:
        ArtifactError: as `check_free`, with `resume` as `check_resumable`, or another run is using the folder.
        StorageError: no space, no permission, or a file system without locks.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    owned = _own_folder(output, resume, force, inputs, result) if state.is_main_process else nullcontext()
    with owned:
        state.wait_for_everyone()
        yield
        state.wait_for_everyone()


def write_recipe(config: LoopConfig, output: Path, plan: str | None = None) -> None:
    """Write the resolved recipe to the training folder, and the plan, on the main process.

    Files that are there stay: a refused resume must leave the run's own ones unchanged. A run without a checkpoint is
    known by them alone.

    Args:
        config: the recipe.
        output: the training folder.
        plan: content of `plan.json`; None where the training has no plan.

    Raises:
        TrainingError: they are of another run; the message names the differences.
    """
    if not PartialState().is_main_process:
        return
    recipe = json.dumps(config.model_dump(mode="json"), indent=1) + "\n"
    for name, text in ((RECIPE, recipe), ("plan.json", plan)):
        if text is None:
            continue
        if not (output / name).is_file():
            write_atomically(output / name, text)
        elif not _has_checkpoint(output):
            check_identity(read_json_object(output / name), json.loads(text), output)


def check_resumable(output: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse to continue in a folder of something else: a run writes there, and removes old checkpoints.

    Args:
        output: the training folder; nothing, or an empty folder, is accepted.
        inputs: what the run reads.

    Raises:
        ArtifactError: as `check_inputs`, or the folder holds something, and no run.
    """
    check_inputs(output, inputs)
    if output.is_dir() and not TRAINING.is_in(output) and not _has_checkpoint(output):
        names = sorted(path.name for path in _list_entries(output) if not is_temporary(path.name))
        if names:
            raise ArtifactError(
                f"holds no training to continue, but {shorten(', '.join(names), 120)}",
                where=output,
                expected=f"{RECIPE} of a run that was stopped, or an empty folder",
                hint="choose the -o of the run, or a new one without --resume",
            )


@contextmanager
def _own_folder(output: Path, resume: bool, force: bool, inputs: Iterable[Path], result: str | None) -> Iterator[None]:
    """Lock the folder for the block, then keep, move aside or put back what is in it.

    The arguments are those of `run_folder`.
    """
    with storage_errors(output), parents_made(output):
        if resume:
            check_resumable(output, inputs)
        else:
            check_free(output, force, inputs, in_place=True)
        if resume and result is not None:
            check_free(output / result, force=True)
        is_new = not output.exists() or [path.name for path in output.iterdir()] == [LOCK]
        output.mkdir(exist_ok=True)
        lock = _take_lock(output, is_new)
        try:
            _remove_unfinished(output)
            with _restored_unless_begun(output, lock, None if resume else _move_aside(output), is_new, resume):
                yield
            remove_leftovers(output.absolute())  # the older run, where the one that replaced it was killed
        finally:
            lock.release()


@contextmanager
def _restored_unless_begun(
    output: Path, lock: HeldLock, aside: Path | None, is_new: bool, resume: bool
) -> Iterator[None]:
    """Delete the older run at the end of the block; put it back after an error before the first checkpoint."""
    try:
        yield
    except BaseException as error:
        found = list_checkpoints(output / CHECKPOINTS)
        if not found and (is_new or not resume):
            _restore(output, lock, aside, is_new)
            aside = None  # it holds only what could not be put back
        elif found and isinstance(error, SdCompressError) and error.hint is None:
            raise error.with_hint(f"--resume continues from {found[-1].name}") from error
        raise
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _take_lock(output: Path, is_new: bool) -> HeldLock:
    try:
        lock = try_lock(output / LOCK, hint="choose another -o, on a local disk")
    except StorageError:
        if is_new:
            shutil.rmtree(output, ignore_errors=True)
        raise
    if lock is None:
        raise ArtifactError("another run is using this folder", where=output, hint="wait for it, or choose another -o")
    return lock


def _remove_unfinished(output: Path) -> None:
    """Remove what a killed run was writing; the lock is held, so no run writes."""
    remove_partial_files(output)
    for staging in (output / CHECKPOINTS).glob(f".{PREFIX}*.partial"):
        shutil.rmtree(staging, ignore_errors=True)


def _move_aside(output: Path) -> Path | None:
    """Move all but the lock file into a folder beside `output`: while it is held, Windows moves neither.

    Returns that folder, in which what was moved lies under the name of `output`; None where there was nothing. After an
    error everything is put back.
    """
    entries = _list_entries(output)
    if not entries:
        return None
    aside = temporary_path(output.absolute(), OLD)
    (aside / _aside_name(output)).mkdir(parents=True)
    try:
        for path in entries:
            replace_file(path, aside / _aside_name(output) / path.name)
    except BaseException:
        _put_back(output, aside)
        raise
    return aside


def _put_back(output: Path, aside: Path) -> None:
    """Move an older run back to its place, as far as possible; what cannot be moved stays in `aside`."""
    moved = aside / _aside_name(output)
    for path in _list_entries(moved):
        with suppress(OSError):
            replace_file(path, output / path.name)
    with suppress(OSError):  # not empty
        moved.rmdir()
        aside.rmdir()


def _restore(output: Path, lock: HeldLock, aside: Path | None, is_new: bool) -> None:
    """Remove what the run wrote and put an older run back, as far as possible: the caller raises another error."""
    for path in _list_entries(output):
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    if aside is not None:
        _put_back(output, aside)
    with suppress(OSError):
        if is_new or aside is None:
            lock.discard()
        if is_new:
            output.rmdir()


def _has_checkpoint(output: Path) -> bool:
    return any(is_intact(path, contents=False) for path in list_checkpoints(output / CHECKPOINTS))


def _aside_name(output: Path) -> str:
    """Returns the name of the training folder, also where it is given as `.`."""
    return output.absolute().name


def _list_entries(output: Path) -> list[Path]:
    return [path for path in output.iterdir() if path.name != LOCK]
