"""A CLIP whose pictures pass through a ResNet: nano's judge.

transformers' dual encoder takes any two towers, but expects pooled features without height and width, and a ResNet's
have both. On a few thousand pictures a ResNet needs far fewer steps than a vision transformer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPModel, VisionTextDualEncoderModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


class ResNetClip(VisionTextDualEncoderModel):
    """A dual encoder of a ResNet and a CLIP text encoder; `config.vision_config.image_size` is the side in pixels."""

    def get_image_features(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Returns the pictures' embeddings as `pooler_output`, (B, D).

        Args:
            pixel_values: (B, 3, H, W).
        """
        features = self.vision_model(pixel_values=pixel_values).pooler_output.flatten(1)
        return BaseModelOutputWithPooling(pooler_output=self.visual_projection(features))


def load_clip(folder: Path) -> CLIPModel | ResNetClip:
    """Returns the CLIP of a folder in float32, whichever of the two kinds it is.

    Args:
        folder: with a transformers config and weights.
    """
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    model = ResNetClip if kind == ResNetClip.config_class.model_type else CLIPModel
    return model.from_pretrained(folder, dtype=torch.float32)
