"""Small pipelines in the layouts of SD1, SD2 and SDXL."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sdcompress.families import configs as family_configs
from sdcompress.families.configs import CONFIGS

from .small_models import BETAS, clip_tokenizer, fill, small_text, small_vae


@pytest.fixture(scope="session")
def sd2_pipeline() -> Any:
    """SD2's layout at small widths: linear projections, heads by level, OpenCLIP's text encoder, v-prediction."""
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
    """SDXL's layout at small widths: two text encoders, size conditioning, several transformer blocks a pair."""
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
    """A small pipeline, and published configs of SD1 whose VAE and text encoder have its size.

    Its UNet has widths that a checkpoint without configs may have.
    """
    pipeline, folder = sd1_like_and_configs
    monkeypatch.setattr(family_configs, "CONFIGS", folder)
    return pipeline
