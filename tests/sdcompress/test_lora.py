"""LoRAs are trained, written in both namings, read, remapped to a student and fused, with equal outputs."""

from __future__ import annotations

import copy
import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sdcompress_engines.errors import ModelError, StorageError, UsageError
from sdcompress_engines.exactness import relative_l2

from sdcompress.data.build_cache import build_cache
from sdcompress.data.cache import LatentCache
from sdcompress.data.sources import open_source
from sdcompress.lora import files
from sdcompress.lora.files import read_lora, write_lora
from sdcompress.lora.fuse import fuse_lora
from sdcompress.lora.names import unet_modules
from sdcompress.lora.remap import remap_lora
from sdcompress.models.describe import describe_model
from sdcompress.models.load import LoadedPipeline, load_pipeline
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import build_student
from sdcompress.train.config import FinetuneConfig, LoraConfig
from sdcompress.train.finetune import finetune
from sdcompress.train.lora import FILE, KOHYA_FILE, LORA, train_lora

SHORT = LoraConfig(
    steps=4,
    batch_size=4,
    learning_rate=1e-2,
    rank=4,
    alpha=8,
    precision="fp32",
    checkpoint_every=2,
    log_every=1,
    text_encoder=True,
)


@pytest.fixture(scope="module")
def model(random_folder: Path) -> LoadedPipeline:
    return load_pipeline(random_folder)


@pytest.fixture(scope="module")
def cache(model: LoadedPipeline, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return build_cache(open_source(pictures), model, tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture(scope="module")
def trained(model: LoadedPipeline, cache: LatentCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    train_lora(model, cache, SHORT, output)
    return output / LORA


def outputs(pipeline: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        text = pipeline.encode_prompt("a flat icon of a cat", "cpu", 1, False)[0]
        return pipeline.unet(
            torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([20, 700]), text.expand(2, -1, -1)
        ).sample


def test_diffusers_and_sdcompress_give_equal_output_from_either_file(
    model: LoadedPipeline, trained: Path, random_folder: Path
) -> None:
    plain = outputs(model.pipeline)
    by_diffusers = load_pipeline(random_folder).pipeline
    by_diffusers.load_lora_weights(trained, weight_name=FILE)
    expected = outputs(by_diffusers)
    assert relative_l2(expected, plain) > 1e-2
    for file in (FILE, KOHYA_FILE):
        fused = load_pipeline(random_folder).pipeline
        layers = read_lora(trained / file, unet_modules(fused.unet))
        assert {component for component, _ in layers} == {"unet", "text_encoder"}
        fuse_lora(fused, layers)
        assert relative_l2(outputs(fused), expected) < 1e-5
    kohya = load_pipeline(random_folder).pipeline
    kohya.load_lora_weights(trained, weight_name=KOHYA_FILE)
    assert relative_l2(outputs(kohya), expected) < 1e-5
    without_weight = load_pipeline(random_folder).pipeline
    fuse_lora(without_weight, read_lora(trained / FILE, unet_modules(without_weight.unet)), weight=0.0)
    assert torch.equal(outputs(without_weight), plain)


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"attn1.to_q": 1, "mid_block.attentions.0.proj_in": 3}}]
)
def test_a_lora_is_scaled_as_diffusers_notes_in_its_header(
    random_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    from peft import LoraConfig as AdapterConfig
    from peft import get_peft_model_state_dict

    torch.manual_seed(4)
    trained = load_pipeline(random_folder).pipeline
    targets = ["to_q", "proj_in"]
    trained.unet.add_adapter(
        AdapterConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False, **settings)
    )
    noted = trained.unet.peft_config["default"].to_dict()
    trained.save_lora_weights(tmp_path, get_peft_model_state_dict(trained.unet), unet_lora_adapter_metadata=noted)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    by_diffusers, fused = (load_pipeline(random_folder).pipeline for _ in range(2))
    by_diffusers.load_lora_weights(file)
    fuse_lora(fused, read_lora(file, unet_modules(fused.unet)))
    assert relative_l2(outputs(fused), outputs(by_diffusers)) < 1e-5


