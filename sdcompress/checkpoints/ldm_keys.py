"""Parameter names of diffusers and transformers ↔ the keys of an LDM checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sdcompress_engines.errors import ModelError
from sdcompress_engines.ldm_keys import UNET_PREFIX, ldm_unet_keys

UNET, VAE = UNET_PREFIX, "first_stage_model."

V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"  # empty tensors by which ComfyUI and A1111 tell such models


METADATA_KEY = "sdcompress.configs"
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
    """diffusers' parameter names of a UNet → LDM's, without the `model.diffusion_model.` prefix.

    Args:
        keys: all of the UNet's parameters.

    Raises:
        ModelError: a parameter that the LDM layout has no place for.
    """
    return _placed(ldm_unet_keys(keys), "UNet")


def vae_keys(keys: Iterable[str]) -> dict[str, str]:
    """diffusers' parameter names of an AutoencoderKL → LDM's, without the `first_stage_model.` prefix.

    Attention weights are 1×1 convolutions in LDM.

    Raises:
        ModelError: a parameter that the LDM layout has no place for.
    """
    keys = list(keys)
    levels = 1 + max(
        (int(match[1]) for key in keys if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", key))), default=-1
    )

    def place(key: str) -> str | None:
        if re.fullmatch(r"((en|de)coder\.conv_(in|out)|(post_)?quant_conv)\.(weight|bias)", key):
            return key
        if match := re.fullmatch(r"(encoder|decoder)\.conv_norm_out\.(\w+)", key):
            return f"{match[1]}.norm_out.{match[2]}"
        if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.+)", key):
            return f"{match[1]}.mid.block_{int(match[2]) + 1}.{_vae_resnet(match[3])}"
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
        return f"{base}.{match[2]}sample.{match[6]}" if match[6] else f"{base}.block.{match[4]}.{_vae_resnet(match[5])}"

    return _placed({key: place(key) for key in keys}, "VAE")


def _vae_resnet(name: str) -> str:
    return name.replace("conv_shortcut", "nin_shortcut")


def openclip_keys(keys: Iterable[str]) -> dict[str, str]:
    """transformers' parameter names of a CLIP text encoder (without `text_model.`) → OpenCLIP's.

    Query, key and value of a layer share one OpenCLIP tensor, in that order along dimension 0; `text_projection` is
    transposed there.

    Raises:
        ModelError: a parameter that the OpenCLIP layout has no place for.
    """

    def place(key: str) -> str | None:
        if key in _OPENCLIP_ENDS:
            return _OPENCLIP_ENDS[key]
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if match is None:
            return None
        base = f"transformer.resblocks.{match[1]}."
        if _QKV.fullmatch(key):
            return f"{base}attn.in_proj_{match[3]}"
        return f"{base}{_OPENCLIP_LAYER[match[2]]}.{match[3]}" if match[2] in _OPENCLIP_LAYER else None

    return _placed({key: place(key) for key in keys}, "text encoder")


def _placed(found: Mapping[str, str | None], what: str) -> dict[str, str]:
    """Returns the names, none of which is None.

    Raises:
        ModelError: a parameter without a place.
    """
    lost = [key for key, name in found.items() if name is None]
    if lost:
        raise ModelError(
            f"the {what} has {len(lost)} parameters that the LDM layout has no place for",
            where=lost[0],
            expected="a UNet, VAE or text encoder of Stable Diffusion",
        )
    return {key: name for key, name in found.items() if name is not None}


def qkv_third(key: str) -> int | None:
    """Which third of OpenCLIP's shared tensor a parameter is: 0 query, 1 key, 2 value; None where it has a tensor of
    its own.
    """
    match = _QKV.fullmatch(key)
    return None if match is None else "qkv".index(match[2])


def is_openclip(config: Any) -> bool:
    """Whether a text encoder comes from OpenCLIP (SD2, SDXL's second) and not from OpenAI (SD1, SDXL's first): they
    differ in the activation.
    """
    return bool(config.hidden_act == "gelu")


def text_prefixes(family_prefixes: Mapping[str, str], openclip: bool) -> tuple[str, str]:
    """Returns the key prefix of a text encoder's parameters in a file, and of its `text_projection`.

    Args:
        family_prefixes: `Family.text_prefixes`.
        openclip: whether the encoder has OpenCLIP's layout, not OpenAI's.
    """
    base = family_prefixes["openclip" if openclip else "openai"]
    return (base, base) if openclip else (f"{base}text_model.", base)
