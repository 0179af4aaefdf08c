"""A tar reader for archives that are not trusted.

It checks every size before it reads, unpacks nothing, and reports an archive that was cut. `tarfile.open` is not used:
it reads an extended header of any size, and an archive that ends between two members or at a damaged header counts as
whole there.
"""

from __future__ import annotations

import gzip
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

MAX_MEMBER_BYTES = 256 * 2**20
MAX_HEADER_BYTES = 2**20
MAX_RATIO = 50
"""Most bytes of a shard for one compressed byte; pictures do not shrink, and a bomb shrinks to a thousandth."""
MIN_LIMIT_BYTES = 2**30
"""A shard may have as many bytes, however small its file."""
_FAR = 2**62
LINK = "member is a link or a device"
OUTSIDE = "member points outside the shard"
OVERSIZE = f"member of over {MAX_MEMBER_BYTES // 2**20} MiB"


class _Decompressed:
    """The decompressed bytes of a file, of which there may not be too many.

    Args:
        path: the compressed file.
    """

    def __init__(self, path: Path) -> None:
        self.file = gzip.open(path, "rb")  # noqa: SIM115
        self.left = max(MIN_LIMIT_BYTES, MAX_RATIO * path.stat().st_size)

    def seekable(self) -> bool:
        return False  # to skip bytes is to decompress them

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise tarfile.ReadError(f"over {MAX_RATIO} times as many bytes as the file has")
        return data


@contextmanager
def open_tar(path: Path) -> Iterator[BinaryIO]:
    """Yields the archive's bytes as a stream, decompressed where its name ends in `.gz` or `.tgz`."""
    if path.suffix in (".gz", ".tgz"):
        stream = _Decompressed(path)
        with stream.file:
            yield cast("BinaryIO", stream)
    else:
        with path.open("rb") as file:
            yield file


def read_tar(
    stream: BinaryIO, limit: Callable[[str], int | None] = lambda name: MAX_MEMBER_BYTES
) -> Iterator[tuple[str, bytes | None, str]]:
    """Yields name, bytes and fault of each member that is not a folder.

    A member with a fault has no bytes; the fault of a sound one is "".

    Args:
        stream: of the archive.
        limit: name of a member → the most bytes that are read; None passes over the member.

    Raises:
        EOFError: the archive ends before its end mark.
        tarfile.HeaderError: a header is damaged, or of a sparse member.
    """
    long_name, long_size = "", -1
    while (block := _read_exactly(stream, tarfile.BLOCKSIZE)).count(0) < tarfile.BLOCKSIZE:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            extended = _read_payload(stream, info.size, MAX_HEADER_BYTES) or b""
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = extended.rstrip(b"\0").decode(errors="replace")
            else:
                records = _parse_pax_records(extended)
                long_name = records.get("path", long_name)
                if any(name.startswith("GNU.sparse.") for name in records):
                    raise tarfile.HeaderError("sparse members are not read")
                long_size = _parse_size(records["size"]) if "size" in records else long_size
            continue
        if info.type in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            _read_payload(stream, info.size, 0)
            continue
        name, size = long_name or info.name, long_size if long_size >= 0 else info.size
        long_name, long_size = "", -1
        if info.isdir():
            continue
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.HeaderError("sparse members are not read")
        if not info.isreg():
            yield name, None, LINK
            continue
        most = limit(name)
        payload = _read_payload(stream, size, -1 if most is None else most)
        if most is None:
            continue
        if payload is None:
            yield name, None, OVERSIZE
        elif name.startswith("/") or ".." in name.split("/"):
            yield name, None, OUTSIDE
        else:
            yield name, payload, ""


def _parse_pax_records(extended: bytes) -> dict[str, str]:
    """Returns the records of a pax header up to the first malformed one.

    A record is `length key=value` and a newline; the length counts the whole record.
    """
    found = {}
    while (head := re.match(rb"(\d{1,9}) ([^=\n]+)=", extended)) and int(head[1]) > head.end():
        found[head[2].decode(errors="replace")] = extended[head.end() : int(head[1]) - 1].decode(errors="replace")
        extended = extended[int(head[1]) :]
    return found


def _parse_size(text: str) -> int:
    """Returns the size in a pax header; Python refuses to read a number of thousands of digits."""
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise tarfile.HeaderError("no size")
    return int(text)


def _read_exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _read_payload(stream: BinaryIO, size: int, limit: int) -> bytes | None:
    """Returns a member's bytes, or None where it has more than `limit`; the stream is then behind the member.

    Args:
        stream: at the first byte of the member.
        size, limit: in bytes.
    """
    if size < 0:
        raise tarfile.HeaderError("negative size")
    padded = -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if size <= limit:
        return _read_exactly(stream, padded)[:size]
    if stream.seekable():
        stream.seek(min(padded, _FAR), 1)  # behind the end, the next header is missing
        return None
    while padded:
        padded -= len(_read_exactly(stream, min(padded, 2**20)))
    return None
