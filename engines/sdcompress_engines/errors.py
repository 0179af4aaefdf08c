"""Every error that a user can meet.

The library raises them. Only the command line turns one into a line and an exit code.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

ANOTHER_OUTPUT = "choose another -o"
"""The end of most hints about an output; `with_place` replaces it."""
_LONGEST_WORD, _LONGEST_PART = 300, 2000
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class SdCompressError(Exception):
    """What failed, where, what was expected, and what to type next, in one line.

    Each part is cut to a readable length, and control characters in it are escaped: a name may come from anywhere.

    Args:
        what: what failed, with the offending value.
        where: the path, key or node it failed at.
        expected: what would have been accepted.
        hint: the next thing to type or to change.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | PathLike[str] | None = None,
        expected: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.expected, self.hint = what, expected, hint
        self.where = None if where is None else fspath(where)
        line = "" if self.where is None else f"{_cut_words(escape_controls(os.fsdecode(self.where)))}: "
        line += _clean(what)
        if expected:
            line += f"; expected {_clean(expected)}"
        if hint:
            line += f". Try: {_clean(hint)}"
        super().__init__(line)

    def with_hint(self, hint: str) -> Self:
        """Returns the same error with a further hint behind its own."""
        hints = f"{self.hint}; {hint}" if self.hint else hint
        return type(self)(self.what, where=self.where, expected=self.expected, hint=hints)

    def with_place(self, place: str) -> Self:
        """Returns the same error of an output that has no `-o`, with the hint to choose `place` instead."""
        hint = (self.hint or "").replace(ANOTHER_OUTPUT, place)
        return type(self)(self.what, where=self.where, expected=self.expected, hint=hint or None)


class UsageError(SdCompressError):
    """A name or an option that does not exist, or a path that does not exist."""

    exit_code = 2


class ModelError(SdCompressError):
    """A checkpoint or pipeline that cannot be used: missing parts, unknown family, wrong shapes."""


class PlanError(SdCompressError):
    """A block-pruning plan that its UNet does not allow."""


class DataError(SdCompressError):
    """A data set that is empty, broken, without captions or of another kind."""


class ArtifactError(SdCompressError):
    """An artifact on disk that is damaged, of another kind, or in the place of an output."""


class StorageError(SdCompressError):
    """A refusal of the file system: no space, no permission, a read-only place."""


class TrainingError(SdCompressError):
    """Training that cannot continue: divergence, or a checkpoint of another run."""


class ExportError(SdCompressError):
    """A graph that could not be exported."""


class EngineError(SdCompressError):
    """An engine that could not be built, loaded or run."""


class NotTrusted(EngineError):
    """An engine or package that was built elsewhere, and that the user has not allowed to run."""


class EngineMismatch(EngineError):
    """An engine that was built for another model, card, version, platform or shape."""


class BackendMissing(SdCompressError):
    """A runtime that is not installed, or a device that this machine does not have."""


class GateFailed(SdCompressError):
    """A measured figure is over its limit."""

    exit_code = 3


_FULL_HINT = f"free some space or {ANOTHER_OUTPUT}"
_FULL = {
    errno.ENOSPC: ("no space left on the device", _FULL_HINT),
    errno.EDQUOT: ("the disk quota is used up", _FULL_HINT),
    errno.EFBIG: (
        "the file is larger than the file system or this account's limit (ulimit -f) allows",
        f"raise the limit or {ANOTHER_OUTPUT}",
    ),
    errno.EIO: ("the disk reports a fault (input/output error)", f"check the disk or {ANOTHER_OUTPUT}"),
    errno.EROFS: ("the file system is read-only", ANOTHER_OUTPUT),
}
"""Refusals of a write that libraries also report as text, by errno."""
_STORAGE = _FULL | {
    errno.EACCES: ("no permission to write here", ANOTHER_OUTPUT),
    errno.EPERM: ("no permission to write here", ANOTHER_OUTPUT),
    errno.EEXIST: ("a part of this path is a file, not a folder", ANOTHER_OUTPUT),
    errno.ENOTDIR: ("a part of this path is a file, not a folder", ANOTHER_OUTPUT),
    errno.EISDIR: ("is a folder, not a file", ANOTHER_OUTPUT),
    errno.ENAMETOOLONG: ("a name in this path is too long", ANOTHER_OUTPUT),
    errno.ELOOP: ("the links in this path lead to each other", ANOTHER_OUTPUT),
    errno.EBUSY: ("is in use by the system, as a mount point is", ANOTHER_OUTPUT),
}
_NO_PROCESS = "the system starts no more processes or threads for this account (ulimit -u)"
_REFUSED = {number: what for number, (what, _) in _STORAGE.items()} | {
    errno.EACCES: "no permission to read or write this",
    errno.EPERM: "no permission to read or write this",
    errno.EEXIST: "exists",
    errno.ENOENT: "does not exist",
    errno.EISDIR: "is a folder, and a file is needed",
    errno.EMFILE: "too many files are open",
    errno.ENFILE: "too many files are open",
    errno.EPIPE: "a program that this command started has ended early",
    errno.EAGAIN: _NO_PROCESS,
}
"""What a refused access means, by errno, where it is not known whether it was to an output."""
_TORCH_WRITES = re.compile(r"file write failed|inline_container\.cc.*unexpected pos")
"""What torch reports where its own writer fails; the reason is nearly always a full disk."""

