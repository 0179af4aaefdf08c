"""How LoRA files name a layer.

diffusers writes `unet.down_blocks.0…to_q.lora_A.weight`, and PEFT alone the same without `unet.`. kohya's scripts and
LyCORIS, whose files the WebUIs read, write `lora_unet_down_blocks_0…to_q` with `.lora_down.weight`, `.lora_up.weight`
and `.alpha`; their names of SDXL's layers are those of the LDM layout, `lora_unet_input_blocks_4_1…`, which ComfyUI
writes with dots behind `diffusion_model.`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from sdcompress_engines.graph_weights import exchangeable_layers
from sdcompress_engines.ldm_keys import UNET_MODULES, UNET_PREFIX, ldm_unet_keys

from sdcompress.lora.adapters import ALPHA, DORA_SCALE, Full, Hadamard, Kronecker, LowRank

KOHYA_PREFIXES = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),  # of a model with one text encoder, and of SDXL's two
    "text_encoder_2": ("lora_te2_",),
}

KINDS = (LowRank, Hadamard, Kronecker, Full)
"""The kinds of adapter that a file names; DoRA is a further tensor beside one of them."""

MAGNITUDE = "lora_magnitude_vector.weight"
"""PEFT's name of DoRA's magnitudes, which are always those of the output channels."""

TENSOR_ROLES = {
    "lora_A.weight": "lora_down.weight",
    "lora.down.weight": "lora_down.weight",
    "lora_linear_layer.down.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_linear_layer.up.weight": "lora_up.weight",
    "lora_magnitude_vector": MAGNITUDE,
    **{end: end for end in (MAGNITUDE, ALPHA, DORA_SCALE)},
    **{end: end for kind in KINDS for end in kind.keys.values()},
}
"""End of a key → the tensor's role, which is the end of the key in kohya's naming."""

UNSUPPORTED = {
    kind: re.compile(rf"(.+)\.({ends})")
    for kind, ends in {
        "IA3": "on_input|ia3_l",
        "OFT": r"oft_blocks|oft_diag|b?oft_[rR](\.weight)?",
        "GLoRA": r"a1\.weight",
        "norm": "w_norm|b_norm",
        "bias": "diff_b",
    }.items()
}
"""Kind of adapter that is not supported → the keys of a layer of it."""

_PEFT_PREFIX = "base_model.model."
_LYCORIS_PREFIX = "lycoris_"
_UNET_PREFIXES = (UNET_PREFIX, UNET_PREFIX.removeprefix("model."))

_UNET_ROOTS = {"down_blocks", "mid_block", "up_blocks", "input_blocks", "middle_block", "output_blocks"} | {
    name.split(".")[0] for pair in UNET_MODULES.items() for name in pair
}
_ROOTS = {
    "unet": re.compile(rf"({'|'.join(sorted(_UNET_ROOTS))})([._]|$)"),
    "text_encoder": re.compile(r"text_model[._]"),
}
"""Component → how its layers' names begin without a prefix."""

_OLD_NAMES = (
    # PEFT's name of an adapter, which is no part of the layer's name.
    (re.compile(r"\.default(_\d+)?(?=\.|$)"), ""),
    # diffusers before 0.22 wrote `attn1.processor.to_q_lora.down.weight`.
    (re.compile(r"\.processor\.to_([qkv])_lora\."), r".to_\1.lora."),
    (re.compile(r"\.processor\.to_out_lora\."), ".to_out.0.lora."),
)
_KEY = re.compile(rf"(.+?)\.({'|'.join(re.escape(end) for end in TENSOR_ROLES)})")


def unet_modules(unet: torch.nn.Module) -> list[str]:
    """Returns the names of a UNet's, or another network's, layers that a LoRA can adapt."""
    return list(exchangeable_layers(unet))


