"""Configs that are derived from the headers of full-size checkpoints, and the published configs in the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdcompress.checkpoints.configs import derive_configs, derive_unet_config
from sdcompress.checkpoints.ldm_keys import UNET, unet_keys
from sdcompress.checkpoints.weights import Weights, open_weights
from sdcompress.families.configs import CONFIGS
from sdcompress.families.registry import family_of
from sdcompress.families.vocabulary import shared_vocabulary
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import meta_unet

from .small_models import clip_tokenizer, full_size, sparse, whole

ARCHITECTURES: list[tuple[str, dict[str, Any]]] = [
    ("sd1", {}),
    ("sd2", {}),
    ("sdxl", {}),
    (
        "sdxl",
        {
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [1, [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        },
    ),
    ("sdxl", {"mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, 1, 2]}),
    ("sdxl", {"mid_block_type": None, "layers_per_block": 1, "transformer_layers_per_block": [1, 2, 5]}),
    ("sd1", {"layers_per_block": [2, 1, 2, 1]}),
]


@pytest.mark.parametrize(
    "config",
    [whole(family) | change for family, change in ARCHITECTURES]
    + [
        make_plan(whole(family), preset).student_config()
        for family in ("sd1", "sd2")
        for preset in ("bk-base", "bk-small", "bk-tiny")
    ],
    ids=lambda config: (
        f"{config['cross_attention_dim']}-{config['layers_per_block']}-{config['mid_block_type']}-{len(config['block_out_channels'])}-{config.get('transformer_layers_per_block')}"
    ),
)
def test_the_config_of_a_unet_is_derived_from_its_shapes(config: dict[str, Any]) -> None:
    unet = meta_unet(config)
    keys = unet_keys(unet.state_dict())
    assert len(set(keys.values())) == len(keys)
    shapes = {UNET + keys[key]: tuple(value.shape) for key, value in unet.state_dict().items()}
    weights = Weights(
        Path("a.safetensors"), shapes, dict.fromkeys(shapes, "float16"), {}, lambda key: torch.zeros(shapes[key])
    )
    found = derive_unet_config(weights)
    assert {k: v.shape for k, v in meta_unet(found).state_dict().items()} == {
        k: v.shape for k, v in unet.state_dict().items()
    }
    for key in (
        "attention_head_dim",
        "block_out_channels",
        "layers_per_block",
        "mid_block_type",
        "down_block_types",
        "up_block_types",
        "cross_attention_dim",
        "sample_size",
    ):
        assert found[key] == config[key], key
    assert family_of(found).student_of(found) == family_of(config).student_of(config)


@pytest.mark.parametrize(("spread", "expected"), [(0.05, "epsilon"), (0.15, "v_prediction")])
@pytest.mark.parametrize("preset", [None, "bk-tiny"])
def test_the_prediction_type_of_sd2_is_detected_in_its_last_attention(
    spread: float, expected: str, preset: str | None, tmp_path: Path
) -> None:
    shapes = full_size("sd2", preset)
    bias = UNET + ("output_blocks.11" if preset is None else "output_blocks.5") + ".1.transformer_blocks.0.norm1.bias"
    values = {bias: spread * torch.tensor([1.0, -1.0]).repeat(shapes[bias][0] // 2)}
    configs = derive_configs(open_weights(sparse(shapes, tmp_path / "a.safetensors", values)))
    assert configs["scheduler/scheduler_config.json"]["prediction_type"] == expected
    assert configs["unet/config.json"]["sample_size"] == (96 if expected == "v_prediction" else 64)


def test_the_shipped_tokenizer_is_that_of_clip() -> None:
    tokens = [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 49407]  # as openai/clip-vit-large-patch14 gives them
    assert clip_tokenizer("sd1")("a photo of an astronaut riding a horse").input_ids == tokens
    assert len(shared_vocabulary()) == 49408
    assert clip_tokenizer("sd1").pad_token_id == 49407
    assert clip_tokenizer("sd2").pad_token_id == clip_tokenizer("sdxl", "tokenizer_2").pad_token_id == 0


def test_the_configs_are_small_and_carry_their_license() -> None:
    assert sum(p.stat().st_size for p in CONFIGS.rglob("*") if p.is_file()) < 2 * 2**20
    notice = (CONFIGS / "NOTICE").read_text()
    assert "OpenAI" in notice
    assert "Permission is hereby granted" in notice
