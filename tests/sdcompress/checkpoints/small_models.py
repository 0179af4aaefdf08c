"""Small models in the layouts of SD1, SD2 and SDXL, and full-size checkpoints that are headers alone."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from sdcompress.checkpoints.ldm_keys import UNET
from sdcompress.checkpoints.write import ldm_state_dict
from sdcompress.families.configs import CONFIGS
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import meta_unet
from sdcompress.support.quiet import quiet

Dialect = Callable[[dict[str, torch.Tensor]], dict[str, Any]]


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def fill(*parts: nn.Module) -> None:
    """Set one-dimensional weights to random values, so that each changes the output."""
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


def outputs(pipeline: Any) -> dict[str, torch.Tensor]:
    """Returns the outputs of the UNet, the text encoders and both halves of the VAE for one fixed input."""
    generator = torch.Generator().manual_seed(3)
    results: dict[str, torch.Tensor] = {}
    text_encoders = [e for e in (pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)) if e is not None]
    with torch.no_grad():
        for i, encoder in enumerate(text_encoders):
            tokens = torch.randint(0, encoder.config.vocab_size, (2, 12), generator=generator)
            found = encoder(tokens, output_hidden_states=True)
            results |= {
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
        results["unet"] = pipeline.unet(sample, torch.tensor([3, 700]), context, **extra).sample
        pictures = torch.randn(1, 3, 32, 32, generator=generator)
        latents = pipeline.vae.encode(pictures).latent_dist.mean
        results |= {"vae encoder": latents, "vae decoder": pipeline.vae.decode(latents).sample}
    return results


def assert_equal(one: Any, other: Any) -> None:
    first, second = outputs(one), outputs(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def by_diffusers(file: Path, folder: Path, kind: str = "StableDiffusionPipeline") -> Any:
    """Returns the pipeline that diffusers alone loads from the file, with the configs in `folder`."""
    import diffusers

    with quiet():
        pipeline = getattr(diffusers, kind).from_single_file(str(file), config=str(folder), local_files_only=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return pipeline


def with_unet(pipeline: Any, unet: Any) -> Any:
    return type(pipeline)(**(pipeline.components | {"unet": unet}), requires_safety_checker=False)


def write_bare(pipeline: Any, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write LDM weights alone, without configs, as checkpoint sites offer them."""
    save_file({k: v.to(dtype).contiguous().clone() for k, v in ldm_state_dict(pipeline).items()}, path)
    return path


def unets(part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in part.items() if key.startswith(UNET)}


def whole(family: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / family / "unet/config.json").read_text())
    return config


@cache
def full_size(family: str, preset: str | None = None) -> dict[str, tuple[int, ...]]:
    """Returns LDM key → shape of a full-size checkpoint of a family, or of a student with this preset."""
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
    scheduler = diffusers.DDIMScheduler(**BETAS, steps_offset=1, clip_sample=False)
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
    """Write a float16 safetensors file of these shapes, zero except for `values`; zeros take no disk space."""
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


def kohya_lora() -> dict[str, torch.Tensor]:
    """Returns a LoRA of rank 4 for one layer, in kohya's naming."""
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    return {
        f"{name}.lora_down.weight": torch.zeros(4, 8),
        f"{name}.lora_up.weight": torch.zeros(8, 4),
        f"{name}.alpha": torch.tensor(4.0),
    }


def diffusers_lora() -> dict[str, torch.Tensor]:
    """Returns a LoRA of rank 4 for one layer, in diffusers' naming."""
    return {
        "unet.down_blocks.0.attentions.0.to_q.lora_A.weight": torch.zeros(4, 8),
        "unet.down_blocks.0.attentions.0.to_q.lora_B.weight": torch.zeros(8, 4),
    }
