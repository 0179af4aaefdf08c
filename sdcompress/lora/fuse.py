"""Fuse LoRAs into a pipeline's weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.errors import ModelError, UsageError, shorten
from sdcompress_engines.graph_weights import exchangeable_layers

from sdcompress.lora.adapters import Adapter, Layers
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
    networks: dict[str, Any] = {name: getattr(pipeline, name, None) for name in components}
    targets = find_targets(layers, {name: shapes_of(network) for name, network in networks.items()})
    for place, name in targets.items():
        target = networks[place[0]].get_parameter(f"{name}.weight")
        target.copy_(add_layers(target, [(layers[place], weight)], place[1]))


def add_layers(before: torch.Tensor, changes: Iterable[tuple[Adapter, float]], name: str) -> torch.Tensor:
    """Returns a weight after the changes of LoRAs, one after another, in its dtype.

    Args:
        before: the weight, (out, in) or (out, in, kh, kw), of any float dtype. The sum is in float32.
        changes: layer of a LoRA and the factor of its change.
        name: of the layer, for the message.

    Raises:
        ModelError: the result is not finite.
    """
    changed = before.float()
    for layer, factor in changes:
        changed = changed + factor * layer.delta(changed)
    changed = changed.to(before.dtype)
    if not changed.isfinite().all():
        raise ModelError(
            f"the LoRA makes weights of {shorten(name, NAME_SHOWN)} that are not finite",
            expected="a LoRA for this model",
            hint="a smaller weight: --lora FILE:WEIGHT",
        )
    return changed


def shapes_of(network: torch.nn.Module | None) -> Mapping[str, tuple[int, ...]] | None:
    """Returns the linear layers and convolutions of a network, which a LoRA can change, with their weights' shapes.

    Args:
        network: may be on the meta device; of None the result is None.
    """
    if network is None:
        return None
    layers = exchangeable_layers(network)
    return {name: tuple(layer.get_parameter("weight").shape) for name, layer in layers.items()}


def find_targets(
    layers: Layers, networks: Mapping[str, Mapping[str, tuple[int, ...]] | None]
) -> dict[tuple[str, str], str]:
    """Returns the name of the layer that each layer of a LoRA changes.

    Args:
        layers: of the LoRA.
        networks: component → its layers with their weights' shapes, of `shapes_of`; None where the model has no such
            component.

    Raises:
        ModelError: names the layers that a network does not have, or whose weight has another shape.
    """
    targets, absent, faults = dict[tuple[str, str], str](), list[str](), list[str]()
    for (component, name), layer in layers.items():
        shapes = networks.get(component) or {}
        found = next((form for form in (name, name.removeprefix("text_model.")) if form in shapes), None)
        shown = shorten(name, NAME_SHOWN)
        if found is None:
            absent.append(f"{shown}, which the {component} does not have as a linear layer or convolution")
        elif not layer.fits(shapes[found]):
            expected = " x ".join(map(str, shapes[found]))
            faults.append(f"{shown} fits a layer of {layer.describe_shape()}, not {expected}")
        else:
            targets[component, name] = found
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
