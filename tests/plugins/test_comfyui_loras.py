"""*Load LoRA* works on the MODEL of an engine, also with LoRAs of the whole model on a student."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sdcompress_engines.runners import onnxruntime

from sdcompress.lora.fuse import shapes_of
from sdcompress.lora.remap import RemappedLora, remap_lora

from ..sdcompress.adapter_cases import ANY_SHAPE, KERNELS
from .comfyui_host import REAL, Real
from .comfyui_lora_cases import (
    FIRST,
    STRENGTH,
    Tensors,
    difference,
    draw,
    fuse,
    make_lora,
    read_layers,
    stack,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning" if REAL else "error")

Carry = Callable[[Tensors], RemappedLora]


@pytest.fixture
def carried(student: Any, random_pipeline: Any, student_plan: Any, tmp_path: Path) -> Carry:
    """Returns what gives a LoRA of the whole model the names of the student."""

    def carry_over(tensors: Tensors) -> RemappedLora:
        layers = read_layers(tensors, random_pipeline.unet, tmp_path)
        return remap_lora(layers, student_plan, shapes_of(student.unet) or {})

    return carry_over


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that gets the number of changed weights of each ONNX Runtime session that is started."""
    started: list[int] = []
    create = onnxruntime.create_session

    def count(*args: Any, weights: Any, **options: Any) -> Any:
        started.append(len(weights))
        return create(*args, weights=weights, **options)

    monkeypatch.setattr(onnxruntime, "create_session", count)
    return started


def test_a_lora_on_the_whole_models_engine_equals_torch_with_it_fused(
    host: Any, tmp_path: Path, node: Any, export_unet: Callable[..., Path], random_pipeline: Any
) -> None:
    shutil.copytree(export_unet("comfyui", random_pipeline, "teacher"), tmp_path / "models/sdcompress/whole")
    tensors = make_lora(random_pipeline.unet)
    (patcher,) = node().load("whole")
    fused = fuse(random_pipeline.unet, [(read_layers(tensors, random_pipeline.unet, tmp_path), STRENGTH)])
    assert difference(host, host.lora(patcher, tensors, STRENGTH), fused) < 1e-5
    assert difference(host, patcher, random_pipeline.unet) < 1e-5
    assert difference(host, patcher, fused) > 1e-2, "the LoRA changes the picture"


def test_loras_of_the_whole_model_on_a_student_equal_remapping_and_fusing(
    host: Any, models: Path, node: Any, student: Any, random_pipeline: Any, carried: Carry
) -> None:
    whole = random_pipeline.unet
    files = [make_lora(whole, seed=seed) for seed in (0, 1)]
    first, second = (carried(each).layers for each in files)
    (patcher,) = node().load("tiny")
    one = host.lora(patcher, files[0], STRENGTH)
    assert difference(host, one, fuse(student.unet, [(first, STRENGTH)])) < 1e-5
    two = host.lora(one, files[1], -0.1)
    assert difference(host, two, fuse(student.unet, [(first, STRENGTH), (second, -0.1)])) < 1e-5
    assert difference(host, host.lora(patcher, files[0], 0.1), fuse(student.unet, [(first, 0.1)])) < 1e-5
    assert difference(host, one, fuse(student.unet, [(first, STRENGTH)])) < 1e-5


def test_the_plain_model_gets_the_original_weights_back_bit_equal(
    host: Any, models: Path, node: Any, random_pipeline: Any
) -> None:
    (patcher,) = node().load("tiny")
    before = draw(host, patcher)
    changed = host.lora(patcher, make_lora(random_pipeline.unet), STRENGTH)
    first = draw(host, changed)
    assert not torch.equal(first, before)
    assert torch.equal(draw(host, patcher), before)
    host.unload()
    assert torch.equal(draw(host, changed), first)
    host.unload()
    assert torch.equal(draw(host, patcher), before)


