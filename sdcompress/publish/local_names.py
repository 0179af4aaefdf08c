"""Folders of this machine in what is published: each is replaced by the name at its end."""

from __future__ import annotations

import re
from pathlib import PureWindowsPath
from typing import Any

_ALWAYS_PLACES = ("source", "plan")
"""Settings that hold a path where they hold a `/`; others may be a hub id, OWNER/NAME."""
_PLACE = re.compile(r"(/|\\|~|\.{1,2}[\\/]|[A-Za-z]:[\\/]|file:|[\w.-]+@[\w.-]+:).*", re.DOTALL)
_PLACE_WITH_SPACES = re.compile(r"(/[^\s/]+/|\\\\|~[^\s\\/]*[\\/]|\.{1,2}[\\/]|[A-Za-z]:[\\/]|file:).*", re.DOTALL)
"""As in `C:\\Users\\Ada Lovelace\\teacher`; `/a b` may be a prompt."""
_RELATIVE = re.compile(r"[^\s/\\:]+([/\\][^\s/\\:]*){2,}|[^\s/\\:]+\\[^\s]*")
_IN_TEXT = re.compile(r"""(?<![\w/:.\\])(?:file://|~|[A-Za-z]:(?=[\\/]))?(?:[\\/]+[^\s\\/:"'<>|,;)]+){2,}[\\/]?""")
"""A path of two or more parts within a sentence."""


def without_places(value: Any, key: str = "") -> Any:
    """Returns a JSON value in which the paths of this machine are replaced by the names at their ends.

    A hub id, OWNER/NAME, stays.

    Args:
        value: of any kind.
        key: under which it stands in its mapping.
    """
    if isinstance(value, dict):
        return {without_places(name): without_places(each, name) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(each, key) for each in value]
    if not isinstance(value, str):
        return value
    has_spaces = len(value.split()) > 1
    patterns = (_PLACE_WITH_SPACES,) if has_spaces else (_PLACE, _RELATIVE)
    is_place = any(pattern.fullmatch(value) for pattern in patterns)
    if is_place or (key in _ALWAYS_PLACES and not value.startswith("hub:")):
        return _last_part(value)
    return _IN_TEXT.sub(lambda match: _last_part(match[0]), value)


def _last_part(path: str) -> str:
    return PureWindowsPath(path.rstrip("\\/")).name or "local"
