"""Forge's model and model patcher, written from Forge's contracts."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch

from .webui_sampling import read_prediction, timestep_of


class KModel(torch.nn.Module):
    """Forge's arithmetic around the UNet: sigmas in, denoised latents out."""

    def __init__(self, unet: torch.nn.Module, prediction: str) -> None:
        super().__init__()
        self.diffusion_model = unet
        self.predictor = SimpleNamespace(prediction_type=prediction)

    def apply_model(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **extra: Any,
    ) -> torch.Tensor:
        scaled = x / (t**2 + 1).sqrt()[:, None, None, None]
        out = self.diffusion_model(
            scaled,
            timestep_of(t),
            context=c_crossattn,
            control=control,
            transformer_options=transformer_options,
            **extra,
        ).float()
        return read_prediction(x, out, t, self.predictor.prediction_type)


class Patcher:
    """Forge's model patcher. A clone gets a deep copy of its options."""

    def __init__(self, model: KModel) -> None:
        self.model, self.lora_patches, self.controlnet_linked_list = model, {}, None
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> Patcher:
        copied = Patcher(self.model)
        copied.lora_patches, copied.controlnet_linked_list = dict(self.lora_patches), self.controlnet_linked_list
        copied.model_options = copy.deepcopy(self.model_options)
        return copied

    def set_model_unet_function_wrapper(self, wrapper: Any) -> None:
        self.model_options["model_function_wrapper"] = wrapper


def forge_model(unet: torch.nn.Module, prediction: str) -> SimpleNamespace:
    patcher = Patcher(KModel(unet, prediction))
    return SimpleNamespace(after_lora=patcher, forge_objects=SimpleNamespace(unet=patcher))
