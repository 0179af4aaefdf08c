"""Whatever a LoRA file holds, it is read and fits its model, or it is refused in one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sdcompress_engines.errors import ModelError, SdCompressError, UsageError

from sdcompress.lora.files import read_lora
from sdcompress.lora.fuse import find_targets, fuse_lora, parse_lora, shapes_of
from sdcompress.lora.names import unet_modules
from sdcompress.lora.remap import remap_lora
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import meta_unet

QUICK = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LINEAR, CONV = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1"


@pytest.fixture(scope="module")
def unet(random_pipeline: Any) -> Any:
    return random_pipeline.unet


@pytest.fixture(scope="module")
def tensors(unet: Any) -> dict[str, torch.Tensor]:
    """A LoRA of a linear layer and a convolution, in kohya's naming."""
    found = {}
    for name in (LINEAR, CONV):
        shape = unet.get_submodule(name).weight.shape
        prefix = f"lora_unet_{name.replace('.', '_')}"
        found |= {
            f"{prefix}.lora_down.weight": 0.01 * torch.ones(4, *shape[1:]),
            f"{prefix}.lora_up.weight": 0.01 * torch.ones(shape[0], 4, *[1 for _ in shape[2:]]),
            f"{prefix}.alpha": torch.tensor(4.0),
        }
    return found


def use(file: Path, unet: Any) -> None:
    """Read a file and carry it over to a student, as `sdcompress lora remap` does."""
    layers, plan = read_lora(file, unet_modules(unet)), make_plan(unet.config, "bk-tiny")
    remap_lora(layers, plan, unet_modules(meta_unet(plan.student_config())))


def check_refusal(error: SdCompressError) -> None:
    assert len(str(error)) < 600
    assert "\n" not in str(error)


