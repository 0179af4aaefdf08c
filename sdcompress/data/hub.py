"""A data set of the Hugging Face Hub, streamed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from sdcompress_engines.errors import BackendMissing, DataError

from sdcompress.data.config import DataConfig
from sdcompress.data.records import CAPTION_COLUMNS, Record, Skipped, Source

HUB = "hub:"


class HubSource(Source):
    """A dataset of the hub, or a local folder of Parquet files, streamed by `datasets`."""

    def __init__(self, name: str, config: DataConfig) -> None:
        super().__init__(name, config)
        try:
            import datasets
        except ImportError as error:
            raise BackendMissing(
                "a hub dataset is read by the package datasets, which is not installed",
                where=f"{HUB}{name}",
                hint="pip install datasets",
            ) from error
        repository, _, split = name.partition(":")
        repository, _, revision = repository.partition("@")
        try:
            stream = datasets.load_dataset(
                repository, split=split or "train", revision=revision or None, streaming=True
            )
        except Exception as error:
            told = (str(error).splitlines() or [""])[0]
            raise DataError(
                f"is no dataset the hub gives ({type(error).__name__}: {told})",
                where=f"{HUB}{name}",
                expected="hub:owner/name[@revision][:split]",
            ) from error
        images = [column for column, kind in (stream.features or {}).items() if isinstance(kind, datasets.Image)]
        if not images:
            raise DataError(
                "has no picture column",
                where=f"{HUB}{name}",
                expected=f"one among {', '.join(stream.features or ()) or 'its columns'}",
            )
        self.column = images[0]
        self.stream = stream.cast_column(self.column, datasets.Image(decode=False))

    def units(self) -> int:
        return int(self.stream.num_shards)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.name} {self.units()} {self.stream.info.dataset_size}".encode()).hexdigest()

    def _unit(self, number: int, skipped: Skipped) -> Iterator[Record]:
        for place, row in enumerate(self.stream.shard(self.units(), number)):
            picture = row.pop(self.column) or {}
            encoded = picture.get("bytes") or self._fetched(str(picture.get("path") or ""))
            caption = next((row[column] for column in CAPTION_COLUMNS if row.get(column)), None)
            yield from self._record(f"{number}:{place}", encoded, caption, row, skipped)

    @staticmethod
    def _fetched(path: str) -> bytes:
        """A picture beside the tables of a hub dataset; never a file of this machine, whatever a row says."""
        if not path.startswith("hf://"):
            return b""
        import fsspec

        with fsspec.open(path, "rb") as file:
            content: bytes = file.read()
        return content
