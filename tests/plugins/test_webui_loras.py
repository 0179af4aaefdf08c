"""The LoRAs of a prompt go into the engine; those of the checkpoint also into a student, which lacks some layers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from sdcompress_engines.errors import EngineError, EngineMismatch
from sdcompress_engines.exactness import relative_l2
from sdcompress_engines.manifest import read_manifest, write_manifest
from sdcompress_engines.runners import onnxruntime
from sdcompress_webui.torch_unet import TorchUNet

from sdcompress.checkpoints.ldm_keys import unet_keys
from sdcompress.prune.presets import make_plan

from .webui_cases import LAYER, ROUNDING, TITLE, add_weights, expected, lora_deltas, lora_of, noise, sample, words
from .webui_host import WebUI
from .webui_sampling import Guidance, denoise, euler, reference, schedule

UP = "up_blocks.2.attentions.2.transformer_blocks.0.attn1.to_q"
"""The teacher's name of a layer that the student has under another name."""
LOST = "mid_block.resnets.0.conv1"
ASKED: dict[str, Any] = {"cond": words(1), "uncond": words(2), "steps": 2}


def changed_student(student: Any, teacher: Any, layers: Mapping[str, torch.Tensor]) -> Any:
    """Returns a copy of the student with changes added, by the teacher's names of the layers."""
    plan, changed = make_plan(dict(teacher.config), "bk-tiny"), copy.deepcopy(student)
    for layer, delta in layers.items():
        if (own := plan.student_key(layer)) is not None:
            changed.get_submodule(own).weight.data += delta
    return changed


@pytest.fixture
def loaded(webui: WebUI) -> list[Any]:
    """Returns the list in which A1111 holds the prompt's LoRAs, with the student's engine chosen."""
    webui.opts.sd_unet = TITLE
    networks: list[Any] = sys.modules["networks"].loaded_networks
    return networks


def test_a_lora_of_the_checkpoint_changes_the_student_and_what_is_lost_is_said_once(
    webui: WebUI, loaded: list[Any], student_unet: Any, random_pipeline: Any
) -> None:
    layers = [LAYER, UP, LOST]
    loaded.append(lora_of(random_pipeline.unet, layers, 0.5))
    deltas = lora_deltas(random_pipeline.unet, layers)
    changed = changed_student(
        student_unet, random_pipeline.unet, {name: 0.5 * each for name, each in zip(layers, deltas, strict=True)}
    )
    latents, _, job = sample(webui, **ASKED)
    assert relative_l2(latents, expected(changed, **ASKED)[0]) < ROUNDING
    squares = [float(each.square().sum()) for each in deltas]
    share = (sum(squares[:2]) / sum(squares)) ** 0.5
    assert [line for line in job.comments if "2 of its 3 layers" in line and f"{share:.0%} of its change" in line]
    assert not sample(webui, **ASKED)[2].comments


def test_pictures_with_none_one_and_two_loras_in_turn(
    webui: WebUI, loaded: list[Any], student_unet: Any, random_pipeline: Any
) -> None:
    teacher = random_pipeline.unet
    first, second = lora_of(teacher, [LAYER], 0.7), lora_of(teacher, [LAYER, UP], -0.4, "light", 5)
    one = {LAYER: 0.7 * lora_deltas(teacher, [LAYER])[0]}
    two = dict(zip([LAYER, UP], (-0.4 * each for each in lora_deltas(teacher, [LAYER, UP], 5)), strict=True))
    plain = sample(webui, **ASKED)[0]
    loaded.append(first)
    with_one = changed_student(student_unet, teacher, one)
    assert relative_l2(sample(webui, **ASKED)[0], expected(with_one, **ASKED)[0]) < ROUNDING
    loaded.append(second)
    with_two = changed_student(with_one, teacher, two)
    assert relative_l2(sample(webui, **ASKED)[0], expected(with_two, **ASKED)[0]) < ROUNDING
    loaded.clear()
    assert torch.equal(sample(webui, **ASKED)[0], plain)


