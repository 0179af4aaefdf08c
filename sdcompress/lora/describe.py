"""What a LoRA file holds, from its header."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from sdcompress_engines.errors import shorten

from sdcompress.checkpoints.weights import Weights
from sdcompress.lora.adapters import ALPHA, Adapter
from sdcompress.lora.build import build_adapter, find_shape_fault
from sdcompress.lora.names import KOHYA_PREFIXES, naming_of, split_component, split_key

_BASE_MODEL_KEYS = ("ss_base_model", "ss_base_model_version", "ss_sd_model_name", "modelspec.architecture")


def describe_lora(weights: Weights) -> dict[str, Any]:
    """Returns facts of a LoRA by name.

    Returns:
        `kinds` (kind of adapter → number of layers; `broken` are those whose tensors do not fit each other), `rank`
        (all ranks, ascending), `layers` (number of adapted layers), `naming` (`kohya`, `diffusers` or `LDM`),
        `components` (component → layers that the LoRA changes), and `made_for` (the base model in the metadata, or
        None).
    """
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in weights.shapes.items():
        if split := split_key(key):
            layers.setdefault(split[0], {})[split[1]] = shape
    adapters = [_build_from_shapes(shapes) for shapes in layers.values()]
    kinds = Counter("broken" if adapter is None else adapter.kind for adapter in adapters)
    made_for = next((weights.metadata[key] for key in _BASE_MODEL_KEYS if weights.metadata.get(key)), None)
    components = [split[0] for split in map(split_component, layers) if split is not None]
    return {
        "kinds": dict(kinds.most_common()),
        "rank": sorted({adapter.rank for adapter in adapters if adapter is not None and adapter.rank is not None}),
        "layers": len(layers),
        "naming": next((naming for naming in map(naming_of, layers) if naming != "diffusers"), "diffusers"),
        "components": {name: components.count(name) for name in KOHYA_PREFIXES if name in components},
        "made_for": None if made_for is None else shorten(made_for, 120),
    }


def _build_from_shapes(shapes: dict[str, tuple[int, ...]]) -> Adapter | None:
    """Returns a layer whose tensors have no values, or None where their shapes do not fit each other."""
    if find_shape_fault(shapes):
        return None
    return build_adapter({role: torch.empty(shape, device="meta") for role, shape in shapes.items() if role != ALPHA})
