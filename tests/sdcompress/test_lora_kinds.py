"""Every kind of adapter: its change, its round trip through a file, and its way from a teacher to a student."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sdcompress_engines.errors import ModelError, UsageError
from sdcompress_engines.exactness import relative_l2

from sdcompress.lora.adapters import Adapter, DoRA, Full, Layers, LowRank
from sdcompress.lora.build import build_adapter, find_shape_fault
from sdcompress.lora.files import read_lora, write_lora
from sdcompress.lora.fuse import fuse_lora
from sdcompress.lora.names import KINDS, unet_modules
from sdcompress.lora.remap import remap_lora, remap_to_teacher
from sdcompress.models.load import load_pipeline
from sdcompress.prune.plan import BlockPlan
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import build_student, meta_unet

from .adapter_cases import ANY_SHAPE, KERNELS, Case, Draw, decompose, dora

MATRIX, KERNEL = (12, 8), (12, 8, 3, 3)
CASES = [(name, MATRIX) for name in ANY_SHAPE] + [(name, KERNEL) for name in ANY_SHAPE | KERNELS]
NAME = "down_blocks.0.resnets.0.conv1"


def make_case(name: str, shape: tuple[int, ...], seed: int = 0) -> Case:
    return (ANY_SHAPE | KERNELS)[name](shape, Draw(seed))


def shapes_of(case: Case) -> dict[str, tuple[int, ...]]:
    return {end: tuple(tensor.shape) for end, tensor in case.tensors.items()}


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_the_change_is_that_of_the_papers_formula(name: str, shape: tuple[int, ...]) -> None:
    case = make_case(name, shape)
    assert find_shape_fault(shapes_of(case)) == ""
    adapter = build_adapter(case.tensors)
    delta = adapter.delta(torch.zeros(shape, dtype=torch.float16))
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta.double(), case.change, rtol=1e-5, atol=1e-6)
    assert adapter.norm() == pytest.approx(float(case.change.norm()), rel=1e-6)
    assert (adapter.kind, adapter.rank) == (case.kind, case.rank)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_dora_brings_the_changed_weight_to_its_norms(name: str, shape: tuple[int, ...], axis: int) -> None:
    case = dora(make_case(name, shape), shape, Draw(1), axis)
    assert find_shape_fault(shapes_of(case)) == ""
    weight, adapter = Draw(2)(*shape), build_adapter(case.tensors)
    torch.testing.assert_close(
        (weight + adapter.delta(weight)).double(), decompose(weight, case, axis), rtol=1e-5, atol=1e-6
    )
    assert adapter.norm() == pytest.approx(float(case.change.norm()), rel=1e-6)
    assert (adapter.kind, adapter.rank) == (case.kind, case.rank)


def test_doras_norms_in_one_dimension_are_of_the_output_channels() -> None:
    case, weight = dora(make_case("lora", MATRIX), MATRIX, Draw(1)), Draw(2)(*MATRIX)
    flat = case.tensors | {"dora_scale": case.tensors["dora_scale"].flatten()}
    assert torch.equal(build_adapter(flat).delta(weight), build_adapter(case.tensors).delta(weight))


def test_a_weight_of_zeros_stays_finite_under_dora() -> None:
    adapter = DoRA(LowRank(torch.zeros(2, 8), torch.zeros(12, 2)), torch.ones(12, 1))
    assert torch.equal(adapter.delta(torch.zeros(MATRIX)), torch.zeros(MATRIX))


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_an_adapter_fits_its_own_shape_only(name: str, shape: tuple[int, ...]) -> None:
    plain = make_case(name, shape)
    others = [(shape[0] + 2, *shape[1:]), (shape[0], shape[1] + 2, *shape[2:]), (*shape[:2], 5, 5)]
    for case in (plain, dora(plain, shape, Draw(1)), dora(plain, shape, Draw(1), 1)):
        adapter = build_adapter(case.tensors)
        assert adapter.fits(shape)
        assert not any(adapter.fits(other) for other in others)


@pytest.mark.parametrize("name", ANY_SHAPE)
def test_a_1x1_convolution_and_a_matrix_take_each_others_adapter(name: str) -> None:
    for own, other in ((MATRIX, (*MATRIX, 1, 1)), ((*MATRIX, 1, 1), MATRIX)):
        case = make_case(name, own)
        adapter = build_adapter(case.tensors)
        assert adapter.fits(other)
        torch.testing.assert_close(adapter.delta(torch.zeros(other)).double(), case.change.reshape(other))


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_every_kind_reads_back_with_equal_changes(
    tmp_path: Path, name: str, shape: tuple[int, ...], axis: int | None
) -> None:
    plain = make_case(name, shape)
    case = plain if axis is None else dora(plain, shape, Draw(1), axis)
    save_file(
        {f"lora_unet_{NAME.replace('.', '_')}.{e}": t for e, t in case.tensors.items()}, tmp_path / "a.safetensors"
    )
    layers = read_lora(tmp_path / "a.safetensors", [NAME])
    write_lora(layers, tmp_path / "b.safetensors", "kohya")
    before, after = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    weight, again = Draw(2)(*shape), read_lora(tmp_path / "b.safetensors", [NAME])
    assert torch.equal(layers["unet", NAME].delta(weight), again["unet", NAME].delta(weight))


@pytest.mark.parametrize("shape", [MATRIX, KERNEL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("with_norms", [False, True])
def test_loras_and_doras_are_written_in_diffusers_naming(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype, with_norms: bool
) -> None:
    case = make_case("lora", shape)
    case = dora(case, shape, Draw(1)) if with_norms else case
    layers: Layers = {("unet", NAME): build_adapter({end: tensor.to(dtype) for end, tensor in case.tensors.items()})}
    write_lora(layers, tmp_path / "a.safetensors", "diffusers")
    ends = {"lora_A.weight", "lora_B.weight"} | ({"lora_magnitude_vector.weight"} if with_norms else set())
    assert load_file(tmp_path / "a.safetensors").keys() == {f"unet.{NAME}.{end}" for end in ends}
    weight = Draw(2)(*shape)
    again = read_lora(tmp_path / "a.safetensors", [NAME])["unet", NAME]
    torch.testing.assert_close(again.delta(weight), layers["unet", NAME].delta(weight), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["locon_core", "loha", "lokr_whole", "full"])
def test_other_kinds_are_not_written_in_diffusers_naming(tmp_path: Path, name: str) -> None:
    layers: Layers = {("unet", NAME): build_adapter(make_case(name, KERNEL).tensors)}
    with pytest.raises(UsageError, match="--naming kohya"):
        write_lora(layers, tmp_path / "a.safetensors", "diffusers")
    inputs = dora(make_case("lora", KERNEL), KERNEL, Draw(1), axis=1)
    with pytest.raises(UsageError, match="DoRA of LoCon"):
        write_lora({("unet", NAME): build_adapter(inputs.tensors)}, tmp_path / "a.safetensors", "diffusers")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "changes", "fault"),
    [
        ("lora", {"lora_up.weight": None}, "only one half"),
        ("lora", {"hada_w1_a": (4, 4)}, "more than one kind"),
        ("lora", {"lora_up.weight": (12, 3, 1, 1)}, "of the ranks 3 and 4"),
        ("lora", {"dora_scale": (12, 8)}, "norms of 12 x 8 channels"),
        ("lora", {"dora_scale": ()}, "norms of one number"),
        ("lora", {"dora_scale": (12,), "lora_magnitude_vector.weight": (12,)}, "has both"),
        ("locon_core", {"lora_mid.weight": (4, 3, 3, 3)}, "core of 4 x 3 x 3 x 3 for the ranks 4 and 4"),
        ("locon_core", {"lora_mid.weight": (4, 4)}, "matrices of"),
        ("locon_core", {"lora_down.weight": (4, 8, 3, 3)}, "beside a core"),
        ("loha", {"hada_w2_b": None}, "only w1_a, w1_b, w2_a"),
        ("loha", {"hada_w2_b": (4, 71)}, "12 x 72 and 12 x 71 element by element"),
        ("loha_core", {"hada_t1": None}, "has only"),
        ("lokr_whole", {"lokr_w1": None}, "has w1 as nothing"),
        ("lokr_whole", {"lokr_w1": (2, 2, 1, 1)}, "has w1 as w1"),
        ("lokr_whole", {"lokr_t2": (4, 4, 3, 3)}, "core beside a whole w2"),
        ("lokr_factors", {"lokr_w2_a": None}, "has w2 as w2_b"),
        ("lokr_factors", {"lokr_w2": (6, 4, 3, 3)}, "has w2 as w2, w2_a, w2_b"),
        ("lokr_core", {"lokr_w1_a": (2, 5)}, "of the ranks 5 and 4"),
        ("full", {"diff": (0, 8)}, "matrices of 0 x 8"),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_refused(
    tmp_path: Path, name: str, changes: dict[str, tuple[int, ...] | None], fault: str
) -> None:
    tensors = dict(make_case(name, KERNEL).tensors)
    for end, shape in changes.items():
        tensors.pop(end, None)
        if shape is not None:
            tensors[end] = torch.zeros(shape)
    save_file({f"lora_unet_conv_in.{end}": tensor for end, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=rf"1 of 1 layers that cannot be used: conv_in .*{fault}") as refusal:
        read_lora(tmp_path / "a.safetensors", ["conv_in"])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_numbers_of_any_tensor_must_be_finite_floats(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    case = dora(make_case(name, shape), shape, Draw(1))
    for end in case.tensors.keys() - {"alpha"}:
        not_finite, integers = torch.full_like(case.tensors[end], float("nan")), case.tensors[end].to(torch.int32)
        for value, fault in ((not_finite, "not finite"), (integers, "is of type int32")):
            tensors = case.tensors | {end: value}
            save_file({f"lora_unet_conv_in.{e}": t for e, t in tensors.items()}, tmp_path / "a.safetensors")
            with pytest.raises(ModelError, match=fault):
                read_lora(tmp_path / "a.safetensors", ["conv_in"])


ENDS = sorted({end for kind in KINDS for end in kind.keys.values()} | {"dora_scale", "lora_magnitude_vector.weight"})
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 12]), max_size=5).map(tuple)


@settings(max_examples=400, deadline=None)
@given(
    case=st.sampled_from(CASES),
    changed=st.dictionaries(st.sampled_from(ENDS), SHAPES, max_size=3),
    absent=st.sets(st.sampled_from(ENDS), max_size=3),
    sides=st.lists(st.tuples(st.integers(0, 20), st.sampled_from([1, 2, 3, 4, 8, 12])), max_size=3),
)
def test_tensors_of_any_shapes_make_an_adapter_or_have_a_fault(
    case: tuple[str, tuple[int, ...]], changed: dict[str, Any], absent: set[str], sides: list[tuple[int, int]]
) -> None:
    shapes = {end: shape for end, shape in (shapes_of(make_case(*case)) | changed).items() if end not in absent}
    places = [(end, axis) for end, shape in shapes.items() for axis in range(len(shape))]
    for number, side in sides if places else []:
        end, axis = places[number % len(places)]
        shapes[end] = (*shapes[end][:axis], side, *shapes[end][axis + 1 :])
    if find_shape_fault(shapes):
        return
    adapter = build_adapter({end: torch.ones(shape) for end, shape in shapes.items()})
    change = adapter.change(torch.float32)
    assert tuple(change.shape) == adapter.shape
    assert adapter.norm() == pytest.approx(float(change.norm()), rel=1e-5)
    if adapter.fits(adapter.shape):
        assert adapter.delta(torch.ones(adapter.shape)).isfinite().all()


@pytest.fixture(scope="module")
def unet(random_pipeline: Any) -> Any:
    return random_pipeline.unet


@pytest.fixture(scope="module")
def plan(unet: Any) -> BlockPlan:
    return make_plan(unet.config, "bk-tiny")


def adapt_unet(unet: Any, name: str, with_norms: bool) -> Layers:
    """Returns adapters of one case for every layer of a UNet that can have it."""
    layers: Layers = {}
    for seed, module in enumerate(unet_modules(unet)):
        shape = tuple(unet.get_submodule(module).weight.shape)
        if any(side % 2 for side in shape[:2]) or (name in KERNELS and shape[2:] != (3, 3)):
            continue
        case = make_case(name, shape, seed)
        layers["unet", module] = build_adapter(
            (dora(case, shape, Draw(seed), seed % 2) if with_norms else case).tensors
        )
    return layers


def fused(pipeline: Any, unet: Any, layers: Layers, weight: float = 0.7) -> Any:
    """Returns a copy of a UNet with a LoRA in its weights."""
    changed = copy.copy(pipeline)
    changed.unet = copy.deepcopy(unet)
    fuse_lora(changed, layers, weight)
    return changed.unet


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("name", ANY_SHAPE | KERNELS)
def test_remap_then_fuse_equals_fuse_then_prune(
    random_pipeline: Any, unet: Any, plan: BlockPlan, name: str, with_norms: bool
) -> None:
    layers, student = adapt_unet(unet, name, with_norms), build_student(unet, plan)
    remapped = remap_lora(layers, plan, unet_modules(student))
    assert remapped.dropped
    pruned = fused(random_pipeline, student, remapped.layers).state_dict()
    whole = build_student(fused(random_pipeline, unet, layers), plan).state_dict()
    assert all(torch.equal(pruned[key], whole[key]) for key in whole)
    assert not any(torch.equal(pruned[f"{n}.weight"], student.state_dict()[f"{n}.weight"]) for _, n in remapped.layers)


@pytest.mark.parametrize("preset", ["bk-base", "bk-small", "bk-tiny"])
def test_to_the_teacher_and_back_is_the_identity(unet: Any, preset: str) -> None:
    plan = make_plan(unet.config, preset)
    student = meta_unet(plan.student_config())
    layers = adapt_unet(student, "lora", False) | {("text_encoder", "text_model.encoder.layers.0.mlp.fc1"): one_layer()}
    whole = remap_to_teacher(layers, plan)
    back = remap_lora(whole, plan, unet_modules(student))
    assert {name for component, name in whole if component == "unet"} <= set(unet_modules(unet))
    assert (back.layers, back.dropped, back.kept_norm) == (layers, [], 1.0)


def one_layer() -> Adapter:
    return build_adapter(make_case("lora", MATRIX).tensors)


def test_a_lora_of_the_teacher_is_not_taken_for_one_of_the_student(unet: Any, plan: BlockPlan) -> None:
    with pytest.raises(ModelError, match="which the unet does not have"):
        remap_to_teacher(adapt_unet(unet, "lora", False), plan)


@pytest.mark.parametrize("name", ["lora", "loha", "lokr_factors", "full"])
def test_the_kept_norm_is_the_share_of_the_changes_norm(unet: Any, plan: BlockPlan, name: str) -> None:
    layers, student = adapt_unet(unet, name, True), meta_unet(plan.student_config())
    remapped = remap_lora(layers | {("text_encoder", "x"): one_layer()}, plan, unet_modules(student))
    squares = {
        module: float(make_case(name, tuple(unet.get_submodule(module).weight.shape), seed).change.square().sum())
        for seed, module in enumerate(unet_modules(unet))
        if ("unet", module) in layers
    }
    kept = sum(square for module, square in squares.items() if plan.student_key(module) is not None)
    assert remapped.kept_norm == pytest.approx((kept / sum(squares.values())) ** 0.5, rel=1e-6)
    assert 0.1 < remapped.kept_norm < 0.99


def test_nothing_is_lost_of_a_lora_for_kept_blocks_and_all_of_one_for_removed_blocks(
    unet: Any, plan: BlockPlan
) -> None:
    layers, modules = adapt_unet(unet, "lora", False), unet_modules(meta_unet(plan.student_config()))
    kept = {place: each for place, each in layers.items() if plan.student_key(place[1]) is not None}
    assert remap_lora(kept, plan, modules).kept_norm == 1.0
    lost = {place: each for place, each in layers.items() if place not in kept}
    assert remap_lora(lost, plan, modules).kept_norm == 0.0
    place, layer = next(iter(lost.items()))
    nothing: Layers = {place: Full(torch.zeros(layer.shape))}
    assert remap_lora(nothing, plan, modules).kept_norm == 1.0


def test_loras_are_fused_one_after_another(random_pipeline: Any, unet: Any) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    shape = tuple(unet.get_submodule(name).weight.shape)
    cases = [dora(make_case(kind, shape, seed), shape, Draw(seed)) for seed, kind in enumerate(("lora", "loha"))]
    changed, expected = unet, unet.get_submodule(name).weight.detach().double()
    for case in cases:
        changed = fused(random_pipeline, changed, {("unet", name): build_adapter(case.tensors)}, 0.5)
        expected = 0.5 * expected + 0.5 * decompose(expected, case, 0)
    torch.testing.assert_close(changed.get_submodule(name).weight.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_change_is_rounded_once_to_the_weights_dtype(random_pipeline: Any, unet: Any, dtype: torch.dtype) -> None:
    half = copy.deepcopy(unet).to(dtype)
    changed = fused(random_pipeline, half, adapt_unet(unet, "lora", True), 0.3)
    for (_, name), layer in adapt_unet(unet, "lora", True).items():
        weight = half.get_submodule(name).weight
        assert torch.equal(changed.get_submodule(name).weight, (weight.float() + 0.3 * layer.delta(weight)).to(dtype))


@pytest.mark.parametrize("targets", [["to_q", "to_out.0"], ["conv1", "conv_shortcut"]])
def test_a_dora_of_peft_is_applied_as_peft_applies_it(random_folder: Path, tmp_path: Path, targets: list[str]) -> None:
    from peft import LoraConfig as AdapterConfig
    from peft import get_peft_model_state_dict

    torch.manual_seed(4)
    trained: Any = load_pipeline(random_folder).pipeline
    config = AdapterConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, use_dora=True)
    trained.unet.add_adapter(config)
    for name, parameter in trained.unet.named_parameters():
        if "magnitude" in name:
            parameter.data *= 0.5 + torch.rand_like(parameter)
    noted = trained.unet.peft_config["default"].to_dict()
    trained.save_lora_weights(tmp_path, get_peft_model_state_dict(trained.unet), unet_lora_adapter_metadata=noted)
    pipeline: Any = load_pipeline(random_folder).pipeline
    layers = read_lora(tmp_path / "pytorch_lora_weights.safetensors", unet_modules(pipeline.unet))
    assert {layer.kind for layer in layers.values()} <= {"DoRA", "DoRA of LoCon"}
    fuse_lora(pipeline, layers)
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 7, pipeline.unet.config.cross_attention_dim)
    with torch.no_grad():
        assert relative_l2(pipeline.unet(*inputs).sample, trained.unet(*inputs).sample) < 1e-5
