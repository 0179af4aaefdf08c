"""File operations of an install: copies beside their place, removal of unchanged files only, empty folders."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

from sdcompress_engines.errors import ArtifactError
from sdcompress_engines.files import sync
from sdcompress_engines.paths import is_link

from sdcompress.hosts.entry import Entry, Item
from sdcompress.hosts.host import Host

PARTIAL = ".sdcompress-partial"
"""The suffix of a copy that has not been renamed into its place yet."""
_CHUNK_BYTES = 1 << 20


def create_partial(target: Path) -> Path:
    """Create an empty file beside `target`, with the permissions of an ordinary file, and return its path."""
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=PARTIAL, dir=target.parent)
    os.close(handle)
    Path(name).chmod(0o644)
    return Path(name)


def copy_beside(item: Item, target: Path) -> Path:
    """Copy a file beside `target`, to be renamed into its place later, and return the copy's path.

    Raises:
        ArtifactError: the source has changed since its entry was computed.
    """
    partial, digest = create_partial(target), hashlib.sha256()
    try:
        with partial.open("wb") as output, item.source.open("rb") as source:
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                output.write(chunk)
        sync(partial)
        if digest.hexdigest() != item.entry.sha256:
            raise ArtifactError("changed while it was copied", where=item.source, hint="run the same command again")
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return partial


def remove_unchanged(host: Host, root: Path, entries: Mapping[str, Entry]) -> tuple[list[str], dict[str, str]]:
    """Delete the files and links that are still as they were installed, and the byte code compiled from them.

    Nothing behind a link is deleted.

    Args:
        host: the program.
        root: its folder.
        entries: path in `root` → what was installed there.

    Returns:
        The deleted paths, and path → reason of those that were kept.
    """
    removed, kept = [], {}
    for name, entry in entries.items():
        path = root / name
        if (link := host.find_link_above(root, name)) is not None:
            kept[name] = f"lies behind the link {link}"
        elif entry.is_at(path):
            path.unlink()
            removed.append(name)
            if path.suffix == ".py":
                _remove_compiled(path)
        elif os.path.lexists(path):
            kept[name] = "was changed since it was installed"
    return removed, kept


def _remove_compiled(source: Path) -> None:
    cache = source.parent / "__pycache__"
    for compiled in cache.iterdir() if cache.is_dir() and not is_link(cache) else ():
        if re.fullmatch(rf"{re.escape(source.stem)}\.[\w.-]+\.pyc", compiled.name):
            compiled.unlink(missing_ok=True)
    with suppress(OSError):  # there is no such folder, or it holds other files
        cache.rmdir()


def missing_folders(root: Path, *paths: str) -> list[str]:
    """Returns the folders above these paths in `root` that are not there, outermost first."""
    above = {folder for path in paths for folder in PurePosixPath(path).parents}
    return [str(folder) for folder in sorted(above) if not (root / folder).exists()]


def make_folders(root: Path, *paths: str) -> list[str]:
    """Create the missing folders above these paths in `root`, and return them, outermost first."""
    missing = missing_folders(root, *paths)
    for folder in missing:
        (root / folder).mkdir()
    return missing


def prune_folders(host: Host, root: Path, folders: Iterable[str]) -> tuple[str, ...]:
    """Remove those of `folders` that are empty and not behind a link, and return the others."""
    left = []
    for folder in sorted(set(folders), key=lambda name: -len(PurePosixPath(name).parts)):
        if host.find_link_above(root, folder) is not None:
            continue
        try:
            (root / folder).rmdir()
        except FileNotFoundError:
            continue
        except OSError:  # it is not empty, or not a folder any more
            left.append(folder)
    return tuple(sorted(left))


def find_leftovers(host: Host, root: Path) -> list[str]:
    """Returns the partial copies that an interrupted install has left, as paths in `root`; links are not followed."""
    return sorted(
        path.relative_to(root).as_posix()
        for folder in host.folders
        if (root / folder).is_dir() and not (host.owns(folder) and is_link(root / folder))
        for path in (root / folder).rglob(f".*{PARTIAL}")
        if path.is_file() and not is_link(path)
    )
