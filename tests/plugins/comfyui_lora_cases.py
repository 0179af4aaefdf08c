"""LoRA files of the whole model, and what torch computes with them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sdcompress_engines.exactness import relative_l2

from sdcompress.lora.adapters import Layers
from sdcompress.lora.files import read_lora
from sdcompress.lora.fuse import add_layers, shapes_of

from ..sdcompress.adapter_cases import Case, Draw, dora, lora
from .comfyui_cases import SHAPE, record_calls, text

Tensors = dict[str, torch.Tensor]
STRENGTH = 0.2
"""Of the LoRAs here, whose changes are large."""
FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
REMOVED = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
"""A layer that nano-tiny has under the same name as nano, and one that it lacks."""


def layer_tensors(name: str, case: Case) -> Tensors:
    """Returns the tensors of a layer by kohya's or LyCORIS's names."""
    return {f"lora_unet_{name.replace('.', '_')}.{end}": tensor for end, tensor in case.tensors.items()}


def make_lora(
    unet: Any,
    make: Callable[[tuple[int, ...], Draw], Case] = lora,
    *,
    seed: int = 0,
    choose: Callable[[str], bool] = lambda name: True,
    with_norms: bool = False,
) -> Tensors:
    """Returns a LoRA of all layers in the resnets and attentions of a UNet.

    Args:
        unet: the whole model's.
        make: (shape of the weight, random numbers) → tensors of its layer.
        seed: of the random numbers.
        choose: whether a layer is changed.
        with_norms: make it a DoRA.
    """
    draw, tensors = Draw(seed), Tensors()
    for name, shape in (shapes_of(unet) or {}).items():
        if (".resnets." in name or ".attentions." in name) and choose(name):
            case = make(shape, draw)
            tensors |= layer_tensors(name, dora(case, shape, draw) if with_norms else case)
    return tensors


def read_layers(tensors: Tensors, unet: Any, folder: Path) -> Layers:
    """Returns the layers of a LoRA by the names of a UNet, as the library reads them from a file."""
    save_file(tensors, folder / "a.safetensors")
    return read_lora(folder / "a.safetensors", shapes_of(unet) or {})


@torch.no_grad()
def fuse(unet: Any, loras: Iterable[tuple[Layers, float]]) -> Any:
    """Returns a copy of a UNet with LoRAs in its weights."""
    fused = copy.deepcopy(unet)
    for layers, strength in loras:
        for (_, name), layer in layers.items():
            weight = fused.get_parameter(f"{name}.weight")
            weight.copy_(add_layers(weight, [(layer, strength)], name))
    return fused


@torch.no_grad()
def difference(host: Any, patcher: Any, unet: Any) -> float:
    """Returns the relative L2 between the engine in ComfyUI and a UNet in torch, over the calls of a sampling."""
    calls = record_calls(patcher)
    draw(host, patcher)
    assert calls
    return max(relative_l2(output, unet(x, times, context).sample) for x, times, context, output in calls)


def draw(host: Any, patcher: Any) -> torch.Tensor:
    """Returns the latents of a sampling."""
    latents: torch.Tensor = host.sample(patcher, text(77, 1), text(77, 2), SHAPE, 2, 4.0, 7)
    return latents


def stack(host: Any, patcher: Any, loras: Sequence[tuple[Tensors, float]]) -> Any:
    """Returns a MODEL behind one *Load LoRA* node for each LoRA."""
    for tensors, strength in loras:
        patcher = host.lora(patcher, tensors, strength)
    return patcher
