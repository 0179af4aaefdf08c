"""Put files into a host's folder: all of them or none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path, PurePosixPath

from sdcompress_engines.files import replace_file
from sdcompress_engines.manifest import MANIFEST_NAME
from sdcompress_engines.output_folders import nearest_existing, require_space
from sdcompress_engines.progress import Reporter

from sdcompress.hosts.conflicts import check_stale, check_target
from sdcompress.hosts.engine_folder import engine_of
from sdcompress.hosts.entry import Entry, Item
from sdcompress.hosts.files import copy_beside, make_folders, missing_folders, prune_folders, remove_unchanged
from sdcompress.hosts.host import Host
from sdcompress.hosts.record import Record, back_up_record, read_host_record, write_record
from sdcompress.hosts.storage import check_links

_LAST = (MANIFEST_NAME, "__init__.py")
"""Files that make a host look into a folder; they are renamed into their place last."""


@dataclass(frozen=True)
class Outcome:
    """What an install or uninstall did. Paths are relative to the host's folder.

    Attributes:
        written: new and replaced files.
        removed: deleted files.
        unchanged: files that were already installed.
        kept: path → the reason why it was not deleted.
        notes: what else the user should know.
    """

    written: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Change:
    """The difference between what is installed and what is wanted, by path in the host's folder.

    Attributes:
        items: everything that is wanted.
        to_write: the paths of `items` to be written.
        unchanged: the paths of `items` that are installed already.
        foreign: the paths of `items` that somebody else has put there with equal content. They are not recorded.
        stale: what is recorded, belongs to the plugin or an engine of this install, and is not wanted any more.
        before: all that is recorded now.
    """

    items: Mapping[str, Item]
    to_write: tuple[str, ...]
    unchanged: tuple[str, ...]
    foreign: tuple[str, ...]
    stale: Mapping[str, Entry]
    before: Mapping[str, Entry]

    @property
    def after(self) -> dict[str, Entry]:
        """All that will be recorded."""
        left = {path: entry for path, entry in self.before.items() if path not in self.stale}
        return left | {path: item.entry for path, item in self.items.items() if path not in self.foreign}

    @property
    def stale_links(self) -> dict[str, Entry]:
        return {path: entry for path, entry in self.stale.items() if entry.link}

    @property
    def bytes_to_write(self) -> int:
        return sum(self.items[path].entry.bytes for path in self.to_write)

    def select(self, *, links: bool) -> list[str]:
        """Returns the paths to write that are links, or those that are copies."""
        return [path for path in self.to_write if bool(self.items[path].entry.link) == links]


def put_files(host: Host, root: Path, items: Mapping[str, Item], engines: set[str], report: Reporter) -> Outcome:
    """Replace the plugin and the named engines in a host's folder by the wanted files.

    All copies are complete before any is renamed into its place. If one fails, the host is left as it was.

    Args:
        host: the program.
        root: its folder.
        items: path in the folder → what to put there.
        engines: the names of the engines that `items` replaces. Other installed engines stay.
        report: shows the progress of the copies.

    Raises:
        ArtifactError: a file in the way that sdcompress has not installed, or that was changed since.
        StorageError: there is not enough space.
    """
    record, broken = read_host_record(host, root)
    change = _compare(host, root, items, engines, record, trust_equal=broken is not None)
    version = _installed_version()
    notes = []
    if change.foreign:
        notes.append(
            f"{len(change.foreign)} files were there already with the same content: an uninstall leaves them in place"
        )
    if (
        not change.to_write
        and not change.stale
        and record is not None
        and (record.files, record.version) == (change.after, version)
    ):
        return Outcome(unchanged=change.unchanged, notes=tuple(notes))
    require_space(root / host.models, change.bytes_to_write, "the install")
    after, folders = change.after, list(record.folders if record else ())
    if broken is not None:
        backup = back_up_record(root / host.record)
        after[backup.relative_to(root).as_posix()] = Entry.of(backup)
        folders += _host_folders(host, after)
        notes.append(
            f"the record of earlier installs was broken ({broken}) and is kept as {backup.name}. Files with the same"
            " content count as installed by sdcompress again"
        )
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    removed = _write(host, root, change, Record(after, tuple(folders), version, created), report)
    return Outcome(change.to_write, tuple(removed), change.unchanged, notes=tuple(notes))


def _compare(
    host: Host, root: Path, items: Mapping[str, Item], engines: set[str], record: Record | None, *, trust_equal: bool
) -> _Change:
    """Returns what must change.

    Args:
        trust_equal: count files with the wanted content as installed by sdcompress even if no record lists them.

    Raises:
        ArtifactError: as in `put_files`.
    """
    before = dict(record.files) if record else {}
    stale = {
        path: entry for path, entry in before.items() if path not in items and engine_of(host, path) in {None, *engines}
    }
    to_write, unchanged, foreign = [], [], []
    for path, item in items.items():
        if not check_target(host, root, path, item.entry, before, stale):
            to_write.append(path)
        elif path in before or trust_equal:
            unchanged.append(path)
        else:
            foreign.append(path)
    check_stale(root, stale)
    return _Change(items, tuple(to_write), tuple(unchanged), tuple(foreign), stale, before)


def _write(host: Host, root: Path, change: _Change, record: Record, report: Reporter) -> list[str]:
    """Carry out a change, write the record, and return the removed paths."""
    if change.select(links=True):
        check_links(nearest_existing(root / host.models))  # before anything is removed
    folders, copies = list(record.folders), list[tuple[Path, Path]]()
    links = {path: entry for path, entry in change.stale_links.items() if entry.is_at(root / path)}
    # Until the end the record lists old and new files, so that an uninstall finds all of them whatever happens.
    both = {**change.before, **record.files}
    try:
        # Links go first: a folder that replaces a link must not be created behind it.
        removed, _ = remove_unchanged(host, root, links)
        folders += missing_folders(root, host.record, *change.to_write)
        make_folders(root, host.record)
        write_record(root / host.record, Record(both, tuple(folders), record.version, record.created))
        make_folders(root, *change.to_write)
        with report.task(f"copying to {host.title}", total=change.bytes_to_write >> 20) as advance:
            for path in change.select(links=False):
                item = change.items[path]
                copies.append((copy_beside(item, root / path), root / path))
                advance(item.entry.bytes >> 20, note=PurePosixPath(path).name)
        for copy, target in sorted(copies, key=lambda pair: pair[1].name in _LAST):
            replace_file(copy, target)
    except BaseException:
        left = Record(both, tuple(folders), record.version, record.created)
        _roll_back(host, root, [copy for copy, _ in copies], change, links, left)
        raise
    stale_files = {path: entry for path, entry in change.stale.items() if not entry.link}
    removed += remove_unchanged(host, root, stale_files)[0]
    folders = list(prune_folders(host, root, folders))
    for path in change.select(links=True):
        item = change.items[path]
        folders += make_folders(root, path)
        (root / path).unlink(missing_ok=True)
        os.symlink(item.entry.link, root / path, target_is_directory=item.source.is_dir())
    write_record(root / host.record, Record(record.files, tuple(folders), record.version, record.created))
    return sorted(removed)


def _roll_back(
    host: Host, root: Path, copies: Sequence[Path], change: _Change, links: Mapping[str, Entry], record: Record
) -> None:
    """After a failure, delete the copies, restore the links and record what is there.

    If nothing is left, the record is deleted.

    Args:
        host: the program.
        root: its folder.
        copies: that are not in their place.
        change: that failed.
        links: that were there before.
        record: of the old and the new files.
    """
    with suppress(OSError):
        for copy in copies:
            copy.unlink(missing_ok=True)
        folders = [*prune_folders(host, root, record.folders), *_restore_links(root, links)]
        present = {
            path: entry
            for path, entry in record.files.items()
            if os.path.lexists(root / path) and host.find_link_above(root, path) is None
        }
        replaced = {path: change.before[path] for path in change.to_write if path in change.before}
        present |= {path: entry for path, entry in replaced.items() if entry.is_at(root / path)}
        if present:
            write_record(root / host.record, Record(present, tuple(folders), record.version, record.created))
        else:
            (root / host.record).unlink(missing_ok=True)
            prune_folders(host, root, folders)


def _restore_links(root: Path, links: Mapping[str, Entry]) -> list[str]:
    """Create the links that are not there, except where that fails. Returns the folders that were created for them."""
    folders: list[str] = []
    for path, entry in links.items():
        with suppress(OSError):
            if not os.path.lexists(root / path):
                folders += make_folders(root, path)
                os.symlink(entry.link, root / path, target_is_directory=Path(entry.link).is_dir())
    return folders


def _host_folders(host: Host, paths: Iterable[str]) -> set[str]:
    """Returns the folders of these paths that belong to sdcompress by name.

    Without a record nobody knows whether they existed before. An uninstall removes them if they are empty.
    """
    return {
        str(above) for path in paths for above in PurePosixPath(path).parents if str(above).startswith(host.folders)
    }


def _installed_version() -> str:
    try:
        return metadata.version("sdcompress")
    except metadata.PackageNotFoundError:
        return "a checkout"
