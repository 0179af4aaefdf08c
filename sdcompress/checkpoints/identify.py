"""What a single file is: a checkpoint of which family and configs, a LoRA, or something else.

What a file does not say (noise schedule, tokenizer, text encoder and VAE sizes) comes from the configs of its family;
the UNet's config comes from the shapes of its weights, so that students load as teachers do. Files that
`checkpoints.write` wrote carry their configs and need neither.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdcompress_engines.errors import ModelError

from sdcompress.checkpoints.ldm_keys import UNET, V_PREDICTION, VAE, ZERO_SNR
from sdcompress.checkpoints.weights import Weights
from sdcompress.families.registry import OTHER, family_of, published_families

if TYPE_CHECKING:
    pass
V_BIAS_SPREAD = 0.09  # between what epsilon and v-prediction training leave in SD2's last attention; ComfyUI's figure

_HEAD_WIDTH = 64  # of every attention head of SD2.x and SDXL; SD1.x has eight heads of any width

_SD1_HEADS = 8

_GROUPS = 32

_PARTS = {"unet": (UNET,), "vae": (VAE,), "text_encoder": ("cond_stage_model.", "conditioner.embedders.")}

CHECKPOINT, LORA, UNKNOWN = "a Stable Diffusion checkpoint", "a LoRA", "unknown weights"

# What else a weight file can be, by its keys; the first that fits.
_OTHERS = {
    LORA: re.compile(r"\.lora_(down|up|A|B)\.|\.lora\.(down|up)\.|\.lora_linear_layer\."),
    "a LoHa or LoKr adapter": re.compile(r"\.(hada_w1|lokr_w1)"),
    "a ControlNet": re.compile(r"^control_model\.|^controlnet_cond_embedding\.|(^|\.)input_hint_block\."),
    "a textual-inversion embedding": re.compile(r"^(emb_params|string_to_param|clip_[lg])$"),
    "a Stable Diffusion 3 transformer": re.compile(r"(^|\.)joint_blocks\.\d"),
    "a Flux transformer": re.compile(r"(^|\.)(double_blocks|single_transformer_blocks)\.\d"),
    "a UNet alone in diffusers' layout": re.compile(r"^(down_blocks\.\d+\.|time_embedding\.linear_1\.)"),
    "a UNet alone, without the prefix of a checkpoint": re.compile(r"^(input_blocks|output_blocks)\.\d"),
    "a VAE alone": re.compile(r"^(first_stage_model\.)?(en|de)coder\.(conv_in|down|up|mid)"),
    "a text encoder alone": re.compile(r"(^|\.)text_model\.encoder\.|(^|\.)transformer\.resblocks\.\d"),
}

_LORA_DOWN = re.compile(r"\.(lora_down|lora_A|lora\.down|lora_A\.default|lora_linear_layer\.down)\.weight$")


def kind_of(weights: Weights) -> str:
    """What a weight file is: `CHECKPOINT`, `LORA`, `a VAE alone`, ...; `unknown weights` where its keys do not tell."""
    if any(key.startswith(f"{UNET}input_blocks.") for key in weights.shapes):
        return CHECKPOINT
    return next(
        (name for name, pattern in _OTHERS.items() if any(pattern.search(key) for key in weights.shapes)), UNKNOWN
    )


def check_checkpoint(weights: Weights) -> None:
    """Refuse a file that is no whole Stable Diffusion checkpoint.

    Raises:
        ModelError: says what the file is, or what it lacks.
    """
    kind = kind_of(weights)
    if kind != CHECKPOINT:
        hint = "sdcompress generate MODEL PROMPT --lora FILE" if kind == LORA else None
        raise ModelError(
            f"is {kind}, no checkpoint: it has no UNet with VAE and text encoder",
            where=weights.path,
            expected="a Stable Diffusion checkpoint in LDM layout",
            hint=hint,
        )
    lacks = [
        name.replace("_", " ")
        for name, prefix in _PARTS.items()
        if not any(key.startswith(prefix) for key in weights.shapes)
    ]
    if lacks:
        raise ModelError(
            f"has no {' and no '.join(lacks)}",
            where=weights.path,
            expected="a Stable Diffusion checkpoint with UNet, VAE and text encoder",
        )


def component_parameters(weights: Weights) -> dict[str, int]:
    """Component → number of parameters the file holds of it; training's leftovers (EMA, loss, schedule) are not
    counted.
    """
    prefixes = dict(_PARTS)
    if any(key.startswith("conditioner.embedders.1.") for key in weights.shapes):
        prefixes |= {"text_encoder": ("conditioner.embedders.0.",), "text_encoder_2": ("conditioner.embedders.1.",)}
    return {
        name: sum(
            math.prod(shape)
            for key, shape in weights.shapes.items()
            if key.startswith(prefix) and "float" in weights.dtypes[key]
        )
        for name, prefix in prefixes.items()
    }


def lora_facts(weights: Weights) -> dict[str, Any]:
    """A LoRA's ranks, number of adapted layers, naming (`kohya` or `diffusers`), the components it changes, and what it
    was made for where it says so.
    """
    downs = {key: shape[0] for key, shape in weights.shapes.items() if _LORA_DOWN.search(key)}
    layers = {_LORA_DOWN.sub("", key) for key in downs}
    kohya = any(key.startswith("lora_") for key in layers)
    parts = {
        "unet": ("lora_unet_", "unet."),
        "text_encoder": ("lora_te_", "lora_te1_", "text_encoder."),
        "text_encoder_2": ("lora_te2_", "text_encoder_2."),
    }
    counts = {name: sum(key.startswith(prefixes) for key in layers) for name, prefixes in parts.items()}
    about = next(
        (
            weights.metadata[key]
            for key in ("ss_base_model", "ss_base_model_version", "ss_sd_model_name", "modelspec.architecture")
            if weights.metadata.get(key)
        ),
        None,
    )
    return {
        "rank": sorted(set(downs.values())),
        "layers": len(layers),
        "naming": "kohya" if kohya else "diffusers",
        "components": {name: count for name, count in counts.items() if count},
        "made_for": about,
    }


def unet_config_of(weights: Weights) -> dict[str, Any]:
    """The diffusers config of a checkpoint's UNet: the one it carries, else told by the shapes of its weights.

    Raises:
        ModelError: no Stable Diffusion UNet, or one of unusual widths whose heads the weights do not tell.
    """
    if weights.configs is not None:
        return dict(weights.configs["unet/config.json"])
    shapes = {key.removeprefix(UNET): shape for key, shape in weights.shapes.items() if key.startswith(UNET)}
    try:
        derived = _unet_from_shapes(shapes)
    except (KeyError, IndexError, StopIteration, ValueError) as error:
        raise ModelError(
            f"has a UNet unlike Stable Diffusion's ({error} is missing)",
            where=weights.path,
            expected="a UNet of SD1.x, SD2.x or SDXL, or a student of one",
        ) from error
    family = family_of(derived)
    if family is OTHER:
        raise ModelError(
            "has a UNet that is none of SD1.x, SD2.x and SDXL",
            where=weights.path,
            expected=", ".join(known.title for known in published_families().values()),
        )
    channels = derived["block_out_channels"]
    if any(width % _GROUPS for width in channels) or (
        family.attention_heads is None and any(width % family.attention_head_width for width in channels)
    ):
        raise ModelError(
            f"has a UNet of unusual widths {channels}: its heads and groups are not told by the weights",
            where=weights.path,
            hint="convert it to a diffusers folder with its own config",
        )
    derived["attention_head_dim"] = family.attention_head_dim(channels)
    if family.v_prediction_config and prediction_type(weights) == "v_prediction":
        derived |= family.v_prediction_config
    return family.read_config("unet/config.json") | derived


def _unet_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What a UNet's LDM weights say of its diffusers config.

    Within a level every entry is one resnet–attention pair; a sampler ends the level.
    """

    def depth(block: str) -> int:
        return len(
            {
                key.split(".")[len(block.split(".")) + 1]
                for key in shapes
                if key.startswith(f"{block}.transformer_blocks.")
            }
        )

    def count(side: str) -> int:
        return len({key.split(".")[1] for key in shapes if key.startswith(f"{side}.")})

    channels: list[int] = []
    down: list[list[int]] = [[]]
    for i in range(1, count("input_blocks")):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            down.append([])
        else:
            channels[len(down) - 1 :] = [shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0]]
            down[-1].append(depth(f"input_blocks.{i}.1"))
    up: list[list[int]] = [[]]
    for i in range(count("output_blocks")):
        up[-1].append(depth(f"output_blocks.{i}.1"))
        if any(f"output_blocks.{i}.{j}.conv.weight" in shapes for j in (1, 2)):
            up.append([])
    if len(down) != len(up):
        raise ValueError(f"{len(down)} levels down and {len(up)} up: a sampler")
    pairs = [len(level) for level in down]
    attended = [any(level) for level in down]
    config: dict[str, Any] = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": pairs[0] if len(set(pairs)) == 1 else pairs,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if any(level) else "UpBlock2D" for level in up],
        "mid_block_type": (
            "UNetMidBlock2DCrossAttn"
            if depth("middle_block.1")
            else "UNetMidBlock2D"
            if count("middle_block")
            else None
        ),
        "cross_attention_dim": next(
            shape[1] for key, shape in shapes.items() if key.endswith("transformer_blocks.0.attn2.to_k.weight")
        ),
        "use_linear_projection": (
            next(len(shape) for key, shape in shapes.items() if key.endswith(".1.proj_in.weight")) == 2
        ),
    }
    down_depths, up_depths = ([_depths(level) for level in side] for side in (down, up))
    config["transformer_layers_per_block"] = 1 if set(map(str, down_depths)) == {"1"} else down_depths
    if up_depths != down_depths[::-1]:
        config["reverse_transformer_layers_per_block"] = up_depths
    if "label_emb.0.0.weight" in shapes:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
        }
    return config


