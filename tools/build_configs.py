"""Write `sdcompress/assets/configs`: the configs of SD1.x, SD2.x and SDXL that a single-file checkpoint lacks.

    pip download --no-deps open_clip_torch -d wheels
    python tools/build_configs.py wheels/open_clip_torch-*.whl

The configs hold the figures of the published architectures. Only values that differ from a class's default are
written. The tokenizer (`vocab.json`, `merges.txt`) is derived from the byte-pair list in the wheel, which is that of
OpenAI's CLIP. It is stored once, and all families share it.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[1] / "sdcompress/assets/configs"
MERGES = 48894
"""The pairs of the list's 262,145 that CLIP uses; with 2 × 256 byte tokens and two special ones they give 49,408."""
START, END = "<|startoftext|>", "<|endoftext|>"
NOTICE = """\
sd1/tokenizer/vocab.json and merges.txt are derived from the byte-pair list `bpe_simple_vocab_16e6.txt.gz` of OpenAI's
CLIP (MIT License, Copyright (c) 2021 OpenAI), as shipped in the Python package open_clip_torch {version}, under the
license below. The configs beside them state the published shapes of the Stable Diffusion 1.x, 2.x and XL architectures;
they hold no weights.

"""

BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}
ATTENTION, PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def unet(
    channels: list[int],
    attention: list[bool],
    *,
    context: int,
    heads: int | list[int],
    linear: bool,
    sample_size: int,
    **more: Any,
) -> dict[str, Any]:
    """Returns the config of a UNet2DConditionModel.

    Args:
        channels: of each level, outermost first.
        attention: whether each level has attention.
        context: width of the text embeddings.
        heads: of each attention, for all levels or level by level.
        linear: whether attentions project by linear layers, not by 1×1 convolutions.
        sample_size: side of the latents.
        more: further entries.
    """
    kinds = [ATTENTION if has else PLAIN for has in attention]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": channels,
        "layers_per_block": 2,
        "down_block_types": [kind.format("Down") for kind in kinds],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": [kind.format("Up") for kind in reversed(kinds)],
        "cross_attention_dim": context,
        "attention_head_dim": heads,
        "use_linear_projection": linear,
        "norm_num_groups": 32,
    } | more


def vae(sample_size: int, scaling_factor: float) -> dict[str, Any]:
    """Returns the config of an AutoencoderKL of scale factor 8 with four latent channels."""
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": sample_size,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "scaling_factor": scaling_factor,
    }


def text_encoder(
    class_name: str, width: int, layers: int, heads: int, activation: str, projection: int
) -> dict[str, Any]:
    """Returns the config of a CLIP text encoder.

    Args:
        class_name: of transformers.
        width, layers, heads: of the encoder.
        activation: `quick_gelu` (OpenAI's) or `gelu` (OpenCLIP's).
        projection: width of the projected output.
    """
    return {
        "architectures": [class_name],
        "model_type": "clip_text_model",
        "vocab_size": MERGES + 2 * 256 + 2,
        "max_position_embeddings": 77,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "hidden_act": activation,
        "projection_dim": projection,
        "bos_token_id": MERGES + 2 * 256,
        "eos_token_id": MERGES + 2 * 256 + 1,
        "pad_token_id": 1,
    }


def tokenizer(pad: str) -> dict[str, Any]:
    """Returns the config of a CLIPTokenizer.

    OpenAI's text encoder was trained on text padded with the end token, OpenCLIP's on token 0, `!`.
    """
    return {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad,
    }


def index(class_name: str, scheduler: str, **more: Any) -> dict[str, Any]:
    """Returns the model_index.json of a pipeline.

    Args:
        class_name: of the pipeline.
        scheduler: class of the scheduler.
        more: further entries.
    """
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler],
    }
    return (
        {
            "_class_name": class_name,
            "_diffusers_version": "0.42.0",
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
        }
        | parts
        | more
    )


Configs = dict[str, dict[str, Any]]
"""Relative path → content."""

SD_INDEX = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
OPENAI_ENCODER = text_encoder("CLIPTextModel", 768, 12, 12, "quick_gelu", 768)


