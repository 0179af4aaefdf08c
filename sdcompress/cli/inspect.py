"""`sdcompress inspect`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sdcompress.cli._console import card, json_option, mib

PIPELINES = ("student", "teacher", "finetuned")  # kinds of artifacts that are diffusers folders


@click.command()
@click.argument("path")
@json_option
def command(path: str, as_json: bool) -> None:
    """Say what PATH is: a pipeline, a checkpoint, a LoRA, or anything sdcompress has made. No weights are loaded.

    \b
      sdcompress inspect nano
      sdcompress inspect realisticVision_v40.safetensors
      sdcompress inspect segmind/small-sd --json
      sdcompress inspect runs/bk-tiny/pipeline
    """
    import json
    from dataclasses import asdict

    from sdcompress_engines.manifest import faults, read_manifest

    from sdcompress.models.locate import resolve

    folder = Path(path)
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None and (folder / "lora").is_dir():  # a training folder holds its LoRA under lora/
        folder = folder / "lora"
        manifest = read_manifest(folder)
    facts: dict[str, Any] = {}
    if manifest is None or manifest.kind in PIPELINES:
        folder = resolve(path)
        if folder.is_file():
            facts = _file_facts(folder)
        else:
            manifest = read_manifest(folder)
            facts = _folder_facts(folder)
            if manifest is not None and facts["student"]:
                facts["student_of"] = (
                    manifest.config.get("teacher_name") or manifest.config.get("model_name") or facts["student_of"]
                )
    elif manifest.kind == "lora":
        facts = _file_facts(sorted(folder.glob("*.safetensors"))[0]) if list(folder.glob("*.safetensors")) else {}
    facts["bytes"] = (
        folder.stat().st_size if folder.is_file() else sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    )
    if manifest is not None:
        facts |= {
            "kind": manifest.kind,
            "created": manifest.created,
            "inputs": manifest.inputs,
            "faults": faults(folder),
            "figures": manifest.figures,
            "versions": manifest.versions,
        }
    if as_json:
        click.echo(json.dumps(facts | ({"manifest": asdict(manifest)} if manifest else {})))
        return
    card(path, [(key, _shown(key, value)) for key, value in facts.items()])


def _shown(key: str, value: Any) -> Any:
    if key == "bytes":
        return mib(float(value))
    if key == "faults" and not value:
        return "none: whole"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown('', entry)}" for name, entry in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(str(entry) for entry in value) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value


def _pipeline_facts(
    index: dict[str, Any], unet: dict[str, Any], prediction_type: str | None, parameters: dict[str, int], dtype: str
) -> dict[str, Any]:
    from sdcompress.families.registry import family_of
    from sdcompress.prune.student import count_parameters, meta_unet

    family = family_of(unet)
    student = family.student_of(unet)
    return {
        "class": index.get("_class_name"),
        "family": family.layout,
        "student": student,
        "student_of": None if student is None else family.title,
        "prediction_type": prediction_type,
        "unet_parameters": count_parameters(meta_unet({k: v for k, v in unet.items() if not k.startswith("_")})),
        "parameters": parameters,
        "dtype": dtype,
        "levels": unet["block_out_channels"],
        "cross_attention_dim": unet["cross_attention_dim"],
        "in_channels": unet.get("in_channels", 4),
    }


def _file_facts(path: Path) -> dict[str, Any]:
    from sdcompress.checkpoints.identify import CHECKPOINT, LORA, component_parameters, configs_of, kind_of, lora_facts
    from sdcompress.checkpoints.weights import open_weights

    weights = open_weights(path)
    kind = kind_of(weights)
    dtypes = ", ".join(sorted(set(weights.dtypes.values())))
    holds = {"format": "single file", "holds": kind}
    if kind == LORA:
        return holds | lora_facts(weights) | {"dtype": dtypes}
    if kind != CHECKPOINT:
        return holds | {"tensors": len(weights.shapes), "dtype": dtypes}
    configs = configs_of(weights)
    scheduler = configs.get("scheduler/scheduler_config.json", {})
    return holds | _pipeline_facts(
        configs["model_index.json"],
        configs["unet/config.json"],
        scheduler.get("prediction_type", "epsilon"),
        component_parameters(weights),
        dtypes,
    )


def _folder_facts(folder: Path) -> dict[str, Any]:
    import json

    from sdcompress.models.locate import model_index, unet_config

    scheduler = folder / "scheduler/scheduler_config.json"
    prediction_type = (
        json.loads(scheduler.read_text(encoding="utf-8")).get("prediction_type", "epsilon")
        if scheduler.is_file()
        else None
    )
    parameters, dtypes = _component_facts(folder)
    return {"format": "diffusers folder"} | _pipeline_facts(
        model_index(folder), unet_config(folder), prediction_type, parameters, ", ".join(sorted(dtypes)) or "unknown"
    )


def _component_facts(folder: Path) -> tuple[dict[str, int], set[str]]:
    """Parameters a component, and the dtypes, from the safetensors headers; of parts kept in pickles, from the config."""
    import math

    from sdcompress.checkpoints.weights import open_weights

    parameters: dict[str, int] = {}
    dtypes: set[str] = set()
    for part in sorted(p for p in folder.iterdir() if p.is_dir()):
        found = sorted(part.glob("*.safetensors"))
        # A variant (`model.fp16.safetensors`) lies beside the whole, or alone.
        plain = [file for file in found if "." not in file.name.removesuffix(".safetensors")] or found
        shapes: dict[str, tuple[int, ...]] = {}
        for file in plain:
            weights = open_weights(file)
            floating = {name: shape for name, shape in weights.shapes.items() if "float" in weights.dtypes[name]}
            shapes |= floating
            dtypes |= {weights.dtypes[name] for name in floating}
        count = sum(math.prod(shape) for shape in shapes.values()) if plain else _meta_count(part)
        if count:
            parameters[part.name] = count
    return parameters, dtypes


def _meta_count(part: Path) -> int | None:
    """Parameters of a UNet, VAE or text encoder from its config alone; None of anything else."""
    import json

    import torch

    from sdcompress.prune.student import count_parameters
    from sdcompress.support.quiet import quiet

    path = part / "config.json"
    if not path.is_file() or part.name not in ("unet", "vae", "text_encoder", "text_encoder_2"):
        return None
    with torch.device("meta"), quiet():
        if part.name.startswith("text_encoder"):
            import transformers

            config = transformers.CLIPTextConfig.from_pretrained(part)
            kind = (
                transformers.CLIPTextModelWithProjection
                if config.architectures == ["CLIPTextModelWithProjection"]
                else transformers.CLIPTextModel
            )
            return count_parameters(kind(config))
        import diffusers

        kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
        return count_parameters(kinds[part.name].from_config(json.loads(path.read_text(encoding="utf-8"))))
