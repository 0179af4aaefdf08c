"""What is in the way of an install: files and links of others, and installed files that were changed since."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from sdcompress_engines.errors import ArtifactError
from sdcompress_engines.paths import is_link

from sdcompress.hosts.engine_folder import engine_of
from sdcompress.hosts.entry import Entry
from sdcompress.hosts.host import Host

_HINT = "move it away, then install again"


def check_target(
    host: Host, root: Path, path: str, entry: Entry, recorded: Mapping[str, Entry], stale: Mapping[str, Entry]
) -> bool:
    """Returns True if `entry` lies at `path` already, and False if it may be written there.

    Args:
        host: the program.
        root: its folder.
        path: where the file or link goes, in `root`.
        entry: what goes there.
        recorded: all that installs have written, by path.
        stale: the part of `recorded` that this install removes.

    Raises:
        ArtifactError: something else lies there that sdcompress has not installed, or that was changed since.
    """
    place = root / path
    if _is_behind_stale_link(host, root, path, stale):
        return False
    if entry.is_at(place):
        return True
    if not os.path.lexists(place) or (path in recorded and recorded[path].is_at(place)):
        return False
    inside = _files_in(root, place)
    if inside and inside <= stale.keys():
        return False
    raise ArtifactError(
        "was changed since it was installed"
        if path in recorded
        else "is there already and was not installed by sdcompress",
        where=place,
        hint=_HINT + (", or give the engine another name: --name NAME" if engine_of(host, path) else ""),
    )


def check_stale(root: Path, stale: Mapping[str, Entry]) -> None:
    """Check that the files to be removed are still as they were installed.

    Raises:
        ArtifactError: one of them was changed.
    """
    for path, entry in stale.items():
        if os.path.lexists(root / path) and not entry.is_at(root / path):
            raise ArtifactError(
                "was changed since it was installed, and this version does not contain it",
                where=root / path,
                hint=_HINT,
            )


def _is_behind_stale_link(host: Host, root: Path, path: str, stale: Mapping[str, Entry]) -> bool:
    """Returns whether a folder above `path` is a link that this install removes.

    Raises:
        ArtifactError: a folder above is another link inside our folders, or a file.
    """
    for above in map(str, PurePosixPath(path).parents):
        if host.owns(above) and is_link(root / above):
            if above in stale and stale[above].is_at(root / above):
                return True
            raise ArtifactError(
                "was not installed by sdcompress: it is a link, and files would be written behind it",
                where=root / above,
                hint=_HINT,
            )
        if os.path.lexists(root / above) and not (root / above).is_dir():
            raise ArtifactError(
                "was not installed by sdcompress: it is a file, and a folder is needed here",
                where=root / above,
                hint=_HINT,
            )
    return False


def _files_in(root: Path, place: Path) -> set[str]:
    """Returns the paths of all files in a folder but compiled ones, or nothing if it is a link or a file."""
    if place.is_symlink() or not place.is_dir():
        return set()
    return {
        found.relative_to(root).as_posix()
        for found in place.rglob("*")
        if not found.is_dir() and found.parent.name != "__pycache__"
    }