def sd1() -> Configs:
    """Returns the configs of Stable Diffusion 1.x."""
    return {
        "model_index.json": index("StableDiffusionPipeline", "PNDMScheduler", **SD_INDEX),
        "unet/config.json": unet(
            [320, 640, 1280, 1280], [True, True, True, False], context=768, heads=8, linear=False, sample_size=64
        ),
        "vae/config.json": vae(512, 0.18215),
        "text_encoder/config.json": OPENAI_ENCODER,
        "tokenizer/tokenizer_config.json": tokenizer(END),
        "scheduler/scheduler_config.json": (
            {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False} | BETAS
        ),
    }


def sd2() -> Configs:
    """Returns the configs of Stable Diffusion 2.x."""
    return {
        "model_index.json": index("StableDiffusionPipeline", "DDIMScheduler", **SD_INDEX),
        "unet/config.json": unet(
            [320, 640, 1280, 1280],
            [True, True, True, False],
            context=1024,
            heads=[5, 10, 20, 20],
            linear=True,
            sample_size=64,
        ),
        "vae/config.json": vae(512, 0.18215),
        # The 24th layer of OpenCLIP's encoder never runs: SD2 uses the output of the layer before.
        "text_encoder/config.json": text_encoder("CLIPTextModel", 1024, 23, 16, "gelu", 512),
        "tokenizer/tokenizer_config.json": tokenizer("!"),
        "scheduler/scheduler_config.json": (
            {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False} | BETAS
        ),
    }


def sdxl() -> Configs:
    """Returns the configs of Stable Diffusion XL."""
    return {
        "model_index.json": index(
            "StableDiffusionXLPipeline",
            "EulerDiscreteScheduler",
            text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
            tokenizer_2=["transformers", "CLIPTokenizer"],
            force_zeros_for_empty_prompt=True,
        ),
        "unet/config.json": unet(
            [320, 640, 1280],
            [False, True, True],
            context=2048,
            heads=[5, 10, 20],
            linear=True,
            sample_size=128,
            transformer_layers_per_block=[1, 2, 10],
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        "vae/config.json": vae(1024, 0.13025),
        "text_encoder/config.json": OPENAI_ENCODER,
        "text_encoder_2/config.json": text_encoder("CLIPTextModelWithProjection", 1280, 32, 20, "gelu", 1280),
        "tokenizer/tokenizer_config.json": tokenizer(END),
        "tokenizer_2/tokenizer_config.json": tokenizer("!"),
        "scheduler/scheduler_config.json": {"_class_name": "EulerDiscreteScheduler"} | BETAS,
    }


FAMILIES = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl}


def byte_letters() -> Iterator[str]:
    """Yield the printable letter that stands for each byte in CLIP's vocabulary.

    It is the byte itself where that is printable, else a letter from U+0100 on. Printable bytes come first.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    yield from map(chr, printable)
    yield from (chr(256 + i) for i in range(256 - len(printable)))


def write_tokenizer(merges: list[str]) -> None:
    """Write the vocabulary and the merges of CLIP's tokenizer.

    Args:
        merges: the byte pairs, the most frequent first.
    """
    letters = list(byte_letters())
    words = [f"{letter}</w>" for letter in letters]
    tokens = [*letters, *words, *("".join(line.split()) for line in merges), START, END]
    folder = TARGET / "sd1/tokenizer"
    (folder / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False, separators=(",", ":")),
        encoding="utf-8",
    )
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def main(wheel: Path) -> None:
    """Write all files from the figures above and the wheel of open_clip_torch."""
    with zipfile.ZipFile(wheel) as archive:
        lines = gzip.decompress(archive.read("open_clip/bpe_simple_vocab_16e6.txt.gz")).decode().splitlines()
        license_text = archive.read(next(name for name in archive.namelist() if name.endswith("LICENSE"))).decode()
    shutil.rmtree(TARGET, ignore_errors=True)
    for family, configs in FAMILIES.items():
        for name, content in configs().items():
            path = TARGET / family / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    write_tokenizer(lines[1 : MERGES + 1])
    (TARGET / "NOTICE").write_text(NOTICE.format(version=wheel.name.split("-")[1]) + license_text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
