"""What a UNet and the checkpoint around it must have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_FAMILIES = {768: "SD1.x", 1024: "SD2.x"}
"""Width of the text embeddings → family, of the UNets without an added vector."""


@dataclass(frozen=True)
class Traits:
    """What a UNet and the checkpoint around it must have in common. None means unknown.

    Attributes:
        context_width: of the text embeddings: 768 for SD1, 1024 for SD2, 2048 for SDXL.
        added_width: of the vector `y` that SDXL adds, 0 without one.
        channels: of the input latents: 4, and 9 for inpainting.
        prediction: `epsilon` or `v_prediction`.
    """

    context_width: int | None = None
    added_width: int | None = None
    channels: int | None = None
    prediction: str | None = None

    def find_mismatch(self, checkpoint: Traits) -> str | None:
        """Returns why a UNet of these traits does not fit `checkpoint`, or None if it fits."""
        for field, what in (
            ("context_width", "text embeddings of width"),
            ("added_width", "an added vector of width"),
            ("channels", "latents with this number of channels:"),
            ("prediction", "the prediction type"),
        ):
            own, loaded = getattr(self, field), getattr(checkpoint, field)
            if own is not None and loaded is not None and own != loaded:
                return (
                    f"it needs {what} {own} ({self.family}), and the loaded checkpoint has {loaded}"
                    f" ({checkpoint.family})"
                )
        return None

    @property
    def family(self) -> str:
        """The family's name for display."""
        return "SDXL" if self.added_width else _FAMILIES.get(self.context_width or 0, "an unknown family")


def read_traits(parameters: Iterable[tuple[str, Any]], prediction: str | None = None) -> Traits:
    """Returns the traits of a UNet as A1111 and Forge hold it.

    Args:
        parameters: LDM name → tensor of any dtype, on any device. Only shapes are read.
        prediction: `epsilon`, `v_prediction`, or None if unknown.
    """
    context, added, channels = None, 0, None
    for name, value in parameters:
        shape = tuple(value.shape)
        if context is None and name.endswith("attn2.to_k.weight"):
            context = shape[1]
        elif name.endswith("label_emb.0.0.weight"):
            added = shape[1]
        elif name.endswith("input_blocks.0.0.weight"):
            channels = shape[1]
    if context is None and channels is None:
        return Traits(prediction=prediction)
    return Traits(context, added, channels, prediction)


def is_whole(unet_config: Mapping[str, Any]) -> bool:
    """Returns whether no block has been removed from a UNet.

    Every whole Stable Diffusion UNet has two pairs per level, a middle block, and attention everywhere but in the
    innermost level. SDXL has attention there, and ten transformer blocks in it.

    Args:
        unet_config: diffusers' config.
    """
    layers = unet_config.get("layers_per_block", 2)
    kinds = list(unet_config.get("down_block_types", ()))
    middle = unet_config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if (min(layers) if isinstance(layers, (list, tuple)) else layers) < 2 or middle != "UNetMidBlock2DCrossAttn":
        return False
    if unet_config.get("addition_embed_type") == "text_time":
        return (
            unet_config.get("transformer_layers_per_block") in ([1, 2, 10], (1, 2, 10))
            and unet_config.get("reverse_transformer_layers_per_block") is None
        )
    return len(kinds) == 4 and kinds[-1] == "DownBlock2D"
