"""A LoRA that an engine in ComfyUI does not take is refused in one line. It is never left out silently."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sdcompress_engines.errors import ArtifactError, SdCompressError
from sdcompress_engines.graph_weights import WEIGHTS_ENTRY

from .comfyui_cases import change
from .comfyui_host import REAL
from .comfyui_lora_cases import FIRST, REMOVED, Tensors, difference, draw, make_lora
from .test_comfyui_folders import engine_folder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning" if REAL else "error")

WEIGHTS = "unet.onnx.safetensors"
ORIGIN = "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
"""LDM's name of `FIRST`."""


def remove_weights(folder: Path, **config: Any) -> None:
    """Remove the file of weights, as of a graph that has none. Such a folder is not opened here."""
    (folder / WEIGHTS).unlink()
    change(folder, **config)


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"precisions": {"unet": "int8"}}, r"its weights are rounded to int8, .*export it in fp16, or bake it in"),
        ({"precisions": {"unet": "fp8"}}, r"rounded to fp8"),
        ({}, r"it has no file of weights.*export it again, or bake it in.*--lora FILE:STRENGTH"),
    ],
)
def test_an_engine_with_fixed_weights_refuses_a_lora_when_it_is_added(
    config: dict[str, Any], words: str, strength: float, host: Any, models: Path, node: Any, random_pipeline: Any
) -> None:
    remove_weights(models / "tiny", **config)
    (patcher,) = node().load("tiny")
    tensors = make_lora(random_pipeline.unet, choose=lambda name: name in (FIRST, REMOVED))
    for model in (patcher, patcher.clone()):
        with pytest.raises(Exception, match=rf"the engine takes no LoRA.*{words}"):
            host.lora(model, tensors, strength)
    host.lora(patcher, tensors, 0.0)


def test_an_engine_built_without_loras_names_the_option(
    host: Any, models: Path, node: Any, graph: Path, random_pipeline: Any
) -> None:
    engine_folder(models / "trt", graph)
    (patcher,) = node().load("trt")
    with pytest.raises(Exception, match=r"it has no file of weights.*without --no-lora, on the machine with the card"):
        host.lora(patcher, make_lora(random_pipeline.unet), 1.0)


def test_a_student_of_an_unknown_model_refuses_a_lora(host: Any, models: Path, node: Any, random_pipeline: Any) -> None:
    set_entry(models / "tiny", origins={})
    (patcher,) = node().load("tiny")
    with pytest.raises(Exception, match="it is not known which blocks of the whole model it has"):
        host.lora(patcher, make_lora(random_pipeline.unet), 1.0)


def test_a_lora_of_removed_blocks_alone_is_refused(host: Any, models: Path, node: Any, random_pipeline: Any) -> None:
    (patcher,) = node().load("tiny")
    tensors = make_lora(random_pipeline.unet, choose=lambda name: name.startswith("mid_block.attentions."))
    count = sum(key.endswith("lora_up.weight") for key in tensors)
    with pytest.raises(Exception, match=rf"the LoRA changes {count} layers of the UNet, and this student has none"):
        host.lora(patcher, tensors, 1.0)
    host.lora(patcher, tensors, 0.0)


def test_a_lora_that_changes_biases_or_norms_is_refused_by_name(
    host: Any, models: Path, node: Any, random_pipeline: Any
) -> None:
    (patcher,) = node().load("tiny")
    tensors = make_lora(random_pipeline.unet, choose=lambda name: name == FIRST)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    bias = {f"{name}.diff_b": torch.ones(48), f"{name}.diff": torch.ones(48, 48, 3, 3)}
    with pytest.raises(Exception, match=r"changes 1 biases or norms .*: input_blocks.1.0.in_layers.2.bias; expected"):
        host.lora(patcher, tensors | bias, 1.0)
    host.lora(patcher, tensors | bias, 0.0)


def test_what_a_student_has_lacks_and_cannot_exchange_is_told_apart(models: Path, parts: Any) -> None:
    whole = parts.whole_model.read_whole_model(parts.folders.read_folder("tiny", models / "tiny"))
    fixed = {name for name in whole.shapes if whole.is_fixed(name)}
    removed = {name for name in whole.shapes if whole.is_removed(name)}
    assert fixed | removed | set(whole.places) == set(whole.shapes)
    assert {
        "out.0.weight",
        "time_embed.0.bias",
        "input_blocks.1.1.norm.weight",
        "input_blocks.1.0.out_layers.0.bias",
    } <= fixed
    assert {name for name in whole.shapes if name.startswith("middle_block.")} <= removed


def transpose(tensors: Tensors) -> Tensors:
    return {key: value if "alpha" in key else value.T.contiguous() for key, value in tensors.items()}


def shorten(tensors: Tensors) -> Tensors:
    return {key: value[:, :-1].contiguous() if "lora_down" in key else value for key, value in tensors.items()}


def as_difference(tensors: Tensors) -> Tensors:
    return {f"{key.partition('.')[0]}.diff": torch.ones(5, 5) for key in tensors}


