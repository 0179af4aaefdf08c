"""Plans and their students: parameter counts, keys, shapes and outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from sdcompress_engines.errors import PlanError, UsageError
from transformers import CLIPTextConfig, CLIPTextModel

from sdcompress.families.unet_blocks import transformer_depths
from sdcompress.prune.cost import count_parameters, unet_cost
from sdcompress.prune.plan import BlockPlan, LevelPlan
from sdcompress.prune.presets import ALIASES, PRESETS, make_plan, read_plan
from sdcompress.prune.student import build_student, meta_unet
from sdcompress.train.pipelines import save_pipeline, with_unet

SD = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD2 = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# segmind/SSD-1B: SDXL with its own number of transformer blocks in each attention.
SSD_1B = SDXL | {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
FAMILIES = {"sd1": SD, "sd2": SD2, "sdxl": SDXL, "ssd-1b": SSD_1B}
# Published: BK-SDM (arXiv 2305.15798, table 1; the repository's configs) for SD1.4 and SD2.1-base.
COUNTS = {
    "sd1": {None: 859_520_964, "bk-base": 579_384_964, "bk-small": 482_346_884, "bk-tiny": 323_384_964},
    "sd2": {None: 865_910_724, "bk-base": 583_480_964, "bk-small": 485_787_524, "bk-tiny": 326_825_604},
}


def config_of(family: str) -> dict:
    with torch.device("meta"):
        return dict(UNet2DConditionModel(**FAMILIES[family]).config)


@pytest.mark.parametrize("family", COUNTS)
@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_parameter_counts_are_the_published_ones(family: str, preset: str | None) -> None:
    config = config_of(family)
    config = make_plan(config, preset).student_config() if preset else config
    assert count_parameters(meta_unet(config)) == COUNTS[family][preset]


def test_students_are_smaller_by_the_shares_in_the_readme() -> None:
    """The UNets of SD-Small and SD-Tiny are 32.6% and 62.4% smaller; with SD1.5's text encoder and VAE, 26% and 50%."""
    config = config_of("sd1")
    configs = [config, *(make_plan(config, preset).student_config() for preset in ("bk-base", "bk-tiny"))]
    whole, small, tiny = (count_parameters(meta_unet(each)) for each in configs)
    with torch.device("meta"):
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
            )
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
    rest = count_parameters(text) + count_parameters(vae)
    assert [f"{1 - n / whole:.1%}" for n in (small, tiny)] == ["32.6%", "62.4%"]
    assert [f"{1 - (n + rest) / (whole + rest):.0%}" for n in (small, tiny)] == ["26%", "50%"]


@pytest.mark.parametrize(
    ("family", "preset"), [(f, p) for f in FAMILIES for p in PRESETS if f in COUNTS or p != "bk-tiny"]
)
def test_every_student_tensor_is_one_teacher_tensor_of_its_shape(family: str, preset: str) -> None:
    config = config_of(family)
    plan = make_plan(config, preset)
    teacher = meta_unet(plan.teacher).state_dict()
    student = meta_unet(plan.student_config()).state_dict()
    mapped = {key: plan.teacher_key(key) for key in student}
    assert len(set(mapped.values())) == len(student)
    assert {k: v.shape for k, v in student.items()} == {k: teacher[name].shape for k, name in mapped.items()}


def test_tiny_drops_the_innermost_level_and_shifts_the_up_blocks() -> None:
    plan = make_plan(config_of("sd1"), "bk-tiny")
    assert plan.teacher_key("up_blocks.0.resnets.1.conv1.weight") == "up_blocks.1.resnets.2.conv1.weight"
    assert plan.teacher_key("up_blocks.2.attentions.1.norm.bias") == "up_blocks.3.attentions.2.norm.bias"
    assert plan.teacher_key("down_blocks.2.resnets.0.conv1.weight") == "down_blocks.2.resnets.0.conv1.weight"
    assert plan.feature_pairs() == [
        ("down_blocks.0", "down_blocks.0"),
        ("down_blocks.1", "down_blocks.1"),
        ("down_blocks.2.attentions.0.proj_out", "down_blocks.2.attentions.1.proj_out"),
        ("up_blocks.0", "up_blocks.1"),
        ("up_blocks.1", "up_blocks.2"),
        ("up_blocks.2", "up_blocks.3"),
    ]


def test_some_transformer_blocks_of_sdxl_can_stay() -> None:
    plan = make_plan(
        config_of("sdxl"),
        levels=[LevelPlan((0,), (0, 2)), LevelPlan((0,), (0, 2)), LevelPlan((0,), (0, 2), (0, 1, 5, 9))],
    )
    teacher, student = meta_unet(plan.teacher).state_dict(), meta_unet(plan.student_config()).state_dict()
    assert all(teacher[plan.teacher_key(k)].shape == v.shape for k, v in student.items())
    assert (
        plan.teacher_key("mid_block.attentions.0.transformer_blocks.2.norm1.weight")
        == "mid_block.attentions.0.transformer_blocks.5.norm1.weight"
    )


def test_a_pair_keeps_its_own_number_of_transformer_blocks() -> None:
    student = make_plan(config_of("ssd-1b"), "bk-base").student_config()
    assert transformer_depths(student) == ([[2], [4]], [[4, 10], [2, 1]], 0)


