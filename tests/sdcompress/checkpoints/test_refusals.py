"""Files that are no whole checkpoint are refused in one line, and none of their code runs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sdcompress_engines.errors import ModelError, SdCompressError, UsageError

from sdcompress.checkpoints.ldm_keys import METADATA_KEY, UNET
from sdcompress.checkpoints.read import load_single_file
from sdcompress.checkpoints.weights import open_weights
from sdcompress.checkpoints.write import ldm_state_dict, write_ldm
from sdcompress.models.load import load_pipeline
from sdcompress.models.locate import locate_pipeline

from .small_models import Dialect, diffusers_lora, kohya_lora, unets


class Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    for name, save in (
        ("a.ckpt", torch.save),
        ("b.ckpt", lambda content, path: path.write_bytes(pickle.dumps(content))),
    ):
        save({"state_dict": {"a": torch.zeros(1)}, "callbacks": Code(tmp_path / "ran")}, tmp_path / name)
        with pytest.raises(ModelError, match="code") as refusal:
            load_pipeline(tmp_path / name)
        assert "\n" not in str(refusal.value)
        assert "safetensors" in str(refusal.value)
    assert not (tmp_path / "ran").exists()


def without(prefix: str) -> Dialect:
    return lambda state: {key: value for key, value in state.items() if not key.startswith(prefix)}


OTHERS: dict[str, tuple[Dialect, str]] = {
    "kohya's LoRA": (lambda _: kohya_lora(), "LoRA"),
    "diffusers' LoRA": (lambda _: diffusers_lora(), "LoRA"),
    "a VAE": (
        lambda state: {
            key.removeprefix("first_stage_model."): value
            for key, value in state.items()
            if key.startswith("first_stage_model.")
        },
        "VAE",
    ),
    "a UNet": (lambda state: {key.removeprefix(UNET): value for key, value in unets(state).items()}, "UNet alone"),
    "Flux": (lambda _: {"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, "Flux"),
    "an embedding": (lambda _: {"emb_params": torch.zeros(1, 768)}, "embedding"),
    "something else": (lambda _: {"a": torch.zeros(1)}, "checkpoint"),
    "no VAE in it": (without("first_stage_model."), "VAE|vae"),
    "no text encoder in it": (without("cond_stage_model."), "text.encoder"),
    "a tensor missing": (
        without(UNET + "input_blocks.4.0.out_layers.0.weight"),
        "input_blocks.4.0.out_layers.0.weight",
    ),
    "a tensor of another shape": (
        lambda state: state | {"first_stage_model.decoder.conv_in.weight": torch.zeros(2, 4, 3, 3)},
        "decoder.conv_in.weight",
    ),
    "no cross-attention in it": (
        lambda state: {key: value for key, value in state.items() if ".transformer_blocks." not in key},
        r"\(no cross-attention\)",
    ),
    "a convolution without channels": (
        lambda state: state | {UNET + "input_blocks.0.0.weight": torch.zeros(32)},
        r"\(an unknown structure\)",
    ),
    "Playground v2.5": (lambda state: state | {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}, "EDM"),
    "CosXL": (lambda state: state | {"edm_vpred.sigma_max": torch.tensor(120.0)}, "EDM"),
    "an inpainting model": (lambda state: state | {UNET + "input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}, "9"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_file_that_is_no_whole_checkpoint_is_refused_by_its_kind(what: str, sd1_like: Any, tmp_path: Path) -> None:
    make, words = OTHERS[what]
    state = {
        key: value.clone(memory_format=torch.contiguous_format) for key, value in make(ldm_state_dict(sd1_like)).items()
    }
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=words) as refusal:
        load_pipeline(tmp_path / "a.safetensors")
    assert "\n" not in str(refusal.value)
    assert "a.safetensors" in str(refusal.value)


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "old.ckpt"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_a_cut_file_is_refused_in_one_line(name: str, part: float, tmp_path: Path) -> None:
    file = tmp_path / name
    state = {f"{UNET}input_blocks.{i}.0.weight": torch.randn(32, 32, 3, 3) for i in range(8)}
    if name.endswith(".safetensors"):
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=name != "old.ckpt")
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    with pytest.raises(ModelError, match=r"complete|tensors") as refusal:
        load_pipeline(file)
    assert "\n" not in str(refusal.value)


def test_another_kind_of_file_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"x")
    (tmp_path / "page.ckpt").write_text("<!DOCTYPE html>")
    for name in ("a.onnx", "page.ckpt"):
        with pytest.raises(SdCompressError, match=name):
            load_pipeline(tmp_path / name)
    with pytest.raises(UsageError, match="does not exist"):
        locate_pipeline(tmp_path / "b.safetensors")


@pytest.mark.parametrize("entry", [None, [None, None]])
def test_a_folder_whose_pipeline_has_no_unet_is_refused(entry: Any, tmp_path: Path) -> None:
    index = {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]} | (
        {} if entry is None else {"unet": entry}
    )
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="FluxPipeline has no UNet"):
        load_pipeline(tmp_path)


def test_tampered_configs_write_nothing_outside_the_scratch_folder(random_pipeline: Any, tmp_path: Path) -> None:
    file = write_ldm(random_pipeline, tmp_path / "a.safetensors")
    configs = json.loads(open_weights(file).metadata[METADATA_KEY])
    for change in (
        {"../../evil.json": "{}"},
        {"tokenizer/../../evil.json": "{}"},
        {"scheduler/scheduler_config.json": '{"_class_name": "DiffusionPipeline"}'},
        {"unet/config.json": "{"},
    ):
        save_file(load_file(file), tmp_path / "b.safetensors", metadata={METADATA_KEY: json.dumps(configs | change)})
        with pytest.raises(ModelError):
            load_single_file(tmp_path / "b.safetensors")
