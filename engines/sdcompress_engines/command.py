"""Commands to type, for hints and reports."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterable


def command_line(words: Iterable[str], *, windows: bool = sys.platform == "win32") -> str:
    """Returns one line that the shell of this system splits into these words.

    cmd and PowerShell do not know the single quotes of `sh`.

    Args:
        words: the command and its arguments.
        windows: quote for Windows; by default where this runs on Windows.
    """
    return " ".join(_quote_for_windows(word) for word in words) if windows else shlex.join(words)


def as_argument(name: object) -> str:
    """Returns a path, or another name, as a word that no command takes for an option: `./-x` for `-x`."""
    text = str(name)
    return f"./{text}" if text.startswith("-") else text


def _quote_for_windows(word: str) -> str:
    quoted = subprocess.list2cmdline([word])  # backslashes and quotes inside the word, as programs read them
    plain = quoted.startswith('"') or re.fullmatch(r"[\w@%+=:.\\/~-]+", quoted)
    return quoted if plain else f'"{quoted}"'
