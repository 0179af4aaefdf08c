"""A folder of pictures with captions beside them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from sdcompress_engines.errors import DataError
from sdcompress_engines.json_files import read_json_lines
from sdcompress_engines.manifest import by_parts

from sdcompress.data.config import DataConfig
from sdcompress.data.drawn import DrawnSet, open_drawn
from sdcompress.data.records import (
    LONG_TEXT,
    MAX_PICTURE_BYTES,
    MAX_TEXT_BYTES,
    OVERSIZE,
    PICTURE_SUFFIXES,
    UNIT_PICTURES,
    UNREAD_SUFFIXES,
    Record,
    Source,
    choose_caption,
    decode_text,
    fingerprint_files,
    fingerprint_texts,
    read_limited,
    read_object,
)
from sdcompress.data.skipped import Skipped


class FolderSource(Source):
    """The pictures of a folder and its subfolders. Links to pictures are followed, links to folders are not.

    Captions and metadata are in `metadata.jsonl` or `metadata.csv` of the folder, with the column `file_name` and one
    of `CAPTION_COLUMNS`, or in a `.json` or `.txt` file beside each picture. Rows without a picture, and pictures of
    `UNREAD_SUFFIXES`, are counted as unusable. Of a set that a teacher drew, the folder holds the latents too.

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
        found = (p for p in self.root.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES | UNREAD_SUFFIXES)
        return sorted((p for p in found if p.is_file() or not p.exists()), key=by_parts)

    @cached_property
    def _table(self) -> dict[str, dict[str, Any]]:
        """File name → its row of the metadata file."""
        rows: list[Any] = []
        if (path := self.root / "metadata.jsonl").is_file():
            rows = list(read_json_lines(path, DataError))
        elif (path := self.root / "metadata.csv").is_file():
            rows = _read_csv(path)
        # A table that was written on Windows may have backslashes, and any a leading `./`.
        return {
            PurePosixPath(str(row["file_name"]).replace("\\", "/")).as_posix(): row
            for row in rows
            if isinstance(row, dict) and "file_name" in row
        }

    @cached_property
    def _rows_without_picture(self) -> list[str]:
        return sorted(self._table.keys() - {path.relative_to(self.root).as_posix() for path in self._pictures})

    def count_units(self) -> int:
        return -(-len(self._pictures) // UNIT_PICTURES)

    def fingerprint(self) -> str:
        return fingerprint_files(f for f in self.root.rglob("*") if f.is_file())

    def hash_captions(self) -> str:
        return fingerprint_texts(f for f in self.root.rglob("*") if f.is_file())

    def open_drawn(self) -> DrawnSet | None:
        return open_drawn(self.root)

    def _read_all(self, number: int, skipped: Skipped) -> Iterator[Record]:
        for path in self._pictures[number * UNIT_PICTURES : (number + 1) * UNIT_PICTURES]:
            key = path.relative_to(self.root).as_posix()
            if path.suffix.lower() in UNREAD_SUFFIXES:
                skipped.add("picture of a kind that is not read", key)
                continue
            if not path.exists():
                skipped.add("link to a file that is missing", key)
                continue
            meta = self._table.get(key, {})
            texts = {
                suffix: read_limited(sidecar, MAX_TEXT_BYTES)
                for suffix in (".json", ".txt")
                if (sidecar := path.with_suffix(suffix)).is_file()
            }
            encoded = read_limited(path, MAX_PICTURE_BYTES)
            if encoded is None or None in texts.values():
                skipped.add(OVERSIZE if encoded is None else LONG_TEXT, key)
                continue
            meta = read_object(texts.get(".json") or b"{}") | meta
            caption = choose_caption(meta)
            if caption is None and ".txt" in texts:
                caption = decode_text(texts[".txt"] or b"")
                if caption is None:
                    skipped.add("caption is no text", key)
                    continue
            yield from self._build_records(key, encoded, caption, meta, skipped)
        for key in self._rows_without_picture[number :: self.count_units()]:  # each unit counts its share
            skipped.add("caption without a picture", key)


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a CSV file by column. Cells beyond the header have no column and are left out.

    Raises:
        DataError: the file is not CSV, or not in UTF-8.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return [{name: value for name, value in row.items() if name is not None} for row in csv.DictReader(file)]
    except UnicodeDecodeError as error:
        raise DataError(
            f"is not UTF-8 (byte 0x{error.object[error.start]:02x})", where=path, expected="a CSV table in UTF-8"
        ) from error
    except csv.Error as error:
        raise DataError(f"is not CSV ({error})", where=path) from error
