"""What would change the engine's layers in ComfyUI is refused with a message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sdcompress_engines.errors import EngineError, EngineMismatch

from .comfyui_cases import SHAPE, WIDTH, text
from .comfyui_host import REAL, Harness

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning" if REAL else "error")


def test_what_would_change_or_save_the_engines_weights_is_refused(host: Any, models: Path, node: Any) -> None:
    (patcher,) = node().load("tiny")
    key = next(key for key in patcher.model.state_dict() if key.startswith("diffusion_model."))
    for value, strengths in (((torch.ones(1),), (0.5, 0.5)), ([(torch.ones(1), None)], (1.0, 1.0))):
        with pytest.raises(
            Exception, match=r"merges another model into 1 of the UNet's weights.*merge the models first"
        ):
            patcher.add_patches({key: value}, *strengths)
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
