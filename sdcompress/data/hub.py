"""A data set of the Hugging Face Hub, streamed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from sdcompress_engines.errors import BackendMissing, DataError

from sdcompress.data.config import DataConfig
from sdcompress.data.records import Record, Source, choose_caption
from sdcompress.data.skipped import Skipped

HUB_PREFIX = "hub:"


class HubSource(Source):
    """A data set of the Hub, or a local folder of Parquet files, streamed by the package `datasets`.

    Args:
        name: `owner/name[@revision][:split]`.
        config: which pictures are used, and which columns hold their captions.

    Raises:
        BackendMissing: `datasets` is not installed.
        DataError: the Hub has no such data set, or it has no column of pictures.
    """

    def __init__(self, name: str, config: DataConfig) -> None:
        super().__init__(name, config)
        try:
            import datasets
        except ImportError as error:
            raise BackendMissing(
                "a hub dataset is read by the package datasets, which is not installed",
                where=f"{HUB_PREFIX}{name}",
                hint="pip install datasets",
            ) from error
        repository, _, split = name.partition(":")
        repository, _, revision = repository.partition("@")
        try:
            stream = datasets.load_dataset(
                repository, split=split or "train", revision=revision or None, streaming=True
            )
        except Exception as error:
            first_line = (str(error).splitlines() or [""])[0]
            raise DataError(
                f"is not a dataset that the hub provides ({type(error).__name__}: {first_line})",
                where=f"{HUB_PREFIX}{name}",
                expected="hub:owner/name[@revision][:split]",
            ) from error
        images = [column for column, kind in (stream.features or {}).items() if isinstance(kind, datasets.Image)]
        if not images:
            raise DataError(
                "has no picture column",
                where=f"{HUB_PREFIX}{name}",
                expected=f"a column of type Image; its columns are {', '.join(stream.features or ()) or 'unknown'}",
            )
        self.column = images[0]
        self.stream = stream.cast_column(self.column, datasets.Image(decode=False))

    def count_units(self) -> int:
        return int(self.stream.num_shards)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.name} {self.count_units()} {self.stream.info.dataset_size}".encode()).hexdigest()

    def _read_all(self, number: int, skipped: Skipped) -> Iterator[Record]:
        for place, row in enumerate(self.stream.shard(self.count_units(), number)):
            picture = row.pop(self.column) or {}
            encoded = picture.get("bytes") or self._download(str(picture.get("path") or ""))
            yield from self._build_records(f"{number}:{place}", encoded, choose_caption(row), row, skipped)

    @staticmethod
    def _download(path: str) -> bytes:
        """Returns a picture that lies on the Hub beside the tables. Any other path gives no bytes.

        A row may name a file of this machine; it is never read.
        """
        if not path.startswith("hf://"):
            return b""
        import fsspec

        with fsspec.open(path, "rb") as file:
            content: bytes = file.read()
        return content
