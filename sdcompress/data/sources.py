"""A data set by name, folder, shards or hub id → a source of records."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from sdcompress_engines.errors import DataError, UsageError

from sdcompress.data.config import DataConfig
from sdcompress.data.folder import FolderSource
from sdcompress.data.hub import HUB, HubSource
from sdcompress.data.records import PICTURES, Source
from sdcompress.data.shards import SHARDS, ShardSource, expand_braces


def open_source(data: str | Path | Iterable[Path], config: DataConfig | None = None) -> Source:
    """A source for a folder of pictures; a folder, glob or brace list of shards, or a list of their files;
    `hub:owner/name`; or nano.

    Raises:
        UsageError: nothing is there, or a condition that cannot be read. DataError: a folder with neither pictures nor
            shards.
        BackendMissing: a hub dataset, and no package to read it.
    """
    config = config or DataConfig()
    if not isinstance(data, str | Path):
        return ShardSource("shards", list(data), config)
    if str(data) == "nano":
        from sdcompress.models import nano

        return ShardSource("nano", nano.shards("train"), config)
    if str(data).startswith(HUB):
        return HubSource(str(data).removeprefix(HUB), config)
    path = Path(data).expanduser()
    if path.is_dir():
        shards = sorted(p for p in path.iterdir() if p.name.endswith(SHARDS))
        if shards:
            return ShardSource(path.name, shards, config)
        if not any(p.suffix.lower() in PICTURES for p in path.rglob("*")):
            raise DataError(
                "holds no picture and no shard",
                where=path,
                expected="pictures (.jpg, .png, .webp) or webdataset shards (.tar)",
            )
        return FolderSource(path.name, path, config)
    files = (
        [path]
        if path.is_file()
        else [f for pattern in expand_braces(str(path)) for f in sorted(Path(p) for p in glob.glob(pattern))]
    )
    if not files:
        raise UsageError(
            "does not exist",
            where=str(data),
            expected=(
                "a folder of captioned pictures, webdataset shards (a folder, a glob, a list such as"
                " data/{00000..00099}.tar), hub:owner/name, or nano"
            ),
        )
    if not all(p.name.endswith(SHARDS) for p in files):
        raise DataError("is no webdataset shard", where=files[0], expected="a .tar file, or a folder")
    return ShardSource(path.name, files, config)
