"""`sdcompress lora remap`, and what `sdcompress inspect` says of a LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdcompress.checkpoints.weights import open_weights
from sdcompress.lora.files import read_lora
from sdcompress.lora.names import unet_modules
from sdcompress.lora.settings import kept_entries
from sdcompress.models.describe import describe_model
from sdcompress.models.locate import read_unet_config
from sdcompress.prune.student import meta_unet

from .conftest import Cli, one_line

KOHYA = ("lora_down.weight", "lora_up.weight")
NOTES = {
    "ss_network_dim": "2",
    "sshs_model_hash": "0" * 64,
    "modelspec.hash_sha256": "0x1",
    "lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8, "unet.r": 2}),
}


@pytest.fixture
def noted(tmp_path: Path) -> Path:
    """A LoRA of diffusers with its alpha in the header, for two layers of nano's UNet."""
    names = ("down_blocks.0.attentions.0.proj_in", "mid_block.attentions.0.proj_in")
    unet = nano_unet()
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        rows, columns = unet.get_submodule(name).weight.shape[:2]
        tensors |= {f"unet.{name}.lora_A.weight": torch.ones(2, columns)}
        tensors |= {f"unet.{name}.lora_B.weight": torch.ones(rows, 2)}
    save_file(tensors, tmp_path / "noted.safetensors", metadata=NOTES)
    return tmp_path / "noted.safetensors"


def nano_unet() -> Any:
    return meta_unet(read_unet_config("nano"))


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_remap_keeps_the_header_and_the_scale(cli: Cli, noted: Path, tmp_path: Path, naming: str) -> None:
    common = ("--teacher", "nano", "--plan", "bk-tiny", "--naming", naming)
    code, out, err = cli("lora", "remap", noted, *common, "-o", tmp_path / "tiny.safetensors")
    assert (code, err) == (0, "")
    assert "of its change by norm" in out
    entries = open_weights(tmp_path / "tiny.safetensors").metadata
    assert {name: entries.get(name) for name in NOTES} == NOTES | {"lora_adapter_metadata": None}
    code, out, _ = cli(
        "lora", "remap", tmp_path / "tiny.safetensors", *common, "--reverse", "-o", tmp_path / "w.safetensors"
    )
    assert code == 0
    whole, modules = nano_unet(), unet_modules(nano_unet())
    before, after = read_lora(noted, modules), read_lora(tmp_path / "w.safetensors", modules)
    (place,) = after
    assert place == ("unet", "down_blocks.0.attentions.0.proj_in")
    weight = torch.zeros(whole.get_submodule(place[1]).weight.shape)
    assert torch.equal(after[place].delta(weight), before[place].delta(weight))
    assert before[place].delta(weight).flatten()[0] == 8


def test_a_loha_is_not_remapped_in_diffusers_naming(cli: Cli, tmp_path: Path) -> None:
    rows, columns = nano_unet().get_submodule("conv_in").weight.flatten(1).shape
    shapes = {"w1_a": (rows, 2), "w1_b": (2, columns), "w2_a": (rows, 2), "w2_b": (2, columns)}
    save_file({f"lora_unet_conv_in.hada_{n}": torch.ones(s) for n, s in shapes.items()}, tmp_path / "a.safetensors")
    common = ("--teacher", "nano", "--plan", "bk-tiny", "-o", tmp_path / "b.safetensors")
    code, _, err = cli("lora", "remap", tmp_path / "a.safetensors", *common, "--naming", "diffusers")
    assert code == 2
    assert "--naming kohya" in one_line(err)
    assert cli("lora", "remap", tmp_path / "a.safetensors", *common)[0] == 0
    assert load_file(tmp_path / "b.safetensors").keys() >= load_file(tmp_path / "a.safetensors").keys()


def test_the_settings_of_peft_are_the_only_entry_that_is_not_kept(noted: Path) -> None:
    assert kept_entries(open_weights(noted)) == {n: t for n, t in NOTES.items() if n != "lora_adapter_metadata"}


def test_inspect_counts_the_kinds_of_a_file(cli: Cli, tmp_path: Path) -> None:
    tensors = {f"lora_unet_a.{end}": torch.ones(2, 2) for end in (*KOHYA, "dora_scale")}
    tensors |= {"lora_unet_a.dora_scale": torch.ones(2, 1), "lora_unet_e.lora_up.weight": torch.ones(2, 2)}
    tensors |= {f"lora_unet_{name}.{end}": torch.ones(3, 3) for name in "bc" for end in KOHYA}
    tensors |= {f"lora_unet_d.hada_w{n}": torch.ones(5, 5) for n in ("1_a", "1_b", "2_a", "2_b")}
    tensors |= {"lora_unet_f.lokr_w1": torch.ones(2, 2), "lora_unet_f.lokr_w2": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    facts = describe_model(str(tmp_path / "a.safetensors"))[0]
    assert facts["kinds"] == {"LoRA": 2, "DoRA": 1, "broken": 1, "LoHa": 1, "LoKr": 1}
    assert (facts["rank"], facts["layers"], facts["naming"]) == ([2, 3, 5], 6, "kohya")
    code, out, _ = cli("inspect", tmp_path / "a.safetensors")
    assert code == 0
    assert "LoRA 2, DoRA 1" in out
