"""The guard of outputs: what may be replaced, and how a folder or a file takes its place without a loss."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .command import command_line
from .errors import ANOTHER_OUTPUT, ArtifactError, StorageError, storage_errors
from .files import atomic_file, parents_made, replace_file, sync, sync_tree
from .leftovers import OLD, bring_back, remove_leftovers, temporary_path
from .locks import try_lock
from .output_marks import is_marked, list_foreign
from .paths import check_unicode, is_link

_NAMES_SHOWN = 3
_MOST_LINKS_READ = 10_000
"""Entries of an input folder among which links are looked for."""


def check_free(target: Path, force: bool = False, inputs: Iterable[Path] = (), *, in_place: bool = False) -> None:
    """Refuse an output folder that may not be written or replaced; call it before any work.

    What a killed process moved aside is brought back first, and what it left beside the folder is removed.

    Args:
        target: the folder.
        force: whether a folder that sdcompress wrote may be replaced. One with other files in it never is.
        inputs: files and folders that the command reads, or will make and read.
        in_place: the command writes into the folder. Otherwise another folder takes its place, also where it is empty.

    Raises:
        ArtifactError: `target` is a file or a link; is, holds or lies in an input; holds what may not be replaced; or
            is a folder that never is, such as the working folder.
        StorageError: nothing can be written there.
    """
    check_unicode(target, StorageError)
    with storage_errors(target):
        bring_back(target.absolute())
        _refuse_link(target)
        if os.path.lexists(target) and not target.is_dir():
            raise ArtifactError("is a file", where=target, expected="a folder to write to", hint=ANOTHER_OUTPUT)
        check_inputs(target, inputs)
        is_full = target.is_dir() and any(target.iterdir())
        if is_full or (target.is_dir() and not in_place):
            _refuse_special(target, is_full)
        if is_full:
            _check_content(target, force)
        _check_writable(target)
        remove_leftovers(target.absolute())


def check_file(target: Path, inputs: Iterable[Path] = (), *, replace: bool = True) -> None:
    """Refuse an output file that may not be written or replaced; call it before any work.

    Args:
        target: the file.
        inputs: see `check_free`.
        replace: whether an older file may be replaced.

    Raises:
        ArtifactError: `target` is a link, a folder or a device; is or lies in an input; or exists.
        StorageError: nothing can be written there.
    """
    with storage_errors(target):
        _refuse_link(target)
        check_inputs(target, inputs)
        if os.path.lexists(target):
            mode = target.stat().st_mode
            if not stat.S_ISREG(mode):
                what = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
                raise ArtifactError(f"is {what}", where=target, expected="a file to write", hint="choose another name")
            if not replace:
                raise ArtifactError("exists", where=target, hint="add --force to replace it, or choose another name")
        _check_writable(target)
        remove_leftovers(target.absolute())


def check_inputs(target: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is an input, holds one or lies in one, all links resolved.

    Args:
        target: the output, a file or a folder.
        inputs: see `check_free`.

    Raises:
        ArtifactError: it does; the message names the input.
    """
    clear: set[Path] = set()  # folders that the output neither is nor holds: of thousands of shards one is looked up
    for given in inputs:
        is_beside = given.parent in clear and given.name.casefold() != target.name.casefold()
        if is_beside and given.is_file() and not is_link(given):
            continue
        for place in (given, *_linked_from(given)):
            if _lies_in(place, target):
                same = _lies_in(target, place)
                what = "is what this command reads" if same else f"holds {place}, which this command reads"
            elif _lies_in(target, place):
                what = f"lies in {place}, which this command reads"
            else:
                continue
            free = given.absolute().parent / f"{given.absolute().stem}-output{target.suffix}"
            shown = free if _lies_in(Path.cwd(), given) else Path(free.name)
            raise ArtifactError(what, where=target, hint=f"choose a place outside it, such as {_option(shown)}")
        clear.add(given.parent)


