"""What LoRA files call a layer, in both namings that are in use.

diffusers names a layer `unet.down_blocks.0…to_q.lora_A.weight`; kohya's scripts, which the WebUIs read,
`lora_unet_down_blocks_0…to_q` with `.lora_down.weight`, `.lora_up.weight` and `.alpha`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}

_ENDS = {
    "lora_A.weight": "down",
    "lora.down.weight": "down",
    "lora_down.weight": "down",
    "lora_B.weight": "up",
    "lora.up.weight": "up",
    "lora_up.weight": "up",
    "alpha": "alpha",
}

_KEY = re.compile(rf"(.*?)\.({'|'.join(re.escape(end) for end in _ENDS)})$")


def unet_modules(unet: Any) -> list[str]:
    """The names of the layers of a UNet that can be adapted."""
    return [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]


def clip_modules(layers: int = 32) -> list[str]:
    """The names of the layers of a CLIP text encoder that can be adapted, of one as deep as any in use."""
    kinds = [*(f"self_attn.{n}_proj" for n in "qkv"), "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
    return [f"text_model.encoder.layers.{i}.{kind}" for i in range(layers) for kind in kinds]


def _place(key: str, known: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
    for component, prefix in KOHYA.items():
        if key.startswith(prefix):
            name = known[component].get(key.removeprefix(prefix))
            return (component, name) if name else None
        if key.startswith(f"{component}."):
            return component, key.removeprefix(f"{component}.").removesuffix(".default")
    return None
