"""What a graph's inputs and outputs are called, and their shapes. Shapes belong to the component, names and order to the host: both are data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ModelError, UsageError
from .runners.base import TensorSpec

COMPONENTS = ("unet", "text_encoder", "vae_decoder")
CONTEXT_TOKENS = 77
"""Tokens of one CLIP window; the text encoder takes exactly one, a UNet's context is one or more of them."""

# host → component → (canonical input → its name there, canonical output → its name there), in the order of the graph.
HOSTS: dict[str, dict[str, tuple[dict[str, str], dict[str, str]]]] = {
    "diffusers": {
        "unet": ({name: name for name in ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")}, {"out_sample": "out_sample"}),
        "text_encoder": ({"input_ids": "input_ids"}, {"last_hidden_state": "last_hidden_state", "pooled_output": "pooled_output"}),
        "vae_decoder": ({"latent_sample": "latent_sample"}, {"sample": "sample"}),
    },
}


@dataclass(frozen=True)
class Signature:
    """A component's graph as one host calls it.

    Attributes:
        inputs, outputs: in graph order; free axes are `batch`, `height`, `width` (latent, or `image_*`), `tokens`.
        multiple: what `height` and `width` must be divisible by.
        names: canonical name → the host's name, inputs and outputs.
    """

    host: str
    component: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    multiple: int
    names: Mapping[str, str]


def signature(component: str, config: Mapping[str, Any], dtype: torch.dtype = torch.float32, host: str = "diffusers") -> Signature:
    """The I/O of a component with this diffusers or transformers config, its float tensors of `dtype`.

    `timestep` and `time_ids` are float32 always: half precision would round fractional timesteps and sizes over 2048.

    Raises:
        UsageError: no such component or host. ModelError: a config without the fields that decide the shapes.
    """
    if host not in HOSTS or component not in HOSTS[host]:
        raise UsageError(f"no signature for {component!r} in host {host!r}", expected=f"one of {', '.join(COMPONENTS)} in {', '.join(HOSTS)}")
    try:
        shapes, results, multiple = _shapes(component, config)
    except KeyError as error:
        raise ModelError(f"the {component} config has no {error.args[0]!r}") from error
    exact = {"timestep": torch.float32, "time_ids": torch.float32, "input_ids": torch.int64}
    inputs, outputs = HOSTS[host][component]

    def specs(names: Mapping[str, str], known: Mapping[str, tuple[int | str, ...]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(given, known[name], exact.get(name, dtype)) for name, given in names.items() if name in known)

    return Signature(host, component, specs(inputs, shapes), specs(outputs, results), multiple, {**inputs, **outputs})


def _shapes(component: str, config: Mapping[str, Any]) -> tuple[dict[str, tuple[int | str, ...]], dict[str, tuple[int | str, ...]], int]:
    if component == "text_encoder":
        width = config["hidden_size"]
        return {"input_ids": ("batch", CONTEXT_TOKENS)}, {"last_hidden_state": ("batch", CONTEXT_TOKENS, width), "pooled_output": ("batch", width)}, 1
    levels = len(config["block_out_channels"])
    if component == "vae_decoder":
        return {"latent_sample": ("batch", config["latent_channels"], "height", "width")}, {"sample": ("batch", config["out_channels"], "image_height", "image_width")}, 1
    shapes: dict[str, tuple[int | str, ...]] = {
        "sample": ("batch", config["in_channels"], "height", "width"),
        "timestep": ("batch",),
        "encoder_hidden_states": ("batch", "tokens", config["cross_attention_dim"]),
    }
    if config.get("addition_embed_type") == "text_time":  # SDXL
        shapes["text_embeds"] = ("batch", config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"])
        shapes["time_ids"] = ("batch", 6)
    return shapes, {"out_sample": ("batch", config["out_channels"], "height", "width")}, 2 ** (levels - 1)
