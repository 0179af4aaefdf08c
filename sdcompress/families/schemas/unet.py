"""The config of a `UNet2DConditionModel` that a text-to-image pipeline of Stable Diffusion can hold.

Fields, defaults and their order are diffusers'. Bounds are several times what published models have: SD 1.4, 1.5, 2.1,
SDXL (base, turbo, refiner), SSD-1B, Segmind-Vega, KOALA, BK-SDM, LCM and the inpainting models. Entries that only other
pipelines serve, such as class labels, image embeddings and Fourier features of the timestep, must have diffusers'
default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import model_validator

from sdcompress.families.schemas.base import (
    Activation,
    ComponentSchema,
    levels,
    per_level,
    require,
    within,
)
from sdcompress.families.unet_blocks import MOST_CHANNELS, MOST_DEPTH, MOST_PAIRS

MOST_PARAMETERS = 10**10
"""Most parameters of a UNet; SDXL has 2.6 * 10^9."""
MOST_TRANSFORMER_BLOCKS = 400
"""Most transformer blocks of a UNet; SDXL has 70."""
TIME_IDS = 6
"""SDXL's original size, crop and target size."""

_Down = Literal["DownBlock2D", "CrossAttnDownBlock2D"]
_Up = Literal["UpBlock2D", "CrossAttnUpBlock2D"]
_Mid = Literal["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"]
_PLAIN_DOWN, _PLAIN_UP, _ATTENTION_MID = "DownBlock2D", "UpBlock2D", "UNetMidBlock2DCrossAttn"