def test_transformer_blocks_are_removed_from_up_blocks_with_a_depth_of_their_own() -> None:
    levels = [LevelPlan((0, 1), (0, 1, 2)), LevelPlan((0, 1), (0, 1, 2)), LevelPlan((0, 1), (0, 1, 2), (0, 2))]
    teacher = config_of("sdxl") | {"reverse_transformer_layers_per_block": [4, 2, 1]}
    plan = make_plan(teacher, levels=levels)
    weights, student = meta_unet(plan.teacher).state_dict(), meta_unet(plan.student_config()).state_dict()
    assert all(weights[plan.teacher_key(k)].shape == v.shape for k, v in student.items())
    assert transformer_depths(plan.student_config()) == ([[2, 2], [2, 2]], [[2, 2, 2], [2, 2, 2]], 2)
    with pytest.raises(PlanError, match="expected ascending indices from 0 to 3"):
        make_plan(teacher, levels=[*levels[:2], LevelPlan((0, 1), (0, 1, 2), (0, 9))])


def test_transformer_blocks_are_removed_from_pairs_of_different_depths() -> None:
    """All three up pairs of SSD-1B's innermost level have other numbers of blocks than the pairs one level out."""
    levels = [LevelPlan((0, 1), (0, 1, 2)), LevelPlan((0, 1), (0, 1, 2)), LevelPlan((0, 1), (0, 1, 2), (0, 2))]
    student = make_plan(config_of("ssd-1b"), levels=levels).student_config()
    assert transformer_depths(student) == ([[2, 2], [2, 2]], [[2, 2, 2], [2, 1, 1]], 0)


def test_a_plan_of_another_unet_is_refused_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(make_plan(config_of("sd1"), "bk-base").to_json())
    with pytest.raises(PlanError, match=r"plan\.json: was made for a UNet with block_out_channels"):
        read_plan(str(path), config_of("sdxl"))


@pytest.mark.parametrize("teacher", [None, []])
def test_a_file_without_a_teachers_config_is_no_plan(teacher: object) -> None:
    content = json.loads(make_plan(config_of("sd1"), "bk-base").to_json()) | {"teacher": teacher}
    with pytest.raises(PlanError, match="is not a plan"):
        BlockPlan.from_json(json.dumps(content))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_plan_survives_its_json(preset: str) -> None:
    plan = make_plan(config_of("sd2"), preset)
    assert BlockPlan.from_json(plan.to_json()) == plan


def test_sdxl_has_no_tiny_and_says_why() -> None:
    with pytest.raises(PlanError, match="1280 channels and its neighbor 640"):
        make_plan(config_of("sdxl"), "bk-tiny")


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="bk-tiny") as caught:
        make_plan(config_of("sd1"), "bk-tniy")
    assert all(name in str(caught.value) for name in [*PRESETS, *ALIASES])


@pytest.mark.parametrize(
    "levels",
    [
        [LevelPlan((0,), (0, 1, 2))] * 4,
        [LevelPlan((1,), (0, 2))] * 4,
        [LevelPlan((0,), (0, 1))] * 4,
        [LevelPlan((0, 5), (0, 1, 2))] * 4,
        [LevelPlan((0,), (0, 2))] * 2,
        [],
    ],
)
def test_illegal_keep_lists_are_refused(levels: list[LevelPlan]) -> None:
    with pytest.raises(PlanError):
        make_plan(config_of("sd1"), levels=levels, mid=False)


def test_macs_fall_with_the_blocks() -> None:
    config = config_of("sd1")
    costs = [unet_cost({k: v for k, v in config.items() if not k.startswith("_")})["total"].macs] + [
        unet_cost(make_plan(config, p).student_config())["total"].macs for p in PRESETS
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] / 1e9 == pytest.approx(401.6, abs=0.5)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_student_holds_the_teachers_values_and_leaves_the_teacher_alone(
    random_pipeline: StableDiffusionPipeline, preset: str
) -> None:
    teacher = random_pipeline.unet
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    plan = make_plan(teacher.config, preset)
    student = build_student(teacher, plan)
    with torch.no_grad():
        for key, value in student.state_dict().items():
            assert torch.equal(value, before[plan.teacher_key(key)])
            value.zero_()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_student_reloads_with_equal_output(
    random_pipeline: StableDiffusionPipeline, preset: str, tmp_path: Path
) -> None:
    student = build_student(random_pipeline.unet, make_plan(random_pipeline.unet.config, preset)).eval()
    save_pipeline(with_unet(random_pipeline, student), tmp_path / "student", "student")
    again = DiffusionPipeline.from_pretrained(tmp_path / "student").unet.eval()
    torch.manual_seed(1)
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 96)
    with torch.no_grad():
        assert torch.equal(student(sample, 500, text).sample, again(sample, 500, text).sample)


@pytest.mark.parametrize("preset", PRESETS)
def test_feature_pairs_have_equal_shapes(random_pipeline: StableDiffusionPipeline, preset: str) -> None:
    from sdcompress.train.features import collect_features

    teacher = random_pipeline.unet
    plan = make_plan(teacher.config, preset)
    student = build_student(teacher, plan)
    pairs = plan.feature_pairs()
    with (
        torch.no_grad(),
        collect_features(student, [s for s, _ in pairs]) as student_features,
        collect_features(teacher, [t for _, t in pairs]) as teacher_features,
    ):
        for unet in (student, teacher):
            unet(torch.randn(1, 4, 16, 16), 500, torch.randn(1, 77, 96))
        assert [student_features[s].shape for s, _ in pairs] == [teacher_features[t].shape for _, t in pairs]
    assert not any(m._forward_hooks for unet in (student, teacher) for m in unet.modules())
