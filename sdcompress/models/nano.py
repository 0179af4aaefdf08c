"""Nano, the built-in teacher: a small but real text-to-image model that ships in the package, with its data and its
metric model.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from sdcompress_engines.files import copy_tree, write_atomically
from sdcompress_engines.json_files import read_json_object
from sdcompress_engines.manifest import cache_folder, read_manifest, sha256_tree
from sdcompress_engines.output_folders import staged, unless_present

from sdcompress.support.pipeline import TextToImagePipeline
from sdcompress.support.quiet import quiet

BUILT_IN = ("nano", "nano-tiny", "nano-tiny-4step")
"""The models in the package: the teacher, its bk-tiny student, and that student in four steps."""
DECODER_NAME = "nano"
"""What `--decoder` takes for the small decoder in the package, for nano and its students."""
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


def decoder_folder() -> Path:
    """Returns the folder of the small decoder."""
    return ASSETS / "decoder"


def pipeline_folder(name: str) -> Path:
    """Returns the pipeline folder of a built-in model.

    The package holds only the UNet of `nano-tiny`, and only a LoRA of `nano-tiny-4step`. The folders that join them to
    the rest are written to the user's cache on first use.

    Args:
        name: nano, nano-tiny or nano-tiny-4step.
    """
    if name == "nano":
        return teacher_folder()
    parts = [ASSETS / "tiny"] + ([ASSETS / "tiny-4step"] if name == "nano-tiny-4step" else [])
    target = cache_folder() / "-".join([name, *(sha256_tree(part)[:12] for part in parts)])
    if not target.is_dir():
        with unless_present(target), staged(target) as out:
            copy_tree(teacher_folder(), out, without="unet")
            copy_tree(parts[0], out / "unet")
            if len(parts) > 1:
                _apply_few_steps(out, parts[1] / "lora.safetensors")
    return target


def _apply_few_steps(folder: Path, lora: Path) -> None:
    """Fuse a few-step LoRA into a pipeline folder, and write the scheduler and the defaults that it was trained for.

    Args:
        folder: of the pipeline; its UNet, scheduler and index are written anew.
        lora: the file.
    """
    from sdcompress.checkpoints.component import keep_half
    from sdcompress.checkpoints.folder import load_component
    from sdcompress.lora.files import read_lora
    from sdcompress.lora.fuse import fuse_lora
    from sdcompress.lora.names import unet_modules
    from sdcompress.lora.sampling import read_sampling

    config = read_json_object(folder / "unet/config.json")
    unet = load_component(folder / "unet", "unet", config, keep_half)
    fuse_lora(cast(TextToImagePipeline, SimpleNamespace(unet=unet)), read_lora(lora, unet_modules(unet)))
    sampling = read_sampling(lora)
    assert sampling is not None, "the package's LoRA says how it draws"
    defaults, scheduler = sampling
    with quiet():
        unet.save_pretrained(folder / "unet")
        scheduler.save_pretrained(folder / "scheduler")
    index = read_json_object(folder / "model_index.json") | defaults
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    write_atomically(folder / "model_index.json", json.dumps(index, indent=2) + "\n")


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
    """Returns whether a model is built in, or a student or an export of nano, so that it knows nano's concepts.

    Args:
        model: a name, a path or a hub id.
    """
    if str(model) in BUILT_IN:
        return True
    manifest = read_manifest(Path(model)) if Path(model).is_dir() else None
    made_from = manifest.inputs.values() if manifest and manifest.kind != "finetuned" else ()
    return bool(made_from) and sha256_tree(teacher_folder()) in made_from


def shards(split: str) -> list[Path]:
    """Returns the shard files of the split `train` or `heldout`."""
    return [data_folder() / name for name in _read_index()["shards"][split]]