def test_equal_loras_again_cost_nothing(
    host: Any, models: Path, node: Any, random_pipeline: Any, sessions: list[int]
) -> None:
    if host.reloads:
        pytest.skip("ComfyUI before December 2024 unloads the model for every new object around patches")
    files = [make_lora(random_pipeline.unet, seed=seed) for seed in (0, 1)]
    (patcher,) = node().load("tiny")
    both = [(files[0], STRENGTH), (files[1], 0.1)]
    first = draw(host, stack(host, patcher, both))
    started = list(sessions)
    assert len(started) == 2, "one of the file, and one with the LoRAs"
    assert torch.equal(draw(host, stack(host, patcher, both)), first), "a node that runs again makes new objects"
    assert torch.equal(draw(host, stack(host, patcher, [*both, (files[1], 0.0)])), first)
    assert sessions == started
    draw(host, stack(host, patcher, [(files[0], 0.3)]))
    assert len(sessions) > len(started)


def test_a_lora_of_the_text_encoder_alone_or_without_strength_changes_nothing(
    host: Any, models: Path, node: Any, random_pipeline: Any, sessions: list[int]
) -> None:
    (patcher,) = node().load("tiny")
    before = draw(host, patcher)
    started = list(sessions)
    unet = make_lora(random_pipeline.unet)
    clip = {name.replace("lora_unet_", "lora_te_text_model_"): value for name, value in unet.items()}
    for tensors, strength in ((clip, 1.0), (unet, 0.0)):
        assert torch.equal(draw(host, host.lora(patcher, tensors, strength)), before)
    assert sessions == started


@pytest.mark.parametrize("layer", [FIRST, "input_blocks.1.1.transformer_blocks.0.attn1.to_q"])
def test_diffusers_and_ldm_names_are_one_layer(
    layer: str, host: Any, models: Path, node: Any, student: Any, random_pipeline: Any, tmp_path: Path
) -> None:
    tensors = make_lora(random_pipeline.unet, choose=lambda name: name == FIRST)
    named = {key.replace(FIRST.replace(".", "_"), layer.replace(".", "_")): value for key, value in tensors.items()}
    fused = fuse(student.unet, [(read_layers(tensors, random_pipeline.unet, tmp_path), 1.0)])
    assert difference(host, host.lora(node().load("tiny")[0], named, 1.0), fused) < 1e-5


def test_untrained_layers_and_tiny_changes_are_no_misfits(
    host: Any, models: Path, node: Any, random_pipeline: Any
) -> None:
    (patcher,) = node().load("tiny")
    before = draw(host, patcher)
    tensors = make_lora(random_pipeline.unet)
    untrained = {key: value * (0 if "lora_up" in key else 1) for key, value in tensors.items()}
    tiny = {key: value * (1e-12 if "lora_up" in key else 1) for key, value in tensors.items()}
    for each in (untrained, tiny):
        torch.testing.assert_close(draw(host, host.lora(patcher, each, 1.0)), before)


