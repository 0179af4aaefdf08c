"""Names of files that a manifest, an index or a graph holds: data, never a way out of their folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import ArtifactError, UsageError, shorten


def is_plain_path(name: object) -> bool:
    """Returns whether a name stays in its folder, on Linux and Windows.

    Such a name is relative, with `/`, without `..`, without a drive, without control characters and in Unicode.
    """
    return (
        isinstance(name, str)
        and not re.search(r"[\\:\x00-\x1f\x7f\ud800-\udfff]", name)
        and all(part not in ("", ".", "..") and len(part.encode(errors="replace")) <= 255 for part in name.split("/"))
    )


def file_inside(folder: Path, name: object, *, source: Path, links: bool = False) -> Path:
    """Returns the path of a file that a manifest, a record, an index or a graph names: always one inside `folder`.

    Every reader of such names takes its paths from here.

    Args:
        folder: the artifact.
        name: relative, with `/` on every system.
        source: the file that holds the name, for the message.
        links: accept links, as of a hub's cache, whose files are links into its own store.

    Raises:
        ArtifactError: the name leads out of the folder, or is a link or lies behind one.
    """
    if not is_plain_path(name):
        raise ArtifactError(
            f"names the file {shorten(repr(name), 120)}", where=source, expected=f"a name inside {folder}"
        )
    path = folder
    for part in str(name).split("/"):
        path = path / part
        if not links and path.is_symlink():
            raise ArtifactError(
                f"is a link, to {os.readlink(path)}",
                where=path,
                expected="a file",
                hint="put a copy of the file in its place",
            )
    return path


def expand_user(path: str | os.PathLike[str]) -> Path:
    """Returns a path whose leading `~` or `~user` is replaced by the home folder.

    Raises:
        UsageError: there is no such user, or the user has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(
            "the home folder of this path is not known", where=path, expected="a path without ~"
        ) from error
