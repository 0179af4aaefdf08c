"""The diffusers configs of a single-file checkpoint.

The UNet's config comes from the shapes of its weights, so that students load as teachers do. Noise schedule, tokenizer
and the sizes of text encoder and VAE are not in the file; they come from the published configs of its family. Files
that `checkpoints.write` wrote carry all their configs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import ModelError

from sdcompress.checkpoints.identify import check_checkpoint
from sdcompress.checkpoints.ldm_keys import EDM, UNET, V_PREDICTION, ZERO_SNR
from sdcompress.checkpoints.unet_shapes import derive_config_from_shapes
from sdcompress.checkpoints.weights import Weights
from sdcompress.families.family import Family
from sdcompress.families.registry import OTHER, family_of, published_families
from sdcompress.families.schemas.check import check_config, config_file
from sdcompress.families.schemas.index import check_index, component_classes

V_BIAS_SPREAD = 0.09
"""Separates epsilon from v-prediction training in the bias of SD2's last attention; ComfyUI's figure."""

_GROUPS = 32  # of every group norm of a published UNet
_LAST_BIAS = re.compile(r"model\.diffusion_model\.output_blocks\.(\d+)\.1\.transformer_blocks\.0\.norm1\.bias")


def derive_unet_config(weights: Weights) -> dict[str, Any]:
    """Returns the diffusers config of a checkpoint's UNet: the one in the file, else the one its shapes imply.

    Raises:
        ModelError: the file has no Stable Diffusion UNet, or one of unusual widths, whose heads the shapes do not
            determine.
    """
    if weights.configs is not None:
        return check_config("unet", weights.configs["unet/config.json"], f"{weights.path}/unet/config.json")
    shapes = {key.removeprefix(UNET): shape for key, shape in weights.shapes.items() if key.startswith(UNET)}
    try:
        derived = derive_config_from_shapes(shapes)
    except (KeyError, IndexError, StopIteration, ValueError) as error:
        reason = (
            "no cross-attention"
            if isinstance(error, StopIteration)
            else "an unknown structure"
            if isinstance(error, IndexError)
            else f"{error} is missing"
        )
        raise ModelError(
            f"has a UNet unlike Stable Diffusion's ({reason})",
            where=weights.path,
            expected="a UNet of SD1.x, SD2.x or SDXL, or a student of one",
        ) from error
    family = _require_published_family(derived, weights)
    channels = derived["block_out_channels"]
    if any(width % _GROUPS for width in channels) or (
        family.attention_heads is None and any(width % family.attention_head_width for width in channels)
    ):
        raise ModelError(
            f"has a UNet of unusual widths {channels}: the weights do not determine its heads and groups",
            where=weights.path,
            hint="convert it to a diffusers folder with its own config",
        )
    derived["attention_head_dim"] = family.attention_head_dim(channels)
    if family.v_prediction_config and detect_prediction_type(weights, family) == "v_prediction":
        derived |= family.v_prediction_config
    return family.read_config("unet/config.json") | derived


def _require_published_family(unet_config: dict[str, Any], weights: Weights) -> Family:
    """Returns the family of a UNet that carries no configs.

    Raises:
        ModelError: it has none, or one whose configs the package does not hold.
    """
    family = family_of(unet_config)
    if not family.config_folder.is_dir():
        kind = "of an unknown kind" if family is OTHER else f"of {family.title}, whose configs this package lacks"
        raise ModelError(
            f"has a UNet {kind}",
            where=weights.path,
            expected=", ".join(known.title for known in published_families().values()),
        )
    return family


def detect_prediction_type(weights: Weights, family: Family) -> str:
    """Returns `epsilon` or `v_prediction`.

    It is read from the configs in the file, from its `v_pred` key or from its metadata. Without these, a family whose
    checkpoints are of both kinds is judged by its weights: in ComfyUI's published observation, the bias of the last
    attention's first norm is spread more than 0.09 (population standard deviation) after training for v-prediction.

    Args:
        weights: of the checkpoint.
        family: of its UNet.
    """
    if weights.configs is not None:
        return str(weights.configs["scheduler/scheduler_config.json"].get("prediction_type", "epsilon"))
    stated = weights.metadata.get("modelspec.prediction_type", "")
    if V_PREDICTION in weights.shapes or stated in ("v", "v_prediction", "v-prediction"):
        return "v_prediction"
    biases = {int(match[1]): key for key in weights.shapes if (match := _LAST_BIAS.fullmatch(key))}
    if stated == "epsilon" or not family.v_prediction_config or not biases:
        return "epsilon"
    spread = weights.read(biases[max(biases)]).float().std(unbiased=False).item()
    return "v_prediction" if spread > V_BIAS_SPREAD else "epsilon"


def derive_configs(weights: Weights) -> dict[str, dict[str, Any]]:
    """Returns the configs of a checkpoint's pipeline folder, relative path → content; no weights are loaded.

    Raises:
        ModelError: the file is no whole Stable Diffusion checkpoint, its family is unknown, or it has another noise
            schedule than its family.
    """
    check_checkpoint(weights)
    if weights.configs is not None:
        return _check_all(weights.configs, weights.path)
    if marks := [key for key in EDM if key in weights.shapes]:
        raise ModelError(
            f"is trained with the noise schedule of EDM ({marks[0]})",
            where=weights.path,
            expected="one with the noise schedule of Stable Diffusion",
            hint="generate with the diffusers folder of this model",
        )
    unet = derive_unet_config(weights)
    family = family_of(unet)
    folder = family.config_folder
    names = [
        path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.json")) if path.name != "vocab.json"
    ]
    configs: dict[str, dict[str, Any]] = {
        name: json.loads((folder / name).read_text(encoding="utf-8")) for name in names
    }
    scheduler = configs["scheduler/scheduler_config.json"]
    scheduler["prediction_type"] = detect_prediction_type(weights, family)
    if ZERO_SNR in weights.shapes:
        if scheduler["_class_name"] == "PNDMScheduler":  # it cannot rescale to zero SNR
            configs["model_index.json"]["scheduler"] = ["diffusers", "DDIMScheduler"]
            scheduler |= {"_class_name": "DDIMScheduler", "clip_sample": False}
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return _check_all(configs | {"unet/config.json": unet}, weights.path)


def _check_all(configs: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Returns the configs that are objects, with the known entries of the pipeline's index and of its components."""
    checked = {name: dict(content) for name, content in configs.items() if isinstance(content, dict)}
    checked["model_index.json"] = index = check_index(checked["model_index.json"], f"{path}/model_index.json")
    for component in component_classes(index["_class_name"]):
        if not component.startswith("tokenizer"):
            name = config_file(component)
            if name not in checked:
                raise ModelError(f"carries no {name}", where=path, expected="the configs of a whole pipeline")
            checked[name] = check_config(component, checked[name], f"{path}/{name}")
    return checked
