"""Shared fixtures. `random_pipeline` has nano's shape and random weights: for what does not depend on training."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from sdcompress.data.sources import open_source
from sdcompress.models import nano

settings.register_profile("repeatable", derandomize=True)
settings.register_profile("random")
settings.load_profile("repeatable")  # `--hypothesis-profile random` looks for new inputs


SLOWEST_S = 1800
"""Limit of a slow test without one of its own, for a machine with other work."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SLOWEST_S))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Each test and its fixtures draw the same random numbers, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills the user's cache and settings; processes that tests start inherit this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDCOMPRESS_CONFIG", str(tmp_path_factory.mktemp("config")))
        patch.setenv("SDCOMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """The command line sets variables for the processes it starts; after the test they are as before."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def make_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer of single bytes, built in memory: 512 byte tokens, start and end."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=77)


def make_pipeline(folder: Path) -> Any:
    """SD1's topology at nano's widths: every weight random and none zero, so that each one shows in the output."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(7)
    tokenizer = make_tokenizer(folder)
    count = len(tokenizer)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(48, 80, 96, 96),
        layers_per_block=2,
        cross_attention_dim=96,
        attention_head_dim=2,
        norm_num_groups=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=128,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=count,
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=3,
            intermediate_size=384,
            projection_dim=96,
            bos_token_id=count - 2,
            eos_token_id=count - 1,
            pad_token_id=count - 1,
        )
    )
    with torch.no_grad():
        for part in (unet, vae, text):
            for name, weight in part.named_parameters():
                if weight.ndim == 1:
                    weight.copy_(
                        (1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.1 * torch.randn_like(weight)
                    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1, **BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (unet, vae, text):
        part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def random_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """SD1's topology at nano's widths with random weights, fp32, on the CPU."""
    return make_pipeline(tmp_path_factory.mktemp("tokenizer") / "made")


@pytest.fixture(scope="session")
def random_folder(random_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`random_pipeline` as a diffusers folder."""
    folder = tmp_path_factory.mktemp("models") / "random"
    random_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL's topology, three levels with attention in the inner two, at a hundredth of its widths."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("sdxl")
    tokenizer = make_tokenizer(folder / "tokenizer-made")
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "projection_dim": 32,
        "bos_token_id": len(tokenizer) - 2,
        "eos_token_id": len(tokenizer) - 1,
        "pad_token_id": len(tokenizer) - 1,
    }
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 3],
        attention_head_dim=[2, 2, 4],
        norm_num_groups=8,
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=128,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder / "sdxl")
    return folder / "sdxl"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 captioned 128 px pictures of nano's held-out split."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    folder.mkdir()
    for i, record in zip(range(24), open_source(nano.shards("heldout")), strict=False):
        record.picture().save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(record.caption)
    return folder


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], Any]], Any]:
    """Returns a function (name, make) → what `make(folder)` returns, made once for all processes of a test run.

    With pytest-xdist each process has fixtures of its own; what takes long to make is kept in a folder they share.
    """
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    shared.mkdir(exist_ok=True)

    def make_or_read(name: str, make: Callable[[Path], Any]) -> Any:
        result = shared / f"{name}.pickle"
        with FileLock(shared / f"{name}.lock"):
            if not result.is_file():
                result.write_bytes(pickle.dumps(make(shared / name)))
            return pickle.loads(result.read_bytes())

    return make_or_read


@pytest.fixture(scope="session")
def fp32_export(random_pipeline: Any, make_once: Callable[..., Any]) -> Any:
    """`ExportResult` of the whole pipeline at fp32."""
    from sdcompress.export.onnx import export_onnx

    return make_once("fp32", lambda folder: export_onnx(random_pipeline, folder, source={"pipeline": "0" * 64}))


@pytest.fixture(scope="session")
def fp16_small(random_pipeline: Any, make_once: Callable[..., Any]) -> Any:
    """`ExportResult` at fp16 of the two components that export in seconds."""
    from sdcompress.export.onnx import export_onnx

    components = ("text_encoder", "vae_decoder")
    return make_once(
        "fp16-small", lambda folder: export_onnx(random_pipeline, folder, precision="fp16", components=components)
    )
