"""How LoRA files name a layer, in the two namings in use.

diffusers writes `unet.down_blocks.0…to_q.lora_A.weight`. kohya's scripts, whose files the WebUIs read, write
`lora_unet_down_blocks_0…to_q` with `.lora_down.weight`, `.lora_up.weight` and `.alpha`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

KOHYA_PREFIXES = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),  # of a model with one text encoder, and of SDXL's two
    "text_encoder_2": ("lora_te2_",),
}

TENSOR_ROLES = {
    "lora_A.weight": "down",
    "lora_A.default.weight": "down",
    "lora.down.weight": "down",
    "lora_linear_layer.down.weight": "down",
    "lora_down.weight": "down",
    "lora_B.weight": "up",
    "lora_B.default.weight": "up",
    "lora.up.weight": "up",
    "lora_linear_layer.up.weight": "up",
    "lora_up.weight": "up",
    "alpha": "alpha",
}
"""End of a key → which tensor of the layer it is. diffusers has the names with `linear` for text encoders."""

# diffusers before 0.22 wrote `attn1.processor.to_q_lora.down.weight`.
_OLD_NAMES = (
    (re.compile(r"\.processor\.to_([qkv])_lora\."), r".to_\1.lora."),
    (re.compile(r"\.processor\.to_out_lora\."), ".to_out.0.lora."),
)
_KEY = re.compile(rf"(.*?)\.({'|'.join(re.escape(end) for end in TENSOR_ROLES)})$")


def unet_modules(unet: torch.nn.Module) -> list[str]:
    """Returns the names of a UNet's, or another network's, layers that a LoRA can adapt."""
    return [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]


def clip_modules(layers: int = 32) -> list[str]:
    """Returns the names of a CLIP text encoder's layers that a LoRA can adapt.

    Args:
        layers: of the encoder; the default is the depth of the deepest one in use.
    """
    kinds = [*(f"self_attn.{n}_proj" for n in "qkv"), "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
    return [f"text_model.encoder.layers.{i}.{kind}" for i in range(layers) for kind in kinds]


def kohya_prefix(component: str, components: Iterable[str]) -> str:
    """Returns the prefix that kohya's scripts write for a component.

    Args:
        component: `unet`, `text_encoder` or `text_encoder_2`.
        components: all that the LoRA changes; with a second text encoder, the first has the name of SDXL's.
    """
    prefixes = KOHYA_PREFIXES[component]
    return prefixes[-1] if "text_encoder_2" in components else prefixes[0]


def split_key(key: str) -> tuple[str, str] | None:
    """Returns the layer's name in the file and the tensor's role (`down`, `up`, `alpha`); None for another key."""
    for pattern, name in _OLD_NAMES:
        key = pattern.sub(name, key)
    match = _KEY.fullmatch(key)
    return (match[1], TENSOR_ROLES[match[2]]) if match else None


def split_down_key(key: str) -> str | None:
    """Returns the layer's name in the file for the key of a `down` tensor, else None."""
    split = split_key(key)
    return split[0] if split is not None and split[1] == "down" else None


def component_of(name: str) -> str | None:
    """Returns the component of a layer by its name in the file, in either naming; None for an unknown one."""
    return next(
        (component for component, prefixes in KOHYA_PREFIXES.items() if name.startswith((*prefixes, f"{component}."))),
        None,
    )


def find_layer(name: str, known: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
    """Returns the component and the module name of a layer, or None for an unknown one.

    Args:
        name: of the layer in the file, in either naming.
        known: component → module name with underscores for dots → module name. kohya's naming needs it, because it
            replaces every dot by an underscore.
    """
    component = component_of(name)
    if component is None:
        return None
    for prefix in KOHYA_PREFIXES[component]:
        if name.startswith(prefix):
            module = known[component].get(name.removeprefix(prefix))
            return (component, module) if module else None
    return component, name.removeprefix(f"{component}.").removesuffix(".default")
