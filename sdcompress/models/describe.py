"""Facts about a pipeline, a checkpoint, a LoRA or another artifact, from headers and configs; no weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdcompress_engines.few_steps import FewStepSampling, read_exported_few_steps, read_few_steps
from sdcompress_engines.manifest import Manifest, faults, read_manifest

from sdcompress.families.schemas.tiny_vae import TINY_VAE
from sdcompress.models.locate import DECODER, locate_pipeline, read_component_config, read_model_index, read_unet_config

_PIPELINES = ("student", "teacher", "few-step", "finetuned")  # kinds of artifacts that are diffusers folders


def describe_model(path: str) -> tuple[dict[str, Any], Manifest | None]:
    """Returns facts by name, and the artifact's manifest where there is one.

    Args:
        path: of a file or folder, the name of a built-in model, or a hub id.

    Raises:
        UsageError: the path does not exist.
        ModelError: the file or folder is broken or of an unknown kind.
    """
    folder = Path(path)
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None and (folder / "lora").is_dir() and not (folder / "pipeline").is_dir():  # of a LoRA's training
        folder = folder / "lora"
        manifest = read_manifest(folder)
    if manifest is None and (folder / DECODER).is_dir():
        folder = folder / DECODER
        manifest = read_manifest(folder)
    facts: dict[str, Any] = {}
    if manifest is not None and manifest.kind == DECODER:
        facts = _describe_decoder(folder)
    elif manifest is None or manifest.kind in _PIPELINES:
        folder = locate_pipeline(path)
        if folder.is_file():
            facts = _describe_file(folder)
        else:
            manifest = read_manifest(folder)
            facts = _describe_folder(folder)
            if manifest is not None and facts["student"]:
                names = (manifest.config.get(key) for key in ("teacher_name", "model_name"))
                facts["student_of"] = next((name for name in names if name), facts["student_of"])
    elif manifest.kind == "lora" and (files := sorted(folder.glob("*.safetensors"))):
        facts = _describe_file(files[0])
    else:
        facts = _describe_sampling(read_exported_few_steps(folder, manifest))
    facts["bytes"] = _measure_size(folder)
    if manifest is not None:
        facts |= {
            "kind": manifest.kind,
            "created": manifest.created,
            "inputs": manifest.inputs,
            "faults": faults(folder),
            "figures": manifest.figures,
            "versions": manifest.versions,
        }
    return facts, manifest


def _describe_decoder(folder: Path) -> dict[str, Any]:
    from sdcompress.checkpoints.folder import open_component
    from sdcompress.models.decoder import locate_decoder

    weights = open_component(locate_decoder(folder))
    sides = {
        side: sum(math.prod(shape) for name, shape in weights.shapes.items() if name.startswith(side))
        for side in ("decoder", "encoder")
    }
    return {
        "format": "diffusers folder",
        "class": TINY_VAE,
        "parameters": sides,
        "dtype": ", ".join(sorted(set(weights.dtypes.values()))),
        "taesd": sorted(path.name for path in folder.glob("taesd*")),
    }


def _measure_size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _describe_file(path: Path) -> dict[str, Any]:
    from sdcompress.checkpoints.configs import derive_configs
    from sdcompress.checkpoints.identify import CHECKPOINT, LORA, count_component_parameters, identify_weights
    from sdcompress.checkpoints.weights import open_weights
    from sdcompress.families.registry import family_of_pipeline
    from sdcompress.lora.describe import describe_lora
    from sdcompress.lora.sampling import read_sampling
    from sdcompress.support.pipeline import scheduler_config

    weights = open_weights(path)
    kind = identify_weights(weights)
    dtypes = ", ".join(sorted(set(weights.dtypes.values())))
    facts = {"format": "single file", "holds": kind}
    if kind == LORA:
        own = read_sampling(path)
        sampling = None if own is None else read_few_steps(own[0], scheduler_config(own[1]))
        return facts | describe_lora(weights) | _describe_sampling(sampling) | {"dtype": dtypes}
    if kind != CHECKPOINT:
        return facts | {"tensors": len(weights.shapes), "dtype": dtypes}
    configs = derive_configs(weights)
    index, unet = configs["model_index.json"], configs["unet/config.json"]
    return facts | _describe_pipeline(
        index,
        unet,
        configs.get("scheduler/scheduler_config.json", {}),
        count_component_parameters(weights, family_of_pipeline(str(index.get("_class_name")), unet)),
        dtypes,
    )


def _describe_folder(folder: Path) -> dict[str, Any]:
    has_scheduler = (folder / "scheduler/scheduler_config.json").is_file()
    scheduler = read_component_config(folder, "scheduler") if has_scheduler else None
    parameters, dtypes = _describe_components(folder)
    return {"format": "diffusers folder"} | _describe_pipeline(
        read_model_index(folder),
        read_unet_config(folder),
        scheduler,
        parameters,
        ", ".join(sorted(dtypes)) or "unknown",
    )


def _describe_pipeline(
    index: Mapping[str, Any],
    unet: Mapping[str, Any],
    scheduler: Mapping[str, Any] | None,
    parameters: dict[str, int],
    dtype: str,
) -> dict[str, Any]:
    from sdcompress.families.registry import family_of
    from sdcompress.prune.cost import count_unet_parameters

    family = family_of(unet)
    removal = family.student_of(unet)
    return {
        "class": index.get("_class_name"),
        "family": family.layout,
        "student": removal,
        "student_of": None if removal is None else family.title,
        "prediction_type": None if scheduler is None else scheduler.get("prediction_type", "epsilon"),
        **_describe_sampling(read_few_steps(index, scheduler or {})),
        "unet_parameters": count_unet_parameters(unet),
        "parameters": parameters,
        "dtype": dtype,
        "levels": unet["block_out_channels"],
        "cross_attention_dim": unet["cross_attention_dim"],
        "in_channels": unet.get("in_channels", 4),
    }


def _describe_sampling(sampling: FewStepSampling | None) -> dict[str, Any]:
    """Returns what a few-step model was trained for, and what to choose in each host; of another model, nothing."""
    return {} if sampling is None else {"trained_for": sampling.describe_in()}


def _describe_components(folder: Path) -> tuple[dict[str, int], set[str]]:
    """Returns component → number of parameters, and the dtypes of a pipeline folder.

    They come from the safetensors headers; for components in pickles, the number comes from the config.
    """
    from sdcompress.checkpoints.folder import find_weight_files
    from sdcompress.checkpoints.weights import open_weights

    parameters: dict[str, int] = {}
    dtypes: set[str] = set()
    for component in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = [file for file in find_weight_files(component) if file.suffix == ".safetensors"]
        shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            weights = open_weights(file, ldm=False)
            floating = {name: shape for name, shape in weights.shapes.items() if "float" in weights.dtypes[name]}
            shapes |= floating
            dtypes |= {weights.dtypes[name] for name in floating}
        count = sum(math.prod(shape) for shape in shapes.values()) if files else _count_by_config(component)
        if count:
            parameters[component.name] = count
    return parameters, dtypes


def _count_by_config(component: Path) -> int | None:
    """Returns the parameters of a UNet, VAE or text encoder from its config alone; None for another component."""
    import torch

    from sdcompress.families.build import build_module
    from sdcompress.families.registry import family_of_pipeline
    from sdcompress.prune.cost import count_parameters

    if component.name not in ("unet", "vae", "text_encoder", "text_encoder_2"):
        return None
    if not (component / "config.json").is_file():
        return None
    pipeline = component.parent
    family = family_of_pipeline(read_model_index(pipeline)["_class_name"], read_unet_config(pipeline))
    config = read_component_config(pipeline, component.name)
    with torch.device("meta"):
        return count_parameters(build_module(component.name, config, component / "config.json", family))
