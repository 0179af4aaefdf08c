"""A CLIP whose pictures pass through a ResNet: nano's judge.

transformers' dual encoder takes any two towers, but expects pooled features without height and width, and a ResNet's
have both. On a few thousand pictures a ResNet needs far fewer steps than a vision transformer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.errors import ModelError, shorten
from sdcompress_engines.json_files import read_json_object
from transformers import CLIPModel, VisionTextDualEncoderModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sdcompress.checkpoints.component import is_finite
from sdcompress.families.build import library_errors
from sdcompress.families.schemas.base import refuse_code


class ResNetClip(VisionTextDualEncoderModel):
    """A dual encoder of a ResNet and a CLIP text encoder; `config.vision_config.image_size` is the side in pixels."""

    def get_image_features(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Returns the pictures' embeddings as `pooler_output`, (B, D).

        Args:
            pixel_values: (B, 3, H, W).
        """
        features = self.vision_model(pixel_values=pixel_values).pooler_output.flatten(1)
        return BaseModelOutputWithPooling(pooler_output=self.visual_projection(features))


def is_dual_encoder(folder: Path) -> bool:
    """Returns whether a folder's CLIP is a `ResNetClip`; if not, it is a `CLIPModel`. No weights are read.

    Raises:
        ModelError: the config is missing, or names another kind or code.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            "not a CLIP model", where=folder, expected="a folder with config.json, the weights and a tokenizer"
        )
    config = read_json_object(path, ModelError)
    parts = [config.get(f"{tower}_config") or {} for tower in ("text", "vision")]
    for part in (config, *parts):
        refuse_code(part if isinstance(part, dict) else {}, path)
    kind = config.get("model_type")
    towers = [part.get("model_type") if isinstance(part, dict) else None for part in parts]
    dual = kind == ResNetClip.config_class.model_type and towers == ["clip_text_model", "resnet"]
    if kind != "clip" and not dual:
        raise ModelError(
            f"is a model of the type {shorten(repr(kind), 60)}",
            where=path,
            expected="a CLIPModel, or a dual encoder of a ResNet and a CLIP text encoder",
        )
    return dual


def load_clip(folder: Path) -> CLIPModel | ResNetClip:
    """Returns the CLIP of a folder in float32, whichever of the two kinds it is.

    Args:
        folder: with a transformers config and weights.

    Raises:
        ModelError: as `is_dual_encoder`, or a weight is missing, of another shape or not finite.
    """
    dual = is_dual_encoder(folder)
    with library_errors("CLIP model", folder):
        model, found = (ResNetClip if dual else CLIPModel).from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    wrong = [str(key) for key in (*found["missing_keys"], *found["mismatched_keys"])]
    wrong += [name for name, weight in model.named_parameters() if not is_finite(weight.detach())]
    if wrong:
        raise ModelError(f"has {len(wrong)} weights missing or broken, first {shorten(wrong[0], 80)}", where=folder)
    return model
