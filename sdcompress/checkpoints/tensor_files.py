"""Files of tensors that somebody else may have written, opened so that whatever is wrong with one is one error."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sdcompress_engines.errors import ModelError, SdCompressError, shorten
from sdcompress_engines.files import check_regular
from sdcompress_engines.paths import check_unicode

MOST_HEADER_MIB = 16
"""Largest header of a safetensors file that is read; that of an SDXL checkpoint has 0.4 MiB, the longest metadata of
kohya's scripts a few."""
COPY_AGAIN = "copy or download it again"
_POINTER = b"version https://git-lfs"


@contextmanager
def one_error(
    path: Path, kind: str, error: type[SdCompressError] = ModelError, hint: str = COPY_AGAIN
) -> Iterator[None]:
    """Turn whatever a library raises in the block into one error: a damaged or hostile file reaches any line of it.

    Args:
        path: the file that is read.
        kind: what it should be, for the message.
        error: the class to raise; an `SdCompressError` passes through.
        hint: what to do about a damaged file.
    """
    try:
        yield
    except SdCompressError:
        raise
    except FileNotFoundError as problem:
        raise error("does not exist", where=path, expected=kind) from problem
    except Exception as problem:
        raise error(f"is not a complete {kind} ({_find_reason(problem)})", where=path, hint=hint) from problem


def _find_reason(error: Exception) -> str:
    """Returns the line of an error that names the fault; torch puts its advice before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = next((line for line in lines if "Unpickler error" in line), lines[0] if lines else "")
    return shorten(line or type(error).__name__, 160)


def open_safetensors(path: Path, error: type[SdCompressError] = ModelError, *, hint: str = COPY_AGAIN) -> Any:
    """Returns a safetensors file with its header read, as `safetensors.safe_open` does.

    Args:
        path: of the file.
        error: the class to raise.
        hint: what to do about a damaged file.

    Raises:
        SdCompressError: of the class `error`: no regular file, not complete, or with a header that is too large.
    """
    with one_error(path, "safetensors file", error, hint):
        _check_header(path, error)
        return safe_open(path, "pt")


def read_safetensors(
    path: Path, error: type[SdCompressError] = ModelError, *, hint: str = COPY_AGAIN
) -> dict[str, torch.Tensor]:
    """Returns the tensors of a safetensors file, on the CPU, mapped into memory.

    Args:
        path, error, hint: see `open_safetensors`.

    Raises:
        SdCompressError: as `open_safetensors`.
    """
    with one_error(path, "safetensors file", error, hint):
        _check_header(path, error)
        return load_file(path)


def _check_header(path: Path, error: type[SdCompressError]) -> None:
    check_unicode(path, error)
    size = struct.unpack("<Q", _read_start(path, error)[:8])[0]
    if size > MOST_HEADER_MIB * 2**20:
        raise error(
            f"says that its header has {size / 2**20:,.0f} MiB",
            where=path,
            expected=f"a safetensors file, with a header of at most {MOST_HEADER_MIB} MiB",
        )


def _read_start(path: Path, error: type[SdCompressError]) -> bytes:
    """Returns the first bytes of a regular file; refuses what `git clone` leaves where Git LFS is not installed."""
    check_regular(path, error)
    with path.open("rb") as file:
        start = file.read(len(_POINTER))
    if start == _POINTER:
        raise error("is a pointer of Git LFS, not the file itself", where=path, hint="git lfs pull, in its repository")
    return start


def read_pickle(
    path: Path, error: type[SdCompressError] = ModelError, *, what: str = "checkpoint", hint: str = COPY_AGAIN
) -> Any:
    """Returns the content of a file that `torch.save` wrote, on the CPU; no code from it is run.

    Args:
        path: of the file.
        error: the class to raise.
        what: it should be, for the message.
        hint: what to do about a damaged file.

    Raises:
        SdCompressError: of the class `error`: no regular file, not complete, or with more than tensors in it.
    """
    with one_error(path, what, error, hint):
        _read_start(path, error)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such as "Detected pickle protocol"
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
        except pickle.UnpicklingError as problem:
            named = re.search(r"(?:GLOBAL|class|operand) `?([A-Za-z_0-9][\w.]*)", str(problem))
            if named is None:
                raise
            raise error(
                f"is a pickle with more than tensors in it ({shorten(named[1], 80)}), which could run code;"
                " it was not loaded",
                where=path,
                expected="tensors only",
                hint="the .safetensors of the same model",
            ) from problem


def is_dense(value: object) -> bool:
    """Returns whether a value from a pickle is a tensor whose numbers are all in the file.

    A pickle of a few bytes can hold a sparse tensor, or one that repeats its numbers, of any size.
    """
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )
