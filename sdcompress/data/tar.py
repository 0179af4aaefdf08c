"""A tar reader for archives that are not trusted: every size is bounded before anything is read, nothing is unpacked, a
cut is told.

Not `tarfile.open`: that reads an extended header whatever size it claims, and takes an archive that ends between two
members, or at a damaged header, for a whole one.
"""

from __future__ import annotations

import gzip
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

MAX_MEMBER_BYTES = 256 * 2**20
MAX_HEADER_BYTES = 2**20
LINK = "member is a link or a device"
OUTSIDE = "member points outside the shard"
OVERSIZE = f"member of over {MAX_MEMBER_BYTES // 2**20} MiB"


def open_tar(path: Path) -> BinaryIO:
    """The archive's bytes, decompressed as its name says."""
    return cast("BinaryIO", gzip.open(path, "rb")) if path.suffix in (".gz", ".tgz") else path.open("rb")


def read_tar(stream: BinaryIO) -> Iterator[tuple[str, bytes | None, str]]:
    """Name, bytes and fault of each member that is not a folder; a member with a fault has no bytes.

    Raises:
        EOFError: the archive ends before its end mark. tarfile.HeaderError: something that is no header where one must
            be.
    """
    long_name, long_size = "", -1
    while (block := _exactly(stream, tarfile.BLOCKSIZE)).count(0) < tarfile.BLOCKSIZE:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            extended = _payload(stream, info.size, MAX_HEADER_BYTES) or b""
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = extended.rstrip(b"\0").decode(errors="replace")
            else:
                told = _pax_records(extended)
                long_name = told.get("path", long_name)
                long_size = int(told["size"]) if told.get("size", "").isdecimal() else long_size
            continue
        if info.type in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            _payload(stream, info.size, 0)
            continue
        name, size = long_name or info.name, long_size if long_size >= 0 else info.size
        long_name, long_size = "", -1
        if info.isdir():
            continue
        if not info.isreg() or info.type == tarfile.GNUTYPE_SPARSE:
            if info.type == tarfile.GNUTYPE_SPARSE:
                raise tarfile.HeaderError("sparse members are not read")
            yield name, None, LINK
            continue
        payload = _payload(stream, size, MAX_MEMBER_BYTES)
        if payload is None:
            yield name, None, OVERSIZE
        elif name.startswith("/") or ".." in name.split("/"):
            yield name, None, OUTSIDE
        else:
            yield name, payload, ""


def _pax_records(extended: bytes) -> dict[str, str]:
    """The records of a pax header, `length key=value` and a newline each, up to the first that is malformed."""
    found = {}
    while (head := re.match(rb"(\d{1,9}) ([^=\n]+)=", extended)) and int(head[1]) > head.end():
        found[head[2].decode(errors="replace")] = extended[head.end() : int(head[1]) - 1].decode(errors="replace")
        extended = extended[int(head[1]) :]
    return found


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _payload(stream: BinaryIO, size: int, limit: int) -> bytes | None:
    """The next member's bytes with the padding passed over; None where they are more than `limit`, and passed over too."""
    if size < 0:
        raise tarfile.HeaderError("negative size")
    padded = -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if size <= limit:
        return _exactly(stream, padded)[:size]
    while padded:
        padded -= len(_exactly(stream, min(padded, 2**20)))
    return None