_IN_USE = ("is in use by another program", "close the program that uses it")
_WINDOWS_STORAGE = {  # by `winerror`, because their errno fits many other faults
    32: _IN_USE,
    33: _IN_USE,
    1224: _IN_USE,
    1314: ("Windows does not allow this account to create links", "turn on Developer Mode, or leave out --link"),
}


def storage_error(error: BaseException, path: str | PathLike[str]) -> StorageError | None:
    """Returns the `StorageError` for an exception, or None where it is no known fault of the file system.

    torch, safetensors and tokenizers report a full disk as exceptions of their own, with the text of the system's.

    Args:
        error: met while `path` was written.
        path: the file or folder, for the message where the error names none. Of a file elsewhere, which was read, the
            hint is not to write elsewhere.
    """
    known: tuple[str, str | None] | None = None
    where: str | bytes | int | PathLike[str] = path
    if isinstance(error, OSError):
        number, where = error.errno or 0, error.filename or path
        known = _WINDOWS_STORAGE.get(getattr(error, "winerror", None) or 0)
        if known is None and number in _STORAGE:
            known = _STORAGE[number] if _is_related(where, path) else (_REFUSED[number], None)
    elif isinstance(error, Exception) and not isinstance(error, SdCompressError):
        known = next((_FULL[number] for number in _FULL if os.strerror(number) in str(error)), None)
        if known is None and _TORCH_WRITES.search(str(error)):
            known = _FULL[errno.ENOSPC]
    if known is None:
        return None
    return StorageError(known[0], where=None if isinstance(where, int) else os.fsdecode(where), hint=known[1])


def _is_related(path: str | bytes | int | PathLike[str], output: str | PathLike[str]) -> bool:
    """Returns whether a path is the output, lies in it, is a temporary file beside it, or holds it."""
    if isinstance(path, int):  # a file descriptor
        return True
    one, other = (os.path.abspath(os.fsdecode(each)).split(os.sep) for each in (path, output))
    if len(one) < len(other):
        return other[: len(one)] == one
    stem = os.path.splitext(other[-1])[0][:40]
    return one[: len(other) - 1] == other[:-1] and stem in one[len(other) - 1]


def system_error(error: BaseException) -> SdCompressError | None:
    """Returns the error for what the system refused to a command: a path, or memory; None for a fault of the program.

    Args:
        error: that nothing nearer to its cause has understood.
    """
    text = str(error)
    if "No usable temporary directory" in text:
        return StorageError(
            "no folder for temporary files can be written", hint="set TMPDIR to one, or free some space"
        )
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return SdCompressError(_NO_PROCESS)
    if isinstance(error, OSError):
        known = _WINDOWS_STORAGE.get(getattr(error, "winerror", None) or 0, (_REFUSED.get(error.errno or 0), None))
        what = known[0] or (shorten(error.strerror) if error.filename and error.strerror else None)
        where = error.filename if isinstance(error.filename, str | bytes) else None
        return StorageError(what, where=None if where is None else os.fsdecode(where), hint=known[1]) if what else None
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return SdCompressError("not enough memory", hint="a smaller size, batch or model, or close other programs")
    if isinstance(error, ValueError) and "embedded null" in text:
        return UsageError("a path holds the character NUL", expected="a path that this system can open")
    if isinstance(error, RuntimeError) and text.startswith("Symlink loop from"):
        return StorageError(_REFUSED[errno.ELOOP], where=text.removeprefix("Symlink loop from ").strip("'"))
    if isinstance(error, RuntimeError) and "home directory" in text:
        return UsageError("the home folder of a path that begins with ~ is not known", expected="a path without ~")
    return None


@contextmanager
def storage_errors(path: str | PathLike[str]) -> Iterator[None]:
    """Turn errors such as "no space" and "no permission", met while `path` is written, into `StorageError`."""
    try:
        yield
    except Exception as error:
        known = storage_error(error, path)
        if known is None:
            raise
        raise known from error


def shorten(error: object, length: int = 300) -> str:
    """Returns an error's message, or another text, in one line of at most `length` characters and dots.

    Control characters in it are escaped.
    """
    line = escape_controls(" ".join(str(error).split()))
    return line if len(line) <= length else f"{line[:length]} ..."


def escape_controls(text: str) -> str:
    """Returns a text without what a terminal would obey or cannot show: `\\x1b` for an escape, `\\n` for a line end.

    Marks that change the direction of writing, and the bytes of a name that is no UTF-8, are escaped too.
    """
    return _CONTROLS.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else match[0].encode("unicode_escape").decode("ascii")


def _clean(text: str) -> str:
    return shorten(_cut_words(text), _LONGEST_PART)


def _cut_words(text: str) -> str:
    """Returns a text in which the middle of every longer word is left out."""
    return re.sub(rf"\S{{{_LONGEST_WORD + 1},}}", lambda word: f"{word[0][:200]}...{word[0][-60:]}", text)
