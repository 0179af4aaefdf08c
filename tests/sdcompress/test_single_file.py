"""Single-file checkpoints: written and read back with equal output by us and by diffusers, without a network; and clear
refusals of what is none.
"""

from __future__ import annotations

import json
import math
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sdcompress.families.identify import student_of
from sdcompress_engines.errors import ModelError, SdCompressError, StorageError, UsageError
from torch import nn

from sdcompress.checkpoints.identify import configs_of, unet_config_of
from sdcompress.checkpoints.ldm_keys import METADATA_KEY, UNET, unet_keys
from sdcompress.checkpoints.read import load_single_file
from sdcompress.checkpoints.weights import Weights, open_weights
from sdcompress.checkpoints.write import ldm_state_dict, write_ldm
from sdcompress.families import configs as family_configs
from sdcompress.families.configs import CONFIGS
from sdcompress.families.vocabulary import shared_vocabulary
from sdcompress.models import nano
from sdcompress.models.load import load_pipeline
from sdcompress.models.locate import resolve, unet_config
from sdcompress.prune.plan import make_plan
from sdcompress.prune.student import build_student, meta_unet
from sdcompress.support.quiet import quiet

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def fill(*parts: nn.Module) -> None:
    """Random one-dimensional weights, so that each shows in the output."""
    with torch.no_grad():
        for part in parts:
            for name, weight in part.named_parameters():
                if weight.ndim == 1:
                    weight.copy_(
                        (1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.1 * torch.randn_like(weight)
                    )
            part.eval()


def small_text(width: int, activation: str, *, projection: bool = False, vocabulary: int = 49408) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        projection_dim=width,
        hidden_act=activation,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def small_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


@cache
def clip_tokenizer(family: str, name: str = "tokenizer") -> Any:
    from transformers import CLIPTokenizer

    shared = CONFIGS / "sd1/tokenizer"
    pad = json.loads((CONFIGS / family / name / "tokenizer_config.json").read_text())["pad_token"]
    return CLIPTokenizer(
        vocab=str(shared / "vocab.json"), merges=str(shared / "merges.txt"), model_max_length=77, pad_token=pad
    )


@pytest.fixture(scope="session")
def sd2_pipeline() -> Any:
    """SD2's kind at small widths: linear projections, heads a level, OpenCLIP's text encoder, v-prediction."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(11)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=2,
        cross_attention_dim=48,
        attention_head_dim=[2, 4, 4, 4],
        norm_num_groups=16,
        use_linear_projection=True,
    )
    vae, text = small_vae(), small_text(48, "gelu")
    fill(unet, vae, text)
    scheduler = DDIMScheduler(
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        **BETAS,
    )
    return StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text,
        tokenizer=clip_tokenizer("sd2"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def sdxl_pipeline() -> Any:
    """SDXL's kind at small widths: two text encoders, size conditioning, several transformer blocks a pair."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(12)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 3],
        cross_attention_dim=80,
        attention_head_dim=[2, 4, 4],
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=48 + 6 * 8,
    )
    vae, first, second = small_vae(), small_text(32, "quick_gelu"), small_text(48, "gelu", projection=True)
    fill(unet, vae, first, second)
    return StableDiffusionXLPipeline(
        unet=unet,
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=clip_tokenizer("sdxl"),
        tokenizer_2=clip_tokenizer("sdxl", "tokenizer_2"),
        scheduler=EulerDiscreteScheduler(**BETAS),
        add_watermarker=False,
    )


