"""Reading safetensors files with torch alone: the WebUIs' Python may have nothing else."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from .errors import ArtifactError, shorten

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class SafetensorsHeader:
    """The header of a safetensors file.

    Attributes:
        entries: name of a tensor → `dtype`, `shape` and `data_offsets`, which count from `start`.
        metadata: name → text.
        start: where the tensors' bytes begin in the file.
    """

    entries: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, str]
    start: int


def read_header(path: str | PathLike[str]) -> SafetensorsHeader:
    """Returns the header of a safetensors file. It is JSON behind its length in eight bytes.

    Raises:
        ArtifactError: the file is cut or damaged.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= size - 8 - length:
                raise ValueError(f"{name} lies outside the file")
        return SafetensorsHeader(header, dict(metadata), 8 + length)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged_file(path, error) from error


def read_tensors(path: str | PathLike[str]) -> dict[str, torch.Tensor]:
    """Returns name → float tensor of a safetensors file, on the CPU. Only what is used is read from the disk.

    Raises:
        ArtifactError: the file is cut or damaged.
    """
    path = Path(path)
    header = read_header(path)
    try:
        with path.open("rb") as file:
            # Torch wants memory that it could write to, hence ACCESS_COPY.
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return {
            name: _view(content, header.start, entry)
            for name, entry in header.entries.items()
            if entry["dtype"] in _DTYPES
        }
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise damaged_file(path, error) from error


def _view(content: mmap.mmap, start: int, entry: Mapping[str, Any]) -> torch.Tensor:
    begin, end = entry["data_offsets"]
    dtype = _DTYPES[entry["dtype"]]
    if end == begin:
        return torch.empty(0, dtype=dtype).reshape(entry["shape"])
    values = torch.frombuffer(content, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=start + begin)
    return values.reshape(entry["shape"])


def damaged_file(path: Path, error: BaseException) -> ArtifactError:
    """Returns the error for a safetensors file that cannot be read."""
    return ArtifactError(
        f"is not a readable safetensors file ({type(error).__name__}: {shorten(error, 120)})",
        where=path,
        hint="copy it again",
    )
