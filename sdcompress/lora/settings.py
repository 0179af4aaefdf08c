"""What stands about a LoRA in the header of its file, such as how PEFT scales its layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sdcompress_engines.errors import ModelError, shorten
from sdcompress_engines.json_files import parse_json

from sdcompress.checkpoints.weights import Weights

_ENTRY = "lora_adapter_metadata"
"""diffusers writes it since 0.34, with a component and a dot before each name, such as `unet.lora_alpha`."""


def kept_entries(weights: Weights) -> dict[str, str]:
    """Returns the entries of a file's header that stay true of its layers when they are written to another file.

    PEFT's settings do not: `write_lora` writes every layer with its own scale, which a reader of the settings would
    apply a second time.
    """
    return {name: text for name, text in weights.metadata.items() if name != _ENTRY}


def read_settings(weights: Weights) -> dict[str, Any]:
    """Returns the settings of all components; empty where the file has none.

    Raises:
        ModelError: they are no JSON object.
    """
    text = weights.metadata.get(_ENTRY)
    if not text:
        return {}
    settings = parse_json(text, f"{weights.path}/{_ENTRY}", ModelError)
    if not isinstance(settings, dict):
        raise ModelError("is no JSON object", where=f"{weights.path}/{_ENTRY}", expected='{"unet.lora_alpha": 8, ...}')
    return settings


def find_alpha(settings: Mapping[str, Any], component: str, name: str, rank: int) -> float:
    """Returns the alpha of a layer: its own, else that of its component, else its rank.

    PEFT's patterns are regular expressions; those that diffusers writes are names, or ends of names, and only these are
    read.

    Args:
        settings: of all components.
        component: of the layer.
        name: of the layer.
        rank: of the layer.

    Raises:
        ValueError: the alpha is no finite number, or a pattern is no name.
    """
    alpha = settings.get(f"{component}.lora_alpha", rank)
    patterns = settings.get(f"{component}.alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(key.replace(".", "").replace("_", "").isalnum() for key in patterns):
        raise ValueError(f"alpha_pattern {shorten(repr(patterns), 60)}")
    alpha = next((value for key, value in patterns.items() if f".{name}".endswith(f".{key}")), alpha)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= 1e9:
        raise ValueError(f"lora_alpha {shorten(repr(alpha), 60)}")
    # Rank-stabilized LoRA (arXiv 2312.03732) divides by the root of the rank.
    return alpha * math.sqrt(rank) if settings.get(f"{component}.use_rslora") else float(alpha)