@contextmanager
def staged(target: Path, force: bool = False, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that becomes `target` when the block ends, and is removed on an error.

    Args:
        target: the output folder.
        force: replace what sdcompress wrote there, once the new folder is complete.
        inputs: see `check_free`.

    Raises:
        ArtifactError, StorageError: as `check_free`, also for what came to `target` in the meantime. StorageError: no
            space, no permission.
    """
    target, inputs = target.absolute(), tuple(inputs)
    check_free(target, force, inputs)
    temporary = temporary_path(target)
    with storage_errors(target), parents_made(target):
        temporary.mkdir()
        try:
            yield temporary
            check_free(target, force, inputs)
            replace_folder(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that becomes `target` when the block ends, and is removed on an error.

    Missing folders above it are made.

    Args:
        target: the file, after `check_file`.

    Raises:
        StorageError: no space, no permission; an older file is as it was.
    """
    with storage_errors(target), parents_made(target), atomic_file(target) as partial:
        yield partial


def replace_folder(new: Path, target: Path) -> None:
    """Put a complete folder in the place of `target`, which is moved aside, and deleted once the new one is there.

    A failure brings the old folder back; after a kill, `check_free` does.

    Args:
        new: on the file system of `target`.
        target: a folder that may be replaced, or nothing.

    Raises:
        OSError: no space, no permission, or a file in it is in use.
    """
    sync_tree(new)
    with moved_aside(target):
        if target.is_dir():  # empty: Windows replaces no folder
            target.rmdir()
        replace_file(new, target)
        sync(target.parent)


@contextmanager
def moved_aside(target: Path) -> Iterator[None]:
    """Move a folder out of its place for the block, and delete it then.

    After an error it is put back, unless something else is in its place. Where that fails, it stays aside, and
    `check_free` puts it back. An empty folder stays where it is.

    Args:
        target: the folder, or nothing.

    Raises:
        OSError: a file in it is in use, or no permission.
    """
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        yield
        return
    aside = temporary_path(target, OLD)
    aside.mkdir()
    try:
        replace_file(target, aside / target.name)
        yield
    except BaseException:
        if os.path.lexists(aside / target.name) and not os.path.lexists(target):
            replace_file(aside / target.name, target)
        raise
    finally:
        if os.path.lexists(target):
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def begun_folder(target: Path, mark: str) -> Iterator[None]:
    """Make a folder for the block; after an error that leaves at most one file in it, the folder is as it was before.

    Args:
        target: the folder, missing or there.
        mark: name of the file that the block writes first. A folder that holds only this file is removed, too.
    """
    was_empty = target.is_dir() and not any(target.iterdir())
    target.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if {path.name for path in target.iterdir()} <= {mark}:
                (target / mark).unlink(missing_ok=True)
                if not was_empty:
                    target.rmdir()
        raise


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep other processes out of an output for the block, by a file beside it. Missing folders above it are made.

    Where nothing can be written beside it, as beside a mounted folder, the file lies in it.

    Raises:
        ArtifactError: another process is writing the output.
        StorageError: the file system has no locks.
    """
    target = target.absolute()
    with storage_errors(target), parents_made(target):
        in_place = target.is_dir() and not os.access(target.parent, os.W_OK | os.X_OK)
        path = target / ".lock" if in_place else target.with_name(f".{target.name}.lock")
        lock = try_lock(path, hint=f"{ANOTHER_OUTPUT}, on a local disk")
        if lock is None:
            raise ArtifactError(
                "another process is writing this output", where=target, hint=f"wait for it, or {ANOTHER_OUTPUT}"
            )
        try:
            yield
        finally:
            lock.discard()


@contextmanager
def unless_present(target: Path) -> Iterator[None]:
    """Ignore the error if another process has written `target`, a folder of the cache, first.

    Raises:
        ArtifactError, StorageError: it cannot be written; no `-o` is proposed.
    """
    try:
        yield
    except (ArtifactError, StorageError) as error:
        if isinstance(error, StorageError) or not target.is_dir():
            raise error.with_place("set SDCOMPRESS_CACHE to another folder") from error


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Refuse to start a write that the disk has no space for.

    Args:
        folder: where the write will go; it need not exist yet.
        needed_bytes: of the write.
        what: the write, as subject of the message.

    Raises:
        StorageError: fewer than `needed_bytes` are free.
    """
    place = nearest_existing(folder)
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise StorageError(
            f"{what} needs {needed_bytes / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free",
            where=place,
            hint=f"free some space or {ANOTHER_OUTPUT}",
        )


def _option(place: str | Path) -> str:
    return command_line(["-o", str(place)])


def _refuse_link(target: Path) -> None:
    if is_link(target):
        raise ArtifactError(
            f"is a link, to {os.readlink(target)}",
            where=target,
            expected="a place to write",
            hint=f"{ANOTHER_OUTPUT}, or the place itself: {os.path.realpath(target)}",
        )


def _check_content(target: Path, force: bool) -> None:
    """Refuse a folder that is not empty, unless `force` is given and sdcompress wrote all that is in it.

    Raises:
        ArtifactError: the message says what is there.
    """
    foreign = list_foreign(target)
    if foreign or not is_marked(target):
        names = foreign or sorted(path.name for path in target.iterdir())
        shown = ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
        raise ArtifactError(
            f"is not empty and holds {len(names):,} {'file' if len(names) == 1 else 'files'} that sdcompress did not"
            f" write as one output ({shown})",
            where=target,
            hint=f"{ANOTHER_OUTPUT}; --force replaces only an output of sdcompress with nothing else in it",
        )
    if not force:
        raise ArtifactError(
            "exists and is not empty", where=target, hint=f"add --force to replace it, or {ANOTHER_OUTPUT}"
        )


def _refuse_special(target: Path, is_full: bool) -> None:
    if reason := _special(target):
        raise ArtifactError(
            f"{reason}, and not empty" if is_full else reason,
            where=target,
            hint=f"choose a folder in it, such as {_option(target / 'output')}",
        )


def _special(folder: Path) -> str | None:
    """Returns what makes a folder one that is never replaced, as the predicate of a message; None for others."""
    try:
        home = Path.home()
    except RuntimeError:
        home = None
    if _lies_in(Path.cwd(), folder):
        return "is or holds the folder you are in"
    if home is not None and _lies_in(home, folder):
        return "is or holds your home folder"
    if os.path.ismount(folder):
        return "is a mount point"
    return "is a git repository" if os.path.lexists(folder / ".git") else None


def _lies_in(place: Path, folder: Path) -> bool:
    """Returns whether an existing or future `place` is `folder` or lies in it, all links resolved."""
    inner, outer = Path(os.path.realpath(place)), Path(os.path.realpath(folder))
    return any(each == outer or _is_same(each, outer) for each in (inner, *inner.parents))


def _is_same(one: Path, other: Path) -> bool:
    try:  # the names may differ: in case, or by a mount
        return os.path.samefile(one, other)
    except OSError:
        return False


def _linked_from(folder: Path) -> Iterator[Path]:
    """Yields the places to which links inside an input folder lead."""
    if not folder.is_dir():
        return
    read = 0
    for base, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(base, name)
            if is_link(path):
                yield path.resolve()
            read += 1
            if read > _MOST_LINKS_READ:
                return


def _check_writable(target: Path) -> None:
    """Refuse a place where nothing can be written, before the work and without a trace.

    Raises:
        StorageError: no permission, or a part of the path is a file.
    """
    place = target if target.is_dir() else nearest_existing(target.absolute().parent)
    if not place.is_dir():
        raise StorageError(
            "a part of this path is a file, not a folder", where=place, expected="a folder", hint=ANOTHER_OUTPUT
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise StorageError("no permission to write here", where=place, hint=ANOTHER_OUTPUT)


def nearest_existing(path: Path) -> Path:
    """Returns `path`, or the nearest of its parents that exists; a link exists wherever it leads."""
    place = path.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    return place
