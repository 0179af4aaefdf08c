"""A LoRA file is read by whatever names its layers have, and a tensor that belongs nowhere is named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from sdcompress_engines.errors import ModelError
from sdcompress_engines.ldm_keys import ldm_unet_keys

from sdcompress.checkpoints.identify import LORA, identify_weights
from sdcompress.checkpoints.weights import open_weights
from sdcompress.lora.files import read_lora, write_lora
from sdcompress.lora.names import find_layer, known_layers, split_key, unet_modules
from sdcompress.models.describe import describe_model
from sdcompress.models.random import family_configs
from sdcompress.prune.student import meta_unet

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
QUERY, OUT, TEXT = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_out.0", "text_model.encoder.layers.3.self_attn.q_proj"
LDM_BLOCK = "input_blocks.4.1.transformer_blocks.0"
KOHYA = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.weight", "lora_B.weight")
OLD = ("lora.down.weight", "lora.up.weight")

FORMS: dict[str, tuple[str, tuple[str, str], tuple[str, str]]] = {
    "diffusers": (f"unet.{QUERY}", PEFT, ("unet", QUERY)),
    "diffusers, old": (f"unet.{BLOCK}.attn1.processor.to_q_lora", ("down.weight", "up.weight"), ("unet", QUERY)),
    "diffusers, old, no prefix": (f"{BLOCK}.attn1.processor.to_out_lora", ("down.weight", "up.weight"), ("unet", OUT)),
    "diffusers, lora.down": (f"unet.{QUERY}", OLD, ("unet", QUERY)),
    "diffusers, text": (f"text_encoder.{TEXT}", PEFT, ("text_encoder", TEXT)),
    "diffusers, text, bare": (f"text_encoder.{TEXT.removeprefix('text_model.')}", PEFT, ("text_encoder", TEXT)),
    "diffusers, text 2": (
        f"text_encoder_2.{TEXT}",
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        ("text_encoder_2", TEXT),
    ),
    "module names": (QUERY, PEFT, ("unet", QUERY)),
    "module names, outside the blocks": ("conv_in", PEFT, ("unet", "conv_in")),
    "module names, text": (TEXT, PEFT, ("text_encoder", TEXT)),
    "PEFT": (f"base_model.model.{QUERY}", PEFT, ("unet", QUERY)),
    "PEFT, text": (f"base_model.model.{TEXT}", PEFT, ("text_encoder", TEXT)),
    "PEFT in a component": (f"unet.base_model.model.{QUERY}", PEFT, ("unet", QUERY)),
    "PEFT, an adapter's name": (QUERY, ("lora_A.default.weight", "lora_B.default.weight"), ("unet", QUERY)),
    "PEFT, another name": (QUERY, ("lora_A.default_0.weight", "lora_B.default_0.weight"), ("unet", QUERY)),
    "kohya": (f"lora_unet_{QUERY.replace('.', '_')}", KOHYA, ("unet", QUERY)),
    "kohya, LDM": (f"lora_unet_{LDM_BLOCK.replace('.', '_')}_attn1_to_q", KOHYA, ("unet", QUERY)),
    "kohya, PEFT's ends": (f"lora_unet_{QUERY.replace('.', '_')}", PEFT, ("unet", QUERY)),
    "kohya, text": (f"lora_te_{TEXT.replace('.', '_')}", KOHYA, ("text_encoder", TEXT)),
    "kohya, text 1": (f"lora_te1_{TEXT.replace('.', '_')}", KOHYA, ("text_encoder", TEXT)),
    "kohya, text 2": (f"lora_te2_{TEXT.replace('.', '_')}", KOHYA, ("text_encoder_2", TEXT)),
    "LyCORIS": (f"lycoris_{QUERY.replace('.', '_')}", KOHYA, ("unet", QUERY)),
    "LyCORIS, text": (f"lycoris_{TEXT.replace('.', '_')}", KOHYA, ("text_encoder", TEXT)),
    "LDM": (f"diffusion_model.{LDM_BLOCK}.attn1.to_q", KOHYA, ("unet", QUERY)),
    "LDM, of a checkpoint": (f"model.diffusion_model.{LDM_BLOCK}.attn1.to_out.0", PEFT, ("unet", OUT)),
    "LDM, outside the blocks": ("diffusion_model.time_embed.0", KOHYA, ("unet", "time_embedding.linear_1")),
}


@pytest.fixture(scope="module")
def sdxl_modules() -> list[str]:
    return unet_modules(meta_unet(family_configs("sdxl")["unet"]))


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_is_found_by_any_name(tmp_path: Path, sdxl_modules: list[str], form: str) -> None:
    name, (down, up), place = FORMS[form]
    tensors = {f"{name}.{down}": torch.ones(2, 8), f"{name}.{up}": torch.ones(8, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    layers = read_lora(tmp_path / "a.safetensors", sdxl_modules)
    assert layers.keys() == {place}
    assert torch.equal(layers[place].change(torch.float32), torch.full((8, 8), 2.0))
    assert identify_weights(open_weights(tmp_path / "a.safetensors")) == LORA
    facts = describe_model(str(tmp_path / "a.safetensors"))[0]
    assert (facts["kinds"], facts["components"], facts["rank"]) == ({"LoRA": 1}, {place[0]: 1}, [2])


@pytest.mark.parametrize("ldm", [False, True])
def test_all_722_layers_of_a_kohya_lora_for_sdxl_are_found(sdxl_modules: list[str], ldm: bool) -> None:
    """kohya's scripts train the 722 linear layers of SDXL's transformers."""
    known, adapted = known_layers(sdxl_modules), [name for name in sdxl_modules if ".attentions." in name]
    keys = ldm_unet_keys(f"{name}.weight" for name in sdxl_modules)
    names = {name: (keys[f"{name}.weight"] or "").removesuffix(".weight") if ldm else name for name in adapted}
    found = {name: find_layer(f"lora_unet_{key.replace('.', '_')}", known) for name, key in names.items()}
    assert len(found) == 722
    assert found == {name: ("unet", name) for name in adapted}


def test_diffusers_gives_the_layers_of_a_kohya_lora_for_sdxl_the_same_names(sdxl_modules: list[str]) -> None:
    from diffusers.loaders import lora_conversion_utils as diffusers

    known = known_layers(sdxl_modules)
    keys = ldm_unet_keys(f"{name}.weight" for name in sdxl_modules)
    tensors, ours = {}, {}
    for key in (key for name, key in keys.items() if key is not None and ".attentions." in name):
        layer, down = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}", torch.zeros(1, 1)
        tensors |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": torch.zeros(1, 1)}
        ours[id(down)] = find_layer(layer, known)
    config = SimpleNamespace(layers_per_block=2)
    mapped = diffusers._maybe_map_sgm_blocks_to_diffusers(dict(tensors), config)
    converted, _ = diffusers._convert_non_diffusers_lora_to_diffusers(mapped)
    theirs = {}
    for key, tensor in converted.items():
        split = split_key(key)
        if split is not None and split[1] == "lora_down.weight":
            theirs[id(tensor)] = find_layer(split[0], known)
    assert len(ours) == 722
    assert theirs == ours


@pytest.mark.parametrize(
    ("ends", "kind"),
    [
        (("weight", "on_input"), "IA3"),
        (("oft_blocks", "alpha"), "OFT"),
        (("oft_diag",), "OFT"),
        (("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"), "GLoRA"),
        (("w_norm", "b_norm"), "norm"),
        (("diff", "diff_b"), "bias"),
    ],
)
def test_kinds_that_are_not_supported_are_refused_by_name(tmp_path: Path, ends: tuple[str, ...], kind: str) -> None:
    tensors = {f"lora_unet_layer_{i}.{end}": torch.ones(2, 2) for i in range(12) for end in ends}
    tensors |= {f"lora_unet_conv_in.{end}": torch.ones(2, 2) for end in KOHYA}
    save_file(tensors, tmp_path / "a.safetensors")
    words = rf"holds 12 {kind} layers, which are not supported; expected LoRA, LoCon, LoHa, LoKr or DoRA"
    with pytest.raises(ModelError, match=words) as refusal:
        read_lora(tmp_path / "a.safetensors", ["conv_in"])
    assert "\n" not in str(refusal.value)


def test_several_kinds_that_are_not_supported_are_all_counted(tmp_path: Path) -> None:
    names = ["a.on_input", "b.oft_blocks", "c.oft_blocks", "c.alpha"]
    save_file({f"lora_unet_{name}": torch.ones(1) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="holds 1 IA3 and 2 OFT layers"):
        read_lora(tmp_path / "a.safetensors", [])
    assert identify_weights(open_weights(tmp_path / "a.safetensors")) == "an OFT, IA3 or GLoRA adapter"


@pytest.mark.parametrize("count", [1, 2, 10_000])
def test_tensors_that_belong_nowhere_are_counted_and_the_first_three_named(
    tmp_path: Path, sdxl_modules: list[str], count: int
) -> None:
    strangers = [f"diffusion_model.nowhere.{i:05}.lora_up.weight" for i in range(count)]
    tensors = {f"unet.{QUERY}.{end}": torch.ones(2, 2) for end in PEFT} | {key: torch.ones(1) for key in strangers}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=f"has {count} of {count + 2} tensors that belong to no layer here") as refusal:
        read_lora(tmp_path / "a.safetensors", sdxl_modules)
    assert [key in str(refusal.value) for key in strangers[:4]] == [True, True, True, False][:count]
    assert len(str(refusal.value)) < 600


@pytest.mark.parametrize("end", ["lora_mid.bias", "lora_up.bias", "scalar", "reshape_weight"])
def test_a_tensor_of_an_unknown_role_is_not_dropped(tmp_path: Path, sdxl_modules: list[str], end: str) -> None:
    tensors = {f"lora_unet_{QUERY.replace('.', '_')}.{end}": torch.ones(2, 2) for end in (*KOHYA, end)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=rf"1 of 3 tensors that belong to no layer here.*\.{end}"):
        read_lora(tmp_path / "a.safetensors", sdxl_modules)


def test_a_layer_named_in_two_namings_is_refused(tmp_path: Path, sdxl_modules: list[str]) -> None:
    tensors = {f"{prefix}{QUERY}.{end}": torch.ones(2, 2) for prefix in ("", "unet.") for end in PEFT}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="twice"):
        read_lora(tmp_path / "a.safetensors", sdxl_modules)


def test_a_checkpoint_is_no_lora_whatever_its_keys_begin_with(tmp_path: Path) -> None:
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="is not a LoRA: it holds a Stable Diffusion checkpoint"):
        read_lora(tmp_path / "a.safetensors", ["conv_in"])


def test_a_text_encoders_layer_is_written_with_the_name_of_the_loader(tmp_path: Path, sdxl_modules: list[str]) -> None:
    tensors = {f"text_encoder.{TEXT.removeprefix('text_model.')}.{end}": torch.ones(2, 2) for end in PEFT}
    save_file(tensors, tmp_path / "a.safetensors")
    write_lora(read_lora(tmp_path / "a.safetensors", sdxl_modules), tmp_path / "b.safetensors", "kohya")
    assert all(key.startswith("lora_te_text_model_encoder_layers_3") for key in load_file(tmp_path / "b.safetensors"))
