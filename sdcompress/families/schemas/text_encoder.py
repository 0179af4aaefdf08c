"""The config of a `CLIPTextModel` or a `CLIPTextModelWithProjection`.

Fields and defaults are transformers'. Bounds are several times what the text encoders of SD 1.x (CLIP ViT-L/14), SD 2.x
(OpenCLIP ViT-H/14) and SDXL (OpenCLIP ViT-bigG/14: 1,280 wide, 32 layers) have.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator

from sdcompress.families.schemas.base import ComponentSchema, require, within

_Activation = Literal[
    "quick_gelu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu", "swish", "mish"
]
_MOST_PARAMETERS = 10**10
"""Most parameters of a text encoder; SDXL's second has 7 * 10^8."""
_MOST_TOKENS = 10**6


class TextEncoderSchema(ComponentSchema):
    """See `transformers.CLIPTextConfig` for the meaning of each entry."""

    model_type: Literal["clip_text_model"] = "clip_text_model"
    vocab_size: Annotated[int, within(3, _MOST_TOKENS)] = 49408
    hidden_size: Annotated[int, within(1, 8192)] = 512
    intermediate_size: Annotated[int, within(1, 65536)] = 2048
    projection_dim: Annotated[int, within(1, 8192)] | None = 512
    num_hidden_layers: Annotated[int, within(1, 96)] = 12
    num_attention_heads: Annotated[int, within(1, 256)] = 8
    max_position_embeddings: Annotated[int, within(2, 4096)] = 77
    hidden_act: _Activation = "quick_gelu"
    layer_norm_eps: Annotated[float, within(1e-12, 0.1)] = 1e-5
    attention_dropout: Annotated[float, within(0, 0.99)] = 0.0
    pad_token_id: Annotated[int, within(-1, _MOST_TOKENS)] | None = 1
    bos_token_id: Annotated[int, within(0, _MOST_TOKENS)] | None = 49406
    eos_token_id: Annotated[int, within(0, _MOST_TOKENS)] = 49407  # the pooled embedding is the one of this token

    @model_validator(mode="after")
    def _check_sizes(self) -> TextEncoderSchema:
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"num_attention_heads is {self.num_attention_heads}, which does not divide hidden_size {self.hidden_size}",
        )
        layer = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size
        parameters = self.vocab_size * self.hidden_size + self.num_hidden_layers * layer
        require(parameters <= _MOST_PARAMETERS, f"about {parameters / 1e9:,.0f} billion parameters")
        return self
