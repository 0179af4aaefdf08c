"""A data set by name, folder, shards or hub id → a source of records."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from sdcompress_engines.errors import DataError, UsageError, shorten
from sdcompress_engines.paths import expand_user

from sdcompress.data.config import DataConfig
from sdcompress.data.folder import FolderSource
from sdcompress.data.hub import HUB_PREFIX, HubSource
from sdcompress.data.records import PICTURE_SUFFIXES, Source
from sdcompress.data.shards import SHARD_SUFFIXES, ShardSource, expand_braces
from sdcompress.models import nano

EXPECTED = (
    "a folder of captioned pictures, webdataset shards (a folder, a glob, a list such as data/{00000..00099}.tar),"
    " hub:owner/name, or nano"
)


def open_source(data: str | Path | Iterable[Path], config: DataConfig | None = None) -> Source:
    """Returns the source of a data set.

    Args:
        data: a folder of pictures or shards, a shard, a glob or brace list of shards, a list of their files,
            `hub:owner/name`, or `nano`.
        config: which pictures are used; by default all with a caption.

    Raises:
        UsageError: nothing is there, or a condition is malformed.
        DataError: a folder with neither pictures nor shards, a file that is no shard, a list of shards of which some
            are missing, or no such hub data set.
        BackendMissing: a hub data set, and no package to read it.
    """
    config = config or DataConfig()
    if not isinstance(data, str | Path):
        return ShardSource("shards", list(data), config)
    if not str(data).strip() or str(data) == "-":  # a script's empty variable is not the working folder
        raise UsageError(f"no data is named {str(data)!r}", expected=EXPECTED)
    if str(data) == "nano":
        return ShardSource("nano", nano.shards("train"), config)
    if str(data).startswith(HUB_PREFIX):
        return HubSource(str(data).removeprefix(HUB_PREFIX), config)
    path = expand_user(data)
    if os.path.isdir(path):
        return _open_folder(path, config)
    files = [path] if os.path.isfile(path) else _match_files(str(path))
    if not files:
        raise UsageError("does not exist", where=shorten(data, 200), expected=EXPECTED)
    wrong = next((p for p in files if not p.name.endswith(SHARD_SUFFIXES)), None)
    if wrong is not None:
        raise DataError("is not a webdataset shard", where=wrong, expected="a .tar file, or a folder")
    return ShardSource(path.name, files, config)


def _open_folder(folder: Path, config: DataConfig) -> Source:
    """Returns the source of a folder: of its shards where it has any, else of its pictures."""
    shards = sorted(p for p in folder.iterdir() if p.name.endswith(SHARD_SUFFIXES))
    if shards:
        source = ShardSource(folder.name, shards, config)
        source.inputs = [folder, *shards]  # a shard may be a link
        return source
    if not any(p.suffix.lower() in PICTURE_SUFFIXES for p in folder.rglob("*")):
        raise DataError(
            "holds no picture and no shard",
            where=folder,
            expected="pictures (.jpg, .png, .webp) or webdataset shards (.tar)",
        )
    return FolderSource(folder.name, folder, config)


def _match_files(pattern: str) -> list[Path]:
    """Returns the files of a glob or brace list: in the order of the list, and sorted within each glob.

    Raises:
        DataError: some files of the list are missing, but not all.
    """
    names = expand_braces(pattern)
    found = [[Path(name)] if os.path.exists(name) else sorted(map(Path, glob.glob(name))) for name in names]
    missing = [name for name, files in zip(names, found, strict=True) if not files]
    if missing and len(missing) < len(names):
        raise DataError(
            f"lacks {len(missing):,} of {len(names):,} files: {shorten(', '.join(missing[:3]), 200)}",
            where=shorten(pattern, 200),
            hint="get the missing files, or name those that are there",
        )
    return [file for files in found for file in files]
