"""Nano, the built-in teacher: a small but real text-to-image model that ships in the package, with its data and its
metric model.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from sdcompress_engines.files import copy_tree
from sdcompress_engines.manifest import cache_folder, read_manifest, sha256_tree
from sdcompress_engines.output_folders import staged, unless_present

ASSETS = Path(__file__).parents[1] / "assets" / "nano"


def teacher_folder() -> Path:
    """Returns the diffusers pipeline folder of the teacher."""
    return ASSETS / "teacher"


def metric_folder() -> Path:
    """Returns the folder of nano-CLIP, a transformers `CLIPModel` with its tokenizer.

    It measures how well a picture fits its prompt, and conditions no model.
    """
    return ASSETS / "clip"


def data_folder() -> Path:
    """Returns the folder of the training pictures, in webdataset shards."""
    return ASSETS / "data"


def pipeline_folder(name: str) -> Path:
    """Returns the pipeline folder of `nano` or `nano-tiny`.

    The package holds only the UNet of `nano-tiny`. The folder that joins it to the teacher's other components is
    written to the user's cache on first use.
    """
    if name == "nano":
        return teacher_folder()
    unet = ASSETS / "tiny"
    target = cache_folder() / f"{name}-{sha256_tree(unet)[:12]}"
    if not target.is_dir():
        with unless_present(target), staged(target) as out:
            copy_tree(teacher_folder(), out, without="unet")
            copy_tree(unet, out / "unet")
    return target


@cache
def _read_index() -> dict[str, Any]:
    index: dict[str, Any] = json.loads((data_folder() / "index.json").read_text(encoding="utf-8"))
    return index


def styles() -> dict[str, str]:
    """Returns style → the phrase that opens its captions."""
    return {name: entry["phrase"] for name, entry in _read_index()["styles"].items()}


def concepts() -> dict[str, list[str]]:
    """Returns each concept that nano draws → other words for it."""
    return {name: words.split(", ") for name, words in _read_index()["concepts"].items()}


def draws_like_nano(model: str | Path) -> bool:
    """Returns whether a model is nano, nano-tiny, or a student or an export of nano, so that it knows nano's concepts.

    Args:
        model: a name, a path or a hub id.
    """
    if str(model) in ("nano", "nano-tiny"):
        return True
    manifest = read_manifest(Path(model)) if Path(model).is_dir() else None
    made_from = manifest.inputs.values() if manifest and manifest.kind != "finetuned" else ()
    return bool(made_from) and sha256_tree(teacher_folder()) in made_from


def shards(split: str) -> list[Path]:
    """Returns the shard files of the split `train` or `heldout`."""
    return [data_folder() / name for name in _read_index()["shards"][split]]
