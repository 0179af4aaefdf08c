"""diffusers makes the same picture with runners in place of its modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sdcompress_engines.errors import EngineError, EngineMismatch
from sdcompress_engines.runners import open_runner
from sdcompress_engines.signature import signature
from sdcompress_engines.unet import EngineTextEncoder, EngineUNet, EngineVaeDecoder


@pytest.fixture(scope="module")
def stand_ins(random_pipeline: Any, fp32_export: Any) -> dict[str, Any]:
    folder = fp32_export.folder
    return {
        "unet": EngineUNet(open_runner(folder / "unet.onnx"), random_pipeline.unet.config),
        "text_encoder": EngineTextEncoder(open_runner(folder / "text_encoder.onnx"), random_pipeline.text_encoder.config.to_dict()),
        "vae": EngineVaeDecoder(open_runner(folder / "vae_decoder.onnx"), random_pipeline.vae.config),
    }


@pytest.fixture(scope="module")
def engine_pipeline(random_pipeline: Any, stand_ins: dict[str, Any]) -> Any:
    from diffusers import StableDiffusionPipeline

    made = StableDiffusionPipeline(
        **stand_ins, tokenizer=random_pipeline.tokenizer, scheduler=type(random_pipeline.scheduler).from_config(random_pipeline.scheduler.config), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("output_type", ["latent", "np"])
def test_the_same_latents_and_pictures_as_torch(random_pipeline: Any, engine_pipeline: Any, output_type: str) -> None:
    found, truth = (
        torch.as_tensor(
            made(
                ["a cat", "two dogs"], num_inference_steps=3, guidance_scale=5.0, height=128, width=64, output_type=output_type, generator=torch.Generator().manual_seed(1)
            ).images
        )
        for made in (engine_pipeline, random_pipeline)
    )
    assert found.shape == truth.shape
    assert truth.std() > 0.01
    assert ((found - truth).norm() / truth.norm()).item() < 1e-3


def test_the_pipeline_sees_its_modules(engine_pipeline: Any) -> None:
    assert engine_pipeline.device == torch.device("cpu")
    assert engine_pipeline.dtype == torch.float32
    assert engine_pipeline.vae_scale_factor == 8
    assert engine_pipeline.unet.config.in_channels == engine_pipeline.unet.config["in_channels"] == 4


def test_a_unet_takes_numbers_and_answers_in_the_dtype_it_was_asked_in(stand_ins: dict[str, Any], random_pipeline: Any) -> None:
    sample, context = torch.randn(2, 4, 16, 16), torch.randn(2, 154, 96)
    with torch.no_grad():
        truth = random_pipeline.unet(sample, 17, context).sample
    named = stand_ins["unet"](sample, 17, encoder_hidden_states=context).sample
    plain = stand_ins["unet"](sample.half(), torch.tensor(17), context.half(), return_dict=False)[0]
    assert ((named - truth).norm() / truth.norm()).item() < 1e-4
    assert plain.dtype == torch.float16
    assert ((plain.float() - truth).norm() / truth.norm()).item() < 1e-2


def test_what_a_graph_cannot_do_is_refused(stand_ins: dict[str, Any], fp32_export: Any, random_pipeline: Any) -> None:
    with pytest.raises(EngineError, match="output_hidden_states"):
        stand_ins["text_encoder"](torch.zeros(1, 77, dtype=torch.int64), output_hidden_states=True)
    with pytest.raises(EngineError, match="mid_block_additional_residual"):
        stand_ins["unet"](torch.randn(1, 4, 16, 16), 1, torch.randn(1, 77, 96), mid_block_additional_residual=torch.ones(1))
    with pytest.raises(EngineMismatch, match="text_embeds"):
        stand_ins["unet"](torch.randn(1, 4, 16, 16), 1, torch.randn(1, 77, 96), added_cond_kwargs={"text_embeds": torch.ones(1, 96)})
    with pytest.raises(EngineError, match="decoder only"):
        stand_ins["vae"].encode(torch.ones(1, 3, 64, 64))
    with pytest.raises(EngineMismatch, match="not a unet"):
        EngineUNet(open_runner(fp32_export.folder / "vae_decoder.onnx"), random_pipeline.unet.config)


def test_graphs_carry_their_signature(fp32_export: Any, random_pipeline: Any) -> None:
    configs = {"unet": dict(random_pipeline.unet.config), "text_encoder": random_pipeline.text_encoder.config.to_dict(), "vae_decoder": dict(random_pipeline.vae.config)}
    for component, config in configs.items():
        wanted = signature(component, config)
        with open_runner(fp32_export.folder / f"{component}.onnx") as runner:
            assert runner.inputs == wanted.inputs
            assert runner.outputs == wanted.outputs
