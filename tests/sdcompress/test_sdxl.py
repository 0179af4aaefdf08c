"""SDXL's UNet, which is also conditioned on pooled text and picture sizes: cache, distillation, LoRA and export."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from sdcompress_engines.exactness import relative_l2
from sdcompress_engines.runners import open_runner

from sdcompress.backends.assemble import open_pipeline
from sdcompress.data.build_cache import build_cache
from sdcompress.data.config import DataConfig
from sdcompress.data.sources import open_source
from sdcompress.export.onnx import export_onnx
from sdcompress.export.settings import choose_settings
from sdcompress.families.registry import family_of
from sdcompress.models.load import LoadedPipeline, load_pipeline
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import build_student
from sdcompress.sampling import generate
from sdcompress.train.config import DistillConfig, LoraConfig
from sdcompress.train.distill import distill, make_objective
from sdcompress.train.lora import FILE, LORA, train_lora
from sdcompress.train.pipelines import make_batches, save_pipeline, with_unet

COMMON: dict[str, Any] = {"batch_size": 2, "precision": "fp32", "log_every": 1}


@pytest.fixture(scope="module")
def teacher(sdxl_folder: Path) -> LoadedPipeline:
    return load_pipeline(sdxl_folder)


def test_sdxl_is_cached_distilled_and_adapted(teacher: LoadedPipeline, pictures: Path, tmp_path: Path) -> None:
    pipeline: Any = teacher.pipeline
    assert family_of(pipeline.unet.config).name == "sdxl"
    cache = build_cache(open_source(pictures), teacher, tmp_path / "cache", config=DataConfig(buckets=True))
    sample = cache.sample(0, 0, 0.0)
    text, _, pooled, _ = pipeline.encode_prompt(
        (pictures / "00.txt").read_text(), device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    assert torch.allclose(sample.text, text[0], atol=2e-3)
    assert sample.pooled is not None
    assert torch.allclose(sample.pooled, pooled[0], atol=2e-3)
    assert sample.time_ids.tolist() == [128, 128, 0, 0, 128, 128]
    result = distill(
        teacher,
        make_plan(pipeline.unet.config, "bk-base"),
        cache,
        DistillConfig(steps=2, attention_kd_weight=0.1, **COMMON),
        tmp_path / "student",
    )
    assert set(result.losses) == {"loss", "task_loss", "output_kd_loss", "feature_kd_loss", "attention_kd_loss"}
    student = DiffusionPipeline.from_pretrained(tmp_path / "student/pipeline")
    assert student.unet.config.layers_per_block == 1
    train_lora(teacher, cache, LoraConfig(steps=2, rank=2, **COMMON), tmp_path / "lora")
    adapted = load_pipeline(teacher.folder).pipeline
    adapted.load_lora_weights(tmp_path / "lora" / LORA, weight_name=FILE)


def test_a_student_guides_as_its_teacher_and_is_trained_on_what_guidance_takes(
    teacher: LoadedPipeline, pictures: Path, tmp_path: Path
) -> None:
    """SDXL's pipeline takes zeros for an absent caption, unless its index says otherwise."""
    for zeros in (True, False):
        pipeline: Any = copy.copy(teacher.pipeline)
        pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
        _, text, _, pooled = pipeline.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=True)
        cache = build_cache(open_source(pictures), replace(teacher, pipeline=pipeline), tmp_path / f"cache {zeros}")
        sample = cache.sample(0, 0, 0.0, drop_caption=True)
        assert sample.pooled is not None
        assert torch.allclose(sample.text, text[0], atol=2e-3)
        assert torch.allclose(sample.pooled, pooled[0], atol=2e-3)
        save_pipeline(with_unet(pipeline, pipeline.unet), tmp_path / f"student {zeros}", "student")
        student = load_pipeline(tmp_path / f"student {zeros}").pipeline
        assert student.config["force_zeros_for_empty_prompt"] is zeros


