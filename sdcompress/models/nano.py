"""Nano, the built-in teacher: a real, small text-to-image model that comes with the package, with its data and its
metric.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from sdcompress_engines.manifest import cache_folder, sha256_tree, staged

ASSETS = Path(__file__).parents[1] / "assets" / "nano"


def teacher_folder() -> Path:
    """The teacher, a diffusers pipeline folder."""
    return ASSETS / "teacher"


def metric_folder() -> Path:
    """nano-CLIP (a transformers `CLIPModel` with its tokenizer): measures alignment, never conditions."""
    return ASSETS / "clip"


def data_folder() -> Path:
    """The training pictures, webdataset shards."""
    return ASSETS / "data"


def folder(name: str) -> Path:
    """The pipeline folder of `nano` or `nano-tiny`.

    The package holds only the UNet of `nano-tiny`; the folder with the teacher's other parts is put together on first
    use in the user's cache.
    """
    if name == "nano":
        return teacher_folder()
    unet = ASSETS / "tiny"
    target = cache_folder() / f"{name}-{sha256_tree(unet)[:12]}"
    if not target.is_dir():
        with staged(target) as out:
            shutil.copytree(teacher_folder(), out, ignore=shutil.ignore_patterns("unet"), dirs_exist_ok=True)
            shutil.copytree(unet, out / "unet")
    return target


@cache
def _index() -> dict[str, Any]:
    index: dict[str, Any] = json.loads((data_folder() / "index.json").read_text(encoding="utf-8"))
    return index


def styles() -> dict[str, str]:
    """Style → the phrase captions open with."""
    return {name: entry["phrase"] for name, entry in _index()["styles"].items()}


def shards(split: str) -> list[Path]:
    """The shard files of `train` or `heldout`."""
    return [data_folder() / name for name in _index()["shards"][split]]
