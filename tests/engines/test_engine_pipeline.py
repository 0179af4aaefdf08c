"""diffusers makes the same picture with runners in place of its modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sdcompress_engines.errors import EngineError, EngineMismatch
from sdcompress_engines.exactness import relative_l2
from sdcompress_engines.progress import Reporter
from sdcompress_engines.runners import TensorSpec, TorchRunner, open_runner
from sdcompress_engines.signature import signature
from sdcompress_engines.text_encoders import EngineTextEncoder, EngineTextEncoderWithProjection
from sdcompress_engines.unet import EngineUNet
from sdcompress_engines.vae import EngineVaeDecoder


@pytest.fixture(scope="module")
def stand_ins(random_pipeline: Any, fp32_export: Any) -> dict[str, Any]:
    folder = fp32_export.folder
    return {
        "unet": EngineUNet(open_runner(folder / "unet.onnx"), random_pipeline.unet.config),
        "text_encoder": EngineTextEncoder(
            open_runner(folder / "text_encoder.onnx"), random_pipeline.text_encoder.config.to_dict()
        ),
        "vae": EngineVaeDecoder(open_runner(folder / "vae_decoder.onnx"), random_pipeline.vae.config),
    }


@pytest.fixture(scope="module")
def engine_pipeline(random_pipeline: Any, stand_ins: dict[str, Any]) -> Any:
    from diffusers import StableDiffusionPipeline

    made = StableDiffusionPipeline(
        **stand_ins,
        tokenizer=random_pipeline.tokenizer,
        scheduler=type(random_pipeline.scheduler).from_config(random_pipeline.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("output_type", ["latent", "np"])
def test_the_same_latents_and_pictures_as_torch(random_pipeline: Any, engine_pipeline: Any, output_type: str) -> None:
    found, truth = (
        torch.as_tensor(
            made(
                ["a cat", "two dogs"],
                num_inference_steps=3,
                guidance_scale=5.0,
                height=128,
                width=64,
                output_type=output_type,
                generator=torch.Generator().manual_seed(1),
            ).images
        )
        for made in (engine_pipeline, random_pipeline)
    )
    assert found.shape == truth.shape
    assert truth.std() > 0.01
    assert relative_l2(found, truth) < 1e-3


def test_the_pipeline_sees_its_modules(engine_pipeline: Any) -> None:
    assert engine_pipeline.device == torch.device("cpu")
    assert engine_pipeline.dtype == torch.float32
    assert engine_pipeline.vae_scale_factor == 8
    assert engine_pipeline.unet.config.in_channels == engine_pipeline.unet.config["in_channels"] == 4


def test_a_unet_takes_numbers_and_answers_in_the_dtype_it_was_asked_in(
    stand_ins: dict[str, Any], random_pipeline: Any
) -> None:
    sample, context = torch.randn(2, 4, 16, 16), torch.randn(2, 154, 96)
    with torch.no_grad():
        truth = random_pipeline.unet(sample, 17, context).sample
    named = stand_ins["unet"](sample, 17, encoder_hidden_states=context).sample
    plain = stand_ins["unet"](sample.half(), torch.tensor(17), context.half(), return_dict=False)[0]
    assert relative_l2(named, truth) < 1e-4
    assert plain.dtype == torch.float16
    assert relative_l2(plain, truth) < 1e-2


def test_what_a_graph_cannot_do_is_refused(stand_ins: dict[str, Any], fp32_export: Any, random_pipeline: Any) -> None:
    with pytest.raises(EngineError, match="attention_mask"):
        stand_ins["text_encoder"](torch.zeros(1, 77, dtype=torch.int64), torch.ones(1, 77))
    with pytest.raises(EngineError, match="mid_block_additional_residual"):
        stand_ins["unet"](
            torch.randn(1, 4, 16, 16), 1, torch.randn(1, 77, 96), mid_block_additional_residual=torch.ones(1)
        )
    with pytest.raises(EngineMismatch, match="takes no text_embeds"):
        stand_ins["unet"](
            torch.randn(1, 4, 16, 16), 1, torch.randn(1, 77, 96), added_cond_kwargs={"text_embeds": torch.ones(1, 96)}
        )
    with pytest.raises(EngineError, match="decoder only"):
        stand_ins["vae"].encode(torch.ones(1, 3, 64, 64))
    with pytest.raises(EngineMismatch, match="not a unet"):
        EngineUNet(open_runner(fp32_export.folder / "vae_decoder.onnx"), random_pipeline.unet.config)


def test_clip_skip_is_an_error_that_names_it(engine_pipeline: Any) -> None:
    with pytest.raises(EngineError, match="clip_skip"):
        engine_pipeline("a cat", num_inference_steps=1, clip_skip=1, height=64, width=64)


def test_graphs_carry_their_signature(fp32_export: Any, random_pipeline: Any) -> None:
    configs = {
        "unet": dict(random_pipeline.unet.config),
        "text_encoder": random_pipeline.text_encoder.config.to_dict(),
        "vae_decoder": dict(random_pipeline.vae.config),
    }
    for component, config in configs.items():
        wanted = signature(component, config)
        with open_runner(fp32_export.folder / f"{component}.onnx") as runner:
            assert runner.inputs == wanted.inputs
            assert runner.outputs == wanted.outputs


class Call(torch.nn.Module):
    """A module called as its graph is: by position, answering with the graph's outputs in a tuple."""

    def __init__(self, module: torch.nn.Module, call: Any) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.call(self.module, *tensors)  # type: ignore[no-any-return]