def outputs(pipeline: Any) -> dict[str, torch.Tensor]:
    """What the UNet, the text encoders and both halves of the VAE give for one fixed input."""
    generator = torch.Generator().manual_seed(3)
    given: dict[str, torch.Tensor] = {}
    text_encoders = [e for e in (pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)) if e is not None]
    with torch.no_grad():
        for i, encoder in enumerate(text_encoders):
            tokens = torch.randint(0, encoder.config.vocab_size, (2, 12), generator=generator)
            found = encoder(tokens, output_hidden_states=True)
            given |= {
                f"text {i}": found.hidden_states[-2],
                f"text {i} pooled": found[0] if found[0].ndim == 2 else found.last_hidden_state,
            }
        size = pipeline.unet.config.sample_size
        sample = torch.randn(2, 4, size, size, generator=generator)
        context = torch.randn(2, 12, pipeline.unet.config.cross_attention_dim, generator=generator)
        extra = {}
        if len(text_encoders) == 2:
            width = pipeline.text_encoder_2.config.projection_dim
            extra["added_cond_kwargs"] = {
                "text_embeds": torch.randn(2, width, generator=generator),
                "time_ids": torch.ones(2, 6),
            }
        given["unet"] = pipeline.unet(sample, torch.tensor([3, 700]), context, **extra).sample
        pictures = torch.randn(1, 3, 32, 32, generator=generator)
        latents = pipeline.vae.encode(pictures).latent_dist.mean
        given |= {"vae encoder": latents, "vae decoder": pipeline.vae.decode(latents).sample}
    return given


