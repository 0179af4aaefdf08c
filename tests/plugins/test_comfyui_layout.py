"""ComfyUI's view of a UNet's blocks, and the names and shapes of its weights, follow from diffusers' config."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from sdcompress.checkpoints.ldm_keys import unet_keys
from sdcompress.families.configs import CONFIGS
from sdcompress.prune.presets import make_plan

from .comfyui_lora import unet_to_diffusers

ALL = [
    (family, preset)
    for family in ("sd1", "sd2", "sdxl")
    for preset in (None, "bk-base", "bk-small", "bk-tiny")
    if (family, preset) != ("sdxl", "bk-tiny")
]


def config_and_weights(family: str, preset: str | None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Returns the config of a UNet, and its weights on the meta device by diffusers' names."""
    from diffusers import UNet2DConditionModel

    config = json.loads((CONFIGS / family / "unet/config.json").read_text())
    if preset is not None:
        config = make_plan(config, preset).student_config()
    with torch.device("meta"):
        return config, UNet2DConditionModel.from_config(config).state_dict()


@pytest.mark.parametrize(("family", "preset"), ALL)
def test_comfyui_looks_for_a_lora_in_the_unets_layers(family: str, preset: str | None, parts: Any) -> None:
    config, weights = config_and_weights(family, preset)
    found = unet_to_diffusers(parts.layout.ldm_layout(config))
    attentions = {key: name for key, name in found.items() if ".attentions." in key}
    assert attentions == {
        key: name
        for key, name in unet_keys(weights).items()
        if ".attentions." in key and key.endswith(".weight") and "norm" not in key
    }


@pytest.mark.parametrize(("family", "preset"), ALL)
def test_names_and_shapes_of_all_weights_follow_from_the_config(family: str, preset: str | None, parts: Any) -> None:
    config, weights = config_and_weights(family, preset)
    wanted = {name: tuple(weights[key].shape) for key, name in unet_keys(weights).items()}
    assert parts.layout.parameter_shapes(config) == wanted