def runner_of(component: str, module: torch.nn.Module, config: Any, call: Any, without: str = "") -> TorchRunner:
    wanted = signature(component, config)
    inputs = tuple(spec for spec in wanted.inputs if spec.name != "y")
    return TorchRunner(Call(module, call), inputs, tuple(spec for spec in wanted.outputs if spec.name != without))


def text_call(module: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    out = module(ids, output_hidden_states=True)
    return out.last_hidden_state, out.pooler_output, out.hidden_states[-2]


def projecting_call(module: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    out = module(ids, output_hidden_states=True)
    return out.text_embeds, out.last_hidden_state, out.hidden_states[-2]


def unet_call(
    module: Any, sample: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, *added: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return (
        module(
            sample,
            timestep,
            context,
            added_cond_kwargs=dict(zip(("text_embeds", "time_ids"), added, strict=False)) or None,
        ).sample,
    )


def relative(output: Any, reference: Any) -> float:
    return relative_l2(torch.as_tensor(output), torch.as_tensor(reference))


@pytest.fixture(scope="module")
def sdxl(random_pipeline: Any) -> Any:
    """SDXL's classes at small widths, random weights; its VAE says `force_upcast`, as SDXL's does."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(11)
    count = len(random_pipeline.tokenizer)
    text = {
        "vocab_size": count,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "bos_token_id": count - 2,
        "eos_token_id": count - 1,
        "pad_token_id": count - 1,
    }
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32 + 48,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 40,
    )
    vae = copy.deepcopy(random_pipeline.vae)
    vae.register_to_config(force_upcast=True)
    made = StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        tokenizer=random_pipeline.tokenizer,
        tokenizer_2=random_pipeline.tokenizer,
        scheduler=DDIMScheduler(),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=32, **text)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=48, projection_dim=40, **text)),
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def sdxl_stand_ins(sdxl: Any) -> dict[str, Any]:
    configs = {
        "text_encoder": sdxl.text_encoder.config.to_dict(),
        "text_encoder_2": sdxl.text_encoder_2.config.to_dict(),
    }
    encoder = runner_of(
        "vae_encoder", sdxl.vae, sdxl.vae.config, lambda vae, picture: (vae.encode(picture).latent_dist.parameters,)
    )
    decoder = runner_of("vae_decoder", sdxl.vae, sdxl.vae.config, lambda vae, latents: (vae.decode(latents).sample,))
    return {
        "unet": EngineUNet(runner_of("unet", sdxl.unet, sdxl.unet.config, unet_call), sdxl.unet.config),
        "text_encoder": EngineTextEncoder(
            runner_of("text_encoder", sdxl.text_encoder, configs["text_encoder"], text_call), configs["text_encoder"]
        ),
        "text_encoder_2": EngineTextEncoderWithProjection(
            runner_of("text_encoder_2", sdxl.text_encoder_2, configs["text_encoder_2"], projecting_call),
            configs["text_encoder_2"],
        ),
        "vae": EngineVaeDecoder(decoder, sdxl.vae.config, encoder=encoder),
    }


def around(pipeline: Any, kind: Any, stand_ins: dict[str, Any]) -> Any:
    parts = {
        "tokenizer": pipeline.tokenizer,
        "tokenizer_2": pipeline.tokenizer_2,
        "scheduler": type(pipeline.scheduler).from_config(pipeline.scheduler.config),
    }
    made = kind(**parts, **stand_ins, add_watermarker=False)
    made.set_progress_bar_config(disable=True)
    return made


def test_sdxl_encodes_prompts_and_draws_as_torch_does(sdxl: Any, sdxl_stand_ins: dict[str, Any]) -> None:
    from diffusers import StableDiffusionXLPipeline

    engines = around(sdxl, StableDiffusionXLPipeline, sdxl_stand_ins)
    with torch.no_grad():
        found, truth = (
            made.encode_prompt(["a cat", "two dogs"], negative_prompt=["", "blur"]) for made in (engines, sdxl)
        )
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, truth, strict=True))
    options = {"num_inference_steps": 2, "height": 128, "width": 64, "guidance_scale": 5.0, "output_type": "np"}
    pictures = [
        made(["a cat", "two dogs"], generator=torch.Generator().manual_seed(1), **options).images
        for made in (engines, sdxl)
    ]
    assert pictures[1].std() > 0.01
    assert relative(*pictures) < 1e-4


def test_sdxl_changes_a_picture_as_torch_does(sdxl: Any, sdxl_stand_ins: dict[str, Any]) -> None:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    plain = {name: getattr(sdxl, name) for name in sdxl_stand_ins}
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    pictures = [
        around(sdxl, StableDiffusionXLImg2ImgPipeline, parts)(
            "a cat",
            image=picture,
            num_inference_steps=4,
            strength=0.5,
            generator=torch.Generator().manual_seed(2),
            output_type="np",
        ).images
        for parts in (sdxl_stand_ins, plain)
    ]
    assert pictures[1].std() > 0.01
    assert relative(*pictures) < 1e-4


def test_a_half_precision_vae_that_asks_for_fp32_is_run_as_it_was_exported(
    sdxl: Any, sdxl_stand_ins: dict[str, Any]
) -> None:
    from diffusers import StableDiffusionXLPipeline

    vae = copy.deepcopy(sdxl.vae).half()
    wanted = signature("vae_decoder", vae.config, torch.float16)
    decoder = TorchRunner(Call(vae, lambda vae, latents: (vae.decode(latents).sample,)), wanted.inputs, wanted.outputs)
    made = around(sdxl, StableDiffusionXLPipeline, {**sdxl_stand_ins, "vae": EngineVaeDecoder(decoder, vae.config)})
    assert made.vae.dtype == torch.float16
    assert vae.config.force_upcast
    assert made("a cat", num_inference_steps=1, height=64, width=64, output_type="np").images.shape == (1, 64, 64, 3)


def test_only_the_hidden_state_that_the_graph_has_is_given(sdxl: Any, sdxl_stand_ins: dict[str, Any]) -> None:
    ids = torch.randint(0, 90, (2, 77))
    with torch.no_grad():
        truth = sdxl.text_encoder_2(ids, output_hidden_states=True)
    found = sdxl_stand_ins["text_encoder_2"](ids, output_hidden_states=True)
    assert len(found.hidden_states) == len(truth.hidden_states) == 4
    assert torch.equal(found.hidden_states[-2], truth.hidden_states[-2])
    assert torch.equal(found.hidden_states[2], truth.hidden_states[2])
    assert torch.equal(found[0], truth.text_embeds)
    for index in (-1, -3, 0, 3):
        with pytest.raises(EngineError, match="clip_skip"):
            found.hidden_states[index]
    assert sdxl_stand_ins["text_encoder_2"](ids).hidden_states is None


def test_a_text_encoder_without_hidden_states_serves_all_but_what_asks_for_them(sdxl: Any) -> None:
    config = sdxl.text_encoder.config.to_dict()
    old = EngineTextEncoder(
        runner_of(
            "text_encoder",
            sdxl.text_encoder,
            config,
            lambda module, ids: text_call(module, ids)[:2],
            without="penultimate_hidden_state",
        ),
        config,
    )
    ids = torch.randint(0, 90, (1, 77))
    last, pooled = old(ids)
    with torch.no_grad():
        truth = sdxl.text_encoder(ids)
    assert torch.equal(last, truth.last_hidden_state)
    assert torch.equal(pooled, truth.pooler_output)
    with pytest.raises(EngineError, match=r"gives no hidden states.*export it again"):
        old(ids, output_hidden_states=True)
    with pytest.raises(EngineMismatch, match=r"not a text_encoder_2.*text_embeds"):
        EngineTextEncoderWithProjection(old.runner, config)


class Said(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def show_line(self, text: str) -> None:
        self.lines.append(text)


def test_a_shape_the_engine_was_not_built_for_runs_in_torch_where_that_was_asked_for(random_pipeline: Any) -> None:
    wanted = signature("unet", random_pipeline.unet.config)
    fixed = tuple(
        TensorSpec(spec.name, tuple({"height": 8, "width": 8}.get(str(size), size) for size in spec.shape), spec.dtype)
        for spec in wanted.inputs
    )
    runner = TorchRunner(Call(random_pipeline.unet, unet_call), fixed, wanted.outputs)
    made, said = [], Said()

    def fallback() -> torch.nn.Module:
        made.append(copy.deepcopy(random_pipeline.unet))
        return made[-1]  # type: ignore[no-any-return]

    unet = EngineUNet(runner, random_pipeline.unet.config, fallback=fallback, report=said)
    context = torch.randn(2, 77, 96)
    for side in (8, 16, 8, 24):
        sample = torch.randn(2, 4, side, side)
        with torch.no_grad():
            truth = random_pipeline.unet(sample, 7, context).sample
        assert relative(unet(sample.half(), 7, context).sample.float(), truth) < 1e-2
        assert len(made) == len(said.lines) == (side != 8 or len(made))
    assert "falling back to torch" in said.lines[0]
    assert "(2, 4, 16, 16)" in said.lines[0]
    assert not list(unet.parameters())
    with pytest.raises(EngineMismatch, match="needs encoder_hidden_states, timestep too"):
        unet.graph.feeds(sample=torch.randn(2, 4, 8, 8))
    with pytest.raises(EngineMismatch, match=r"shape \(2, 4, 16, 16\)"):
        EngineUNet(runner, random_pipeline.unet.config)(torch.randn(2, 4, 16, 16), 7, context)
    unet.close()
    with pytest.raises(EngineError, match="not open"):
        unet(torch.randn(2, 4, 8, 8), 7, context)
