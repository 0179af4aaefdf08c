"""What holds for every UNet and every plan; and what is refused, in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sdcompress_engines.errors import ModelError, PlanError, SdCompressError
from sdcompress_engines.ldm_keys import ldm_unet_keys
from sdcompress_engines.signature import context_width, signature

from sdcompress.families.unet_blocks import read_blocks
from sdcompress.lora.adapters import LowRank
from sdcompress.lora.remap import remap_lora
from sdcompress.prune.cost import count_parameters, unet_cost
from sdcompress.prune.plan import BlockPlan, LevelPlan
from sdcompress.prune.presets import PRESETS, make_plan, read_plan
from sdcompress.prune.student import attention_pairs, build_student, meta_unet
from sdcompress.train.config import DistillConfig
from sdcompress.train.distill import make_objective
from sdcompress.train.features import collect_features

from .random_unets import (
    CONTEXT,
    build_teacher,
    cut_lists,
    keep_lists,
    predict,
    remove_by_hand,
    unet_configs,
)

few = settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))

# segmind/SSD-1B's form at small widths.
SSD_1B = {
    "sample_size": 8,
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "cross_attention_dim": CONTEXT,
    "attention_head_dim": [1, 2, 4],
    "norm_num_groups": 4,
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
TWO_LEVELS = {
    "sample_size": 8,
    "block_out_channels": [8, 8],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "cross_attention_dim": CONTEXT,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def check_student(teacher: Any, plan: BlockPlan) -> None:
    """The student is its teacher without the removed modules: same output, each tensor one tensor of the teacher."""
    student, pruned = build_student(teacher, plan), remove_by_hand(teacher, plan.levels, plan.mid)
    assert torch.allclose(predict(student), predict(pruned), rtol=0, atol=1e-6 * float(predict(pruned).abs().max()))
    mapped = {plan.teacher_key(key): value for key, value in student.state_dict().items()}
    kept = {key: value for key, value in teacher.state_dict().items() if plan.student_key(key) is not None}
    assert len(mapped) == len(student.state_dict()) == len(pruned.state_dict())
    assert mapped.keys() == kept.keys()
    assert all(torch.equal(mapped[key], value) for key, value in kept.items())
    again = BlockPlan.from_json(plan.to_json())
    assert again == plan
    assert {k: v.shape for k, v in meta_unet(again.student_config()).state_dict().items()} == {
        k: v.shape for k, v in student.state_dict().items()
    }


@few
@given(st.data())
def test_a_student_computes_what_its_teacher_computes_without_the_removed_modules(data: st.DataObject) -> None:
    config = data.draw(unet_configs())
    levels, mid = data.draw(keep_lists(config))
    teacher = build_teacher(config)
    levels = data.draw(cut_lists(teacher, levels, mid))
    whole = remove_by_hand(teacher, levels, mid)
    assume(count_parameters(whole) < count_parameters(teacher))
    check_student(teacher, make_plan(teacher.config, levels=levels, mid=mid))


@few
@given(unet_configs(), st.sampled_from(list(PRESETS)))
def test_a_presets_student_is_its_teacher_without_the_removed_modules(config: dict[str, Any], preset: str) -> None:
    teacher = build_teacher(config)
    try:
        plan = make_plan(teacher.config, preset)
    except PlanError as error:
        assert "channels" in str(error) or "removes nothing" in str(error)  # noqa: PT017
        return
    check_student(teacher, plan)


@settings(few, max_examples=5)
@given(unet_configs(), st.sampled_from(list(PRESETS)), st.sampled_from(["blocks", "bk-sdm", "segmind"]))
def test_everything_derived_from_a_plan_fits(config: dict[str, Any], preset: str, choice: str) -> None:
    """Feature pairs, LDM's names, costs, the graph's inputs and a LoRA's layers."""
    teacher = build_teacher(config)
    try:
        plan = make_plan(teacher.config, preset)
    except PlanError:
        assume(False)
    student = build_student(teacher, plan)
    pairs = plan.feature_pairs(choice) + attention_pairs(student, plan)
    with (
        collect_features(student, [name for name, _ in pairs]) as student_features,
        collect_features(teacher, [name for _, name in pairs]) as teacher_features,
    ):
        predict(student)
        predict(teacher)
    assert [student_features[s].shape for s, _ in pairs] == [teacher_features[t].shape for _, t in pairs]
    names = ldm_unet_keys(student.state_dict())
    assert len({*names.values()} - {None}) == len(student.state_dict())
    assert unet_cost(plan.student_config())["total"].parameters == count_parameters(student)
    inputs = {spec.name: spec.shape for spec in signature("unet", dict(student.config)).inputs}
    assert inputs["encoder_hidden_states"] == ("batch", "tokens", CONTEXT)
    layers = {
        ("unet", name): LowRank(torch.zeros(1, module.in_features), torch.zeros(module.out_features, 1), 1.0)
        for name, module in teacher.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    remapped = remap_lora(layers, plan, dict(student.named_modules()))
    assert {name: id(layer) for (_, name), layer in remapped.layers.items()} == {
        key: id(layer) for (_, name), layer in layers.items() if (key := plan.student_key(name)) is not None
    }


@pytest.mark.parametrize("preset", ["bk-base", "bk-tiny"])
def test_lists_of_one_depth_a_pair_are_cut_to_the_pairs_that_stay(preset: str) -> None:
    teacher = build_teacher(SSD_1B)
    plan = make_plan(teacher.config, preset)
    check_student(teacher, plan)
    student: Any = build_student(teacher, plan)
    depths = [[len(each.transformer_blocks) for each in block.attentions] for block in student.up_blocks[:-1]]
    assert depths == {"bk-base": [[4, 10], [2, 1]], "bk-tiny": [[2, 1]]}[preset]


def test_tuples_of_depths_without_those_of_the_up_blocks_are_written_for_both_sides(tmp_path: Path) -> None:
    """diffusers builds such a UNet from Python's tuples, and refuses its JSON."""
    depths = ((1, 2, 3), (3, 2, 1))
    teacher = build_teacher(TWO_LEVELS | {"transformer_layers_per_block": depths})
    plan = make_plan(teacher.config, "bk-base")
    check_student(teacher, plan)
    build_student(teacher, plan).save_pretrained(tmp_path)
    again = type(teacher).from_pretrained(tmp_path)
    assert again.config["reverse_transformer_layers_per_block"] == [3, [1, 3]]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_teacher_of_two_levels_has_every_preset(preset: str) -> None:
    teacher = build_teacher(TWO_LEVELS)
    plan = make_plan(teacher.config, preset)
    check_student(teacher, plan)
    assert dict(plan.feature_pairs())["up_blocks.0"] == f"up_blocks.{plan.dropped_levels}"


def test_one_pair_a_level_without_mid_block_can_still_lose_its_innermost_level() -> None:
    config = TWO_LEVELS | {"layers_per_block": 1, "mid_block_type": None}
    check_student(build_teacher(config), make_plan(config, "bk-tiny"))
    for preset in ("bk-base", "bk-small"):
        with pytest.raises(PlanError, match=r"removes nothing here.*Try: bk-tiny"):
            make_plan(config, preset)


def test_a_plan_that_removes_nothing_is_refused_as_a_file_too(tmp_path: Path) -> None:
    levels = (LevelPlan((0, 1), (0, 1, 2)),) * 2
    path = tmp_path / "plan.json"
    path.write_text(BlockPlan("custom", dict(TWO_LEVELS), levels, True).to_json())
    with pytest.raises(PlanError, match=r"plan\.json: removes nothing"):
        read_plan(str(path), TWO_LEVELS)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_head_dim": 4}, "attention_head_dim"),
        ({"norm_eps": 1e-6}, "norm_eps"),
        ({"transformer_layers_per_block": 2}, "other blocks"),
        ({"layers_per_block": [2, 3]}, "other blocks"),
    ],
)
def test_a_plan_of_another_unet_builds_no_student(changes: dict[str, Any], named: str) -> None:
    """Heads and constants leave no trace in the shapes of the weights."""
    plan = make_plan(TWO_LEVELS, "bk-base")
    with pytest.raises(PlanError, match=named):
        build_student(build_teacher(TWO_LEVELS | changes), plan)