@pytest.mark.parametrize("key", [0, 1, 3, 4])
@pytest.mark.parametrize(
    "shape", [(), (1,), (0,), (0, 48), (48, 0), (1, 1, 1), (7, 9), (4, 5, 3, 3), (2, 48), (1, 1, 1, 1, 1)]
)
def test_matrices_that_fit_neither_each_other_nor_the_layer_are_refused_by_name(
    unet: Any, tensors: dict[str, torch.Tensor], tmp_path: Path, key: int, shape: tuple[int, ...]
) -> None:
    name = list(tensors)[key]
    save_file(tensors | {name: torch.zeros(shape)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=LINEAR if key < 3 else CONV) as refusal:
        use(tmp_path / "a.safetensors", unet)
    check_refusal(refusal.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", [0, 1, 2])
def test_numbers_that_are_not_finite_are_refused(
    unet: Any, tensors: dict[str, torch.Tensor], tmp_path: Path, key: int, value: float
) -> None:
    name = list(tensors)[key]
    save_file(tensors | {name: torch.full_like(tensors[name], value)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"1 of 2 layers that cannot be used: .* not finite"):
        use(tmp_path / "a.safetensors", unet)


@pytest.mark.parametrize("alpha", [torch.ones(2), torch.ones(0), torch.ones(1, 3)])
def test_an_alpha_is_one_number(unet: Any, tensors: dict[str, torch.Tensor], tmp_path: Path, alpha: Any) -> None:
    save_file(tensors | {list(tensors)[2]: alpha}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"alpha of \d numbers"):
        use(tmp_path / "a.safetensors", unet)
    save_file(tensors | {list(tensors)[2]: torch.ones(1)}, tmp_path / "a.safetensors")
    use(tmp_path / "a.safetensors", unet)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("conv_norm_out", "conv_norm_out, which the unet does not have as a linear layer"),
        (
            "down_blocks.0.attentions.0.transformer_blocks.0.norm1",
            "norm1, which the unet does not have as a linear layer",
        ),
        ("down_blocks.0", "down_blocks.0, which the unet does not have as a linear layer"),
        ("time_proj", "time_proj, which the unet does not have as a linear layer"),
        ("nowhere", "nowhere, which the unet does not have"),
        ("x" * 50_000, "which the unet does not have"),
    ],
)
def test_a_layer_that_no_lora_changes_is_refused_by_name(unet: Any, tmp_path: Path, name: str, words: str) -> None:
    matrices = {f"unet.{name}.lora_A.weight": torch.ones(2, 48), f"unet.{name}.lora_B.weight": torch.ones(48, 2)}
    save_file(matrices, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=words) as refusal:
        use(tmp_path / "a.safetensors", unet)
    check_refusal(refusal.value)


def test_an_embedding_of_a_text_encoder_is_refused_by_name(random_pipeline: Any, tmp_path: Path) -> None:
    name = "text_model.embeddings.token_embedding"
    matrices = {f"text_encoder.{name}.lora_{m}.weight": torch.ones(2, 2) for m in "AB"}
    save_file(matrices, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="token_embedding, which the text_encoder does not have as a linear layer"):
        fuse_lora(random_pipeline, read_lora(tmp_path / "a.safetensors", unet_modules(random_pipeline.unet)))


def test_a_sum_that_is_not_finite_is_refused(random_pipeline: Any, tensors: Any, tmp_path: Path) -> None:
    save_file({key: torch.full_like(tensor, 3e38) for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    layers = read_lora(tmp_path / "a.safetensors", unet_modules(random_pipeline.unet))
    before = random_pipeline.unet.get_submodule(LINEAR).weight.clone()
    with pytest.raises(ModelError, match="not finite"):
        fuse_lora(random_pipeline, layers)
    assert torch.equal(random_pipeline.unet.get_submodule(LINEAR).weight, before)


def test_all_faulty_layers_are_counted(unet: Any, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file({key: torch.zeros(3) for key in tensors}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=f"2 of 2 layers that cannot be used: .*{LINEAR}.*{CONV}"):
        use(tmp_path / "a.safetensors", unet)


def test_a_pickle_of_tensors_is_a_lora_too(unet: Any, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict": tensors}, tmp_path / "a.pt")
    layers = read_lora(tmp_path / "a.pt", unet_modules(unet))
    assert find_targets(layers, {"unet": shapes_of(unet)}).keys() == {("unet", LINEAR), ("unet", CONV)}
    torch.save([tensors], tmp_path / "a.pt")
    with pytest.raises(ModelError, match="holds no tensors"):
        read_lora(tmp_path / "a.pt", unet_modules(unet))


@QUICK
@given(data=st.data())
def test_a_mutated_file_is_read_or_refused_in_one_line(
    unet: Any, tensors: dict[str, torch.Tensor], tmp_path: Path, data: st.DataObject
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    content = bytearray((tmp_path / "a.safetensors").read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    places = st.tuples(st.integers(0, header - 1), st.integers(0, 255))
    for place, byte in data.draw(st.lists(places, min_size=1, max_size=6)):
        content[place] = byte
    (tmp_path / "b.safetensors").write_bytes(content)
    try:
        use(tmp_path / "b.safetensors", unet)
    except SdCompressError as error:
        check_refusal(error)


@QUICK
@given(
    header=st.dictionaries(
        st.sampled_from(["__metadata__", "unet.conv_in.lora_A.weight", "unet.conv_in.lora_B.weight", "x" * 5000]),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F16", "BF16", "F8_E4M3", "I64", "BOOL", "X9", "C64"]),
                "shape": st.lists(st.integers(-1, 2**40), max_size=5),
                "data_offsets": st.lists(st.integers(-8, 2**40), min_size=2, max_size=2),
            }
        ),
    ),
    length=st.sampled_from([None, 0, 1, 2**31, 2**63]),
)
def test_any_header_is_read_or_refused_in_one_line(unet: Any, tmp_path: Path, header: Any, length: int | None) -> None:
    text = json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    (tmp_path / "a.safetensors").write_bytes(size + text + bytes(64))
    with pytest.raises(SdCompressError) as refusal:
        use(tmp_path / "a.safetensors", unet)
    check_refusal(refusal.value)


@pytest.mark.parametrize(
    "noted",
    ["{", "[]", '{"unet.lora_alpha": "4"}', '{"unet.lora_alpha": 1e400}', '{"unet.alpha_pattern": {"(a+)+b": 4}}'],
)
def test_a_scale_that_cannot_be_read_is_refused(unet: Any, tensors: Any, tmp_path: Path, noted: str) -> None:
    plain = {key: tensor for key, tensor in tensors.items() if not key.endswith("alpha")}
    save_file(plain, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": noted})
    with pytest.raises(ModelError) as refusal:
        read_lora(tmp_path / "a.safetensors", unet_modules(unet))
    check_refusal(refusal.value)


@pytest.mark.parametrize("text", ["", ":1", "a.safetensors:", "a.safetensors:nan", "a:inf", "a:b", "x" * 9999 + ":y"])
def test_an_option_without_a_file_or_with_no_finite_weight_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="FILE or FILE:WEIGHT") as refusal:
        parse_lora(text)
    check_refusal(refusal.value)


def test_the_tensors_of_a_good_file_stay_as_they_are(unet: Any, tensors: Any, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    layers = read_lora(tmp_path / "a.safetensors", unet_modules(unet))
    assert torch.equal(layers["unet", CONV].down, load_file(tmp_path / "a.safetensors")[list(tensors)[3]])
