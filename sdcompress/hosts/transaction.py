"""Put files into a host's folder: all of them or none."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from sdcompress_engines.errors import (
    ArtifactError,
    StorageError,
    storage_error,
)
from sdcompress_engines.manifest import MANIFEST_NAME, require_space
from sdcompress_engines.progress import Reporter

from sdcompress.hosts.engine_folder import engine_of
from sdcompress.hosts.host import Host
from sdcompress.hosts.record import (
    Entry,
    Record,
    copy_beside,
    make_folders,
    prune_folders,
    read_record,
    remove,
    set_aside,
    write_record,
)


def _apply(host: Host, root: Path, wanted: Mapping[str, tuple[Path, Entry]], names: set[str], report: Reporter) -> Done:
    """Bring the plugin and the engines `names` from what the record says to what is wanted: path in the host → (source,
    what it is).
    """
    record, broken = read(host, root)
    before = record or Record()
    known = dict(before.files)
    stale = {
        path: entry for path, entry in known.items() if path not in wanted and engine_of(host, path) in {None, *names}
    }
    todo: list[Any] = []
    unchanged: list[Any] = []
    foreign: list[Any] = []
    for path, (_, entry) in wanted.items():
        state = _lies_there(host, root, path, entry, known, stale)
        if state == "same":
            (unchanged if path in known or broken else foreign).append(path)
        else:
            todo.append(path)
    if changed := [
        path for path, entry in stale.items() if os.path.lexists(root / path) and not entry.is_at(root / path)
    ]:
        raise ArtifactError(
            "was changed since it was installed, and is not in what is installed now",
            where=root / changed[0],
            hint=_AWAY,
        )
    mine = {path: wanted[path][1] for path in wanted if path not in foreign}
    after = {path: entry for path, entry in known.items() if path not in stale} | mine
    version, created = _version(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    notes = (
        [f"{len(foreign)} files were there already, the same, and are not ours: an uninstall leaves them"]
        if foreign
        else []
    )
    if not todo and not stale and record is not None and (record.files, record.version) == (after, version):
        return Done(unchanged=tuple(unchanged), notes=tuple(notes))
    require_space(_existing(root / host.models), sum(wanted[path][1].bytes for path in todo), "the install")
    if broken is not None:
        backup = set_aside(root / host.record)
        after[backup.relative_to(root).as_posix()] = Entry.of(backup)
        notes.append(
            f"the record of earlier installs was broken ({broken}); it is kept as {backup.name}, and what was there and"
            " the same counts as ours again"
        )
    links = {path: entry for path, entry in stale.items() if entry.link}
    removed, _ = remove(root, links)  # before folders are made, which would be made behind them
    folders, ready = list(before.folders), list[tuple[Path, Path]]()
    if (
        broken is not None
    ):  # which of them were there before us is not known any more; ours in name, they go when they are empty
        folders += {
            str(above)
            for path in after
            for above in PurePosixPath(path).parents
            if str(above).startswith((host.extension, host.models))
        }
    try:
        for path in [host.record, *todo]:
            folders += make_folders(root, str(PurePosixPath(path).parent))
        # Of the old and the new, so that an uninstall finds every file of ours whatever happens from here on.
        write_record(root / host.record, Record({**known, **after}, tuple(folders), version, created))
        with report.task(
            f"copying to {host.title}", total=sum(wanted[path][1].bytes for path in todo) >> 20
        ) as advance:
            for path in (path for path in todo if not wanted[path][1].link):
                ready.append((copy_beside(*wanted[path], root / path), root / path))
                advance(wanted[path][1].bytes >> 20, note=PurePosixPath(path).name)
        for temporary, target in sorted(
            ready, key=lambda pair: pair[1].name in (MANIFEST_NAME, "__init__.py")
        ):  # what makes a host look comes last
            os.replace(temporary, target)
    except BaseException:
        _take_back(host, root, [temporary for temporary, _ in ready], {**known, **after}, folders, version, created)
        raise
    gone, _ = remove(root, {path: entry for path, entry in stale.items() if path not in links})
    folders = list(prune_folders(root, folders))
    for path in (path for path in todo if wanted[path][1].link):
        folders += make_folders(root, str(PurePosixPath(path).parent))
        (root / path).unlink(missing_ok=True)
        os.symlink(wanted[path][1].link, root / path, target_is_directory=wanted[path][0].is_dir())
    write_record(root / host.record, Record(after, tuple(folders), version, created))
    return Done(tuple(todo), tuple(sorted([*removed, *gone])), tuple(unchanged), notes=tuple(notes))


_AWAY = "move it away, then install again"


def _lies_there(
    host: Host, root: Path, path: str, entry: Entry, known: Mapping[str, Entry], stale: Mapping[str, Entry]
) -> str:
    """`same`, `ours` (to be replaced) or `nothing`.

    Raises:
        ArtifactError: something that is not ours, or that was changed.
    """
    place, ours = root / path, (host.extension, host.models)
    for above in map(str, PurePosixPath(path).parents):
        if (root / above).is_symlink() and (
            above == host.extension or any(above.startswith(f"{folder}/") for folder in ours)
        ):
            if above in stale and stale[above].is_at(root / above):
                return "nothing"
            raise ArtifactError(
                "is a link that is not ours, and files would be written behind it", where=root / above, hint=_AWAY
            )
        if os.path.lexists(root / above) and not (root / above).is_dir():
            raise ArtifactError("is a file that is not ours, and a folder goes here", where=root / above, hint=_AWAY)
    if entry.is_at(place):
        return "same"
    if not os.path.lexists(place):
        return "nothing"
    if path in known and known[path].is_at(place):
        return "ours"
    inside = (
        {
            found.relative_to(root).as_posix()
            for found in place.rglob("*")
            if not found.is_dir() and found.parent.name != "__pycache__"
        }
        if place.is_dir() and not place.is_symlink()
        else set()
    )
    if inside and inside <= stale.keys():
        return "ours"
    what = "was changed since it was installed" if path in known else "is there already and is not ours"
    raise ArtifactError(
        what,
        where=place,
        hint=_AWAY + (", or give the engine another name: --name NAME" if engine_of(host, path) else ""),
    )


def _take_back(
    host: Host,
    root: Path,
    copies: Sequence[Path],
    files: Mapping[str, Entry],
    folders: Sequence[str],
    version: str,
    created: str,
) -> None:
    """After a failure: no copies, and a record of what is there, or nothing of ours at all."""
    with suppress(OSError):
        for copy in copies:
            copy.unlink(missing_ok=True)
        there = {path: entry for path, entry in files.items() if os.path.lexists(root / path)}
        if not there:
            (root / host.record).unlink(missing_ok=True)
        left = prune_folders(root, folders)
        if there:
            write_record(root / host.record, Record(there, left, version, created))


def _check_folders(host: Host, root: Path) -> None:
    """Refuse places that cannot be written to before anything is.

    Raises:
        StorageError: a link to nowhere, a file where a folder goes, or no permission.
    """
    for place in (root / host.extension, root / host.models):
        existing = _existing(place)
        if dangling := [path for path in (place, *place.parents) if path.is_symlink() and not path.exists()]:
            raise StorageError(
                f"is a link to {os.readlink(dangling[0])}, which is not there",
                where=dangling[0],
                hint="mount or make that folder, or remove the link",
            )
        if not existing.is_dir():
            raise StorageError("is a file, and a folder goes here", where=existing, hint="move it away")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise StorageError(
                "no permission to write here", where=existing, hint=f"run this as the user who runs {host.title}"
            )


def _existing(place: Path) -> Path:
    return next(path for path in (place, *place.parents) if path.exists())


@contextmanager
def _writing(root: Path, host: Host) -> Iterator[None]:
    """What the file system says, as a `StorageError` with a way out that fits an install."""
    try:
        yield
    except OSError as error:
        known = storage_error(error, error.filename or root)
        what = known.what if known else f"the file system failed ({error.strerror or error})"
        no_links = known is not None and getattr(error, "winerror", None) == 1314
        hint = (
            known.hint if known and no_links else f"close {host.title} if it runs, and run this as the user who runs it"
        )
        raise StorageError(what, where=error.filename or root, hint=hint) from error


@dataclass(frozen=True)
class Done:
    """What an install or uninstall did, by path in the host's folder.

    Attributes:
        written, removed, unchanged: as they say; a replaced file counts as written.
        kept: path → why it was left where it is.
        notes: what else a person should know.
    """

    written: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read(host: Host, root: Path) -> tuple[Record | None, str | None]:
    """The record of what is installed in the host's folder, and what is wrong with it; see `read_record`."""
    return read_record(root / host.record, (host.extension, host.models))


def _version() -> str:
    try:
        return metadata.version("sdcompress")
    except metadata.PackageNotFoundError:
        return "a checkout"
