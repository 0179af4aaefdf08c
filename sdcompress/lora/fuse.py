"""Fuse LoRAs into a pipeline's weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.errors import ModelError, UsageError

from sdcompress.lora.files import Layers
from sdcompress.support.pipeline import TextToImagePipeline

MOST_WEIGHT = 100.0
"""Largest factor of a LoRA's change; 1 is usual."""


def parse_lora(text: str) -> tuple[Path, float]:
    """Returns the file and the weight of a LoRA option, `FILE` or `FILE:WEIGHT`; the default weight is 1.

    Raises:
        UsageError: the weight is no number, or too large.
    """
    name, colon, weight = text.rpartition(":")
    is_drive = len(name) == 1 and name.isalpha() and weight.startswith(("\\", "/"))
    if not colon or weight.endswith(".safetensors") or is_drive:
        return Path(text), 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not abs(number) <= MOST_WEIGHT:
        expected = f"FILE or FILE:WEIGHT, such as style.safetensors:0.8, with a weight of at most {MOST_WEIGHT:g}"
        raise UsageError(f"--lora {text!r}", expected=expected)
    return Path(name), number


@torch.no_grad()
def fuse_lora(pipeline: TextToImagePipeline, layers: Layers, weight: float = 1.0) -> None:
    """Add a LoRA to the pipeline's weights in place.

    Args:
        pipeline: in torch.
        layers: of the LoRA.
        weight: factor of the change.

    Raises:
        ModelError: the pipeline does not have one of the layers, or has it in another shape.
    """
    for (component, name), layer in layers.items():
        network = getattr(pipeline, component, None)
        names = dict(network.named_modules()) if network is not None else {}
        module = names.get(name) or names.get(name.removeprefix("text_model."))
        if module is None:
            raise ModelError(
                f"the LoRA changes {name}, which the {component} does not have",
                expected="a LoRA for this model",
                hint="sdcompress lora remap LORA --teacher TEACHER --plan PLAN -o FILE, for a LoRA of the teacher",
            )
        target: Any = module.weight
        if layer.up.shape[0] != target.shape[0] or layer.down.flatten(1).shape[1] != target.flatten(1).shape[1]:
            raise ModelError(
                f"the LoRA's {name} fits a layer of {layer.up.shape[0]} x {layer.down.flatten(1).shape[1]}",
                expected=f"{target.shape[0]} x {target.flatten(1).shape[1]}, as the {component} has",
            )
        target += (weight * layer.delta(target.shape)).to(target)
