"""Names, order and shapes of the inputs and outputs of each component's graph.

Shapes depend on the component, names and order on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ModelError, UsageError
from .runners.base import TensorSpec

COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "vae_decoder", "vae_encoder")
CONTEXT_TOKENS = 77
"""Tokens of one CLIP window. A text encoder takes exactly one; a UNet's context is one or more of them."""

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
    try:
        shapes, results, multiple = _shapes(component, config)
    except KeyError as error:
        raise ModelError(f"the {component} config has no {error.args[0]!r}") from error
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
        hidden = ("batch", CONTEXT_TOKENS, config["hidden_size"])
        results: dict[str, tuple[int | str, ...]] = {"last_hidden_state": hidden, "penultimate_hidden_state": hidden}
        results |= (
            {"pooled_output": ("batch", config["hidden_size"])}
            if component == "text_encoder"
            else {"text_embeds": ("batch", config["projection_dim"])}
        )
        return {"input_ids": ("batch", CONTEXT_TOKENS)}, results, 1
    levels = len(config["block_out_channels"])
    if component == "vae_decoder":
        return (
            {"latent_sample": ("batch", config["latent_channels"], "height", "width")},
            {"sample": ("batch", config["out_channels"], "image_height", "image_width")},
            1,
        )
    if component == "vae_encoder":
        picture = ("batch", config["in_channels"], "image_height", "image_width")
        return (
            {"sample": picture},
            {"latent_parameters": ("batch", 2 * config["latent_channels"], "height", "width")},
            2 ** (levels - 1),
        )
    shapes: dict[str, tuple[int | str, ...]] = {
        "sample": ("batch", config["in_channels"], "height", "width"),
        "timestep": ("batch",),
        "encoder_hidden_states": ("batch", "tokens", config["cross_attention_dim"]),
    }
    if config.get("addition_embed_type") == "text_time":
        # SDXL: the text's embedding, and six numbers that are embedded one by one.
        whole, sizes = config["projection_class_embeddings_input_dim"], 6 * config["addition_time_embed_dim"]
        shapes |= {"text_embeds": ("batch", whole - sizes), "time_ids": ("batch", 6), "y": ("batch", whole)}
    return shapes, {"out_sample": ("batch", config["out_channels"], "height", "width")}, 2 ** (levels - 1)
