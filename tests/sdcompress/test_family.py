"""The family and the block removal of a UNet are recognized by its config, for published students too."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sdcompress_engines.errors import ModelError

from sdcompress.families.configs import CONFIGS
from sdcompress.families.registry import OTHER, family_of
from sdcompress.models import nano
from sdcompress.models.locate import read_unet_config, refuse_student
from sdcompress.prune.cost import count_parameters
from sdcompress.prune.plan import LevelPlan
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import meta_unet

DOWN, PLAIN_DOWN, UP, PLAIN_UP, MID = (
    "CrossAttnDownBlock2D",
    "DownBlock2D",
    "CrossAttnUpBlock2D",
    "UpBlock2D",
    "UNetMidBlock2DCrossAttn",
)

# Entries of published configs. BK-SDM: src/unet_config*/bk_*/config.json of Nota-NetsPresso/BK-SDM, which its models on
# the hub carry. Segmind small and tiny: what `prepare_unet` of segmind/distill-sd leaves, counted there in the README.
# SSD-1B, Vega and KOALA: the block tables by which ComfyUI knows them (transformer_depth, transformer_depth_output,
# transformer_depth_middle).
FOUR: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [DOWN, DOWN, DOWN, PLAIN_DOWN],
    "up_block_types": [PLAIN_UP, UP, UP, UP],
    "in_channels": 4,
}
THREE: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": [DOWN] * 3,
    "up_block_types": [UP] * 3,
    "in_channels": 4,
}
SD1: dict[str, Any] = {
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "sample_size": 64,
}
SD2: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "sample_size": 64,
}
SD2_THREE: dict[str, Any] = SD2 | {"attention_head_dim": [5, 10, 20]}
V: dict[str, Any] = {"sample_size": 96, "upcast_attention": True}
BASE: dict[str, Any] = {"layers_per_block": 1, "mid_block_type": MID}
SMALL: dict[str, Any] = {"layers_per_block": 1, "mid_block_type": None}
XL: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": [PLAIN_DOWN, DOWN, DOWN],
    "up_block_types": [UP, UP, PLAIN_UP],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "in_channels": 4,
    "sample_size": 128,
}
SSD_1B: dict[str, Any] = {
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
VEGA: dict[str, Any] = {
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, 1, 2],
}
PUBLISHED: dict[str, tuple[dict[str, Any], str, str, int]] = {
    "segmind/small-sd": (FOUR | SD1 | BASE, "sd1", "bk-base", 579_384_964),
    "segmind/tiny-sd": (THREE | SD1 | SMALL, "sd1", "bk-tiny", 323_384_964),
    "nota-ai/bk-sdm-base": (FOUR | SD1 | BASE, "sd1", "bk-base", 579_384_964),
    "nota-ai/bk-sdm-small": (FOUR | SD1 | SMALL, "sd1", "bk-small", 482_346_884),
    "nota-ai/bk-sdm-tiny": (THREE | SD1 | SMALL, "sd1", "bk-tiny", 323_384_964),
    "nota-ai/bk-sdm-v2-base": (FOUR | SD2 | BASE, "sd2", "bk-base", 583_480_964),
    "nota-ai/bk-sdm-v2-small": (FOUR | SD2 | SMALL, "sd2", "bk-small", 485_787_524),
    "nota-ai/bk-sdm-v2-tiny": (THREE | SD2_THREE | SMALL, "sd2", "bk-tiny", 326_825_604),
    "segmind/SSD-1B": (XL | SSD_1B, "sdxl", "SSD-1B", 1_330_000_000),
    "segmind/Segmind-Vega": (XL | VEGA, "sdxl", "Segmind-Vega", 745_000_000),
    "etri-vilab/koala-1b": (XL | BASE | {"transformer_layers_per_block": [1, 2, 6]}, "sdxl", "KOALA-1B", 1_161_000_000),
    "etri-vilab/koala-700m": (
        XL | SMALL | {"transformer_layers_per_block": [1, 2, 5]},
        "sdxl",
        "KOALA-700M",
        782_000_000,
    ),
}


def whole(family: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / family / "unet/config.json").read_text())
    return config


def public(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_student_is_recognized_by_its_blocks(name: str) -> None:
    config, family, kind, parameters = PUBLISHED[name]
    assert family_of(config).name == family
    assert family_of(config).student_of(config) == kind
    # The counts of SD1 and SD2 are published to the last digit, those of SDXL's students in billions.
    assert count_parameters(meta_unet(config)) == pytest.approx(parameters, rel=0.005 if family == "sdxl" else 0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_student_is_refused_as_a_teacher_by_its_name(name: str) -> None:
    config, _, kind, _ = PUBLISHED[name]
    with pytest.raises(ModelError, match=f"student already.*{kind}") as refusal:
        refuse_student(config, name)
    assert name in str(refusal.value)


@pytest.mark.parametrize(
    ("family", "parameters"), [("sd1", 859_520_964), ("sd2", 865_910_724), ("sdxl", 2_567_463_684)]
)
def test_a_whole_model_is_no_student(family: str, parameters: int) -> None:
    config = whole(family)
    assert family_of(config).name == family
    assert family_of(config).student_of(config) is None
    refuse_student(config, "teacher")
    assert count_parameters(meta_unet(public(config))) == parameters


@pytest.mark.parametrize(
    ("name", "teacher", "change"),
    [
        *((f"nota-ai/bk-sdm-{size}", "sd1", {}) for size in ("base", "small", "tiny")),
        *((f"nota-ai/bk-sdm-v2-{size}", "sd2", {}) for size in ("base", "small", "tiny")),
        *(
            (f"nota-ai/bk-sdm-v2-{size}", "sd2", V) for size in ("base", "small", "tiny")
        ),  # of SD2.1 (v-prediction), not of its base
    ],
)
def test_a_plans_student_config_is_the_published_one(name: str, teacher: str, change: dict[str, Any]) -> None:
    published, _, kind, parameters = PUBLISHED[name]
    student = make_plan(whole(teacher) | change, kind).student_config()
    expected = published | change
    assert {key: student.get(key) for key in expected} == expected
    assert count_parameters(meta_unet(student)) == parameters


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (f, k)
        for f in ("sd1", "sd2", "sdxl")
        for k in ("bk-base", "bk-small", "bk-tiny")
        if (f, k) != ("sdxl", "bk-tiny")
    ],
)
def test_a_preset_is_recognized_in_its_student(family: str, kind: str) -> None:
    student = make_plan(whole(family), kind).student_config()
    assert family_of(student).student_of(student) == kind


def test_another_block_removal_is_recognized_as_custom() -> None:
    whole_level, pruned = LevelPlan((0, 1), (0, 1, 2)), LevelPlan((0,), (0, 2))
    plan = make_plan(whole("sd1"), levels=[whole_level, pruned, pruned, pruned])
    student = plan.student_config()
    assert family_of(student).student_of(student) == "custom"


def test_the_student_of_nano_is_recognized_and_its_teacher_is_whole() -> None:
    teacher = read_unet_config("nano")
    assert family_of(teacher).student_of(teacher) is None
    tiny = json.loads((nano.ASSETS / "tiny/config.json").read_text())
    assert family_of(tiny).student_of(tiny) == "bk-tiny"


def test_a_unet_of_another_kind_has_no_family() -> None:
    refiner = XL | {
        "block_out_channels": [384, 768, 1536, 1536],
        "down_block_types": [PLAIN_DOWN, DOWN, DOWN, PLAIN_DOWN],
        "cross_attention_dim": 1280,
        "layers_per_block": 2,
    }
    upscaler = (
        FOUR
        | SD2
        | {
            "in_channels": 7,
            "down_block_types": [PLAIN_DOWN, DOWN, DOWN, DOWN],
            "up_block_types": [UP, UP, UP, PLAIN_UP],
            "num_class_embeds": 1000,
        }
    )
    assert family_of(refiner) is family_of(upscaler) is OTHER
    assert family_of(refiner).student_of(refiner) is None
