"""The units of a cache that is being built: each a file and a sidecar, which says that the unit is complete."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import save_file
from sdcompress_engines.errors import ArtifactError, DataError
from sdcompress_engines.files import atomic_file, write_atomically
from sdcompress_engines.json_files import read_json
from sdcompress_engines.manifest import FileEntry, sha256_file
from sdcompress_engines.output_folders import require_space

from sdcompress.checkpoints.tensor_files import read_safetensors
from sdcompress.data.cache import unit_name
from sdcompress.data.skipped import Skipped
from sdcompress.data.units import EncodedUnit


def read_facts(folder: Path, number: int) -> dict[str, Any] | None:
    """Returns the sidecar of a unit, or None where the unit is not complete."""
    sidecar, path = folder / f"{unit_name(number)}.json", folder / unit_name(number)
    if not sidecar.is_file():
        return None
    try:
        facts = UnitFacts.model_validate(read_json(sidecar))
    except (ArtifactError, ValidationError):
        return None
    return facts.model_dump() if path.is_file() and path.stat().st_size == facts.bytes else None


class UnitFacts(BaseModel):
    """What the sidecar of a unit records; see `write_unit`."""

    sha256: str
    bytes: int
    read: int
    reasons: dict[str, list[str]]
    filtered: dict[str, int]
    fields: list[str]
    tiled: int = 0
    tile_px: int | None = None
    drawn: int = 0
    not_drawn: dict[str, int] = {}


def write_unit(folder: Path, number: int, unit: EncodedUnit) -> None:
    """Write a unit's file and then its sidecar, the JSON file whose presence means that the unit is complete.

    Args:
        folder: of the build.
        number: of the unit, from 0.
        unit: its content.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in unit.tensors.values())
    require_space(folder, size, "the cache's next unit")
    path = folder / unit_name(number)
    with atomic_file(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in unit.tensors.items()}, temporary)
    skipped = unit.skipped
    facts = {
        "sha256": sha256_file(path),
        "bytes": path.stat().st_size,
        "read": skipped.read,
        "reasons": skipped.reasons,
        "filtered": skipped.filtered,
        "fields": sorted(skipped.fields),
        "tiled": unit.tiled,
        "tile_px": unit.tile_px,
        "drawn": unit.drawn,
        "not_drawn": unit.not_drawn,
    }
    write_atomically(folder / f"{unit_name(number)}.json", json.dumps(facts))


@dataclass
class UnitTotals:
    """What the units of a build hold together.

    Attributes:
        skipped: what was read, and what was left out and why.
        hashed: file name → hash and size.
        columns: column of the pictures → its values of all units.
        captions: embedded captions.
        tiled: views that were encoded in tiles.
        tile_px: side of the smallest of those tiles, in pixels; None where there are none.
        drawn, not_drawn: as of `EncodedUnit`.
    """

    skipped: Skipped
    hashed: dict[str, FileEntry]
    columns: dict[str, torch.Tensor]
    captions: int
    tiled: int
    tile_px: int | None
    drawn: int
    not_drawn: dict[str, int]


def sum_units(folder: Path, count: int) -> UnitTotals:
    """Read the sidecars and the pictures' columns of `count` units. Returns their sums."""
    skipped, hashed = Skipped(), dict[str, FileEntry]()
    parts: dict[str, list[torch.Tensor]] = {}
    caption_entries = captions = tiled = drawn = 0
    not_drawn = Counter[str]()
    tiles_px: list[int] = []
    for number in range(count):
        facts = read_facts(folder, number)
        if facts is None:
            raise DataError(
                "was damaged while the cache was built", where=folder / unit_name(number), hint="the same command again"
            )
        skipped.merge(Skipped(facts["read"], facts["reasons"], facts["filtered"], set(facts["fields"])))
        tiled += facts["tiled"]
        drawn += facts["drawn"]
        not_drawn.update(facts["not_drawn"])
        tiles_px += [facts["tile_px"]] if facts["tile_px"] else []
        hashed[unit_name(number)] = FileEntry(facts["sha256"], facts["bytes"])
        unit = read_safetensors(folder / unit_name(number), DataError)
        pictures = {
            name.removeprefix("pictures."): tensor for name, tensor in unit.items() if name.startswith("pictures.")
        }
        pictures["unit"] = torch.full_like(pictures["row"], number)
        pictures["first"] = pictures["first"] + caption_entries
        caption_entries += len(pictures["caption_row"])
        captions += len(unit.get("text", ()))
        for name, tensor in pictures.items():
            parts.setdefault(name, []).append(tensor)
    columns = {name: torch.cat(tensors) for name, tensors in parts.items()}
    smallest_px = min(tiles_px, default=None)
    return UnitTotals(skipped, hashed, columns, captions, tiled, smallest_px, drawn, dict(not_drawn))


def drop_duplicates(columns: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the columns without their digests and without pictures whose digest another picture has before them.

    The columns of captions stay whole: `first` points into them.
    """
    _, first_seen = np.unique(columns["digest"].numpy(), axis=0, return_index=True)
    kept = torch.from_numpy(np.sort(first_seen))
    of_pictures = {name: columns[name][kept].contiguous() for name in ("unit", "bucket", "row", "first", "count")}
    return {name: tensor for name, tensor in columns.items() if name != "digest"} | of_pictures
