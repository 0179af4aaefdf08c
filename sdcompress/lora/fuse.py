"""Fuse LoRAs into a pipeline's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from sdcompress_engines.errors import ModelError, UsageError, shorten

from sdcompress.lora.adapters import Layers
from sdcompress.lora.files import NAME_SHOWN, describe_faults
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
    if text.strip() and (not colon or weight.endswith(".safetensors") or is_drive):
        return Path(text), 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not name or not abs(number) <= MOST_WEIGHT:
        expected = f"FILE or FILE:WEIGHT, such as style.safetensors:0.8, with a weight of at most {MOST_WEIGHT:g}"
        raise UsageError(f"--lora {shorten(repr(text), 120)}", expected=expected)
    return Path(name), number


@torch.no_grad()
def fuse_lora(pipeline: TextToImagePipeline, layers: Layers, weight: float = 1.0) -> None:
    """Add a LoRA to the pipeline's weights in place.

    Several LoRAs are added one after another: each changes the weights that the one before has left.

    Args:
        pipeline: in torch.
        layers: of the LoRA.
        weight: factor of the change.

    Raises:
        ModelError: the pipeline does not have one of the layers, or has it in another shape, or a sum is not finite.
    """
    components = {component for component, _ in layers}
    targets = find_targets(layers, {name: getattr(pipeline, name, None) for name in components})
    for place, target in targets.items():
        changed = (target.float() + weight * layers[place].delta(target)).to(target.dtype)
        if not changed.isfinite().all():
            raise ModelError(
                f"the LoRA makes weights of {place[1]} that are not finite",
                expected="a LoRA for this model",
                hint="a smaller weight: --lora FILE:WEIGHT",
            )
        target.copy_(changed)


def find_targets(layers: Layers, networks: Mapping[str, torch.nn.Module | None]) -> dict[tuple[str, str], torch.Tensor]:
    """Returns the weight that each layer of a LoRA changes.

    Args:
        layers: of the LoRA.
        networks: component → its network, which may be on the meta device; None where the model has none.

    Raises:
        ModelError: names the layers that a network does not have, that are of a kind that no LoRA changes, or whose
            weight has another shape.
    """
    modules = {name: dict(network.named_modules()) for name, network in networks.items() if network is not None}
    targets, absent, faults = dict[tuple[str, str], torch.Tensor](), list[str](), list[str]()
    for (component, name), layer in layers.items():
        names = modules.get(component, {})
        module = names.get(name) or names.get(name.removeprefix("text_model."))
        shown = shorten(name, NAME_SHOWN)
        if module is None:
            absent.append(f"{shown}, which the {component} does not have")
        elif not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            faults.append(f"{shown} is a {type(module).__name__}")
        elif not layer.fits(module.weight.shape):
            expected = " x ".join(map(str, module.weight.shape))
            faults.append(f"{shown} fits a layer of {layer.describe_shape()}, not {expected}")
        else:
            targets[component, name] = module.weight
    if absent:
        more = f", and {len(absent) - 1} more of {len(layers)}" if len(absent) > 1 else ""
        raise ModelError(
            f"the LoRA changes {absent[0]}{more}",
            expected="a LoRA for this model",
            hint="sdcompress lora remap LORA --teacher TEACHER --plan PLAN -o FILE, for a LoRA of the teacher",
        )
    if faults:
        raise ModelError(
            f"the LoRA has {describe_faults(faults, len(layers))}", expected="a LoRA for the layers of this model"
        )
    return targets
