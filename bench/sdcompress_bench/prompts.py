"""Reads prompt files and folders of reference pictures, in the formats of the public sets."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image, ImageOps
from sdcompress_engines.errors import DataError, UsageError, shorten
from sdcompress_engines.files import check_regular
from sdcompress_engines.json_files import parse_json

from sdcompress.data.records import (
    CAPTION_COLUMNS,
    MAX_CAPTION,
    MAX_PICTURE_BYTES,
    PICTURE_SUFFIXES,
    Record,
    is_text,
    read_limited,
)

from .scenario import Prompt

MOST_MIB = 256
"""Largest file of prompts that is read; COCO's captions of its training pictures have 66 MiB."""


def read_prompts(path: str | Path) -> list[Prompt]:
    """Returns the prompts of a file, in its order. The ending of its name decides the format:

    - `.txt`: one prompt a line; blank lines are left out.
    - `.tsv`: PartiPrompts (columns Prompt, Category, Challenge, Note), or any table with a caption column. Quotes are
      ordinary characters.
    - `.csv`, `.jsonl`: a caption column, `text`, `caption` or `prompt`, and optionally a column `style`.
    - `.json`: COCO's captions (`annotations` with `image_id` and `caption`): the first caption of each picture.

    Raises:
        UsageError: there is no such file, or its ending is unknown.
        DataError: its content has another format, or no prompts; the message has the line.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError("no such file of prompts", where=path)
    check_regular(path, DataError)
    if (read := _READERS.get(path.suffix.lower())) is None:
        kind = f"of type {path.suffix}" if path.suffix else "without an ending"
        raise UsageError(f"prompts in a file {kind}", where=path, expected=", ".join(_READERS))
    prompts = []
    for where, caption, style in read(path, _text(path)):
        if not is_text(caption) or not caption.strip():
            raise DataError(f"caption {caption!r:.60}" if caption else "no caption", where=where, expected="text")
        if len(caption) > MAX_CAPTION:
            raise DataError(
                f"a caption of {len(caption):,} characters", where=where, expected=f"at most {MAX_CAPTION:,}"
            )
        prompts.append(Prompt(" ".join(caption.split()), style if is_text(style) else ""))
    if not prompts:
        raise DataError("has no prompts", where=path, expected="at least one")
    return prompts


@dataclass(frozen=True)
class Pictures(Sequence[torch.Tensor]):
    """Picture files as squares of one size, uint8, (3, size_px, size_px).

    Each file is read on access, so a large set need not fit in memory.
    """

    paths: tuple[Path, ...]
    size_px: int

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Pictures: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | Pictures:
        """Returns a picture, center-cropped and resized, or a part of the pictures.

        Raises:
            DataError: the file is no readable picture.
        """
        if isinstance(index, slice):
            return Pictures(self.paths[index], self.size_px)
        path = self.paths[index]
        encoded = read_limited(path, MAX_PICTURE_BYTES)
        if encoded is None:
            raise DataError("is too large", where=path, expected=f"at most {MAX_PICTURE_BYTES:,} bytes")
        picture = ImageOps.fit(
            Record(str(path), encoded, "").picture(), (self.size_px, self.size_px), Image.Resampling.LANCZOS
        )
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def read_reference(folder: str | Path, size_px: int) -> Pictures:
    """Returns the pictures of a folder and its subfolders, sorted by path.

    Raises:
        UsageError: there is no such folder.
        DataError: it has no pictures.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError("no such folder of reference pictures", where=folder)
    paths = tuple(sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file()))
    if not paths:
        raise DataError("has no pictures", where=folder, expected=", ".join(sorted(PICTURE_SUFFIXES)))
    return Pictures(paths, size_px)


_Rows = Iterator[tuple[str, Any, Any]]
"""For each prompt: its file and line, its caption and its style; the last two may be no text."""


def _text(path: Path) -> str:
    encoded = read_limited(path, MOST_MIB * 2**20)
    if encoded is None:
        raise DataError("is too large", where=path, expected=f"prompts, in at most {MOST_MIB} MiB")
    try:
        return encoded.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = encoded[: error.start].count(b"\n") + 1
        raise DataError(
            f"byte 0x{encoded[error.start]:02x} is not UTF-8", where=f"{path}:{line}", expected="UTF-8 text"
        ) from error


def _read_lines(path: Path, text: str) -> _Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line, ""


def _read_table(path: Path, text: str, **dialect: Any) -> _Rows:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True, **dialect)
    try:
        names = [name or "" for name in rows.fieldnames or ()]
        column = _caption_column(names, f"{path}:1")
        style = next((name for name in names if name.lower() == "style"), "")
        for row in rows:
            yield f"{path}:{rows.line_num}", row[column], row.get(style)
    except csv.Error as error:
        raise DataError(f"cannot be read as a table ({error})", where=f"{path}:{rows.reader.line_num}") from error


def _read_csv(path: Path, text: str) -> _Rows:
    return _read_table(path, text)


def _read_tsv(path: Path, text: str) -> _Rows:
    return _read_table(path, text, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_jsonl(path: Path, text: str) -> _Rows:
    for where, line, _ in _read_lines(path, text):
        row = parse_json(line, where, DataError)
        if not isinstance(row, dict):
            raise DataError(f"a JSON {type(row).__name__}", where=where, expected='an object like {"caption": "a cat"}')
        yield where, row[_caption_column(row, where)], row.get("style")


def _read_coco(path: Path, text: str) -> _Rows:
    content = parse_json(text, path, DataError)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise DataError(
            "has no annotations",
            where=path,
            expected="COCO's captions, as in captions_val2014.json: annotations with image_id and caption",
        )
    seen = set()
    for number, annotation in enumerate(annotations):
        where = f"{path}: annotations[{number}]"
        if (
            not isinstance(annotation, dict)
            or "caption" not in annotation
            or not isinstance(annotation.get("image_id"), int | str)
        ):
            raise DataError("is no caption", where=where, expected="image_id and caption, as in captions_val2014.json")
        if annotation["image_id"] not in seen:
            seen.add(annotation["image_id"])
            yield where, annotation["caption"], ""


def _caption_column(names: Sequence[str] | Mapping[str, Any], where: str) -> str:
    for column in CAPTION_COLUMNS:
        for name in names:
            if name.lower() == column:
                return name
    raise DataError(
        f"no captions among the columns {shorten(', '.join(names) or '(none)')}",
        where=where,
        expected=f"one of {', '.join(CAPTION_COLUMNS)}",
    )


_READERS: dict[str, Callable[[Path, str], _Rows]] = {
    ".txt": _read_lines,
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".json": _read_coco,
}
