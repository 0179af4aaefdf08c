"""The standard streams: they accept every character, also where they are closed, and end without a lost line."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from sdcompress_engines.errors import escape_controls, system_error

BROKEN_PIPE_STATUS = 141
"""Exit status of a program whose output nobody reads any more: 128 + SIGPIPE, as shells report it."""

_SIGNS = {
    **dict.fromkeys("─━–—‐‑−╸╺", "-"),
    **dict.fromkeys("│┃", "|"),
    **dict.fromkeys("“”„«»", '"'),
    **dict.fromkeys("‘’‚", "'"),
    **dict.fromkeys("µμ", "u"),
    **dict.fromkeys("•·", "*"),
    **dict.fromkeys("×✗✘", "x"),
    **dict.fromkeys("✓✔", "+"),
    **dict.fromkeys("\u00a0\u2009\u202f", " "),
    "█": "#",
    "→": "->",
    "←": "<-",
    "≥": ">=",
    "≤": "<=",
    "≠": "!=",
    "≈": "~",
    "±": "+-",
    "…": "...",
    "²": "^2",
}
_ASCII = "sdcompress_ascii"
_NAMES = {1: "standard output", 2: "standard error"}


class OutputClosed(Exception):
    """Nobody reads stdout or stderr any more. This is no `OSError`, of which click hides the broken pipes."""


class _Output(io.FileIO):
    """A file descriptor whose errors name it: an `OSError` of a write has no file name otherwise.

    Raises:
        OutputClosed: nobody reads it.
        OSError: the write fails otherwise, as on a full disk.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = _NAMES[self.fileno()]
            if error.errno in (errno.EPIPE, errno.EINVAL):  # EINVAL: on Windows
                raise OutputClosed from error
            raise


def prepare_streams() -> None:
    """Let stdout and stderr take every character.

    A redirected stream is in UTF-8: on Windows, its code page lacks some of the characters that the commands print. A
    terminal, and an encoding that `PYTHONIOENCODING` names, stay as they are; a character that they lack becomes a sign
    of ASCII, or an escape such as `\\u732b`. A closed stream becomes the null device, so that no file that is opened
    later gets its number.
    """
    codecs.register_error("sdcompress", _replace_characters)
    codecs.register(_find_ascii)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, _open_null(number))
    sys.stdout, sys.stderr = _accept_all(sys.stdout, 1), _accept_all(sys.stderr, 2)


def close_streams(status: int) -> int:
    """Write out what stdout and stderr hold; returns the exit status.

    Args:
        status: of the command. It stays, unless it is 0 and stdout cannot be written.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OutputClosed:
            _drop(stream)
            status = status or BROKEN_PIPE_STATUS
        except (OSError, ValueError) as error:
            _drop(stream)
            if stream is sys.stdout and status == 0:
                print_error(str(system_error(error) or error))
                status = 1
    return status


def print_error(text: str) -> None:
    """Print a line on stderr. If stderr takes no more, nothing is printed: the exit status has to be enough."""
    with suppress(OSError, ValueError, OutputClosed):
        print(f"sdcompress: {text}", file=sys.stderr, flush=True)


def _accept_all(stream: TextIO, number: int) -> TextIO:
    """Returns a stream that takes every character, and whose errors name it.

    Args:
        stream: a standard stream. One that is not a file, as in tests, is returned as it is.
        number: of its file descriptor.
    """
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    chosen = stream.isatty() or os.environ.get("PYTHONIOENCODING")
    encoding = stream.encoding if chosen else "utf-8"
    if codecs.lookup(encoding).name == "ascii":
        encoding = _ASCII  # click takes `ascii` for a mistake, and writes UTF-8 in its place
    if type(getattr(stream.buffer, "raw", stream.buffer)) is not io.FileIO or stream.fileno() != number:
        stream.reconfigure(encoding=encoding, errors="sdcompress")
        return stream
    stream.flush()
    buffer = io.BufferedWriter(_Output(number, "w", closefd=False))
    by_line = stream.line_buffering or stream.write_through
    return io.TextIOWrapper(buffer, encoding, "sdcompress", line_buffering=by_line)


def _replace_characters(error: UnicodeError) -> tuple[str, int]:
    """Returns what is written for the characters that an encoding lacks, and where the writing goes on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    signs = (_SIGNS.get(character) or escape_controls(character) for character in missing)
    return "".join(signs).encode("ascii", "backslashreplace").decode("ascii"), error.end


def _find_ascii(name: str) -> codecs.CodecInfo | None:
    """Returns the codec of ASCII under the name `_ASCII`."""
    if name != _ASCII:
        return None
    ascii_codec = codecs.lookup("ascii")
    return codecs.CodecInfo(
        ascii_codec.encode,
        ascii_codec.decode,
        incrementalencoder=ascii_codec.incrementalencoder,
        incrementaldecoder=ascii_codec.incrementaldecoder,
        name=_ASCII,
    )


def _open_null(number: int) -> io.TextIOWrapper:
    try:
        os.fstat(number)
    except OSError:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
    return open(os.devnull, "r" if number == 0 else "w", encoding="utf-8")


def _drop(stream: TextIO) -> None:
    """Send a stream's rest to the null device, so that Python does not fail on it again when it ends."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