def test_a_strength_that_the_host_changes_in_place_is_noticed(
    webui: WebUI, loaded: list[Any], student_unet: Any, random_pipeline: Any
) -> None:
    network = lora_of(random_pipeline.unet, [UP], 0.5)
    loaded.append(network)
    sample(webui, **ASKED)
    network.unet_multiplier = 1.5
    changed = changed_student(
        student_unet, random_pipeline.unet, {UP: 1.5 * lora_deltas(random_pipeline.unet, [UP])[0]}
    )
    assert relative_l2(sample(webui, **ASKED)[0], expected(changed, **ASKED)[0]) < ROUNDING


def test_a_lora_that_stays_costs_nothing_at_the_next_picture(
    webui: WebUI, loaded: list[Any], random_pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    start = onnxruntime.create_session

    def count(*args: Any, **options: Any) -> Any:
        started.append(options["weights"])
        return start(*args, **options)

    monkeypatch.setattr(onnxruntime, "create_session", count)
    loaded.append(lora_of(random_pipeline.unet, [UP]))
    for _ in range(3):
        sample(webui, **ASKED)
    assert [len(weights) for weights in started] == [0, 1]
    loaded.clear()
    sample(webui, **ASKED)
    loaded.append(lora_of(random_pipeline.unet, [UP]))  # the host read the file again
    sample(webui, **ASKED)
    assert len(started) == 2


def test_each_lora_gets_the_weight_that_the_one_before_left(
    webui: WebUI, loaded: list[Any], student_unet: Any, random_pipeline: Any
) -> None:
    first, second = lora_of(random_pipeline.unet, [UP]), lora_of(random_pipeline.unet, [UP], name="doubling")
    (layer,) = second.modules.values()
    layer.calc_updown = lambda weight: (weight.clone(), None)  # as DoRA, it depends on the weight
    loaded += [first, second]
    doubled = changed_student(student_unet, random_pipeline.unet, {UP: lora_deltas(random_pipeline.unet, [UP])[0]})
    own = make_plan(dict(random_pipeline.unet.config), "bk-tiny").student_key(UP)
    doubled.get_submodule(own).weight.data *= 2
    assert relative_l2(sample(webui, **ASKED)[0], expected(doubled, **ASKED)[0]) < ROUNDING


def set_bias(network: Any) -> None:
    (layer,) = network.modules.values()
    layer.calc_updown = lambda weight: (torch.zeros_like(weight), torch.zeros(1))


def set_norm(network: Any) -> None:
    network.modules["diffusion_model_out_0"] = SimpleNamespace(sd_module=torch.nn.GroupNorm(2, 4), calc_updown=None)


def set_wrong_shape(network: Any) -> None:
    (layer,) = network.modules.values()
    layer.calc_updown = lambda weight: (torch.ones(3, 3), None)


def set_nan(network: Any) -> None:
    (layer,) = network.modules.values()
    layer.calc_updown = lambda weight: (torch.full_like(weight, torch.nan), None)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (set_bias, "bias of input_blocks"),
        (set_norm, "1 norms or biases, such as out_0"),
        (set_wrong_shape, "does not fit the layer input_blocks"),
        (set_nan, "not finite"),
    ],
)
def test_a_lora_that_the_engine_cannot_take_is_refused_and_the_next_picture_is_without_it(
    webui: WebUI, loaded: list[Any], random_pipeline: Any, change: Callable[[Any], None], named: str
) -> None:
    plain = sample(webui, **ASKED)[0]
    loaded.append(lora_of(random_pipeline.unet, [LAYER]))
    change(loaded[0])
    with pytest.raises(EngineError, match=named):
        sample(webui, **ASKED)
    loaded.clear()
    assert torch.equal(sample(webui, **ASKED)[0], plain)


def test_a_lora_of_removed_blocks_alone_is_refused(webui: WebUI, loaded: list[Any], random_pipeline: Any) -> None:
    loaded.append(lora_of(random_pipeline.unet, [LOST]))
    with pytest.raises(EngineMismatch, match="1 layers, and this model has none of them"):
        sample(webui, **ASKED)


