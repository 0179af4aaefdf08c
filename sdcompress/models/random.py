"""Pipelines of a published shape with random weights, to measure what does not depend on the weights.

Nothing is downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sdcompress.families.registry import find_family
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

    Weights are drawn as torch draws new layers'. Biases and norms, which would be zeros and ones, are moved away from
    that, so that each of them changes the output.

    Args:
        family: `sd1` (512 px), `sd2` (768 px, v-prediction) or `sdxl` (1024 px).
        plan: of block removal: `bk-base`, `bk-small`, `bk-tiny` or a plan file; None is the whole UNet.
        dtype: of the weights.
        seed: two seeds give different weights.
        device: where the weights are drawn and stay: seconds on a GPU, half a minute on a CPU. One seed gives different
            weights on different kinds of device.

    Raises:
        UsageError: an unknown family. PlanError: a plan that the family does not allow.
    """
    import diffusers

    from sdcompress.support.quiet import quiet

    configs = family_configs(family, plan)
    folder = find_family(family).config_folder
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    torch.manual_seed(seed)
    parts: dict[str, Any] = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        with quiet():
            parts[name] = _random_part(entry[0], entry[1], folder / name, configs.get(name), device)
            if isinstance(parts[name], torch.nn.Module):
                _shake(parts[name])
                parts[name] = parts[name].to(dtype).eval()
    options = find_family(family).pipeline_options if index["_class_name"] == "StableDiffusionPipeline" else {}
    with quiet():
        pipeline: TextToImagePipeline = getattr(diffusers, index["_class_name"])(**parts, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _random_part(
    library: str, class_name: str, folder: Path, config: dict[str, Any] | None, device: torch.device | str
) -> Any:
    """Returns a component: a module with random weights, or what its folder holds where it has none."""
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
    """Returns the configs of a family's components by component, the UNet's as a plan leaves it. No module is built.

    Raises:
        UsageError: an unknown family. PlanError: a plan that the family does not allow.
    """
    from sdcompress.prune.plan import read_plan

    found = find_family(family)
    configs = {name: found.read_config(f"{name}/config.json") for name in ("unet", "vae", *found.text_encoders)}
    if plan is not None:
        configs["unet"] = dict(read_plan(plan, configs["unet"]).student_config())
    return configs


@torch.no_grad()
def _shake(module: torch.nn.Module) -> None:
    for weight in module.parameters():
        if weight.ndim == 1:
            weight.add_(0.1 * torch.randn_like(weight))