def clip_modules(layers: int = 32) -> list[str]:
    """Returns the names of a CLIP text encoder's layers that a LoRA can adapt.

    Args:
        layers: of the encoder; the default is the depth of the deepest one in use.
    """
    kinds = [*(f"self_attn.{n}_proj" for n in "qkv"), "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
    return [f"text_model.encoder.layers.{i}.{kind}" for i in range(layers) for kind in kinds]


def known_layers(modules: Iterable[str]) -> dict[str, dict[str, str]]:
    """Returns component → a layer's name with underscores for dots → its module name, for `find_layer`.

    Args:
        modules: all of the UNet's layers. Each is known by its names of diffusers and of the LDM layout.
    """
    modules = list(modules)
    ldm = ldm_unet_keys(f"{name}.weight" for name in modules)
    names = {key.removesuffix(".weight"): name.removesuffix(".weight") for name, key in ldm.items() if key is not None}
    unet = {key.replace(".", "_"): name for key, name in names.items()} | {m.replace(".", "_"): m for m in modules}
    # transformers names the layers with or without `text_model`, depending on its version.
    clip = {
        form.replace(".", "_"): name for name in clip_modules() for form in (name, name.removeprefix("text_model."))
    }
    return {"unet": unet, "text_encoder": clip, "text_encoder_2": clip}


def kohya_prefix(component: str, components: Iterable[str]) -> str:
    """Returns the prefix that kohya's scripts write for a component.

    Args:
        component: `unet`, `text_encoder` or `text_encoder_2`.
        components: all that the LoRA changes; with a second text encoder, the first has the name of SDXL's.
    """
    prefixes = KOHYA_PREFIXES[component]
    return prefixes[-1] if "text_encoder_2" in components else prefixes[0]


def split_key(key: str) -> tuple[str, str] | None:
    """Returns the layer's name in the file and the tensor's role, of `TENSOR_ROLES`; None for another key."""
    for pattern, name in _OLD_NAMES:
        key = pattern.sub(name, key)
    match = _KEY.fullmatch(key)
    return (match[1], TENSOR_ROLES[match[2]]) if match else None


def naming_of(name: str) -> str:
    """Returns the naming of a layer's name in the file: `kohya`, `LDM` or `diffusers`."""
    if name.startswith(("lora_", _LYCORIS_PREFIX)):
        return "kohya"
    return "LDM" if name.startswith(_UNET_PREFIXES) else "diffusers"


def split_component(name: str) -> tuple[str, str] | None:
    """Returns the component of a layer and its name without prefixes; None for an unknown one.

    Args:
        name: of the layer in the file, in any naming.
    """
    name = name.removeprefix(_PEFT_PREFIX)
    for component, prefixes in KOHYA_PREFIXES.items():
        others = _UNET_PREFIXES if component == "unet" else ()
        for prefix in (*prefixes, f"{component}.", *others):
            if name.startswith(prefix):
                return component, name.removeprefix(prefix).removeprefix(_PEFT_PREFIX)
    name = name.removeprefix(_LYCORIS_PREFIX)
    return next(((component, name) for component, root in _ROOTS.items() if root.match(name)), None)


def find_layer(name: str, known: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
    """Returns the component and the module name of a layer, or None for an unknown one.

    A name behind diffusers' prefix is returned as it is where it is not known: it may be that of a module that no LoRA
    changes.

    Args:
        name: of the layer in the file, in any naming.
        known: the layers of the model, of `known_layers`.
    """
    split = split_component(name)
    if split is None:
        return None
    component, rest = split
    module = known[component].get(rest.replace(".", "_"))
    if module is not None:
        return component, module
    return split if name.startswith(f"{component}.") else None


def count_unsupported(keys: Iterable[str]) -> dict[str, int]:
    """Returns kind of adapter that is not supported → number of its layers, of those in a file.

    Args:
        keys: all of the file.
    """
    keys = list(keys)
    layers = {kind: {m[1] for m in map(pattern.fullmatch, keys) if m} for kind, pattern in UNSUPPORTED.items()}
    return {kind: len(names) for kind, names in layers.items() if names}
