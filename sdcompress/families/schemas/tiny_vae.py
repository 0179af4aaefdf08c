"""The config of an `AutoencoderTiny`: a small decoder and a small encoder in the place of a VAE (TAESD's shape).

Fields and defaults are diffusers'.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sdcompress.families.schemas.base import ComponentSchema, levels, require, within
from sdcompress.support.bounds import MOST_DECODER_BLOCKS, MOST_DECODER_WIDTH

TINY_VAE = "AutoencoderTiny"
"""diffusers' class."""
VAES = ("AutoencoderKL", TINY_VAE)
"""The classes that the VAE of a pipeline may have."""

Widths = Annotated[list[Annotated[int, within(1, MOST_DECODER_WIDTH)]], levels()]
Blocks = Annotated[list[Annotated[int, within(0, MOST_DECODER_BLOCKS)]], levels()]


class TinyVaeSchema(ComponentSchema):
    """See `diffusers.AutoencoderTiny` for the meaning of each entry.

    `block_out_channels` is what a pipeline computes the scale of its latents from; diffusers writes the decoder's.
    """

    in_channels: Annotated[int, within(3, 3)] = 3
    out_channels: Annotated[int, within(3, 3)] = 3
    encoder_block_out_channels: Widths = Field(default_factory=lambda: [64, 64, 64, 64])
    decoder_block_out_channels: Widths = Field(default_factory=lambda: [64, 64, 64, 64])
    block_out_channels: Widths | None = None
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "relu"
    upsample_fn: Literal["nearest", "nearest-exact", "bilinear", "bicubic"] = "nearest"
    latent_channels: Annotated[int, within(1, 64)] = 4
    upsampling_scaling_factor: Annotated[int, within(2, 2)] = 2
    num_encoder_blocks: Blocks = Field(default_factory=lambda: [1, 3, 3, 3])
    num_decoder_blocks: Blocks = Field(default_factory=lambda: [3, 3, 3, 1])
    latent_magnitude: Annotated[float, within(1e-4, 1e4)] = 3
    latent_shift: Annotated[float, within(-1e4, 1e4)] = 0.5
    force_upcast: bool | None = False
    scaling_factor: Annotated[float, within(1e-4, 1e4)] = 1.0
    shift_factor: Annotated[float, within(-1e4, 1e4)] | None = 0.0

    @model_validator(mode="after")
    def _check_levels(self) -> TinyVaeSchema:
        decoder, encoder = self.decoder_block_out_channels, self.encoder_block_out_channels
        for side, widths, blocks in (
            ("decoder", decoder, self.num_decoder_blocks),
            ("encoder", encoder, self.num_encoder_blocks),
        ):
            require(len(set(widths)) == 1, f"{side}_block_out_channels has several widths")
            require(len(blocks) == len(widths), f"num_{side}_blocks has {len(blocks)} entries for {len(widths)} levels")
        require(len(encoder) == len(decoder), f"{len(encoder)} levels of the encoder and {len(decoder)} of the decoder")
        require(
            self.block_out_channels in (None, decoder), "block_out_channels differs from decoder_block_out_channels"
        )
        return self


def taesd_config(latent_channels: int) -> dict[str, Any]:
    """Returns the config of TAESD's shape, which is diffusers' default.

    Args:
        latent_channels: of the VAE in whose place it is.
    """
    config = TinyVaeSchema(latent_channels=latent_channels)
    return {"_class_name": TINY_VAE, **config.model_dump(exclude={"block_out_channels"})}
