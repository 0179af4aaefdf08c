"""What an export keeps of a pipeline besides graphs: configs, scheduler and tokenizers, and a hash of its weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from sdcompress.export.components import config_of
from sdcompress.support.pipeline import TextToImagePipeline

_NOT_EXPORTED = ("safety_checker", "feature_extractor", "image_encoder")


def save_small_parts(pipeline: TextToImagePipeline, folder: Path) -> None:
    """Write all that a pipeline needs besides weights: `model_index.json`, configs, scheduler and tokenizers.

    A safety checker is left out.

    Args:
        pipeline: in torch.
        folder: the folder to write.
    """
    pipeline.save_config(folder)
    index_path = folder / "model_index.json"
    index = json.loads(index_path.read_text(encoding="utf-8"))
    index |= {name: [None, None] for name in _NOT_EXPORTED if name in index}
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    index_path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    for name, part in pipeline.components.items():
        if index.get(name, [None])[0] is not None and part is not None:
            _save_config(part, folder / name)


def _save_config(part: Any, folder: Path) -> None:
    """Write a component without its weights: a module's config, or all of a scheduler or tokenizer."""
    is_module = isinstance(part, torch.nn.Module)
    if is_module and hasattr(part, "save_config"):  # of diffusers
        part.save_config(folder)
    else:
        (part.config if is_module else part).save_pretrained(folder)


def sha256_weights(part: torch.nn.Module) -> str:
    """Returns the sha256 of a module's config and weights. It does not depend on the file that they came from."""
    config = {key: value for key, value in config_of(part).items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in part.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