def assert_equal(one: Any, other: Any) -> None:
    first, second = outputs(one), outputs(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def by_diffusers(file: Path, folder: Path, kind: str = "StableDiffusionPipeline") -> Any:
    """The file loaded by diffusers alone, with the configs in `folder`."""
    import diffusers

    with quiet():
        pipeline = getattr(diffusers, kind).from_single_file(str(file), config=str(folder), local_files_only=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return pipeline


def with_unet(pipeline: Any, unet: Any) -> Any:
    return type(pipeline)(**(pipeline.components | {"unet": unet}), requires_safety_checker=False)


def bare(pipeline: Any, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """As checkpoint sites have it: LDM weights alone, without configs of ours."""
    save_file({k: v.to(dtype).contiguous().clone() for k, v in ldm_state_dict(pipeline).items()}, path)
    return path


def test_nano_in_ldm_layout_loads_through_diffusers_and_through_us_with_equal_output(tmp_path: Path) -> None:
    original = load_pipeline("nano")
    file = write_ldm(original.pipeline, tmp_path / "nano.safetensors", torch.float32)
    ours = load_pipeline(file)
    assert ours.name == "nano"
    assert ours.folder == file
    assert ours.sha256 != original.sha256
    assert_equal(original.pipeline, ours.pipeline)
    assert_equal(original.pipeline, by_diffusers(file, nano.teacher_folder()))
    caption = "a flat icon of a cat"
    assert ours.pipeline.tokenizer(caption).input_ids == original.pipeline.tokenizer(caption).input_ids
    assert ours.pipeline.vae.config.scaling_factor == original.pipeline.vae.config.scaling_factor
    assert type(ours.pipeline.scheduler) is type(original.pipeline.scheduler)


@pytest.mark.parametrize("preset", ["bk-base", "bk-small", "bk-tiny"])
def test_a_student_goes_through_one_file_with_equal_output(preset: str, random_pipeline: Any, tmp_path: Path) -> None:
    student = with_unet(
        random_pipeline, build_student(random_pipeline.unet, make_plan(random_pipeline.unet.config, preset))
    )
    file = write_ldm(student, tmp_path / "student.safetensors", torch.float32)
    assert student_of(unet_config(file)) == preset
    assert_equal(student, load_single_file(file))
    student.save_pretrained(tmp_path / "folder")
    assert_equal(student, by_diffusers(file, tmp_path / "folder"))


def test_sd2s_kind_goes_through_one_file_with_equal_output(sd2_pipeline: Any, tmp_path: Path) -> None:
    file = write_ldm(sd2_pipeline, tmp_path / "sd2.safetensors", torch.float32)
    loaded: Any = load_single_file(file)
    assert_equal(sd2_pipeline, loaded)
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    assert loaded.scheduler.config.rescale_betas_zero_snr
    assert loaded.tokenizer("cat", padding="max_length", max_length=5).input_ids == [49406, 2368, 49407, 0, 0]
    sd2_pipeline.save_pretrained(tmp_path / "folder")
    assert_equal(sd2_pipeline, by_diffusers(file, tmp_path / "folder"))
    assert {"v_pred", "ztsnr"} <= open_weights(file).shapes.keys()


def test_sdxls_kind_goes_through_one_file_with_equal_output(sdxl_pipeline: Any, tmp_path: Path) -> None:
    file = write_ldm(sdxl_pipeline, tmp_path / "sdxl.safetensors", torch.float32)
    loaded: Any = load_single_file(file)
    assert_equal(sdxl_pipeline, loaded)
    assert loaded.tokenizer_2.pad_token_id == 0
    sdxl_pipeline.save_pretrained(tmp_path / "folder")
    assert_equal(sdxl_pipeline, by_diffusers(file, tmp_path / "folder", "StableDiffusionXLPipeline"))


def test_the_file_holds_nothing_of_the_machine_that_wrote_it(random_folder: Path, tmp_path: Path) -> None:
    file = write_ldm(load_pipeline(random_folder).pipeline, tmp_path / "a.safetensors")
    assert str(random_folder) not in open_weights(file).metadata[METADATA_KEY]


def test_a_write_that_fails_leaves_nothing(random_pipeline: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        write_ldm(random_pipeline, tmp_path / "file/a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# Without configs of ours, as checkpoint sites have them


@pytest.fixture(scope="session")
def sd1_like_and_configs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(13)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=2,
        cross_attention_dim=48,
        attention_head_dim=8,
        norm_num_groups=32,
    )
    vae, text = small_vae(), small_text(48, "quick_gelu")
    fill(unet, vae, text)
    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1, **BETAS)
    pipeline = StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text,
        tokenizer=clip_tokenizer("sd1"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("configs")
    shutil.copytree(CONFIGS / "sd1", folder / "sd1")
    vae.save_config(folder / "sd1/vae")
    text.config.save_pretrained(folder / "sd1/text_encoder")
    return pipeline, folder


@pytest.fixture
def sd1_like(sd1_like_and_configs: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small pipeline whose UNet has widths a checkpoint may have, and a family of configs to match it in place of
    SD1's full-size VAE and text encoder.
    """
    pipeline, folder = sd1_like_and_configs
    monkeypatch.setattr(family_configs, "CONFIGS", folder)
    return pipeline


def unets(part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in part.items() if key.startswith(UNET)}


Dialect = Callable[[dict[str, torch.Tensor]], dict[str, Any]]
DIALECTS: dict[str, Dialect] = {
    "plain": lambda state: state,
    "nested": lambda state: {"state_dict": {"state_dict": state}, "global_step": 470000},
    "with an EMA copy and training's leftovers": lambda state: {
        "state_dict": (
            state
            | {
                "model_ema." + key.removeprefix("model.").replace(".", ""): torch.zeros_like(value)
                for key, value in unets(state).items()
            }
            | {"model_ema.decay": torch.tensor(0.9), "betas": torch.zeros(1000), "logvar": torch.zeros(1000)}
        )
    },
    "EMA alone": lambda state: {
        "model_ema." + key.removeprefix("model.").replace(".", "") if key.startswith(UNET) else key: value
        for key, value in state.items()
    },
    "a VAE under vae.": lambda state: {
        key.replace("first_stage_model.", "vae."): value for key, value in state.items()
    },
    "a text encoder of 2022": lambda state: {
        key.replace("transformer.text_model.", "transformer."): value for key, value in state.items()
    },
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_checkpoint_loads_in_every_dialect(dialect: str, suffix: str, sd1_like: Any, tmp_path: Path) -> None:
    content = DIALECTS[dialect]({key: value.detach() for key, value in ldm_state_dict(sd1_like).items()})
    file = tmp_path / f"a.{suffix}"
    if suffix == "ckpt":
        torch.save(content, file)
    else:
        while "state_dict" in content:
            content = content["state_dict"]
        save_file({key: value.clone(memory_format=torch.contiguous_format) for key, value in content.items()}, file)
    loaded: Any = load_single_file(file)
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(loaded, name).state_dict(), getattr(sd1_like, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert loaded.scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize("preset", ["bk-base", "bk-small", "bk-tiny"])
def test_a_student_without_configs_is_told_by_its_weights(preset: str, sd1_like: Any, tmp_path: Path) -> None:
    student = with_unet(sd1_like, build_student(sd1_like.unet, make_plan(sd1_like.unet.config, preset)))
    loaded: Any = load_single_file(bare(student, tmp_path / "a.safetensors"))
    student.unet.config["sample_size"] = loaded.unet.config.sample_size = 16
    assert_equal(student, loaded)


def test_a_pickle_of_before_2020_loads(sd1_like: Any, tmp_path: Path) -> None:
    torch.save(ldm_state_dict(sd1_like), tmp_path / "a.ckpt", _use_new_zipfile_serialization=False)
    loaded: Any = load_single_file(tmp_path / "a.ckpt")
    assert torch.equal(loaded.unet.conv_in.weight, sd1_like.unet.conv_in.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_to_fp32(dtype: torch.dtype, sd1_like: Any, tmp_path: Path) -> None:
    loaded: Any = load_single_file(bare(sd1_like, tmp_path / "a.safetensors", dtype))
    for name in ("unet", "vae", "text_encoder"):
        parameters = dict(getattr(loaded, name).named_parameters())
        assert {p.dtype for p in parameters.values()} == {torch.float32}
        assert all(
            torch.equal(parameters[key], p.to(dtype).float()) for key, p in getattr(sd1_like, name).named_parameters()
        )


def test_v_prediction_is_read_from_the_file_and_never_from_its_name(sd1_like: Any, tmp_path: Path) -> None:
    state = {key: value.clone(memory_format=torch.contiguous_format) for key, value in ldm_state_dict(sd1_like).items()}
    save_file(state | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, tmp_path / "a.safetensors")
    save_file(state, tmp_path / "sd-v-prediction-768-v.safetensors")
    said: Any = load_single_file(tmp_path / "a.safetensors")
    assert said.scheduler.config.prediction_type == "v_prediction"
    assert said.scheduler.config.rescale_betas_zero_snr
    named: Any = load_single_file(tmp_path / "sd-v-prediction-768-v.safetensors")
    assert named.scheduler.config.prediction_type == "epsilon"


# Full-size checkpoints: headers alone, in files that take no room


@cache
def full_size(family: str, preset: str | None = None) -> dict[str, tuple[int, ...]]:
    """LDM key → shape of a whole checkpoint of a family, its UNet pruned so."""
    import diffusers
    import transformers

    def config(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((CONFIGS / family / name / "config.json").read_text())
        return found

    with torch.device("meta"):
        parts: dict[str, Any] = {
            "unet": meta_unet(config("unet") if preset is None else make_plan(config("unet"), preset).student_config()),
            "vae": diffusers.AutoencoderKL.from_config(config("vae")),
            "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**config("text_encoder"))),
        }
        if family == "sdxl":
            parts["text_encoder_2"] = transformers.CLIPTextModelWithProjection(
                transformers.CLIPTextConfig(**config("text_encoder_2"))
            )
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    more: dict[str, Any] = (
        {"tokenizer_2": None, "add_watermarker": False}
        if family == "sdxl"
        else {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    )
    with quiet():
        pipeline = kind(**parts, tokenizer=None, scheduler=scheduler, **more)
    return {key: tuple(value.shape) for key, value in ldm_state_dict(pipeline).items()}


def sparse(shapes: dict[str, tuple[int, ...]], path: Path, values: dict[str, torch.Tensor] | None = None) -> Path:
    """A float16 safetensors file of these shapes, all zero but `values`; zeros take no room on the disk."""
    header, end = {}, 0
    for key, shape in shapes.items():
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + 2 * math.prod(shape)]}
        end += 2 * math.prod(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, value in (values or {}).items():
            file.seek(8 + len(text) + header[key]["data_offsets"][0])
            file.write(value.half().numpy().tobytes())
        file.truncate(8 + len(text) + end)
    return path


ARCHITECTURES: list[tuple[str, dict[str, Any]]] = [
    ("sd1", {}),
    ("sd2", {}),
    ("sdxl", {}),
    (
        "sdxl",
        {
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [1, [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        },
    ),
    ("sdxl", {"mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, 1, 2]}),
    ("sdxl", {"mid_block_type": None, "layers_per_block": 1, "transformer_layers_per_block": [1, 2, 5]}),
    ("sd1", {"layers_per_block": [2, 1, 2, 1]}),
]


def whole(family: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / family / "unet/config.json").read_text())
    return config


@pytest.mark.parametrize(
    "config",
    [whole(family) | change for family, change in ARCHITECTURES]
    + [
        make_plan(whole(family), preset).student_config()
        for family in ("sd1", "sd2")
        for preset in ("bk-base", "bk-small", "bk-tiny")
    ],
    ids=lambda config: (
        f"{config['cross_attention_dim']}-{config['layers_per_block']}-{config['mid_block_type']}-{len(config['block_out_channels'])}-{config.get('transformer_layers_per_block')}"
    ),
)
def test_a_unets_config_is_told_by_its_shapes(config: dict[str, Any]) -> None:
    unet = meta_unet(config)
    keys = unet_keys(unet.state_dict())
    assert len(set(keys.values())) == len(keys)
    shapes = {UNET + keys[key]: tuple(value.shape) for key, value in unet.state_dict().items()}
    weights = Weights(
        Path("a.safetensors"), shapes, dict.fromkeys(shapes, "float16"), {}, lambda key: torch.zeros(shapes[key])
    )
    found = unet_config_of(weights)
    assert {k: v.shape for k, v in meta_unet(found).state_dict().items()} == {
        k: v.shape for k, v in unet.state_dict().items()
    }
    for key in (
        "attention_head_dim",
        "block_out_channels",
        "layers_per_block",
        "mid_block_type",
        "down_block_types",
        "up_block_types",
        "cross_attention_dim",
        "sample_size",
    ):
        assert found[key] == config[key], key
    assert student_of(found) == student_of(config)


@pytest.mark.parametrize(("spread", "expected"), [(0.05, "epsilon"), (0.15, "v_prediction")])
@pytest.mark.parametrize("preset", [None, "bk-tiny"])
def test_sd2s_prediction_type_is_told_by_its_last_attention(
    spread: float, expected: str, preset: str | None, tmp_path: Path
) -> None:
    shapes = full_size("sd2", preset)
    bias = UNET + ("output_blocks.11" if preset is None else "output_blocks.5") + ".1.transformer_blocks.0.norm1.bias"
    values = {bias: spread * torch.tensor([1.0, -1.0]).repeat(shapes[bias][0] // 2)}
    configs = configs_of(open_weights(sparse(shapes, tmp_path / "a.safetensors", values)))
    assert configs["scheduler/scheduler_config.json"]["prediction_type"] == expected
    assert configs["unet/config.json"]["sample_size"] == (96 if expected == "v_prediction" else 64)


# What is no checkpoint


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


def kohya(_: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    return {
        f"{name}.lora_down.weight": torch.zeros(4, 8),
        f"{name}.lora_up.weight": torch.zeros(8, 4),
        f"{name}.alpha": torch.tensor(4.0),
    }


def without(prefix: str) -> Dialect:
    return lambda state: {key: value for key, value in state.items() if not key.startswith(prefix)}


OTHERS: dict[str, tuple[Dialect, str]] = {
    "kohya's LoRA": (kohya, "LoRA"),
    "diffusers' LoRA": (
        lambda _: {
            "unet.down_blocks.0.attentions.0.to_q.lora_A.weight": torch.zeros(4, 8),
            "unet.down_blocks.0.attentions.0.to_q.lora_B.weight": torch.zeros(8, 4),
        },
        "LoRA",
    ),
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
    "an inpainting model": (lambda state: state | {UNET + "input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}, "9"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_whole_checkpoint_is_refused_by_what_it_is(what: str, sd1_like: Any, tmp_path: Path) -> None:
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
def test_a_cut_file_is_one_clear_line(name: str, part: float, tmp_path: Path) -> None:
    file = tmp_path / name
    state = {f"{UNET}input_blocks.{i}.0.weight": torch.randn(32, 32, 3, 3) for i in range(8)}
    if name.endswith(".safetensors"):
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=name != "old.ckpt")
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    with pytest.raises(ModelError, match=r"whole|tensors") as refusal:
        load_pipeline(file)
    assert "\n" not in str(refusal.value)


def test_a_file_of_another_kind_and_one_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"x")
    (tmp_path / "page.ckpt").write_text("<!DOCTYPE html>")
    for name in ("a.onnx", "page.ckpt"):
        with pytest.raises(SdCompressError, match=name):
            load_pipeline(tmp_path / name)
    with pytest.raises(UsageError, match="does not exist"):
        resolve(tmp_path / "b.safetensors")


@pytest.mark.parametrize("entry", [None, [None, None]])
def test_a_folder_whose_pipeline_has_no_unet_is_refused(entry: Any, tmp_path: Path) -> None:
    index = {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]} | (
        {} if entry is None else {"unet": entry}
    )
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="FluxPipeline has no UNet"):
        load_pipeline(tmp_path)


def test_configs_that_were_tampered_with_do_not_leave_the_scratch_folder(random_pipeline: Any, tmp_path: Path) -> None:
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


# The package's configs and tokenizer


def test_the_shipped_tokenizer_is_clips() -> None:
    tokens = [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 49407]  # as openai/clip-vit-large-patch14 gives them
    assert clip_tokenizer("sd1")("a photo of an astronaut riding a horse").input_ids == tokens
    assert len(shared_vocabulary()) == 49408
    assert clip_tokenizer("sd1").pad_token_id == 49407
    assert clip_tokenizer("sd2").pad_token_id == clip_tokenizer("sdxl", "tokenizer_2").pad_token_id == 0


def test_the_configs_are_small_and_carry_their_licence() -> None:
    assert sum(p.stat().st_size for p in CONFIGS.rglob("*") if p.is_file()) < 2 * 2**20
    notice = (CONFIGS / "NOTICE").read_text()
    assert "OpenAI" in notice
    assert "Permission is hereby granted" in notice


# sdcompress inspect


@pytest.fixture
def inspect(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`sdcompress inspect PATH --json`, and the same for people, which must not fail."""
    from sdcompress.cli import main

    def run(path: object) -> dict[str, Any]:
        for more in ([], ["--json"]):
            monkeypatch.setattr(sys, "argv", ["sdcompress", "inspect", str(path), *more])
            with pytest.raises(SystemExit) as stop:
                main()
            out, err = capfd.readouterr()
            assert not stop.value.code, err
        facts: dict[str, Any] = json.loads(out)
        return facts

    return run


@pytest.mark.parametrize(
    ("family", "preset", "parameters"),
    [
        ("sd1", None, {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
        ("sd2", "bk-tiny", {"unet": 326_825_604, "vae": 83_653_863, "text_encoder": 340_387_840}),
        (
            "sdxl",
            None,
            {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
        ),
    ],
)
def test_inspect_tells_a_checkpoint_from_its_header(
    family: str, preset: str | None, parameters: dict[str, int], inspect: Any, tmp_path: Path
) -> None:
    file = sparse(full_size(family, preset), tmp_path / "a.safetensors")
    facts = inspect(file)
    assert facts["family"] == family
    assert facts["parameters"] == parameters
    assert facts["prediction_type"] == "epsilon"
    assert facts["dtype"] == "float16"
    assert facts["student"] == preset
    assert facts["bytes"] == file.stat().st_size


def test_inspect_tells_a_loras_naming_rank_and_layers(inspect: Any, tmp_path: Path) -> None:
    for name, naming in (("kohya's LoRA", "kohya"), ("diffusers' LoRA", "diffusers")):
        save_file(OTHERS[name][0]({}), tmp_path / "a.safetensors")
        facts = inspect(tmp_path / "a.safetensors")
        assert "LoRA" in json.dumps(facts)
        assert facts["naming"] == naming
        assert facts["rank"] in (4, [4])


def test_inspect_tells_a_folder(inspect: Any, random_folder: Path) -> None:
    facts = inspect(random_folder)
    assert facts["class"] == "StableDiffusionPipeline"
    assert facts["parameters"]["unet"] == facts["unet_parameters"]
    assert facts["dtype"] == "float32"
    assert facts["student"] is None
