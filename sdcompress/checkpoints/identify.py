"""What a weight file is: a Stable Diffusion checkpoint, a LoRA, or something else."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from sdcompress_engines.errors import ModelError

from sdcompress.checkpoints.ldm_keys import UNET, VAE
from sdcompress.checkpoints.weights import Weights
from sdcompress.families.family import Family
from sdcompress.families.registry import families

CHECKPOINT, LORA, UNKNOWN = "a Stable Diffusion checkpoint", "a LoRA", "unknown weights"

_LORA_KEY = re.compile(
    r"\.lora_(down|up|A|B)\.|[._]lora\.(down|up)\.|\.lora_linear_layer\.|\.(hada|lokr)_w[12](_[ab])?$|\.diff$"
)
# Other kinds of weight files, by their keys. The first that matches is taken.
_OTHER_KINDS = {
    LORA: _LORA_KEY,
    "an OFT, IA3 or GLoRA adapter": re.compile(r"\.(oft_blocks|oft_diag|b?oft_[rR]|on_input|ia3_l|a1\.weight)(\.|$)"),
    "a ControlNet": re.compile(r"^control_model\.|^controlnet_cond_embedding\.|(^|\.)input_hint_block\."),
    "a textual-inversion embedding": re.compile(r"^(emb_params|string_to_param|clip_[lg])$"),
    "a Stable Diffusion 3 transformer": re.compile(r"(^|\.)joint_blocks\.\d"),
    "a Flux transformer": re.compile(r"(^|\.)(double_blocks|single_transformer_blocks)\.\d"),
    "a UNet alone in diffusers' layout": re.compile(r"^(down_blocks\.\d+\.|time_embedding\.linear_1\.)"),
    "a UNet alone, without the prefix of a checkpoint": re.compile(r"^(input_blocks|output_blocks)\.\d"),
    "a VAE alone": re.compile(r"^(first_stage_model\.)?(en|de)coder\.(conv_in|down|up|mid)"),
    "a text encoder alone": re.compile(r"(^|\.)text_model\.encoder\.|(^|\.)transformer\.resblocks\.\d"),
}


def identify_weights(weights: Weights) -> str:
    """Returns what a weight file is: `CHECKPOINT`, `LORA`, `a VAE alone`, ...; `UNKNOWN` where no key is known."""
    # A LoRA may name its layers as a checkpoint does.
    if any(key.startswith(f"{UNET}input_blocks.") and not _LORA_KEY.search(key) for key in weights.shapes):
        return CHECKPOINT
    return next(
        (name for name, pattern in _OTHER_KINDS.items() if any(pattern.search(key) for key in weights.shapes)), UNKNOWN
    )


def check_checkpoint(weights: Weights) -> None:
    """Refuse a file that is no whole Stable Diffusion checkpoint.

    Raises:
        ModelError: names what the file is, or what it lacks.
    """
    kind = identify_weights(weights)
    if kind != CHECKPOINT:
        hint = "sdcompress generate MODEL PROMPT --lora FILE" if kind == LORA else None
        raise ModelError(
            f"holds {kind}, not a checkpoint with UNet, VAE and text encoder",
            where=weights.path,
            expected="a Stable Diffusion checkpoint in LDM layout",
            hint=hint,
        )
    text_prefixes = tuple(prefix for family in families().values() for prefix in family.checkpoint_prefixes.values())
    prefixes = {"unet": (UNET,), "vae": (VAE,), "text encoder": text_prefixes}
    missing = [name for name, starts in prefixes.items() if not any(key.startswith(starts) for key in weights.shapes)]
    if missing:
        raise ModelError(
            f"has no {' and no '.join(missing)}",
            where=weights.path,
            expected="a Stable Diffusion checkpoint with UNet, VAE and text encoder",
        )


def count_component_parameters(weights: Weights, family: Family) -> dict[str, int]:
    """Returns component → number of its parameters in a checkpoint.

    What training leaves beside the model (EMA copy, loss, schedule) is not counted.

    Args:
        weights: of the checkpoint.
        family: of its UNet; its text encoders are counted one by one.
    """
    prefixes: Mapping[str, str] = {"unet": UNET, "vae": VAE, **family.checkpoint_prefixes}
    return {
        name: sum(
            math.prod(shape)
            for key, shape in weights.shapes.items()
            if key.startswith(prefix) and "float" in weights.dtypes[key]
        )
        for name, prefix in prefixes.items()
    }
