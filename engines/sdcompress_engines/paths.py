"""Names of files that a manifest, an index or a graph holds: data, never a way out of their folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import ArtifactError, SdCompressError, UsageError, shorten

_FORBIDDEN = re.compile(r"[\\:\x00-\x1f\x7f\ud800-\udfff]")
_WINDOWS_DEVICE = re.compile(r"(con(in\$|out\$)?|prn|aux|nul|(com|lpt)[\d¹²³])( *\..*)?", re.IGNORECASE)
_LONGEST = 1024
"""Most characters of a name; the longest in use have about 100."""


def is_plain_path(name: object) -> bool:
    """Returns whether a name stays in its folder, on Linux and Windows.

    Such a name is relative, with `/`, without `..`, without a drive, without control characters and in Unicode. Its
    parts do not end in a dot or a space, which Windows leaves out, and are none of the devices of Windows.
    """
    return (
        isinstance(name, str)
        and len(name) <= _LONGEST
        and not _FORBIDDEN.search(name)
        and all(_is_plain_part(part) for part in name.split("/"))
    )


def _is_plain_part(part: str) -> bool:
    return (
        part != ""
        and part[-1] not in ". "
        and len(part.encode(errors="replace")) <= 255
        and not _WINDOWS_DEVICE.fullmatch(part)
    )


def is_link(path: Path) -> bool:
    """Returns whether a path is a symbolic link, or a junction of Windows."""
    is_junction = getattr(os.path, "isjunction", None)  # Python 3.12
    return path.is_symlink() or (is_junction is not None and is_junction(path))


def file_inside(
    folder: Path,
    name: object,
    *,
    source: Path,
    links: bool = False,
    error: type[SdCompressError] = ArtifactError,
) -> Path:
    """Returns the path of a file that a manifest, a record, an index or a graph names: always one inside `folder`.

    Every reader of such names takes its paths from here. The files of a Hugging Face cache may be links, see
    `is_in_hub_cache`.

    Args:
        folder: the artifact.
        name: relative, with `/` on every system.
        source: the file that holds the name, for the message.
        links: accept all links, as people set them in the folder of a model.
        error: the class to raise.

    Raises:
        SdCompressError: of the class `error`: the name leads out of the folder, or is a link or lies behind one.
    """
    if not is_plain_path(name):
        raise error(f"names the file {shorten(repr(name), 120)}", where=source, expected=f"a name inside {folder}")
    path = folder
    for part in str(name).split("/"):
        path = path / part
        if not links and is_link(path) and not is_in_hub_cache(path):
            raise error(
                f"is a link, to {os.readlink(path)}",
                where=path,
                expected="a file",
                hint="put a copy of the file in its place",
            )
    return path


def check_unicode(path: Path, error: type[SdCompressError]) -> None:
    """Refuse a path of other bytes than Unicode: safetensors and tokenizers cannot open it.

    Args:
        path: a file or folder that they will write or read.
        error: the class to raise.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as problem:
        raise error(
            "has bytes in its path that are not UTF-8", where=path, expected="a path that safetensors can open"
        ) from problem


def expand_user(path: str | os.PathLike[str]) -> Path:
    """Returns a path whose leading `~` or `~user` is replaced by the home folder.

    Raises:
        UsageError: there is no such user, or the user has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(
            "the home folder of this path is not known",
            where=path,
            expected="a path without ~",
            hint="set HOME to your home folder",
        ) from error


def hide_home(text: str) -> str:
    """Returns a text in which the home folder is `~`. A home folder that is not known, or the root, hides nothing."""
    home = os.path.expanduser("~").rstrip("/\\")
    return text if home in ("", "~") else text.replace(home, "~")


def is_in_hub_cache(link: Path) -> bool:
    """Returns whether a link is one that huggingface_hub makes, to a file of the same repository.

    It leads from `models--OWNER--NAME/snapshots/REVISION/...` to a file in `models--OWNER--NAME/blobs`. The folder of
    the artifact may be a link to that place, as `sdcompress install --link` makes one.
    """
    for snapshots in (*link.absolute().parents, *(link.parent.resolve() / link.name).parents):
        repository = snapshots.parent
        if snapshots.name == "snapshots" and repository.name.startswith("models--"):
            target = link.resolve()
            return target.parent == repository.resolve() / "blobs" and target.is_file()
    return False