def fix_weights(folder: Path) -> None:
    """Put the weights of a graph back into it, as in an export of an earlier version."""
    manifest = read_manifest(folder)
    assert manifest is not None
    model = onnx.load(folder / "unet.onnx")
    (folder / "unet.onnx.safetensors").unlink()
    onnx.save(model, folder / "unet.onnx")
    write_manifest(folder, manifest.kind, config=manifest.config, inputs=manifest.inputs)


def test_an_engine_with_fixed_weights_refuses_a_lora_with_the_command_that_bakes_it_in(
    webui: WebUI, loaded: list[Any], installed: Path, student_unet: Any, random_pipeline: Any
) -> None:
    folder = installed / "models" / "sdcompress" / "tiny"
    fix_weights(folder)
    loaded.append(lora_of(random_pipeline.unet, [LAYER], 0.8))
    with pytest.raises(EngineMismatch, match=r"LoRA style \(0.8\).*--lora /loras/style.safetensors:0.8"):
        sample(webui, **ASKED)
    add_weights(folder, student_unet)
    webui.opts.sdcompress_fallback = "torch"
    with pytest.raises(EngineError, match="torch cannot add a LoRA to this student"):
        sample(webui, **ASKED)


def test_torch_draws_a_size_that_the_engine_does_not_take_with_the_lora_too(
    webui: WebUI, loaded: list[Any], installed: Path, student_unet: Any, random_pipeline: Any
) -> None:
    add_weights(installed / "models" / "sdcompress" / "tiny", student_unet)
    webui.opts.sdcompress_fallback = "torch"
    loaded.append(lora_of(random_pipeline.unet, [UP], 0.5))
    changed = changed_student(
        student_unet, random_pipeline.unet, {UP: 0.5 * lora_deltas(random_pipeline.unet, [UP])[0]}
    )
    latents = sample(webui, **{**ASKED, "x": noise(17, 20)})[0]
    state = changed.state_dict()
    in_torch = TorchUNet(
        {name: state[key] for key, name in unet_keys(state).items()}, changed.config, "cpu", torch.float32
    )
    wanted = euler(Guidance(in_torch), noise(17, 20), schedule(2), ASKED["cond"], ASKED["uncond"])
    assert relative_l2(latents, wanted) < ROUNDING


@pytest.fixture
def merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a stand-in for Forge's `backend.patcher.lora` into `sys.modules`: patches of the kind `diff` alone."""

    def merge_lora_to_weight(patches: Any, weight: torch.Tensor, key: str = "") -> torch.Tensor:
        for strength, (kind, (diff,)), *_ in patches:
            assert kind == "diff"
            weight = weight + strength * diff
        return weight

    for name in ("backend", "backend.patcher", "backend.patcher.lora"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["backend.patcher.lora"].merge_lora_to_weight = merge_lora_to_weight  # type: ignore[attr-defined]


def test_forge_puts_its_patches_into_the_student(
    forge: WebUI, merge: None, student_unet: Any, random_pipeline: Any
) -> None:
    teacher, x, sigma, context = random_pipeline.unet, noise(), torch.tensor([5.0]), words(1)
    names, layers = unet_keys(teacher.state_dict()), [LAYER, UP, LOST]
    deltas = lora_deltas(teacher, layers)
    patches = {
        f"diffusion_model.{names[f'{layer}.weight']}": [[0.5, ("diff", (delta,)), 1.0, None, None]]
        for layer, delta in zip(layers, deltas, strict=True)
    }

    def draw() -> torch.Tensor:
        with forge.job(TITLE) as job:
            forge.before_sampling(job, TITLE)
            result: torch.Tensor = forge.forge_denoise(x, sigma, context)
            return result

    plain = draw()
    forge.sd_model.after_lora.lora_patches[("/loras/style.safetensors", 0.5, 1.0, False)] = patches
    with_lora = draw()
    changed = changed_student(
        student_unet, teacher, {name: 0.5 * each for name, each in zip(layers, deltas, strict=True)}
    )
    forge.sd_model.after_lora.lora_patches.clear()
    assert torch.equal(draw(), plain)
    assert relative_l2(with_lora, plain) > 100 * ROUNDING
    assert relative_l2(with_lora, denoise(reference(changed), x, sigma, context, None)) < ROUNDING
