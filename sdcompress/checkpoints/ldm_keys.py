"""Parameter names of diffusers and transformers ↔ the keys of an LDM checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sdcompress_engines.errors import ModelError
from sdcompress_engines.ldm_keys import UNET_PREFIX, ldm_unet_keys

UNET, VAE = UNET_PREFIX, "first_stage_model."

V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
"""Keys of the empty tensors by which ComfyUI and A1111 recognize such models."""

EDM = ("edm_mean", "edm_vpred.sigma_max")
"""Keys of models with continuous noise levels: Playground v2.5 and CosXL."""

METADATA_KEY = "sdcompress.configs"
"""The metadata entry of a safetensors file that holds the pipeline's configs."""

USAGE_HINT = "modelspec.usage_hint"
"""The entry of ModelSpec that says how to use a model: of a few-step model, what to choose in each host."""

_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

_OPENCLIP_ENDS = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}

_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}

_QKV = re.compile(r"(encoder\.layers\.\d+\.self_attn)\.([qkv])_proj\.(weight|bias)")


def unet_keys(keys: Iterable[str]) -> dict[str, str]:
    """Returns diffusers' parameter name → LDM key, without the `model.diffusion_model.` prefix, for a UNet.

    Args:
        keys: all of the UNet's parameters.

    Raises:
        ModelError: the LDM layout has no place for a parameter.
    """
    return _require_all(ldm_unet_keys(keys), "UNet")


def vae_keys(keys: Iterable[str]) -> dict[str, str]:
    """Returns diffusers' parameter name → LDM key, without the `first_stage_model.` prefix, for an AutoencoderKL.

    Attention weights are 1×1 convolutions in the LDM layout.

    Raises:
        ModelError: the LDM layout has no place for a parameter.
    """
    keys = list(keys)
    levels = 1 + max(
        (int(match[1]) for key in keys if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", key))), default=-1
    )

    def map_key(key: str) -> str | None:
        if re.fullmatch(r"((en|de)coder\.conv_(in|out)|(post_)?quant_conv)\.(weight|bias)", key):
            return key
        if match := re.fullmatch(r"(encoder|decoder)\.conv_norm_out\.(\w+)", key):
            return f"{match[1]}.norm_out.{match[2]}"
        if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.+)", key):
            return f"{match[1]}.mid.block_{int(match[2]) + 1}.{_map_vae_resnet(match[3])}"
        if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", key):
            return (
                f"{match[1]}.mid.attn_1.{_VAE_ATTENTION[match[2]]}.{match[3]}" if match[2] in _VAE_ATTENTION else None
            )
        match = re.fullmatch(
            r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(?:resnets\.(\d+)\.(.+)|(?:down|up)samplers\.0\.(conv\.\w+))",
            key,
        )
        if match is None:
            return None
        level = int(match[3]) if match[2] == "down" else levels - 1 - int(match[3])
        base = f"{match[1]}.{match[2]}.{level}"
        if match[6]:
            return f"{base}.{match[2]}sample.{match[6]}"
        return f"{base}.block.{match[4]}.{_map_vae_resnet(match[5])}"

    return _require_all({key: map_key(key) for key in keys}, "VAE")


def _map_vae_resnet(name: str) -> str:
    return name.replace("conv_shortcut", "nin_shortcut")


def openclip_keys(keys: Iterable[str]) -> dict[str, str]:
    """Returns transformers' parameter name (without `text_model.`) → OpenCLIP's, for a CLIP text encoder.

    In OpenCLIP, query, key and value of a layer share one tensor, in this order along dimension 0, and
    `text_projection` is transposed.

    Raises:
        ModelError: the OpenCLIP layout has no place for a parameter.
    """

    def map_key(key: str) -> str | None:
        if key in _OPENCLIP_ENDS:
            return _OPENCLIP_ENDS[key]
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if match is None:
            return None
        base = f"transformer.resblocks.{match[1]}."
        if _QKV.fullmatch(key):
            return f"{base}attn.in_proj_{match[3]}"
        return f"{base}{_OPENCLIP_LAYER[match[2]]}.{match[3]}" if match[2] in _OPENCLIP_LAYER else None

    return _require_all({key: map_key(key) for key in keys}, "text encoder")


def _require_all(names: Mapping[str, str | None], component: str) -> dict[str, str]:
    """Returns the names, all of which are known.

    Raises:
        ModelError: a name is None: the layout has no place for the parameter.
    """
    unplaced = [key for key, name in names.items() if name is None]
    if unplaced:
        raise ModelError(
            f"the {component} has {len(unplaced)} parameters that the LDM layout has no place for",
            where=unplaced[0],
            expected="a UNet, VAE or text encoder of Stable Diffusion",
        )
    return {key: name for key, name in names.items() if name is not None}


def qkv_index(key: str) -> int | None:
    """Returns which third of OpenCLIP's shared tensor a parameter is: 0 query, 1 key, 2 value.

    It is None for a parameter that has a tensor of its own.
    """
    match = _QKV.fullmatch(key)
    return None if match is None else "qkv".index(match[2])


def qkv_keys(key: str) -> list[str]:
    """Returns the parameters that share OpenCLIP's tensor with `key`: query, key, value.

    Args:
        key: transformers' name, without `text_model.`, of one of the three.
    """
    return [_QKV.sub(rf"\1.{letter}_proj.\3", key) for letter in "qkv"]


def is_openclip(config: Any) -> bool:
    """Returns whether a text encoder is OpenCLIP's (SD2, SDXL's second) and not OpenAI's (SD1, SDXL's first).

    They differ in the activation.

    Args:
        config: a transformers `CLIPTextConfig`.
    """
    return bool(config.hidden_act == "gelu")


def text_prefixes(family_prefixes: Mapping[str, str], openclip: bool) -> tuple[str, str]:
    """Returns the key prefixes in a file: of a text encoder's parameters, and of its `text_projection`.

    Args:
        family_prefixes: `Family.text_prefixes`.
        openclip: whether the encoder has OpenCLIP's layout, not OpenAI's.
    """
    base = family_prefixes["openclip" if openclip else "openai"]
    return (base, base) if openclip else (f"{base}text_model.", base)
