"""Stable Diffusion XL and its published students."""

from __future__ import annotations

from sdcompress.families.family import Family, UNetConfig
from sdcompress.families.unet_blocks import PLAIN, has_plain_conditioning, transformer_depths

# Transformer blocks of each attention: down blocks (outermost first), up blocks (innermost first), mid block.
# Sources: the configs of stabilityai/stable-diffusion-xl-base-1.0, segmind/SSD-1B and segmind/Segmind-Vega;
# KOALA (arXiv 2312.04005, table 2).
_TEACHER = ([[2, 2], [10, 10]], [[10, 10, 10], [2, 2, 2]], 10)
_STUDENTS = {
    "SSD-1B": ([[2, 2], [4, 4]], [[4, 4, 10], [2, 1, 1]], 0),
    "Segmind-Vega": ([[1, 1], [2, 2]], [[2, 2, 2], [1, 1, 1]], 0),
    "KOALA-1B": ([[2], [6]], [[6, 6], [2, 2]], 6),
    "KOALA-700M": ([[2], [5]], [[5, 5], [2, 2]], None),
    "bk-base": ([[2], [10]], [[10, 10], [2, 2]], 10),
    "bk-small": ([[2], [10]], [[10, 10], [2, 2]], None),
}


def _is_sdxl(config: UNetConfig) -> bool:
    """Returns whether the UNet has three levels, no attention in the outermost, and the picture size as an input."""
    return (
        has_plain_conditioning(config)
        and config.get("addition_embed_type") == "text_time"
        and len(config["block_out_channels"]) == 3
        and config["down_block_types"][0] == PLAIN
    )


def _student_of(config: UNetConfig) -> str | None:
    """Returns the published student or preset with this number of transformer blocks; `custom` where none has it."""
    depths = transformer_depths(config)
    if depths == _TEACHER:
        return None
    return next((name for name, known in _STUDENTS.items() if depths == known), "custom")


SDXL = Family(
    "sdxl",
    "Stable Diffusion XL",
    recognizes=_is_sdxl,
    student_of=_student_of,
    native_size_px=1024,
    pipeline_class="StableDiffusionXLPipeline",
    pipeline_options={"add_watermarker": False},
    text_encoders=("text_encoder", "text_encoder_2"),
    projected_text_encoders=("text_encoder_2",),
    bf16_vae=False,
    text_prefixes={
        "openai": "conditioner.embedders.0.transformer.",
        "openclip": "conditioner.embedders.1.model.",
    },
)