@pytest.mark.parametrize("old", [False, True])
def test_a_lora_of_diffusers_own_scripts_is_read(random_folder: Path, tmp_path: Path, old: bool) -> None:
    """They train with PEFT and rename the layers; versions before 0.22 wrote the names of attention processors."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig as AdapterConfig
    from peft import get_peft_model_state_dict

    torch.manual_seed(5)
    pipeline, layers = load_pipeline(random_folder).pipeline, {}
    for name, targets in (("unet", ["to_q", "to_out.0"]), ("text_encoder", ["q_proj", "out_proj"])):
        network = getattr(pipeline, name)
        network.add_adapter(AdapterConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
        layers[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
    if old:
        layers = {
            "unet_lora_layers": {
                key.replace(".to_q.lora.", ".processor.to_q_lora.").replace(
                    ".to_out.0.lora.", ".processor.to_out_lora."
                ): tensor
                for key, tensor in layers["unet_lora_layers"].items()
            }
        }
    pipeline.save_lora_weights(tmp_path, **layers)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    by_diffusers, fused = (load_pipeline(random_folder).pipeline for _ in range(2))
    by_diffusers.load_lora_weights(file)
    fuse_lora(fused, read_lora(file, unet_modules(fused.unet)))
    assert relative_l2(outputs(fused), outputs(by_diffusers)) < 1e-5
    assert describe_model(str(file))[0]["layers"] == len(load_file(file)) / 2


def test_training_does_not_change_the_model(model: LoadedPipeline, trained: Path, random_folder: Path) -> None:
    fresh = load_pipeline(random_folder)
    for name in ("unet", "text_encoder"):
        used, stored = getattr(model.pipeline, name).state_dict(), getattr(fresh.pipeline, name).state_dict()
        assert used.keys() == stored.keys()
        assert all(torch.equal(used[k], stored[k]) for k in stored)


def test_a_lora_for_the_teacher_becomes_one_for_the_student(
    model: LoadedPipeline, trained: Path, tmp_path: Path
) -> None:
    """A student pruned from the fused teacher equals the pruned student with the remapped LoRA fused into it."""
    pipeline: Any = model.pipeline
    plan = make_plan(pipeline.unet.config, "bk-tiny")
    layers = {
        key: layer for key, layer in read_lora(trained / FILE, unet_modules(pipeline.unet)).items() if key[0] == "unet"
    }
    student = build_student(pipeline.unet, plan).eval()
    remapped = remap_lora(layers, plan, unet_modules(student))
    assert len(remapped.layers) + len(remapped.dropped) == len(layers)
    assert any(name.startswith("mid_block.") for name in remapped.dropped)
    assert any(name.startswith("down_blocks.0.attentions.1.") for name in remapped.dropped)
    write_lora(remapped.layers, tmp_path / "tiny.safetensors", "kohya")
    pruned = copy.copy(pipeline)
    pruned.unet = student
    fuse_lora(pruned, read_lora(tmp_path / "tiny.safetensors", unet_modules(student)))
    whole = copy.copy(pipeline)
    whole.unet = copy.deepcopy(pipeline.unet)
    fuse_lora(whole, layers)
    whole.unet = build_student(whole.unet, plan).eval()
    assert relative_l2(outputs(pruned), outputs(whole)) < 1e-5


def test_a_kohya_lora_for_sdxl_changes_both_text_encoders(sdxl_folder: Path, tmp_path: Path) -> None:
    """kohya's scripts name SDXL's first text encoder `lora_te1_`, and the only one of SD1 `lora_te_`."""
    plain, fused = load_pipeline(sdxl_folder).pipeline, load_pipeline(sdxl_folder).pipeline
    tensors = {}
    for prefix in ("lora_te1_", "lora_te2_"):
        layer = f"{prefix}text_model_encoder_layers_0_mlp_fc1"
        tensors |= {f"{layer}.lora_down.weight": torch.ones(1, 32), f"{layer}.lora_up.weight": torch.ones(64, 1)}
    save_file(tensors, tmp_path / "kohya.safetensors")
    layers = read_lora(tmp_path / "kohya.safetensors", unet_modules(fused.unet))
    fuse_lora(fused, layers)
    for name in ("text_encoder", "text_encoder_2"):
        before, after = getattr(plain, name).state_dict(), getattr(fused, name).state_dict()
        (changed,) = [key for key in before if not torch.equal(before[key], after[key])]
        assert torch.allclose(after[changed], before[changed] + 1)
    write_lora(layers, tmp_path / "written.safetensors", "kohya")
    assert load_file(tmp_path / "written.safetensors").keys() >= tensors.keys()


def test_a_kohya_lora_for_sdxl_names_the_layers_of_the_unet_as_in_the_ldm_layout(
    sdxl_folder: Path, tmp_path: Path
) -> None:
    names = {
        "time_embed_0": "time_embedding.linear_1",
        "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_4_1_transformer_blocks_0_ff_net_2": "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2",
        "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
        "output_blocks_2_1_transformer_blocks_1_ff_net_2": "up_blocks.0.attentions.2.transformer_blocks.1.ff.net.2",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    }
    ends = ("lora_down.weight", "lora_up.weight")
    tensors = {f"lora_unet_{name}.{end}": torch.ones(1, 1) for name in names for end in ends}
    save_file(tensors, tmp_path / "kohya.safetensors")
    layers = read_lora(tmp_path / "kohya.safetensors", unet_modules(load_pipeline(sdxl_folder).pipeline.unet))
    assert {name for _, name in layers} == set(names.values())


def test_a_lora_that_does_not_fit_on_the_disk_leaves_nothing(
    trained: Path, model: LoadedPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = read_lora(trained / FILE, unet_modules(model.pipeline.unet))

    def fill_disk(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", fill_disk)  # stand-in for a full disk
    with pytest.raises(StorageError, match="no space"):
        write_lora(layers, tmp_path / "lora.safetensors", "kohya")
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_drawn_while_unet_and_text_encoder_train_in_bf16(
    model: LoadedPipeline, cache: LatentCache, tmp_path: Path
) -> None:
    drawing = {"steps": 1, "precision": "bf16", "sample_every": 1, "validation_prompts": ("a cat",)}
    train_lora(model, cache, SHORT.model_copy(update=drawing), tmp_path / "run")
    assert (tmp_path / "run/samples/step-000001.webp").is_file()


def test_a_file_that_is_no_lora_for_this_unet_is_refused(trained: Path, model: LoadedPipeline, tmp_path: Path) -> None:
    modules = unet_modules(model.pipeline.unet)
    with pytest.raises(UsageError, match="does not exist"):
        read_lora(tmp_path / "gone.safetensors", modules)
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="is not a LoRA: it holds unknown weights"):
        read_lora(tmp_path / "other.safetensors", modules)
    for name in ("transformer.blocks.0.to_q.lora_A.weight", "down_blocks.0.to_q_lora.down.weight"):
        save_file({name: torch.zeros(2, 2)}, tmp_path / "other.safetensors")
        with pytest.raises(ModelError, match=f"a LoRA whose layers have names of another kind, such as {name}"):
            read_lora(tmp_path / "other.safetensors", modules)
    (tmp_path / "cut.safetensors").write_bytes((trained / FILE).read_bytes()[:-100])
    with pytest.raises(ModelError, match="is not a complete safetensors"):
        read_lora(tmp_path / "cut.safetensors", modules)
    tensors = load_file(trained / KOHYA_FILE)
    save_file(
        tensors | {"lora_unet_down_blocks_7_nothing.lora_down.weight": torch.zeros(4, 4)},
        tmp_path / "alien.safetensors",
    )
    with pytest.raises(ModelError, match="down_blocks_7_nothing"):
        read_lora(tmp_path / "alien.safetensors", modules)
    half = dict(tensors)
    half.pop(next(k for k in half if k.endswith("lora_up.weight")))
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(ModelError, match="only one half"):
        read_lora(tmp_path / "half.safetensors", modules)
    student = load_pipeline(model.folder).pipeline
    student.unet = build_student(student.unet, make_plan(student.unet.config, "bk-tiny"))
    with pytest.raises(ModelError, match="lora remap"):
        fuse_lora(student, read_lora(trained / FILE, modules))


@pytest.mark.parametrize("targets", [("to_nowhere",), ("to_q", "to_nowhere"), ("to_q", "norm1")])
def test_targets_that_name_no_layer_are_refused(
    model: LoadedPipeline, cache: LatentCache, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError, match=f"targets {targets[-1]} match no layer"):
        train_lora(model, cache, SHORT.model_copy(update={"targets": targets}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_finetuning_trains_every_weight_and_saves_an_ordinary_pipeline(
    model: LoadedPipeline, cache: LatentCache, tmp_path: Path
) -> None:
    config = FinetuneConfig(
        steps=3,
        batch_size=4,
        learning_rate=1e-3,
        precision="fp32",
        gradient_checkpointing=True,
        noise_offset=0.05,
        snr_gamma=5,
    )
    finetune(model, cache, config, tmp_path / "run")
    after = load_pipeline(tmp_path / "run").pipeline.unet.state_dict()
    before = model.pipeline.unet.state_dict()
    assert after.keys() == before.keys()
    assert sum(not torch.equal(after[k], before[k]) for k in after) > 0.95 * len(after)