def test_what_a_student_lacks_of_a_lora_is_reported_once(
    host: Any,
    models: Path,
    node: Any,
    random_pipeline: Any,
    carried: Carry,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tensors = make_lora(random_pipeline.unet)
    remapped = carried(tensors)
    (patcher,) = node().load("tiny")
    for _ in range(2):
        draw(host, host.lora(patcher, tensors, STRENGTH))
        draw(host, patcher)
    lines = [each.getMessage() for each in caplog.records if each.name == "sdcompress" and "LoRA" in each.getMessage()]
    count, dropped = len(remapped.layers) + len(remapped.dropped), len(remapped.dropped)
    assert lines == [
        f"tiny: the LoRA changes {count} layers, {dropped} of which this student does not have:"
        f" {remapped.kept_norm:.0%} of its change by norm is left"
    ]


def test_the_change_of_a_weight_that_is_not_known_is_measured_where_it_does_not_depend_on_it(parts: Any) -> None:
    delta, measure, cpu = torch.randn(8, 4), parts.loras.measure_change, torch.device("cpu")
    patches = [(0.5, ("diff", (delta,)), 1.0, None, None)]
    added = measure(patches, (8, 4), "a", lambda _, weight, key: weight + 0.5 * delta, cpu)
    assert added == pytest.approx(0.5 * float(delta.norm()), rel=1e-4)
    assert measure(patches, (8, 4), "a", lambda _, weight, key: (weight + delta) * 2, cpu) is None
    assert measure(patches, (8, 5), "a", lambda _, weight, key: weight, cpu) is None


on_real = pytest.mark.skipif(not REAL, reason="the stand-in knows LoRA and full differences only")
"""With `indirect`: the host is ComfyUI itself."""


@on_real
@pytest.mark.parametrize("host", [Real], indirect=True)
@pytest.mark.parametrize("kind", [kind for kind in (*ANY_SHAPE, *KERNELS) if kind != "lokr_core"])
def test_every_kind_of_adapter_equals_torch_with_it_fused(
    kind: str,
    host: Any,
    models: Path,
    node: Any,
    student: Any,
    random_pipeline: Any,
    carried: Carry,
) -> None:
    """`lokr_core` fails in ComfyUI's own code: it takes `torch.kron` of a tensor that is not contiguous."""
    kinds = (".conv1",) if kind in KERNELS else (".conv1", ".to_q")
    make = {**ANY_SHAPE, **KERNELS}[kind]
    tensors = make_lora(random_pipeline.unet, make, choose=lambda name: name.endswith(kinds))
    layers = carried(tensors).layers
    patcher = host.lora(node().load("tiny")[0], tensors, 0.05)
    assert difference(host, patcher, fuse(student.unet, [(layers, 0.05)])) < 1e-5


@on_real
@pytest.mark.parametrize("host", [Real], indirect=True)
@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_dora_equals_torch_with_the_weights_that_comfyui_computes(
    kind: str, host: Any, models: Path, node: Any, parts: Any, student: Any, random_pipeline: Any
) -> None:
    """ComfyUI divides by other norms than the paper, so its own sum is the reference."""
    tensors = make_lora(random_pipeline.unet, ANY_SHAPE[kind], with_norms=True)
    patcher = host.lora(node().load("tiny")[0], tensors, 0.05)
    places = parts.whole_model.read_whole_model(parts.folders.read_folder("tiny", models / "tiny")).places
    fused = copy.deepcopy(student.unet)
    for name, place in places.items():
        if found := patcher.patches.get(f"diffusion_model.{name}"):
            weight = fused.get_parameter(place)
            weight.copy_(host.calculate(patcher)(found, weight.clone(), name))
    assert difference(host, patcher, fused) < 1e-5
    assert difference(host, patcher, student.unet) > 1e-3


def test_a_full_difference_equals_torch_with_it_fused(
    host: Any, models: Path, node: Any, student: Any, random_pipeline: Any, carried: Carry
) -> None:
    tensors = make_lora(random_pipeline.unet, ANY_SHAPE["full"], choose=lambda name: ".attentions." in name)
    layers = carried(tensors).layers
    patcher = host.lora(node().load("tiny")[0], tensors, 0.05)
    assert difference(host, patcher, fuse(student.unet, [(layers, 0.05)])) < 1e-5


def test_layers_are_those_of_the_whole_model_on_a_student(
    host: Any, models: Path, node: Any, random_pipeline: Any
) -> None:
    from sdcompress.checkpoints.ldm_keys import unet_keys

    (patcher,) = node().load("tiny")
    weights = random_pipeline.unet.state_dict()
    listed = {
        key.removeprefix("diffusion_model."): tuple(value.shape)
        for key, value in patcher.model.state_dict().items()
        if key.startswith("diffusion_model.")
    }
    assert listed == {name: tuple(weights[key].shape) for key, name in unet_keys(weights).items()}
