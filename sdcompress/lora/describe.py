"""What a LoRA file holds, from its header."""

from __future__ import annotations

from typing import Any

from sdcompress_engines.errors import shorten

from sdcompress.checkpoints.weights import Weights
from sdcompress.lora.names import KOHYA_PREFIXES, component_of, split_down_key

_BASE_MODEL_KEYS = ("ss_base_model", "ss_base_model_version", "ss_sd_model_name", "modelspec.architecture")


def describe_lora(weights: Weights) -> dict[str, Any]:
    """Returns facts of a LoRA by name.

    Returns:
        `rank` (all ranks, ascending), `layers` (number of adapted layers), `naming` (`kohya` or `diffusers`),
        `components` (component → layers that the LoRA changes), and `made_for` (the base model in the metadata, or
        None).
    """
    shapes = {name: shape for key, shape in weights.shapes.items() if (name := split_down_key(key)) is not None}
    ranks = {name: shape[0] if shape else 0 for name, shape in shapes.items()}
    made_for = next((weights.metadata[key] for key in _BASE_MODEL_KEYS if weights.metadata.get(key)), None)
    components = [component_of(name) for name in ranks]
    return {
        "rank": sorted(set(ranks.values())),
        "layers": len(ranks),
        "naming": "kohya" if any(name.startswith("lora_") for name in ranks) else "diffusers",
        "components": {name: components.count(name) for name in KOHYA_PREFIXES if name in components},
        "made_for": None if made_for is None else shorten(made_for, 120),
    }