@pytest.mark.parametrize("damage", [transpose, shorten, as_difference])
def test_a_lora_of_another_shape_is_refused_with_the_layer_and_the_engine_goes_on(
    damage: Callable[[Tensors], Tensors], host: Any, models: Path, node: Any, student: Any, random_pipeline: Any
) -> None:
    (patcher,) = node().load("tiny")
    good = make_lora(random_pipeline.unet, choose=lambda name: name == FIRST.replace("to_q", "to_v"))
    bad = damage(make_lora(random_pipeline.unet, choose=lambda name: name == FIRST))
    model = host.lora(host.lora(patcher, good, 0.1), bad, 0.1)
    for _ in range(2):
        with pytest.raises(
            Exception, match=rf"does not fit the layer {ORIGIN}.*expected a LoRA for the weight's shape"
        ):
            draw(host, model)
    assert difference(host, patcher, student.unet) < 1e-5


def test_a_change_that_is_not_finite_is_refused(host: Any, models: Path, node: Any, random_pipeline: Any) -> None:
    tensors = make_lora(random_pipeline.unet, choose=lambda name: name == FIRST)
    tensors = {key: torch.full_like(value, float("nan")) for key, value in tensors.items()}
    with pytest.raises(Exception, match="numbers that are not finite"):
        draw(host, host.lora(node().load("tiny")[0], tensors, 1.0))


def set_entry(folder: Path, **changes: Any) -> None:
    """Change what the file of weights says of them."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    entry = json.loads(metadata[WEIGHTS_ENTRY]) | changes
    tensors = {name: value.clone() for name, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata | {WEIGHTS_ENTRY: json.dumps(entry)})
    change(folder)


@pytest.mark.parametrize(
    ("origins", "words"),
    [
        ({f"{FIRST}.weight": ORIGIN, f"{FIRST.replace('to_q', 'to_k')}.weight": ORIGIN}, "one layer .* twice"),
        (
            {f"{FIRST}.weight": ORIGIN.replace("attn1", "attn3")},
            r"has the weight input_blocks.*expected weights of the",
        ),
        (
            {f"{FIRST}.weight": "out.2.weight"},
            r"has the weight out.2.weight of shape \(48, 48\); expected \(4, 48, 3, 3\)",
        ),
    ],
)
def test_weights_that_are_not_those_of_the_whole_model_are_refused(
    origins: dict[str, str], words: str, models: Path, parts: Any
) -> None:
    set_entry(models / "tiny", origins=origins)
    with pytest.raises(ArtifactError, match=words):
        parts.whole_model.read_whole_model(parts.folders.read_folder("tiny", models / "tiny"))


def test_a_damaged_file_of_weights_is_refused_in_one_line(models: Path, parts: Any) -> None:
    (models / "tiny" / WEIGHTS).write_bytes(b"no weights")
    change(models / "tiny")
    with pytest.raises(SdCompressError, match="is not a readable safetensors file") as raised:
        parts.whole_model.read_whole_model(parts.folders.read_folder("tiny", models / "tiny"))
    assert "\n" not in str(raised.value)


def test_altered_weights_beside_an_engine_are_found_before_they_are_used(models: Path, graph: Path, parts: Any) -> None:
    place = engine_folder(models / "trt", graph)
    weights = place / "unet.engine.safetensors"
    weights.write_bytes((graph / WEIGHTS).read_bytes())
    change(place)
    folder = parts.folders.read_folder("trt", place)
    assert folder.weights == weights
    assert folder.bytes == 600, "an engine contains its weights"
    parts.folders.check_weights(folder)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"unet.engine.safetensors is not what the manifest says"):
        parts.folders.check_weights(folder)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("bk-tiny", r"an unexpected value \(TypeError"),
        ({"teacher": None}, r"an unexpected value \(TypeError"),
        ({"teacher": {"block_out_channels": [32, 48]}}, r"an unexpected value \(KeyError"),
        ({"layers_per_block": 10**9}, r"an unexpected value \(ValueError: layers_per_block are \[10+,"),
        ({"block_out_channels": [-32, 48, 64, 64]}, r"an unexpected value \(ValueError: block_out_channels"),
        ({"transformer_layers_per_block": "many"}, r"an unexpected value"),
        ({"use_linear_projection": True}, r"names a whole model of SD2.x with text embeddings 96 wide; expected SD1.x"),
        ({"cross_attention_dim": 768}, r"of SD1.x with text embeddings 768 wide; expected SD1.x, 96 wide"),
    ],
)
def test_a_broken_plan_is_one_line(plan: Any, words: str, models: Path, parts: Any, random_pipeline: Any) -> None:
    whole = json.loads(json.dumps(dict(random_pipeline.unet.config)))
    made = {"teacher": whole | plan} if isinstance(plan, dict) and "teacher" not in plan else plan
    change(models / "tiny", plan=made)
    with pytest.raises(ArtifactError, match=words) as raised:
        parts.folders.read_folder("tiny", models / "tiny")
    assert "\n" not in str(raised.value)
