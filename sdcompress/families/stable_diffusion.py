"""Stable Diffusion 1.x and 2.x, and nano, which has the layout of 1.x with smaller widths."""

from __future__ import annotations

from dataclasses import replace

from sdcompress.families.family import Family, UNetConfig
from sdcompress.families.unet_blocks import ATTENTION, has_mid_block, has_plain_conditioning, resnet_pairs

_NANO_CHANNELS, _NANO_CONTEXT = [48, 80, 96], 96


def _is_sd(config: UNetConfig) -> bool:
    """Returns whether the UNet has attention in its outermost level and no input beside the text."""
    return (
        has_plain_conditioning(config)
        and config.get("addition_embed_type") is None
        and config["down_block_types"][0] == ATTENTION
    )


def _student_of(config: UNetConfig) -> str | None:
    """Returns the BK-SDM preset with these blocks; `segmind/small-sd` is bk-base and `segmind/tiny-sd` is bk-tiny."""
    pairs = resnet_pairs(config)
    has_mid = has_mid_block(config)
    lost_level = config["down_block_types"][-1] == ATTENTION
    if min(pairs) >= 2 and has_mid and not lost_level:
        return None
    if max(pairs) > 1:
        return "custom"
    return {(True, False): "bk-base", (False, False): "bk-small", (False, True): "bk-tiny"}.get(
        (has_mid, lost_level), "custom"
    )


# 1.x projects into its attentions by 1x1 convolutions, 2.x by linear layers.
SD1 = Family(
    "sd1",
    "Stable Diffusion 1.x",
    recognizes=lambda config: _is_sd(config) and not config.get("use_linear_projection"),
    student_of=_student_of,
    pipeline_options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    text_prefixes={"openai": "cond_stage_model.transformer.", "openclip": "cond_stage_model.model."},
    attention_heads=8,
)
SD2 = replace(
    SD1,
    name="sd2",
    title="Stable Diffusion 2.x",
    recognizes=lambda config: _is_sd(config) and bool(config.get("use_linear_projection")),
    native_size_px=768,
    attention_heads=None,
    v_prediction_config={"sample_size": 96, "upcast_attention": True},  # stabilityai/stable-diffusion-2-1, 768 px
)
# At guidance scales of 4 and more nano's colors are oversaturated.
NANO = replace(
    SD1,
    name="nano",
    base="sd1",
    recognizes=lambda config: (
        SD1.recognizes(config)
        and list(config["block_out_channels"])[:3] == _NANO_CHANNELS
        and config["cross_attention_dim"] == _NANO_CONTEXT
    ),
    native_size_px=128,
    guidance_scale=2.5,
    captions="nano",
)
