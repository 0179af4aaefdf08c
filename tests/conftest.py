"""Shared fixtures. `random_pipeline` has nano's shape and random weights: for what does not depend on training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdcompress import nano
from sdcompress.data.sources import open_source


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def random_pipeline() -> StableDiffusionPipeline:
    """SD1's topology at nano's size with random weights, fp32, on the CPU."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=16, block_out_channels=(48, 80, 96, 96), layers_per_block=2, cross_attention_dim=96, attention_head_dim=2, norm_num_groups=16)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=128,
    )
    tokenizer = CLIPTokenizer.from_pretrained(nano.teacher_folder() / "tokenizer")
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=384, num_hidden_layers=2, num_attention_heads=3, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def random_folder(random_pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`random_pipeline` as a diffusers folder."""
    folder = tmp_path_factory.mktemp("models") / "random"
    random_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 captioned 128 px pictures of nano's held-out split."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    folder.mkdir()
    for i, record in zip(range(24), open_source(nano.shards("heldout")), strict=False):
        record.picture().save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(record.caption)
    return folder
