"""Writes the model that all setups run, and the inputs that all UNets get."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .setups import PROMPT, PROMPTS, STUDENTS


def write_model(model: str, folder: Path) -> None:
    """Write the pipeline in fp32, in a layout that transformers 4 and 5 both read, and the UNet inputs `inputs.npz`."""
    from sdcompress.models.load import load_pipeline
    from sdcompress.models.random import random_pipeline
    from sdcompress.support.quiet import quiet

    pipeline: Any = load_pipeline(model).pipeline if model == "nano" else random_pipeline("sd1", STUDENTS[model])
    target = folder / "model.partial"
    shutil.rmtree(target, ignore_errors=True)
    with quiet():
        pipeline.save_pretrained(target)
    _rename_weights(target / "text_encoder" / "model.safetensors")
    _split_tokenizer(target / "tokenizer" / "tokenizer.json")
    _write_inputs(pipeline, PROMPTS.get(model, PROMPT), folder / "inputs.npz")
    target.rename(folder / "model")


def _rename_weights(path: Path) -> None:
    """Give the text encoder's weights the names of transformers 4."""
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    prefix = "text_model."
    renamed = {key if key.startswith(prefix) else prefix + key: value for key, value in weights.items()}
    save_file(renamed, path, {"format": "pt"})


def _split_tokenizer(path: Path) -> None:
    """Replace tokenizer.json by the two files of transformers 4."""
    vocabulary = json.loads(path.read_text(encoding="utf-8"))["model"]
    path.unlink()
    (path.parent / "vocab.json").write_text(json.dumps(vocabulary["vocab"]), encoding="utf-8")
    merges = (" ".join(pair) if isinstance(pair, list) else pair for pair in vocabulary["merges"])
    text = "".join(f"{line}\n" for line in ("#version: 0.2", *merges))
    (path.parent / "merges.txt").write_text(text, encoding="utf-8")


def _write_inputs(pipeline: Any, prompt: str, path: Path) -> None:
    """Write `sample` and `context` of a UNet call with guidance, and the initial `latents` of a picture."""
    import numpy as np
    import torch

    side, channels = int(pipeline.unet.config.sample_size), pipeline.unet.config.in_channels
    ids = pipeline.tokenizer(
        ["", prompt], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        context = pipeline.text_encoder(ids)[0]
    generator = torch.Generator().manual_seed(0)
    np.savez(
        path,
        sample=torch.randn(2, channels, side, side, generator=generator).numpy(),
        context=context.numpy(),
        latents=torch.randn(1, channels, side, side, generator=generator).numpy(),
    )
