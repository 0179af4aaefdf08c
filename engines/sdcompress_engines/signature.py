"""Names, order and shapes of the inputs and outputs of each component's graph.

Shapes depend on the component, names and order on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ModelError, UsageError, shorten
from .runners.base import TensorSpec

COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "vae_decoder", "vae_encoder")
CONTEXT_TOKENS = 77
"""Tokens of one CLIP window. A text encoder takes exactly one; a UNet's context is one or more of them."""

MOST_LEVELS = 8
"""Most levels of a UNet or VAE; the published ones have three or four."""

_UNET = ("sample", "timestep", "encoder_hidden_states")
_ADDED = ("text_embeds", "time_ids")
_DIFFUSERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unet": ((*_UNET, *_ADDED), ("out_sample",)),
    "text_encoder": (("input_ids",), ("last_hidden_state", "pooled_output", "penultimate_hidden_state")),
    "text_encoder_2": (("input_ids",), ("text_embeds", "last_hidden_state", "penultimate_hidden_state")),
    "vae_decoder": (("latent_sample",), ("sample",)),
    "vae_encoder": (("sample",), ("latent_parameters",)),
}
# host → component → (canonical input → the host's name, canonical output → the host's name), in the order of the graph.
# `y` is SDXL's text embedding and embedded sizes in one vector, as in the LDM code base. A host that runs its own text
# encoder and VAE has no entry for them.
HOSTS: dict[str, dict[str, tuple[dict[str, str], dict[str, str]]]] = {
    "diffusers": {
        component: ({name: name for name in inputs}, {name: name for name in outputs})
        for component, (inputs, outputs) in _DIFFUSERS.items()
    },
    "webui": {
        "unet": (
            dict(zip((*_UNET, "y"), ("sample", "timesteps", "encoder_hidden_states", "y"), strict=True)),
            {"out_sample": "latent"},
        )
    },
    "comfyui": {
        "unet": (dict(zip((*_UNET, "y"), ("x", "timesteps", "context", "y"), strict=True)), {"out_sample": "h"})
    },
}


@dataclass(frozen=True)
class Signature:
    """A component's graph as one host calls it.

    Attributes:
        host: a key of `HOSTS`.
        component: one of `COMPONENTS`.
        inputs, outputs: in the order of the graph; free axes are `batch`, `height`, `width` (latent pixels),
            `image_height`, `image_width` (pixels) and `tokens`.
        multiple: number that must divide the free sizes of the picture: in latent pixels for a UNet, in pixels for a
            VAE's encoder.
        names: canonical name → the host's name, inputs and outputs.
    """

    host: str
    component: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    multiple: int
    names: Mapping[str, str]


def signature(
    component: str, config: Mapping[str, Any], dtype: torch.dtype = torch.float32, host: str = "diffusers"
) -> Signature:
    """Returns the inputs and outputs of a component's graph.

    `timestep` and `time_ids` are always float32: half precision would round fractional timesteps and sizes over 2048.

    Args:
        component: one of `COMPONENTS`.
        config: of the component, from diffusers or transformers.
        dtype: of all other float tensors.
        host: a key of `HOSTS`.

    Raises:
        UsageError: no such component or host. ModelError: a config without the fields that decide the shapes.
    """
    if host not in HOSTS or component not in HOSTS[host]:
        offered = "; ".join(f"{name}: {', '.join(known)}" for name, known in HOSTS.items())
        raise UsageError(f"no {component!r} in the signature {host!r}", expected=offered)
    shapes, results, multiple = _shapes(component, config)
    exact = {"timestep": torch.float32, "time_ids": torch.float32, "input_ids": torch.int64}
    inputs, outputs = HOSTS[host][component]

    def specs(names: Mapping[str, str], known: Mapping[str, tuple[int | str, ...]]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(of_host, known[name], exact.get(name, dtype)) for name, of_host in names.items() if name in known
        )

    return Signature(host, component, specs(inputs, shapes), specs(outputs, results), multiple, {**inputs, **outputs})


