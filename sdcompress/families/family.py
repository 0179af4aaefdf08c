"""`Family`: what the rest of the project asks about a kind of Stable Diffusion."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sdcompress.families import configs

UNetConfig = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One kind of Stable Diffusion.

    Attributes:
        name: as it is typed and stored. title: as people write it.
        recognizes: returns whether a UNet config is of this kind, for whole UNets and for students.
        student_of: returns which block removal led to a UNet config, or None for a whole UNet.
        base: the published family whose layout and configs this one shares; empty for a family with its own layout.
        native_size_px: side of the pictures it was trained on.
        guidance_scale: default scale of classifier-free guidance.
        pipeline_class: diffusers' class. pipeline_options: what its constructor takes beside the components.
        text_encoders: components that encode the caption, in order; each has a tokenizer.
        projected_text_encoders: those of `text_encoders` that end in a projection (`CLIPTextModelWithProjection`).
        latent_channels: of the VAE's latents. vae_scale_factor: side of a picture over the side of its latents.
        bf16_vae: whether the VAE is accurate enough in bf16.
        captions: the captions it was trained on: "general" (photographs and art) or "nano".
        text_prefixes: in a single file, the key prefix of a text encoder of OpenAI's (`openai`) or of OpenCLIP's
            (`openclip`) layout.
        attention_heads: of every attention; None where `attention_head_width` is fixed instead.
        v_prediction_config: how the UNet's config of a checkpoint trained for v-prediction differs; empty where all
            checkpoints predict noise.
    """

    name: str
    title: str
    recognizes: Callable[[UNetConfig], bool]
    student_of: Callable[[UNetConfig], str | None] = lambda config: None
    base: str = ""
    native_size_px: int = 512
    guidance_scale: float = 7.5
    pipeline_class: str = "StableDiffusionPipeline"
    pipeline_options: Mapping[str, Any] = field(default_factory=dict)
    text_encoders: tuple[str, ...] = ("text_encoder",)
    projected_text_encoders: tuple[str, ...] = ()
    latent_channels: int = 4
    vae_scale_factor: int = 8
    bf16_vae: bool = True
    captions: Literal["general", "nano"] = "general"
    text_prefixes: Mapping[str, str] = field(default_factory=dict)
    attention_heads: int | None = None
    attention_head_width: int = 64
    v_prediction_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> str:
        """The name of the family whose layout, configs and presets it has: its base's or its own."""
        return self.base or self.name

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The components that turn captions into tokens, in the order of `text_encoders`."""
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.text_encoders)

    @property
    def checkpoint_prefixes(self) -> dict[str, str]:
        """Text encoder → the prefix of all its keys in a single file, such as `conditioner.embedders.0.`."""
        stems = dict.fromkeys(prefix[: prefix[:-1].rindex(".") + 1] for prefix in self.text_prefixes.values())
        return dict(zip(self.text_encoders, stems, strict=True)) if stems else {}

    @property
    def config_folder(self) -> Path:
        """The folder of the published configs; it may not exist."""
        return configs.CONFIGS / self.layout

    @property
    def published(self) -> bool:
        """Whether the package holds its configs, so that a random pipeline of it can be built."""
        return not self.base and self.config_folder.is_dir()

    def read_config(self, path: str) -> dict[str, Any]:
        """Returns a published config.

        Args:
            path: inside the folder, such as `unet/config.json`.
        """
        config: dict[str, Any] = json.loads((self.config_folder / path).read_text(encoding="utf-8"))
        return config

    def attention_head_dim(self, channels: Sequence[int]) -> int | list[int]:
        """Returns `attention_head_dim` of a diffusers UNet config: the number of heads, of all levels or of each."""
        if self.attention_heads is not None:
            return self.attention_heads
        return [width // self.attention_head_width for width in channels]