class UNetSchema(ComponentSchema):
    """See `diffusers.UNet2DConditionModel` for the meaning of each entry."""

    sample_size: Annotated[Any, per_level(1, 4096)] | None = None
    in_channels: Annotated[int, within(1, 64)] = 4
    out_channels: Annotated[int, within(1, 64)] = 4
    center_input_sample: bool | None = False
    flip_sin_to_cos: bool | None = True
    freq_shift: Annotated[float, within(0, 16)] = 0
    down_block_types: Annotated[list[_Down], levels()]
    mid_block_type: _Mid | None = "UNetMidBlock2DCrossAttn"
    up_block_types: Annotated[list[_Up], levels()]
    only_cross_attention: bool | list[bool] = False
    block_out_channels: Annotated[list[Annotated[int, within(1, MOST_CHANNELS)]], levels()]
    layers_per_block: Annotated[Any, per_level(1, MOST_PAIRS)] = 2
    downsample_padding: Annotated[int, within(0, 3)] = 1
    mid_block_scale_factor: Annotated[float, within(1e-3, 1e3)] = 1
    dropout: Annotated[float, within(0, 0.99)] = 0.0
    act_fn: Activation = "silu"
    norm_num_groups: Annotated[int, within(1, 1024)] = 32
    norm_eps: Annotated[float, within(1e-12, 0.1)] = 1e-5
    cross_attention_dim: Annotated[Any, per_level(1, 4 * MOST_CHANNELS)]
    transformer_layers_per_block: Annotated[Any, per_level(0, MOST_DEPTH, depth=2)] = 1
    reverse_transformer_layers_per_block: Annotated[Any, per_level(0, MOST_DEPTH, depth=2)] | None = None
    encoder_hid_dim: None = None
    encoder_hid_dim_type: None = None
    attention_head_dim: Annotated[Any, per_level(1, 1024)] = 8
    num_attention_heads: None = None
    dual_cross_attention: Literal[False] | None = False
    use_linear_projection: bool | None = False
    class_embed_type: None = None
    addition_embed_type: Literal["text_time"] | None = None
    addition_time_embed_dim: Annotated[int, within(1, 4096)] | None = None
    num_class_embeds: None = None
    upcast_attention: bool | None = False
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    resnet_skip_time_act: bool | None = False
    resnet_out_scale_factor: Annotated[float, within(1e-3, 1e3)] = 1.0
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: Annotated[int, within(2, 8 * MOST_CHANNELS)] | None = None
    time_embedding_act_fn: Activation | None = None
    timestep_post_act: Activation | None = None
    time_cond_proj_dim: Annotated[int, within(1, 4096)] | None = None
    conv_in_kernel: Annotated[int, within(1, 9)] = 3
    conv_out_kernel: Annotated[int, within(1, 9)] = 3
    projection_class_embeddings_input_dim: Annotated[int, within(1, 8 * MOST_CHANNELS)] | None = None
    attention_type: Literal["default"] = "default"
    class_embeddings_concat: Literal[False] | None = False
    mid_block_only_cross_attention: bool | None = None
    cross_attention_norm: Literal["layer_norm", "group_norm"] | None = None
    addition_embed_type_num_heads: Annotated[int, within(1, 1024)] = 64

    @model_validator(mode="after")
    def _check_levels(self) -> UNetSchema:
        count = len(self.block_out_channels)
        for name in (
            "down_block_types",
            "up_block_types",
            "only_cross_attention",
            "layers_per_block",
            "cross_attention_dim",
            "transformer_layers_per_block",
            "reverse_transformer_layers_per_block",
            "attention_head_dim",
        ):
            value = getattr(self, name)
            require(
                not isinstance(value, list) or len(value) == count,
                f"{name} has {len(value) if isinstance(value, list) else 1} entries for {count} levels",
            )
        reverse = self.reverse_transformer_layers_per_block
        require(reverse is None or isinstance(reverse, list), "reverse_transformer_layers_per_block is no list")
        require(not isinstance(self.sample_size, list) or len(self.sample_size) == 2, "sample_size needs two numbers")
        for name in ("conv_in_kernel", "conv_out_kernel"):
            require(getattr(self, name) % 2 == 1, f"{name} is even")
        return self

    @model_validator(mode="after")
    def _check_widths(self) -> UNetSchema:
        groups, heads = self.norm_num_groups, self.spread(self.attention_head_dim)
        for level, width in enumerate(self.block_out_channels):
            require(width % groups == 0, f"block_out_channels holds {width}, no multiple of {groups} norm_num_groups")
            require(
                not self._attends(level) or width % heads[level] == 0,
                f"attention_head_dim has {heads[level]} heads, which do not divide {width} channels",
            )
        require(self.block_out_channels[0] % 2 == 0, "block_out_channels begins with an odd width")
        if self.time_embedding_dim is not None:
            require(self.time_embedding_dim % 2 == 0, "time_embedding_dim is odd")
        if self.addition_embed_type is not None:
            require(
                (self.addition_time_embed_dim or 0) % 2 == 0 and self.added_text_width > 0,
                f"projection_class_embeddings_input_dim is not larger than {TIME_IDS} times addition_time_embed_dim",
            )
        return self

    @model_validator(mode="after")
    def _check_depths(self) -> UNetSchema:
        pairs, depths = self.spread(self.layers_per_block), self.spread(self.transformer_layers_per_block)
        up = self.up_depths
        for level, count in enumerate(pairs):
            for name, depth, places in (
                ("transformer_layers_per_block", depths[level], count),
                ("reverse_transformer_layers_per_block", up[-1 - level], count + 1),
            ):
                require(
                    not isinstance(depth, list) or len(depth) == places,
                    f"{name} holds {depth} for a level of {places} attentions",
                )
        require(
            self.reverse_transformer_layers_per_block is not None or not any(isinstance(each, list) for each in depths),
            "transformer_layers_per_block holds lists, and there is no reverse_transformer_layers_per_block",
        )
        blocks, parameters = self._estimate()
        most = MOST_TRANSFORMER_BLOCKS
        require(blocks <= most, f"{blocks:,} transformer blocks, expected at most {most}")
        require(
            parameters <= MOST_PARAMETERS,
            f"about {parameters / 1e9:,.0f} billion parameters, expected at most {MOST_PARAMETERS / 1e9:,.0f}",
        )
        return self

    def spread(self, value: Any) -> list[Any]:
        """Returns a value of all levels as a list with one entry a level."""
        return value if isinstance(value, list) else [value] * len(self.block_out_channels)

    @property
    def up_depths(self) -> list[Any]:
        """Transformer blocks of each up block, innermost level first."""
        if self.reverse_transformer_layers_per_block is not None:
            return self.spread(self.reverse_transformer_layers_per_block)
        return self.spread(self.transformer_layers_per_block)[::-1]

    @property
    def added_text_width(self) -> int:
        """The width of the pooled text embedding that the UNet takes beside the picture's size."""
        return (self.projection_class_embeddings_input_dim or 0) - TIME_IDS * (self.addition_time_embed_dim or 0)

    def _attends(self, level: int) -> bool:
        last = level == len(self.block_out_channels) - 1
        return (
            self.down_block_types[level] != _PLAIN_DOWN
            or self.up_block_types[-1 - level] != _PLAIN_UP
            or (last and self.mid_block_type == _ATTENTION_MID)
        )

    def _estimate(self) -> tuple[int, int]:
        """Returns the number of transformer blocks and about that of the parameters.

        A resnet of width w has 9 (i w + w^2) parameters with i input channels; a transformer block 16 w^2 + 2 w c,
        where c is the width of the text.
        """
        pairs, widths = self.spread(self.layers_per_block), self.block_out_channels
        contexts = self.spread(self.cross_attention_dim)
        down, up = self.spread(self.transformer_layers_per_block), self.up_depths[::-1]
        blocks = parameters = 0
        for level, width in enumerate(widths):
            attentions = 0
            for side, kinds, count, plain in (
                (down, self.down_block_types, pairs[level], _PLAIN_DOWN),
                (up, self.up_block_types[::-1], pairs[level] + 1, _PLAIN_UP),
            ):
                if kinds[level] != plain:
                    depth = side[level]
                    attentions += sum(depth) if isinstance(depth, list) else depth * count
            if level == len(widths) - 1 and self.mid_block_type == _ATTENTION_MID:
                depth = down[level]
                attentions += depth[0] if isinstance(depth, list) else depth
            resnets = 2 * pairs[level] + 3
            blocks += attentions
            parameters += resnets * 27 * width**2 + attentions * (16 * width**2 + 2 * width * contexts[level])
        return blocks, parameters
