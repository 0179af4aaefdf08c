"""Pipelines of a published shape with random weights: enough to measure what does not depend on the weights, and
nothing to download.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from sdcompress_engines.errors import UsageError

from sdcompress.families.configs import CONFIGS, FAMILIES


def random_pipeline(
    family: str,
    plan: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Any:
    """A diffusers pipeline of the full size of `family`, or a student of it, with random weights; no two seeds are
    alike.

    Weights are drawn as torch draws new layers'; biases and norms, which would be zeros and ones, are moved away from
    that, so that each shows in the output.

    Args:
        family: `sd1` (512 px), `sd2` (768 px, v-prediction) or `sdxl` (1024 px).
        plan: of block removal: `bk-base`, `bk-small`, `bk-tiny` or a plan file; None is the whole UNet.
        device: where the weights are drawn and stay: seconds on a GPU, half a minute on a CPU. One seed gives other
            weights on another device.

    Raises:
        UsageError: an unknown family. PlanError: a plan the family does not allow.
    """
    import diffusers
    import transformers

    from sdcompress.support.quiet import quiet

    configs = family_configs(family, plan)
    folder = CONFIGS / family
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    torch.manual_seed(seed)
    parts: dict[str, Any] = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        library, kind = (diffusers if entry[0] == "diffusers" else transformers), entry[1]
        made = getattr(library, kind)
        with quiet():
            if library is diffusers and name in configs:
                with torch.device(device):
                    parts[name] = made.from_config(configs[name])
            elif (folder / name / "config.json").is_file():
                config = made.config_class.from_pretrained(folder / name)
                with torch.device(device):
                    parts[name] = made(config)
            else:
                parts[name] = made.from_pretrained(folder / name)
        if isinstance(parts[name], torch.nn.Module):
            _shake(parts[name])
            with quiet():
                parts[name] = parts[name].to(dtype).eval()
    if index["_class_name"] == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with quiet():
        pipeline = getattr(diffusers, index["_class_name"])(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def family_configs(family: str, plan: str | None = None) -> dict[str, dict[str, Any]]:
    """The configs of a family's components by the pipeline's names, with the UNet's as a plan leaves it; nothing is
    made of them.

    Raises:
        UsageError: an unknown family. PlanError: a plan the family does not allow.
    """
    from sdcompress.prune.plan import read_plan

    if family not in FAMILIES:
        raise UsageError(f"no family {family!r}", expected=" or ".join(FAMILIES))
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    configs: dict[str, dict[str, Any]] = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in names
        if (path := CONFIGS / family / name / "config.json").is_file()
    }
    if plan is not None:
        configs["unet"] = dict(read_plan(plan, configs["unet"]).student_config())
    return configs


@torch.no_grad()
def _shake(module: torch.nn.Module) -> None:
    for weight in module.parameters():
        if weight.ndim == 1:
            weight.add_(0.1 * torch.randn_like(weight))
