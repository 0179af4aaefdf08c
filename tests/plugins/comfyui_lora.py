"""How ComfyUI finds and applies the layers of a LoRA, written from its contracts: LoRA and full differences only."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch

_TRANSFORMER = [
    *(f"attn{n}.{name}" for n in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ff.net.0.proj", "ff.net.2"),
]
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_to_diffusers(config: dict[str, Any]) -> dict[str, str]:
    """Returns diffusers' name → LDM's of the weights in resnets and attentions that a LoRA may be for."""
    pairs, down, up = (
        config["num_res_blocks"],
        iter(config["transformer_depth"]),
        list(config["transformer_depth_output"]),
    )
    found: dict[str, str] = {}
    at = 1
    for level, count in enumerate(pairs):
        for pair in range(count):
            found.update(_pair(f"down_blocks.{level}", pair, f"input_blocks.{at}", next(down)))
            at += 1
        at += 1
    if config["transformer_depth_middle"] > -2:
        found.update(_attention("mid_block.attentions.0", "middle_block.1", config["transformer_depth_middle"]))
        for resnet in (0, 1):
            found.update(_resnet(f"mid_block.resnets.{resnet}", f"middle_block.{2 * resnet}"))
    at = 0
    for level, count in enumerate(reversed(pairs)):
        for pair in range(count + 1):
            found.update(_pair(f"up_blocks.{level}", pair, f"output_blocks.{at}", up.pop()))
            at += 1
    return found


def _pair(block: str, pair: int, ldm_name: str, depth: int) -> Iterator[tuple[str, str]]:
    yield from _resnet(f"{block}.resnets.{pair}", f"{ldm_name}.0")
    yield from _attention(f"{block}.attentions.{pair}", f"{ldm_name}.1", depth)


def _resnet(name: str, ldm_name: str) -> Iterator[tuple[str, str]]:
    for layer, ldm_layer in _RESNET.items():
        yield f"{name}.{layer}.weight", f"{ldm_name}.{ldm_layer}.weight"


def _attention(name: str, ldm_name: str, depth: int) -> Iterator[tuple[str, str]]:
    layers = [f"transformer_blocks.{block}.{layer}" for block in range(depth) for layer in _TRANSFORMER]
    for layer in ["proj_in", *layers, "proj_out"] if depth > 0 else []:
        yield f"{name}.{layer}.weight", f"{ldm_name}.{layer}.weight"


def load_lora(tensors: dict[str, torch.Tensor], model: Any) -> dict[str, Any]:
    """Returns key of the model → patch, from a LoRA by kohya's names with diffusers' or LDM's block names."""
    prefix = "diffusion_model."
    named = {key.removeprefix(prefix): key for key in model.state_dict() if key.startswith(prefix)}
    named |= {name: f"{prefix}{key}" for name, key in unet_to_diffusers(model.model_config.unet_config).items()}
    patches: dict[str, Any] = {}
    for name, key in named.items():
        layer = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        if f"{layer}.lora_up.weight" in tensors:
            alpha = float(tensors[f"{layer}.alpha"]) if f"{layer}.alpha" in tensors else None
            up, down = tensors[f"{layer}.lora_up.weight"], tensors[f"{layer}.lora_down.weight"]
            patches[key] = ("lora", (up, down, alpha, None, None))
        if f"{layer}.diff" in tensors:
            patches[key] = ("diff", (tensors[f"{layer}.diff"],))
        if f"{layer}.diff_b" in tensors:
            patches[f"{key.removesuffix('.weight')}.bias"] = ("diff", (tensors[f"{layer}.diff_b"],))
    return patches


def calculate_weight(
    patches: list[Any], weight: torch.Tensor, key: str, intermediate_dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Change a weight in place. A patch that does not fit is logged and left out."""
    for strength, (kind, values), strength_model, _, _ in patches:
        if strength_model != 1:
            weight *= strength_model
        try:
            if kind == "lora":
                up, down, alpha = values[:3]
                product = up.to(intermediate_dtype).flatten(1) @ down.to(intermediate_dtype).flatten(1)
                weight += strength * (1 if alpha is None else alpha / len(down)) * product.reshape(weight.shape)
            elif values[0].shape == weight.shape:
                weight += strength * values[0].to(weight.dtype)
            else:
                logging.getLogger().warning("shape mismatch of %s", key)
        except RuntimeError as error:
            logging.getLogger().error("%s %s", key, error)
    return weight