def test_a_teacher_in_half_precision_is_given_the_sizes_of_its_student(teacher: LoadedPipeline, tmp_path: Path) -> None:
    """bf16 holds whole numbers up to 256 only."""
    (tmp_path / "data").mkdir()
    Image.new("RGB", (515, 301), "red").save(tmp_path / "data/0.png")
    (tmp_path / "data/0.txt").write_text("red")
    cache = build_cache(open_source(tmp_path / "data"), teacher, tmp_path / "cache")
    config = DistillConfig(**COMMON | {"precision": "bf16"})
    plan = make_plan(teacher.pipeline.unet.config, "bk-base")
    student = build_student(teacher.pipeline.unet, plan)
    objective = make_objective(teacher.pipeline.unet, student, plan, config)
    seen: list[list[int]] = []
    for network in (student, objective.teacher):
        network.add_time_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].tolist()))
    batch = make_batches(teacher.pipeline, cache, config).make_batch(range(1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), objective.attach_hooks(student):
        objective.compute_losses(student, batch)
    assert seen == [[301, 515, 0, 45, 128, 128]] * 2


def test_latents_are_trained_in_the_scale_in_which_the_pipeline_decodes_them(
    teacher: LoadedPipeline, pictures: Path, tmp_path: Path
) -> None:
    """Playground v2.5's VAE has a mean and a standard deviation for each channel."""
    cache = build_cache(open_source(pictures), teacher, tmp_path / "cache")
    pipeline: Any = copy.copy(teacher.pipeline)
    pipeline.register_modules(vae=copy.deepcopy(pipeline.vae))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="sample")
    plain = make_batches(pipeline, cache, DistillConfig(**COMMON)).make_batch(range(2)).target
    mean, std = [-1.6, 1.1, 0.4, -0.2], [9.9, 6.2, 7.5, 5.9]
    pipeline.vae.register_to_config(latents_mean=mean, latents_std=std)
    latents = make_batches(pipeline, cache, DistillConfig(**COMMON)).make_batch(range(2)).target
    decoded: list[torch.Tensor] = []

    def see(z: torch.Tensor, **options: Any) -> tuple[torch.Tensor]:
        decoded.append(z)
        return (torch.zeros(len(z), 3, 128, 128),)

    pipeline.vae.decode = see
    pipeline.unet = copy.deepcopy(pipeline.unet)
    pipeline.unet.forward = lambda *arguments, **options: (latents,)
    pipeline(["a", "b"], num_inference_steps=2, guidance_scale=1.0, height=128, width=128)
    assert torch.allclose(decoded[0], plain / pipeline.vae.config.scaling_factor, atol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # diffusers' Euler scheduler under numpy 2
def test_an_exported_sdxl_pipeline_draws_as_torch(teacher: LoadedPipeline, tmp_path: Path) -> None:
    whole = export_onnx(teacher.pipeline, tmp_path / "whole")
    assert list(whole.parity) == ["unet", "text_encoder", "text_encoder_2", "vae_decoder"]
    assert all(check is not None and check.share_of_limit <= 1 for check in whole.parity.values())
    exported = open_pipeline(tmp_path / "whole", "onnxruntime")
    pictures = [
        np.asarray(generate(each, ["a cat"], seeds=[1], steps=2, guidance_scale=5.0)[0], dtype=np.float32)
        for each in (exported, teacher.pipeline)
    ]
    assert np.abs(pictures[0] - pictures[1]).mean() < 1


def test_sdxls_unet_for_a_webui_takes_text_and_sizes_as_one_vector(sdxl_folder: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(sdxl_folder).pipeline
    one_level = {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "transformer_layers_per_block": [1],
        "attention_head_dim": [2],
        "layers_per_block": 1,
        "mid_block_type": None,
    }
    torch.manual_seed(2)
    pipeline.unet = UNet2DConditionModel.from_config(dict(pipeline.unet.config) | one_level).eval()
    export_onnx(pipeline, tmp_path / "webui", host="webui")
    sample, times = torch.randn(1, 4, 16, 16), torch.tensor([501.0])
    context, embeds = torch.randn(1, 77, 64), torch.randn(1, 32)
    ids = torch.tensor([[128.0, 128, 0, 0, 128, 128]])
    y = torch.cat([embeds, pipeline.unet.add_time_proj(ids.flatten()).reshape(1, -1)], dim=-1)
    with open_runner(tmp_path / "webui" / "unet.onnx") as runner, torch.no_grad():
        names = [spec.name for spec in (*runner.inputs, *runner.outputs)]
        output = runner.infer({"sample": sample, "timesteps": times, "encoder_hidden_states": context, "y": y})
        added = {"text_embeds": embeds, "time_ids": ids}
        expected = pipeline.unet(sample, times, context, added_cond_kwargs=added).sample
    assert names == ["sample", "timesteps", "encoder_hidden_states", "y", "latent"]
    assert relative_l2(output["latent"], expected) < 1e-4


def test_a_vae_that_overflows_stays_fp32(teacher: LoadedPipeline) -> None:
    settings = choose_settings(teacher.pipeline, "fp16", ("vae_decoder", "text_encoder_2"))
    assert settings.to_config()["precisions"] == {"vae_decoder": "fp32", "text_encoder_2": "fp16"}
    repaired = copy.copy(teacher.pipeline)
    repaired.vae = copy.deepcopy(teacher.pipeline.vae)
    repaired.vae.register_to_config(force_upcast=False)
    assert choose_settings(repaired, "fp16", ("vae_decoder",)).precisions == {"vae_decoder": "fp16"}
