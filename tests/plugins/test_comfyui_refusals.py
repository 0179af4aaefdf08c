"""What would change the engine's layers in ComfyUI is refused with a message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sdcompress_engines.errors import EngineError, EngineMismatch

from sdcompress.checkpoints.ldm_keys import unet_keys
from sdcompress.families.configs import CONFIGS
from sdcompress.prune.presets import make_plan

from .comfyui_cases import SHAPE, WIDTH, text
from .comfyui_host import REAL, Harness
from .comfyui_model import unet_to_diffusers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning" if REAL else "error")


Q = "transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize(
    "layer", ["down_blocks_0_attentions_0", "up_blocks_2_attentions_1", "input_blocks_1_1", "output_blocks_5_1"]
)
def test_a_lora_is_refused_with_the_command_that_bakes_it_in(
    layer: str, strength: float, host: Any, models: Path, node: Any
) -> None:
    (patcher,) = node().load("tiny")
    for model in (patcher, patcher.clone()):
        with pytest.raises(Exception, match=r"1 of the UNet's weights, which are built into the engine.*--lora"):
            host.lora(model, [f"lora_unet_{layer}_{Q}", f"lora_te_text_model_encoder_layers_0_{Q}"], strength)


def test_a_lora_of_the_text_encoder_alone_or_without_strength_changes_nothing(
    host: Any, models: Path, node: Any
) -> None:
    (patcher,) = node().load("tiny")
    before = host.sample(patcher, text(77, 1), text(77, 2), SHAPE, 1, 4.0, 7)
    for keys, strength in (
        ([f"lora_te_text_model_encoder_layers_0_{Q}"], 1.0),
        ([f"lora_unet_down_blocks_0_attentions_0_{Q}"], 0.0),
    ):
        assert torch.equal(
            host.sample(host.lora(patcher, keys, strength), text(77, 1), text(77, 2), SHAPE, 1, 4.0, 7), before
        )


def test_what_would_change_or_save_the_engines_weights_is_refused(host: Any, models: Path, node: Any) -> None:
    (patcher,) = node().load("tiny")
    key = next(key for key in patcher.model.state_dict() if key.startswith("diffusion_model."))
    with pytest.raises(Exception, match="merge"):
        patcher.add_patches({key: (torch.ones(1),)}, 0.5, 0.5)
    with pytest.raises(Exception, match="LoRA hook"):
        patcher.add_hook_patches(None, {(key, (0, 0, 1)): torch.ones(1)}, 0.5)
    for save in (lambda: patcher.get_key_patches("diffusion_model."), lambda: patcher.model.state_dict_for_saving()):
        with pytest.raises(Exception, match=r"no weights to save or to merge.*--ldm"):
            save()


@pytest.mark.parametrize(
    "options",
    [
        {"patches": {"output_block_patch": [max]}},
        {"patches_replace": {"attn2": {("input", 1): max}}},
        {"patches": {"middle_patch": [max]}},
    ],
)
def test_a_node_that_changes_the_unets_layers_is_refused(
    options: dict[str, Any], harness: Harness, models: Path, node: Any
) -> None:
    (patcher,) = node().load("tiny")
    patcher.model_options["transformer_options"].update(options)
    with pytest.raises(EngineError, match="a node changes layers inside the UNet"):
        harness.sample(patcher, text(77, 1), text(77, 2), SHAPE, 1, 4.0, 7)
    assert not patcher.model.diffusion_model.is_open, "refused before gigabytes are loaded"


def test_a_controlnet_is_refused_with_the_reason(models: Path, parts: Any) -> None:
    model = parts.model.EngineModel(parts.folders.read_folder("tiny", models / "tiny"))
    with pytest.raises(EngineError, match=r"ControlNet.*no inputs for that.*--ldm"):
        model(
            torch.zeros(SHAPE),
            torch.zeros(2),
            torch.zeros(2, 77, WIDTH),
            control={"input": [], "middle": [torch.zeros(1)], "output": []},
        )


def test_empty_patches_and_unknown_keywords_are_ignored(models: Path, parts: Any) -> None:
    model = parts.model.EngineModel(parts.folders.read_folder("tiny", models / "tiny"))
    given = {
        "patches": {"attn1_patch": []},
        "patches_replace": {},
        "sigmas": torch.ones(1),
        "optimized_attention_override": max,
    }
    assert (
        model(
            torch.zeros(SHAPE),
            torch.zeros(2),
            torch.zeros(2, 77, WIDTH),
            transformer_options=given,
            crossattn_controlnet=torch.zeros(1),
        ).shape
        == SHAPE
    )
    model.close()


@pytest.mark.parametrize(
    ("shape", "width", "vector", "words"),
    [
        (SHAPE, 768, None, r"text embeddings 768 wide for an engine of SD1.x.*expected 96 wide.*CLIP"),
        (SHAPE, WIDTH, 2816, r"a vector 2816 wide beside the text for an engine of SD1.x"),
        ((2, 9, 8, 16), WIDTH, None, r"latents of shape \(2, 9, 8, 16\)"),
        ((2, 16, 8, 16), WIDTH, None, r"latents of shape"),
    ],
)
def test_inputs_of_another_family_are_refused_by_name(
    shape: tuple[int, ...], width: int, vector: int | None, words: str, models: Path, parts: Any
) -> None:
    model = parts.model.EngineModel(parts.folders.read_folder("tiny", models / "tiny"))
    with pytest.raises(EngineMismatch, match=words):
        model(
            torch.zeros(shape),
            torch.zeros(2),
            torch.zeros(2, 77, width),
            y=None if vector is None else torch.zeros(2, vector),
        )
    assert not model.is_open


FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.mark.parametrize(
    ("family", "preset"),
    [
        (family, preset)
        for family in FAMILIES
        for preset in (None, "bk-base", "bk-small", "bk-tiny")
        if (family, preset) != ("sdxl", "bk-tiny")
    ],
)
def test_comfyui_looks_for_a_lora_in_the_unets_layers(family: str, preset: str | None, parts: Any) -> None:
    from diffusers import UNet2DConditionModel

    config = json.loads((CONFIGS / family / "unet/config.json").read_text())
    if preset is not None:
        config = make_plan(config, preset).student_config()
    with torch.device("meta"):
        names = UNet2DConditionModel.from_config(config).state_dict()
    queries = {key: name for key, name in unet_keys(names).items() if key.endswith("attn1.to_q.weight")}
    assert unet_to_diffusers(parts.layout.ldm_layout(config)) == queries
