"""Pipelines of a published shape with random weights, to measure what does not depend on the weights.

No file is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sdcompress.families.registry import find_family
from sdcompress.families.schemas.tiny_vae import taesd_config
from sdcompress.support.pipeline import TextToImagePipeline


def random_pipeline(
    family: str,
    plan: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> TextToImagePipeline:
    """Returns a diffusers pipeline of a family's full size, or a student of it, with random weights.

    Weights are drawn as torch initializes new layers. Biases would be zeros and norm weights ones; noise is added to
    them, so that each of them changes the output.

    Args:
        family: `sd1` (512 px), `sd2` (768 px, v-prediction) or `sdxl` (1024 px).
        plan: of block removal: `bk-base`, `bk-small`, `bk-tiny` or a plan file; None is the whole UNet.
        dtype: of the weights.
        seed: two seeds give different weights.
        device: draws and holds the weights; takes seconds on a GPU and half a minute on a CPU. One seed gives different
            weights on different kinds of device.

    Raises:
        UsageError: the family is unknown.
        PlanError: the family does not allow the plan.
    """
    import diffusers

    from sdcompress.support.quiet import quiet

    configs = family_configs(family, plan)
    known = find_family(family)
    index = known.read_config("model_index.json")
    torch.manual_seed(seed)
    parts: dict[str, Any] = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        with quiet():
            parts[name] = _random_component(entry[0], entry[1], known.config_folder / name, configs.get(name), device)
            if isinstance(parts[name], torch.nn.Module):
                _add_noise_to_vectors(parts[name])
                parts[name] = parts[name].to(dtype).eval()
    with quiet():
        pipeline: TextToImagePipeline = getattr(diffusers, known.pipeline_class)(**parts, **known.pipeline_options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def random_decoder(
    vae: Mapping[str, Any], *, dtype: torch.dtype = torch.float32, seed: int = 0, device: torch.device | str = "cpu"
) -> Any:
    """Returns an `AutoencoderTiny` of TAESD's shape with random weights, for the latents of a VAE.

    Args:
        vae: the VAE's config.
        dtype: of the weights.
        seed: two seeds give different weights.
        device: draws and holds the weights.
    """
    from diffusers import AutoencoderTiny

    from sdcompress.support.quiet import quiet

    torch.manual_seed(seed)
    with quiet(), torch.device(device):
        network = AutoencoderTiny.from_config(taesd_config(vae["latent_channels"]))
        _add_noise_to_vectors(network)
        return network.to(dtype).eval()


def _random_component(
    library: str, class_name: str, folder: Path, config: dict[str, Any] | None, device: torch.device | str
) -> Any:
    """Returns a module with random weights; for a component without weights, the one that `folder` holds."""
    import diffusers
    import transformers

    part_class = getattr(diffusers if library == "diffusers" else transformers, class_name)
    if library == "diffusers" and config is not None:
        with torch.device(device):
            return part_class.from_config(config)
    if (folder / "config.json").is_file():
        module_config = part_class.config_class.from_pretrained(folder)
        with torch.device(device):
            return part_class(module_config)
    return part_class.from_pretrained(folder)


def family_configs(family: str, plan: str | None = None) -> dict[str, dict[str, Any]]:
    """Returns component → config for a family; the UNet's is the student's config where a plan is given.

    Raises:
        UsageError: the family is unknown.
        PlanError: the family does not allow the plan.
    """
    from sdcompress.prune.presets import read_plan

    known = find_family(family)
    configs = {name: known.read_config(f"{name}/config.json") for name in ("unet", "vae", *known.text_encoders)}
    if plan is not None:
        configs["unet"] = dict(read_plan(plan, configs["unet"]).student_config())
    return configs


@torch.no_grad()
def _add_noise_to_vectors(module: torch.nn.Module) -> None:
    """Add Gaussian noise of standard deviation 0.1 to the biases and norm weights."""
    for weight in module.parameters():
        if weight.ndim == 1:
            weight.add_(0.1 * torch.randn_like(weight))