def test_a_plan_file_takes_heads_and_constants_from_the_teacher_at_hand(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(make_plan(TWO_LEVELS, "bk-tiny").to_json())
    teacher = build_teacher(TWO_LEVELS | {"attention_head_dim": 4, "layers_per_block": [2, 2]})
    check_student(teacher, read_plan(str(path), teacher.config))


def test_a_student_without_attention_refuses_the_attention_loss() -> None:
    plain = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    teacher = build_teacher(TWO_LEVELS | plain)
    plan = make_plan(teacher.config, "bk-small")
    student = build_student(teacher, plan)
    assert make_objective(teacher, student, plan, DistillConfig()).teacher is not None
    with pytest.raises(PlanError, match=r"no attention.*attention_kd_weight=0"):
        make_objective(teacher, student, plan, DistillConfig(attention_kd_weight=1))


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({"cross_attention_dim": [6, 6]}, 6),
        ({"cross_attention_dim": [6, 5], "mid_block_type": None}, 6),
        ({"cross_attention_dim": [6, 5]}, None),
        ({"cross_attention_dim": [6]}, None),
        ({"cross_attention_dim": []}, None),
        ({"cross_attention_dim": "6"}, None),
        ({"cross_attention_dim": None}, None),
        ({"cross_attention_dim": [[6], [6]]}, None),
        ({"cross_attention_dim": [6, 6], "up_block_types": None}, None),
    ],
)
def test_the_width_of_the_text_is_that_of_the_blocks_with_attention(changes: Any, width: int | None) -> None:
    if width is not None:
        assert context_width(TWO_LEVELS | changes) == width
        return
    with pytest.raises(ModelError, match=r"cross_attention_dim|up_block_types"):
        context_width(TWO_LEVELS | changes)


odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-2, 9) | st.none() | st.lists(st.integers(-2, 4), max_size=3), max_size=6),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def change_one_value(data: st.DataObject, value: Any) -> Any:
    """The value with one of its parts replaced, removed or added."""
    if isinstance(value, dict) and value and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(value)))
        rest = {name: each for name, each in value.items() if name != key}
        return rest if data.draw(st.booleans()) else rest | {key: change_one_value(data, value[key])}
    if isinstance(value, list) and value and data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(value) - 1))
        changed, after = change_one_value(data, value[place]), place + data.draw(st.integers(0, 1))
        return [*value[:place], changed, *value[after:]]
    return data.draw(odd_values)


@settings(few, max_examples=30)
@given(st.data(), st.sampled_from([SSD_1B, TWO_LEVELS]))
def test_a_changed_plan_file_is_refused_in_one_line_or_makes_a_student(data: st.DataObject, config: Any) -> None:
    content = change_one_value(data, json.loads(make_plan(config, "bk-base").to_json()))
    try:
        plan = BlockPlan.from_json(json.dumps(content))
        meta_unet(plan.student_config())
    except SdCompressError as error:
        assert len(str(error)) < 800  # noqa: PT017


@settings(few, max_examples=30)
@given(st.data(), st.sampled_from([SSD_1B, TWO_LEVELS]))
def test_a_changed_config_is_refused_in_one_line_or_pruned(data: st.DataObject, config: Any) -> None:
    changed = change_one_value(data, json.loads(json.dumps(config)))
    assume(isinstance(changed, dict))
    try:
        unet_cost(make_plan(changed, "bk-base").student_config())
    except SdCompressError as error:
        assert len(str(error)) < 800  # noqa: PT017


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]}, "down_block_types"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"transformer_layers_per_block": [1, 1, 1]}, "one value for each of the 2 levels"),
        ({"transformer_layers_per_block": [[1], 1]}, "transformer_layers_per_block"),
        ({"transformer_layers_per_block": 10**6}, "from 1 to 64"),
        ({"reverse_transformer_layers_per_block": 1}, "reverse_transformer_layers_per_block 1; expected a list"),
        ({"layers_per_block": 0}, "from 1 to 8"),
        ({"layers_per_block": True}, "from 1 to 8"),
        ({"block_out_channels": [8] * 5000}, "1 to 8 numbers"),
    ],
)
def test_a_unet_that_cannot_be_pruned_is_refused_by_the_key(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        read_blocks(TWO_LEVELS | changes)
