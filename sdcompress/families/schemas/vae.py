"""The config of an `AutoencoderKL`.

Fields and defaults are diffusers'. Bounds are several times what the VAEs of SD 1.x, SD 2.x and SDXL have.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator

from sdcompress.families.schemas.base import (
    Activation,
    ComponentSchema,
    levels,
    require,
    within,
)

_MOST_WIDTH = 4096
"""Most channels of a level; published VAEs have 512."""
_MOST_PARAMETERS = 4 * 10**9
"""Most parameters; published VAEs have 8 * 10^7."""


class VaeSchema(ComponentSchema):
    """See `diffusers.AutoencoderKL` for the meaning of each entry."""

    in_channels: Annotated[int, within(3, 3)] = 3
    out_channels: Annotated[int, within(3, 3)] = 3
    down_block_types: Annotated[list[Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]], levels()]
    up_block_types: Annotated[list[Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]], levels()]
    block_out_channels: Annotated[list[Annotated[int, within(1, _MOST_WIDTH)]], levels()]
    layers_per_block: Annotated[int, within(1, 8)] = 1
    act_fn: Activation = "silu"
    latent_channels: Annotated[int, within(1, 64)] = 4
    norm_num_groups: Annotated[int, within(1, 1024)] = 32
    sample_size: Annotated[int, within(1, 16384)] = 32
    scaling_factor: Annotated[float, within(1e-4, 1e4)] = 0.18215
    shift_factor: Annotated[float, within(-1e4, 1e4)] | None = None
    latents_mean: list[Annotated[float, within(-1e4, 1e4)]] | None = None
    latents_std: list[Annotated[float, within(1e-6, 1e4)]] | None = None
    force_upcast: bool | None = True
    use_quant_conv: bool | None = True
    use_post_quant_conv: bool | None = True
    mid_block_add_attention: bool | None = True

    @model_validator(mode="after")
    def _check_levels(self) -> VaeSchema:
        widths = self.block_out_channels
        for name in ("down_block_types", "up_block_types"):
            count = len(getattr(self, name))
            require(count == len(widths), f"{name} has {count} entries for {len(widths)} levels")
        for width in widths:
            require(
                width % self.norm_num_groups == 0,
                f"block_out_channels holds {width}, no multiple of {self.norm_num_groups} norm_num_groups",
            )
        for name in ("latents_mean", "latents_std"):
            value = getattr(self, name)
            require(value is None or len(value) == self.latent_channels, f"{name} has not one entry a latent channel")
        parameters = sum((2 * self.layers_per_block + 2) * 18 * width**2 for width in widths)
        require(parameters <= _MOST_PARAMETERS, f"about {parameters / 1e9:,.0f} billion parameters")
        return self
