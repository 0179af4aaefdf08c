"""A folder of pictures with captions beside them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import DataError
from sdcompress_engines.manifest import by_parts

from sdcompress.data.config import DataConfig
from sdcompress.data.records import (
    PICTURE_SUFFIXES,
    UNIT_PICTURES,
    Record,
    Source,
    choose_caption,
    decode_text,
    fingerprint_files,
    read_object,
)
from sdcompress.data.skipped import Skipped


class FolderSource(Source):
    """The pictures of a folder and its subfolders.

    Captions and metadata are in `metadata.jsonl` or `metadata.csv` of the folder, with the column `file_name` and one
    of `CAPTION_COLUMNS`, or in a `.json` or `.txt` file beside each picture.

    Args:
        name: for reports and manifests.
        root: the folder.
        config: which pictures are used, and which columns hold their captions.
    """

    def __init__(self, name: str, root: Path, config: DataConfig) -> None:
        super().__init__(name, config)
        self.root, self.inputs = root, [root]

    @cached_property
    def _pictures(self) -> list[Path]:
        found = (p for p in self.root.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
        return sorted(found, key=by_parts)

    @cached_property
    def _table(self) -> dict[str, dict[str, Any]]:
        """File name → its row of the metadata file."""
        rows: list[Any] = []
        if (path := self.root / "metadata.jsonl").is_file():
            for number, line in enumerate(path.read_text(errors="replace", encoding="utf-8-sig").split("\n"), 1):
                try:
                    rows += [json.loads(line)] if line.strip() else []
                except (ValueError, RecursionError) as error:
                    raise DataError(f"line {number} is not JSON ({error})", where=path) from error
        elif (path := self.root / "metadata.csv").is_file():
            rows = _read_csv(path)
        # A table that was written on Windows may have backslashes.
        return {
            str(row["file_name"]).replace("\\", "/"): row
            for row in rows
            if isinstance(row, dict) and "file_name" in row
        }

    def count_units(self) -> int:
        return -(-len(self._pictures) // UNIT_PICTURES)

    def fingerprint(self) -> str:
        return fingerprint_files(f for f in self.root.rglob("*") if f.is_file())

    def _read_all(self, number: int, skipped: Skipped) -> Iterator[Record]:
        for path in self._pictures[number * UNIT_PICTURES : (number + 1) * UNIT_PICTURES]:
            key = path.relative_to(self.root).as_posix()
            meta = self._table.get(key, {})
            if (sidecar := path.with_suffix(".json")).is_file():
                meta = read_object(sidecar.read_bytes()) | meta
            caption = choose_caption(meta)
            if caption is None and (sidecar := path.with_suffix(".txt")).is_file():
                caption = decode_text(sidecar.read_bytes())
                if caption is None:
                    skipped.add("caption is no text", key)
                    continue
            yield from self._build_records(key, path.read_bytes(), caption, meta, skipped)


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a CSV file by column. Cells beyond the header have no column and are left out.

    Raises:
        DataError: the file is not CSV.
    """
    try:
        with path.open(newline="", errors="replace", encoding="utf-8-sig") as file:
            return [{name: value for name, value in row.items() if name is not None} for row in csv.DictReader(file)]
    except csv.Error as error:
        raise DataError(f"is not CSV ({error})", where=path) from error