def _shapes(
    component: str, config: Mapping[str, Any]
) -> tuple[dict[str, tuple[int | str, ...]], dict[str, tuple[int | str, ...]], int]:
    """Returns the canonical inputs and outputs with their shapes, and the multiple."""
    if component in ("text_encoder", "text_encoder_2"):
        hidden = ("batch", CONTEXT_TOKENS, _size(config, "hidden_size"))
        results: dict[str, tuple[int | str, ...]] = {"last_hidden_state": hidden, "penultimate_hidden_state": hidden}
        results |= (
            {"pooled_output": ("batch", _size(config, "hidden_size"))}
            if component == "text_encoder"
            else {"text_embeds": ("batch", _size(config, "projection_dim"))}
        )
        return {"input_ids": ("batch", CONTEXT_TOKENS)}, results, 1
    if component == "vae_decoder":
        return (
            {"latent_sample": ("batch", _size(config, "latent_channels"), "height", "width")},
            {"sample": ("batch", _size(config, "out_channels"), "image_height", "image_width")},
            1,
        )
    if component == "vae_encoder":
        picture = ("batch", _size(config, "in_channels"), "image_height", "image_width")
        return (
            {"sample": picture},
            {"latent_parameters": ("batch", 2 * _size(config, "latent_channels"), "height", "width")},
            _reduction(config),
        )
    check_unet_inputs(config)
    shapes: dict[str, tuple[int | str, ...]] = {
        "sample": ("batch", _size(config, "in_channels"), "height", "width"),
        "timestep": ("batch",),
        "encoder_hidden_states": ("batch", "tokens", context_width(config)),
    }
    if config.get("addition_embed_type") == "text_time":
        # SDXL: the text's embedding, and six numbers that are embedded one by one.
        whole = _size(config, "projection_class_embeddings_input_dim")
        text = whole - 6 * _size(config, "addition_time_embed_dim")
        if text < 1:
            raise ModelError(f"the config has a text embedding {text} wide beside SDXL's sizes", expected="1 or more")
        shapes |= {"text_embeds": ("batch", text), "time_ids": ("batch", 6), "y": ("batch", whole)}
    return shapes, {"out_sample": ("batch", _size(config, "out_channels"), "height", "width")}, _reduction(config)


def check_unet_inputs(config: Mapping[str, Any]) -> None:
    """Refuse a UNet with an input that no graph of ours has: the graph would draw other pictures than the model.

    Args:
        config: the UNet's diffusers config.

    Raises:
        ModelError: it takes the guidance scale, as the first LCM models do.
    """
    if config.get("time_cond_proj_dim") is not None:
        raise ModelError(
            "the UNet takes the guidance scale as an input (time_cond_proj_dim), which its graph would lack",
            hint="run this model with torch",
        )


def context_width(config: Mapping[str, Any]) -> int:
    """Returns the width of the text embeddings that a UNet takes.

    Where the config has one width a level, those of blocks without attention do not count.

    Args:
        config: the UNet's diffusers config.

    Raises:
        ModelError: there is no width, or blocks with attention have different ones.
    """
    width = _entry(config, "cross_attention_dim")
    if isinstance(width, (list, tuple)):
        levels = zip(width, _level_kinds(config, len(width)), strict=True)
        attended = [each for each, kinds in levels if "CrossAttn" in kinds] or list(width)
        if any(each != attended[0] for each in attended):
            raise ModelError(
                f"the UNet config has cross_attention_dim {shorten(width, 80)}",
                expected="one width in all blocks with attention: they all take the same text",
            )
        width = attended[0]
    return _check_size("cross_attention_dim", width)


def _level_kinds(config: Mapping[str, Any], levels: int) -> list[str]:
    """Returns the kinds of the blocks of each level, in one text; the mid block belongs to the innermost level."""
    sides = [_entry(config, "down_block_types"), _entry(config, "up_block_types")]
    if levels == 0 or not all(isinstance(side, (list, tuple)) and len(side) == levels for side in sides):
        raise ModelError(f"the UNet config has {levels} values of cross_attention_dim", expected="one for each level")
    kinds = [f"{down} {up}" for down, up in zip(sides[0], reversed(sides[1]), strict=True)]
    kinds[-1] += f" {config.get('mid_block_type', 'UNetMidBlock2DCrossAttn')}"
    return kinds


def _reduction(config: Mapping[str, Any]) -> int:
    """Returns the number of pixels for each pixel of the innermost level, along one side."""
    channels = _entry(config, "block_out_channels")
    if not isinstance(channels, (list, tuple)) or not 1 <= len(channels) <= MOST_LEVELS:
        raise ModelError(
            f"the config has block_out_channels {shorten(channels, 80)}", expected=f"a list of 1 to {MOST_LEVELS}"
        )
    return int(2 ** (len(channels) - 1))


def _size(config: Mapping[str, Any], name: str) -> int:
    return _check_size(name, _entry(config, name))


def _entry(config: Mapping[str, Any], name: str) -> Any:
    if name not in config:
        raise ModelError(f"the config has no {name!r}")
    return config[name]


def _check_size(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"the config has {name} {shorten(value, 80)}", expected="one whole number above 0")
    return value
