"""A diffusers folder is loaded whole or refused in one line, before a picture; nothing in it names code or a path."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from sdcompress_engines.errors import ModelError, SdCompressError
from sdcompress_engines.manifest import write_manifest

from sdcompress.backends.exported import open_exported
from sdcompress.checkpoints.folder import find_weight_files
from sdcompress.models.describe import describe_model
from sdcompress.models.load import load_pipeline

State = dict[str, torch.Tensor]
UNET = "unet/diffusion_pytorch_model.safetensors"
KEY = "up_blocks.1.resnets.0.conv1.weight"


@pytest.fixture
def folder(small_folder: Path, tmp_path: Path) -> Path:
    """A copy of a small pipeline that a test may change."""
    return shutil.copytree(small_folder, tmp_path / "model")


def edit(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def refusal(folder: Path) -> str:
    with pytest.raises(SdCompressError) as caught:
        load_pipeline(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


def put(state: State, key: str, tensor: torch.Tensor) -> State:
    return state | {key: tensor}


FAULTS: dict[str, tuple[Callable[[State], State], str]] = {
    "no tensors": (lambda state: {}, "the unet lacks"),
    "a tensor missing": (lambda state: {k: v for k, v in state.items() if k != KEY}, f"lacks 1 of .*{KEY}"),
    "half of them": (lambda state: dict(list(state.items())[::2]), "the unet lacks"),
    "another shape": (lambda state: put(state, KEY, state[KEY][:, :-1].clone()), "has shape"),
    "a transposed matrix": (lambda state: put(state, KEY, state[KEY].transpose(0, 1).contiguous()), "shape"),
    "NaN": (lambda state: put(state, KEY, state[KEY] * float("nan")), f"{KEY} holds NaN"),
    "one infinity": (lambda state: put(state, KEY, state[KEY].flatten().index_fill(0, torch.tensor([3]), float("-inf"))
                     .view_as(state[KEY])), f"{KEY} holds NaN or infinity"),
    "whole numbers": (lambda state: put(state, KEY, state[KEY].to(torch.int32)), "stored as int32"),
    "an unknown tensor": (lambda state: put(state, "up_blocks.9.x.weight", torch.zeros(2)), "up_blocks.9.x.weight"),
    "a scaled format": (
        lambda state: put(state, KEY.replace("weight", "scale_weight"), torch.ones(1)), "scaled format"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("as_stored", [False, True])
def test_broken_weights_are_refused(fault: str, as_stored: bool, folder: Path) -> None:
    change, words = FAULTS[fault]
    save_file(change(load_file(folder / UNET)), folder / UNET)
    with pytest.raises(ModelError, match=words):
        load_pipeline(folder, as_stored=as_stored)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_any_tensor_that_is_missing_is_named(component: str, folder: Path) -> None:
    (file,) = find_weight_files(folder / component)
    state = load_file(file)
    for key in list(state)[:: len(state) // 6]:
        save_file({name: tensor for name, tensor in state.items() if name != key}, file)
        assert key in refusal(folder)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9999])
def test_a_cut_file_is_refused(part: float, folder: Path) -> None:
    content = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(content[: int(len(content) * part)])
    assert "is not a complete safetensors file" in refusal(folder)
    (folder / UNET).unlink()
    assert "unet: has no weights" in refusal(folder)


@pytest.mark.parametrize("suffix", [".fp16", ".bf16"])
def test_a_folder_that_holds_only_a_variant_is_loaded(suffix: str, folder: Path) -> None:
    dtype = torch.float16 if suffix == ".fp16" else torch.bfloat16
    expected = {key: value.to(dtype) for key, value in load_file(folder / UNET).items()}
    for component in ("unet", "vae", "text_encoder"):
        (file,) = find_weight_files(folder / component)
        save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file.with_suffix(f"{suffix}.safetensors"))
        file.unlink()
    for as_stored in (False, True):
        unet = load_pipeline(folder, as_stored=as_stored).pipeline.unet
        assert unet.dtype == (dtype if as_stored else torch.float32)
        assert all(torch.equal(value, expected[key].to(value.dtype)) for key, value in unet.state_dict().items())
    assert describe_model(str(folder))[0]["dtype"] == str(dtype).removeprefix("torch.")


def test_weights_that_are_kept_as_stored_are_not_rounded_to_those_of_the_unet(folder: Path) -> None:
    save_file({key: value.bfloat16() for key, value in load_file(folder / UNET).items()}, folder / UNET)
    stored = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    loaded = load_pipeline(folder, as_stored=True).pipeline
    assert loaded.unet.dtype == torch.bfloat16
    assert all(torch.equal(value, stored[key]) for key, value in loaded.vae.state_dict().items())


@pytest.mark.parametrize("name", ["{}.safetensors.index.json", "{}.safetensors.index.fp16.json"])
def test_shards_are_loaded_together_and_stay_in_their_folder(name: str, folder: Path) -> None:
    state = load_file(folder / UNET)
    (folder / UNET).unlink()
    names = {key: f"part-{place % 2}.safetensors" for place, key in enumerate(state)}
    for file in set(names.values()):
        save_file({key: state[key] for key in state if names[key] == file}, folder / "unet" / file)
    index = folder / "unet" / name.format("diffusion_pytorch_model")
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    loaded = load_pipeline(folder).pipeline.unet.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in state.items())
    outside = folder.parent / "outside.safetensors"
    save_file(state, outside)
    for target in ("../../outside.safetensors", str(outside), "part-9.safetensors", 5, {"a": 1}):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(state, target)}))
        refusal(folder)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_shards_of_a_save_over_an_earlier_one_are_no_choice_of_weights(part: str, folder: Path) -> None:
    """diffusers then loads the shards, and transformers the whole file."""
    (whole,) = (folder / part).glob("*.safetensors")
    shard = whole.with_name(f"{whole.stem}-00001-of-00001.safetensors")
    save_file({key: value / 2 for key, value in load_file(whole).items()}, shard)
    names = dict.fromkeys(load_file(whole), shard.name)
    whole.with_name(f"{whole.name}.index.json").write_text(json.dumps({"weight_map": names}))
    assert f"has weights twice: {whole.name}" in refusal(folder)
    shard.unlink()
    load_pipeline(folder)


def test_names_of_old_versions_are_read(folder: Path) -> None:
    """diffusers before 0.14 and transformers before 5; such are the files of SD 1.4, 1.5 and 2.1."""
    before = load_pipeline(folder).pipeline
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae = folder / "vae/diffusion_pytorch_model.safetensors"
    renamed = {}
    for key, tensor in load_file(vae).items():
        for new, name in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        renamed[key] = tensor
    assert any("proj_attn" in key for key in renamed)
    save_file(renamed, vae)
    text = folder / "text_encoder/model.safetensors"
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(text).items()}
    save_file(state | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, text)
    after = load_pipeline(folder).pipeline
    for name in ("vae", "text_encoder"):
        one, other = getattr(before, name).state_dict(), getattr(after, name).state_dict()
        assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_pickle_of_tensors_is_read_and_one_with_code_is_not(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / UNET)
    (folder / UNET).unlink()
    pickled = folder / "unet/diffusion_pytorch_model.bin"
    torch.save(state, pickled)
    loaded = load_pipeline(folder).pipeline.unet.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in state.items())

    class Code:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    pickled.write_bytes(pickle.dumps({"a": Code()}))
    assert "could run code" in refusal(folder)
    assert not (tmp_path / "ran").exists()


NAMES = [
    ({"unet": ["sentinel", "UNet2DConditionModel"]}, "as its unet"),
    ({"unet": ["diffusers", "UNet2DModel"]}, "as its unet"),
    ({"vae": ["os", "system"]}, "as its vae"),
    ({"scheduler": ["sentinel", "PNDMScheduler"]}, "as its scheduler"),
    ({"scheduler": ["diffusers", "DiffusionPipeline"]}, "as its scheduler"),
    ({"tokenizer": ["sentinel", "CLIPTokenizer"]}, "as its tokenizer"),
    ({"text_encoder": ["diffusers_modules.local.sentinel", "X"]}, "as its text_encoder"),
    ({"text_encoder": [None, None]}, "has no text_encoder"),
    ({"safety": ["sentinel", "Checker"]}, "names a component 'safety'"),
    ({"_class_name": ["sentinel", "Pipeline"]}, "of the class"),
    ({"_class_name": "sentinel"}, "of the class sentinel"),
    ({"custom_pipeline": "sentinel"}, "names code"),
    ({"vae": "sentinel"}, "as its vae"),
]


@pytest.mark.parametrize(("changes", "words"), NAMES)
def test_no_name_in_an_index_is_imported(
    changes: dict[str, Any], words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sentinel.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    edit(folder / "model_index.json", changes)
    assert words in refusal(folder)
    assert "sentinel" not in sys.modules
    assert not (tmp_path / "ran").exists()


def test_no_name_in_an_export_folder_is_imported(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sentinel.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "export/pipeline").mkdir(parents=True)
    index = shutil.copy(small_folder / "model_index.json", tmp_path / "export/pipeline")
    edit(Path(index), {"scheduler": ["sentinel", "PNDMScheduler"]})
    write_manifest(tmp_path / "export", "onnx")
    with pytest.raises(ModelError, match="as its scheduler"):
        open_exported(tmp_path / "export", "cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("changes", [{}, {"force_zeros_for_empty_prompt": None}])
def test_an_empty_caption_is_encoded_as_diffusers_does(
    changes: dict[str, Any], sdxl_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sdxl_folder, tmp_path / "model")
    edit(folder / "model_index.json", changes)
    expected = diffusers.DiffusionPipeline.from_pretrained(folder).encode_prompt("a cat")[1]
    assert torch.equal(load_pipeline(folder).pipeline.encode_prompt("a cat")[1], expected)


def test_code_beside_a_model_is_not_read(folder: Path, tmp_path: Path) -> None:
    """A safety checker is never loaded, whatever its entry names; nor is a Python file of a component."""
    for name in ("pipeline.py", "unet/sentinel.py", "tokenizer/sentinel.py", "scheduler/sentinel.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (folder / "tokenizer/chat_template.jinja").write_text("{{ 1 / 0 }}")
    edit(folder / "model_index.json", {"safety_checker": ["sentinel", "Checker"], "feature_extractor": ["os", "x"]})
    assert load_pipeline(folder).pipeline.safety_checker is None
    assert not (tmp_path / "ran").exists()
    edit(folder / "tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["sentinel.T", None]}})
    assert "names code" in refusal(folder)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("unet/config.json", {"in_channels": 9}, "an inpainting or editing model"),
        ("unet/config.json", {"cross_attention_dim": 64}, "text of width 64"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 10**30}, "captions of"),
        ("tokenizer/tokenizer_config.json", {"pad_token": 5}, "pad_token"),
        ("text_encoder/config.json", {"vocab_size": 100}, "tokens below 100"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.5]}, "trained_betas"),
    ],
)
def test_components_that_do_not_fit_are_refused(file: str, changes: dict[str, Any], words: str, folder: Path) -> None:
    edit(folder / file, changes)
    if "vocab_size" in changes:  # the weights fit the config
        state = load_file(folder / "text_encoder/model.safetensors")
        key = next(key for key in state if key.endswith("token_embedding.weight"))
        save_file(state | {key: state[key][:100].clone()}, folder / "text_encoder/model.safetensors")
    assert words in refusal(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "5", '"x"', "\x00", "null"])
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "tokenizer/tokenizer.json"])
def test_a_config_that_is_no_object_is_refused(file: str, text: str, folder: Path) -> None:
    (folder / file).write_text(text)
    refusal(folder)