def _depths(level: list[int]) -> int | list[int]:
    """A level's numbers of transformer blocks as diffusers writes them: one figure where they are equal, 1 where there
    are none.
    """
    return max(level[0], 1) if len(set(level)) == 1 else level


def prediction_type(weights: Weights) -> str:
    """`epsilon` or `v_prediction`: from the config the file carries, its `v_pred` key or its metadata, else, for SD2.x,
    from its weights.

    SD2.x checkpoints of both kinds have equal shapes; in ComfyUI's published observation the bias of the last
    attention's first norm is spread more than 0.09 (population standard deviation) after training for v-prediction.
    """
    if weights.configs is not None:
        return str(weights.configs["scheduler/scheduler_config.json"].get("prediction_type", "epsilon"))
    said = weights.metadata.get("modelspec.prediction_type", "")
    if V_PREDICTION in weights.shapes or said in ("v", "v_prediction", "v-prediction"):
        return "v_prediction"
    if said == "epsilon" or not any(key.startswith("cond_stage_model.model.") for key in weights.shapes):
        return "epsilon"
    last = re.compile(r"model\.diffusion_model\.output_blocks\.(\d+)\.1\.transformer_blocks\.0\.norm1\.bias")
    found = {int(match[1]): key for key in weights.shapes if (match := last.fullmatch(key))}
    if not found:
        return "epsilon"
    return (
        "v_prediction"
        if weights.read(found[max(found)]).float().std(unbiased=False).item() > V_BIAS_SPREAD
        else "epsilon"
    )


def configs_of(weights: Weights) -> dict[str, dict[str, Any]]:
    """A pipeline folder's configs, relative path → content, as they hold for this checkpoint; no weights are loaded.

    Raises:
        ModelError: no whole Stable Diffusion checkpoint, or of no family that is known.
    """
    check_checkpoint(weights)
    if weights.configs is not None:
        return {name: dict(content) for name, content in weights.configs.items() if isinstance(content, dict)}
    unet = unet_config_of(weights)
    folder = family_of(unet).config_folder
    names = [
        path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.json")) if path.name != "vocab.json"
    ]
    configs: dict[str, dict[str, Any]] = {
        name: json.loads((folder / name).read_text(encoding="utf-8")) for name in names
    }
    scheduler = configs["scheduler/scheduler_config.json"]
    scheduler["prediction_type"] = prediction_type(weights)
    if ZERO_SNR in weights.shapes:
        if scheduler["_class_name"] == "PNDMScheduler":  # which cannot
            configs["model_index.json"]["scheduler"] = ["diffusers", "DDIMScheduler"]
            scheduler |= {"_class_name": "DDIMScheduler", "clip_sample": False}
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return configs | {"unet/config.json": unet}
