"""Removing user names, host names and absolute paths from text, so that it can be pasted into an issue."""

from __future__ import annotations

import getpass
import os
import platform
import re
from contextlib import suppress
from pathlib import Path

from sdcompress_engines.paths import expand_user

_COMMON = {"root", "user", "admin", "administrator", "localhost", "ubuntu"}
"""Names of users and machines that identify nobody."""
_SHORTEST = 3
_PART = r"[^\s'\"<>|:;,()\[\]{}*?\\/]"
_UNIX = re.compile(rf"(?<![\w.~$/:\\-])/(?:{_PART}+/)+({_PART}*)")
_WINDOWS = re.compile(rf"(?<![\w])(?:[A-Za-z]:|\\\\{_PART}+)[\\/]+(?:{_PART}+[\\/]+)*({_PART}*)")
_QUOTED = re.compile(r"(['\"])((?:/|[A-Za-z]:[\\/]|\\\\)[^'\"\n]*[\\/])([^'\"\n]*)\1")


def anonymize(text: str, *, names: bool = True) -> str:
    """Returns a text without what names a person or a machine.

    The cache folder becomes `$SDCOMPRESS_CACHE`, and the home folder `~`. Every other absolute path keeps its last part
    only, as in `.../unet.onnx`. The names of the user and of the machine become USER and HOST.

    Args:
        text: to show.
        names: replace the names too. False for a command, where the same word can have another meaning.
    """
    for folder, sign in _known_folders():
        text = re.sub(re.escape(folder) + r"(?![\w.-])", sign, text, flags=_case())
    text = _QUOTED.sub(lambda match: f"{match[1]}.../{match[3]}{match[1]}", text)
    text = _WINDOWS.sub(lambda match: f".../{match[1]}", text)
    text = _UNIX.sub(lambda match: f".../{match[1]}", text)
    for name, sign in _known_names() if names else ():
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", sign, text, flags=re.IGNORECASE)
    return text


def _case() -> re.RegexFlag:
    return re.IGNORECASE if os.name == "nt" else re.NOFLAG


def _known_folders() -> list[tuple[str, str]]:
    """Returns the folders that have a short name, as written and as resolved, the longest first."""
    folders = {str(_home()): "~", str(_home().resolve()): "~"}
    if cache := os.environ.get("SDCOMPRESS_CACHE"):
        place = expand_user(cache)
        folders |= {str(place.absolute()): "$SDCOMPRESS_CACHE", str(place.resolve()): "$SDCOMPRESS_CACHE"}
    usable = [(folder, sign) for folder, sign in folders.items() if len(Path(folder).parts) > 1]
    return sorted(usable, key=lambda pair: -len(pair[0]))


def _home() -> Path:
    """Returns the home folder, or `~` where it is not known."""
    return Path(os.path.expanduser("~"))


def _known_names() -> list[tuple[str, str]]:
    users = {_home().name}
    with suppress(OSError, KeyError, ImportError):  # the system knows no name for this user
        users.add(getpass.getuser())
    host = platform.node()
    names = [(name, "USER") for name in users] + [(name, "HOST") for name in (host, host.partition(".")[0])]
    kept = {name: sign for name, sign in names if len(name) >= _SHORTEST and name.lower() not in _COMMON}
    return sorted(kept.items(), key=lambda pair: -len(pair[0]))
