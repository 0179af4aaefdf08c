"""What a UNet is, told by its config alone: its family, and whether blocks have been removed from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FAMILIES = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "other": "another UNet",
}
_PLAIN, _ATTENTION = "DownBlock2D", "CrossAttnDownBlock2D"
# Transformer blocks of each attention, outermost first on the way down and innermost first on the way up. SDXL's
# innermost level has ten in each. Sources: the configs of stabilityai/stable-diffusion-xl-base-1.0, segmind/SSD-1B and
# segmind/Segmind-Vega; KOALA (arXiv 2312.04005, table 2).
_SDXL_DEPTHS = {
    "SSD-1B": ([[2, 2], [4, 4]], [[4, 4, 10], [2, 1, 1]], 0),
    "Segmind-Vega": ([[1, 1], [2, 2]], [[2, 2, 2], [1, 1, 1]], 0),
    "KOALA-1B": ([[2], [6]], [[6, 6], [2, 2]], 6),
    "KOALA-700M": ([[2], [5]], [[5, 5], [2, 2]], None),
    "bk-base": ([[2], [10]], [[10, 10], [2, 2]], 10),
    "bk-small": ([[2], [10]], [[10, 10], [2, 2]], None),
}
_SDXL_TEACHER = ([[2, 2], [10, 10]], [[10, 10, 10], [2, 2, 2]], 10)


def family_of(unet_config: Mapping[str, Any]) -> str:
    """`sd1`, `sd2`, `sdxl` or `other`, from the shapes a UNet's config gives, so that it holds for students and for
    nano's widths too.

    SD1.x projects into its attentions by 1×1 convolutions, SD2.x by linear layers; SDXL has three levels and takes the
    picture's size beside the text.
    """
    config = unet_config
    unknown = {"encoder_hid_dim_type", "class_embed_type", "num_class_embeds"}
    if (
        any(config.get(key) is not None for key in unknown)
        or not set(config.get("down_block_types", [""])) <= {_PLAIN, _ATTENTION}
        or not config.get("cross_attention_dim")
    ):
        return "other"
    if config.get("addition_embed_type") == "text_time":
        return "sdxl" if len(config["block_out_channels"]) == 3 and config["down_block_types"][0] == _PLAIN else "other"
    if config.get("addition_embed_type") is not None or config["down_block_types"][0] != _ATTENTION:
        return "other"
    return "sd2" if config.get("use_linear_projection") else "sd1"


def student_of(unet_config: Mapping[str, Any]) -> str | None:
    """Which block removal has made this UNet: `bk-base`, `bk-small`, `bk-tiny`, a published student of SDXL, `custom`,
    or None where it is whole.

    The published `segmind/small-sd` is bk-base by its blocks, and `segmind/tiny-sd` bk-tiny.
    """
    family = family_of(unet_config)
    if family == "sdxl":
        depths = _depths(unet_config)
        return (
            None
            if depths == _SDXL_TEACHER
            else next((name for name, known in _SDXL_DEPTHS.items() if depths == known), "custom")
        )
    if family == "other":
        return None
    pairs = _pairs(unet_config)
    has_mid = unet_config.get("mid_block_type", "UNetMidBlock2DCrossAttn") is not None
    lost_level = unet_config["down_block_types"][-1] == _ATTENTION
    if min(pairs) >= 2 and has_mid and not lost_level:
        return None
    if max(pairs) > 1:
        return "custom"
    return {(True, False): "bk-base", (False, False): "bk-small", (False, True): "bk-tiny"}.get(
        (has_mid, lost_level), "custom"
    )


def _pairs(config: Mapping[str, Any]) -> list[int]:
    """Resnet–attention pairs of each down block."""
    layers = config.get("layers_per_block", 2)
    return list(layers) if isinstance(layers, list | tuple) else [layers] * len(config["block_out_channels"])


def _depths(config: Mapping[str, Any]) -> tuple[list[list[int]], list[list[int]], int | None]:
    """Transformer blocks of each attention: on the way down, on the way up, and in the mid block (None where there is
    no mid block).
    """
    pairs, levels = _pairs(config), len(config["block_out_channels"])
    given = config.get("transformer_layers_per_block", 1)
    down = list(given) if isinstance(given, list | tuple) else [given] * levels
    reverse = config.get("reverse_transformer_layers_per_block")
    up = (
        list(reverse)
        if reverse is not None
        else [entry[0] if isinstance(entry, list | tuple) else entry for entry in reversed(down)]
    )

    def spread(entry: Any, count: int) -> list[int]:
        return list(entry) if isinstance(entry, list | tuple) else [entry] * count

    attended = [i for i, kind in enumerate(config["down_block_types"]) if kind == _ATTENTION]
    kind = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    last = spread(down[-1], 1)[0]
    mid = None if kind is None else last if kind == "UNetMidBlock2DCrossAttn" else 0
    return (
        [spread(down[i], pairs[i]) for i in attended],
        [spread(up[levels - 1 - i], pairs[i] + 1) for i in reversed(attended)],
        mid,
    )
