"""The model card of a finished pipeline or LoRA, written from its manifest: nothing in it is typed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from sdcompress_engines.errors import ArtifactError, ModelError, UsageError
from sdcompress_engines.manifest import MANIFEST_NAME, Manifest, faults, read_manifest

if TYPE_CHECKING:
    from sdcompress.prune.plan import BlockPlan

CARD = "README.md"
PICTURE = "samples.webp"
KINDS = ("student", "finetuned", "lora")
_PARTS = ("pipeline", "lora")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TASK, _OUTPUT, _FEATURE, _ATTENTION = "task_weight", "output_kd_weight", "feature_kd_weight", "attention_kd_weight"
_LOSSES = {
    _TASK: "denoising loss against the true noise",
    _OUTPUT: "against the teacher's prediction",
    _FEATURE: "against the teacher's block outputs",
    _ATTENTION: "against the teacher's self-attention outputs",
}


@dataclass(frozen=True)
class Finished:
    """A folder that can be published.

    Attributes:
        folder: holds the manifest and the files it names.
        manifest: of kind student, finetuned or lora.
        samples: the newest grid of the training's pictures, None where it drew none.
    """

    folder: Path
    manifest: Manifest
    samples: Path | None

    def files(self) -> dict[str, Path]:
        """Name in the repository → file, the manifest last; what the manifest does not name is left out, and so is a
        card.
        """
        return {
            name: self.folder / name for name in [*self.manifest.files, MANIFEST_NAME] if name not in (CARD, PICTURE)
        }


def finished(folder: Path) -> Finished:
    """What a training or artifact folder has to publish; every file is read and checked.

    Raises:
        UsageError: no such folder. ModelError: neither a pipeline nor a LoRA made here. ArtifactError: a damaged one;
            names all faults.
    """
    if not folder.is_dir():
        raise UsageError(
            "is no folder" if folder.exists() else "does not exist",
            where=folder,
            expected="a pipeline, LoRA or training folder",
        )
    expected = "a pipeline or LoRA that distill, finetune or lora train has finished, or its training folder"
    place = next((p for p in (folder, *(folder / part for part in _PARTS)) if (p / MANIFEST_NAME).is_file()), None)
    if place is None and (folder / "checkpoints").is_dir():
        raise ModelError(
            "is a training that has not finished",
            where=folder,
            expected=expected,
            hint="the command that made it, with --resume",
        )
    if place is None:
        pipeline = (folder / "model_index.json").is_file()
        raise ModelError(
            "was not made by sdcompress: it has no " + MANIFEST_NAME if pipeline else "is no pipeline and no LoRA",
            where=folder,
            expected=expected,
        )
    manifest = read_manifest(place)
    if manifest is None or manifest.kind not in KINDS:
        raise ModelError(f"is of kind {manifest.kind if manifest else None!r}", where=place, expected=expected)
    found = faults(place)
    if manifest.kind != "lora" and not found:
        found = [
            f"{name} is missing" for name in ("model_index.json", "unet/config.json") if not (place / name).is_file()
        ]
    if not found and not (
        isinstance(manifest.config.get("train"), dict) and (manifest.kind != "student" or "plan" in manifest.config)
    ):
        found = [f"{MANIFEST_NAME} does not say how it was trained"]
    if found:
        raise ArtifactError(
            f"is damaged: {'; '.join(found)}", where=place, hint="train it again with --resume, or copy it again"
        )
    grids = sorted((place.parent / "samples").glob("step-*.webp")) if place.resolve().name in _PARTS else []
    return Finished(place, manifest, grids[-1] if grids else None)


def model_card(folder: Path, repo: str, license: str | None = None, base_model: str | None = None) -> str:
    """The text of the card of what `folder` has to publish, for the hub repository `repo`: front matter, then Markdown.

    Args:
        folder: as `finished` takes it.
        repo: OWNER/NAME, as it will be loaded.
        license: the hub's name of a licence; None is `other`, with a line that says it must be checked.
        base_model: the hub id of the teacher or base model; None is the name it was trained under, where that is such
            an id.

    Raises:
        UsageError: a licence or a base model that is no such name. Others as `finished`.
    """
    if license is not None and not _LICENSE.fullmatch(license):
        raise UsageError(
            f"licence {license!r}",
            expected="the hub's name of one, such as creativeml-openrail-m, openrail++ or apache-2.0",
        )
    if base_model is not None and not _HUB_ID.fullmatch(base_model):
        raise UsageError(f"base model {base_model!r}", expected="a hub id, OWNER/NAME")
    done = finished(folder)
    manifest = done.manifest
    base = base_model or _name_of_base(manifest)
    parts = [_front_matter(manifest, license, base), f"# {repo.rpartition('/')[2]}\n", _summary(done, base)]
    if done.samples is not None:
        parts.append(_samples(manifest))
    parts += [
        _loading(done, repo, base),
        _architecture(done),
        _training(manifest),
        _license_note(manifest, license, base),
        _origin(manifest, base),
    ]
    return "\n".join(part for part in parts if part)


def _name_of_base(manifest: Manifest) -> str:
    return str(manifest.config.get("teacher_name" if manifest.kind == "student" else "model_name", "unknown"))


def _front_matter(manifest: Manifest, license: str | None, base: str) -> str:
    values: dict[str, Any] = {"license": license or "other"}
    if _HUB_ID.fullmatch(base):  # the hub takes nothing but its own ids here
        values["base_model"] = base
    tags = {"student": ["distillation", "block-pruning"], "finetuned": [], "lora": ["lora"]}[manifest.kind]
    values |= {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["stable-diffusion", "text-to-image", "sdcompress", *tags],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n"


def _summary(done: Finished, base: str) -> str:
    if done.manifest.kind == "lora":
        return f"A LoRA for `{base}`.\n"
    if done.manifest.kind == "finetuned":
        return f"`{base}`, with every weight of its UNet trained further.\n"
    plan = _plan(done)
    before, after = _parameters(plan.teacher), _unet_parameters(done.folder)
    return (
        f"A smaller student of `{base}`: blocks of its UNet were removed ({plan.name}), and what is left was trained by"
        f" distillation. The UNet has {after:,} parameters where the teacher's has {before:,}, {1 - after / before:.1%}"
        " fewer.\n"
    )


def _parameters(config: dict[str, Any]) -> int:
    from sdcompress.prune.student import count_parameters, meta_unet

    return count_parameters(meta_unet({k: v for k, v in config.items() if not k.startswith("_")}))


def _unet_parameters(folder: Path) -> int:
    path = folder / "unet/config.json"
    try:
        return _parameters(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"is no UNet's config ({error})", where=path) from error


def _samples(manifest: Manifest) -> str:
    prompts = manifest.config.get("train", {}).get("validation_prompts", [])
    return (
        f"![samples]({PICTURE})\n\n"
        + "Drawn during training, row by row:\n\n" * bool(prompts)
        + "".join(f"- {prompt}\n" for prompt in prompts)
    )


def _loading(done: Finished, repo: str, base: str) -> str:
    if done.manifest.kind == "lora":
        from sdcompress.train.lora import FILE, KOHYA_FILE

        code = (
            "pipeline ="
            f' DiffusionPipeline.from_pretrained("{base if _HUB_ID.fullmatch(base) else "BASE_MODEL"}").to(device)\npipeline.load_lora_weights("{repo}",'
            f' weight_name="{FILE}")'
        )
        own = (
            f"`{KOHYA_FILE}` is the same LoRA in the naming the WebUIs read.\n\nFor a student of the base model:\n\n   "
            f" sdcompress lora remap {FILE} --teacher TEACHER --plan bk-tiny -o lora-bk-tiny.safetensors\n"
        )
    else:
        code = f'pipeline = DiffusionPipeline.from_pretrained("{repo}").to(device)'
        own = (
            f'With sdcompress:\n\n    sdcompress generate {repo} "PROMPT" -o picture.png\n    sdcompress export {repo}'
            " -o engines --trt\n"
        )
    python = (
        'import torch\nfrom diffusers import DiffusionPipeline\n\ndevice = "cuda" if torch.cuda.is_available() else'
        f' "cpu"\n{code}\npipeline("PROMPT", num_inference_steps=25).images[0].save("picture.png")'
    )
    return f"## How to load it\n\n```python\n{python}\n```\n\n{own}"


def _architecture(done: Finished) -> str:
    if done.manifest.kind == "lora":
        train = done.manifest.config.get("train", {})
        rank, alpha = train.get("rank"), train.get("alpha") or train.get("rank")
        return (
            f"## What is in it\n\nMatrices of rank {rank} (alpha {alpha:g}) for the layers"
            f" {', '.join(train.get('targets', []))}"
            + (" and the text encoder" if train.get("text_encoder") else "")
            + ".\n"
        )
    after = _unet_parameters(done.folder)
    if done.manifest.kind == "finetuned":
        return (
            f"## What is in it\n\nA UNet of {after:,} parameters; its architecture is the base model's, and so are text"
            " encoder, tokenizer and VAE.\n"
        )
    plan = _plan(done)
    before = _parameters(plan.teacher)
    layers = plan.teacher.get("layers_per_block", 2)
    rows = []
    for i, channels in enumerate(plan.teacher["block_out_channels"]):
        gone = stays = ""
        if i < len(plan.levels):
            level, have = plan.levels[i], layers if isinstance(layers, int) else layers[i]
            sides = (("down", level.down, have), ("up", level.up, have + 1))
            stays = "; ".join(f"{side} pairs {_list(kept)}" for side, kept, _ in sides)
            gone = "; ".join(
                f"{side} pairs {_list(lost)}"
                for side, kept, count in sides
                if (lost := [n for n in range(count) if n not in kept])
            )
            if level.transformer_blocks is not None:
                stays += f"; transformer blocks {_list(level.transformer_blocks)}"
                gone += "; the other transformer blocks" if gone else "transformer blocks"
        rows.append(
            f"| level {i} ({channels} channels) | {gone or ('nothing' if stays else 'all')} | {stays or 'nothing'} |\n"
        )
    if plan.teacher.get("mid_block_type", "") is not None:
        rows.append(f"| mid block | {'nothing | all' if plan.mid else 'all | nothing'} |\n")
    counts = f"| | parameters of the UNet |\n|---|---|\n| teacher | {before:,} |\n| this model | {after:,} |\n"
    return (
        f"## What was removed\n\nOf the teacher's resnet–attention pairs, counted from 0 (plan {plan.name}, after"
        " [BK-SDM](https://arxiv.org/abs/2305.15798)):\n\n| | removed | stays"
        f" |\n|---|---|---|\n{''.join(rows)}\n{counts}\nText encoder, tokenizer and VAE are the teacher's.\n"
    )


def _plan(done: Finished) -> BlockPlan:
    from sdcompress.prune.plan import BlockPlan

    return BlockPlan.from_json(json.dumps(done.manifest.config["plan"]), done.folder / MANIFEST_NAME)


def _list(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices))


def _training(manifest: Manifest) -> str:
    train: dict[str, Any] = manifest.config.get("train", {})
    figures = manifest.figures
    seen = figures.get("steps", 0) * train.get("batch_size", 0)
    rows: list[tuple[str, object]] = [
        ("steps", f"{figures.get('steps', 0):,} of {train.get('batch_size')} pictures ({seen:,} seen)")
    ]
    rate = f"{train.get('learning_rate', 0):g}, {train.get('lr_schedule')}"
    rows.append(
        (
            "learning rate",
            rate + (f", after {train['lr_warmup_steps']} steps of warm-up" if train.get("lr_warmup_steps") else ""),
        )
    )
    rows.append(("optimizer", f"{train.get('optimizer')}, weight decay {train.get('weight_decay'):g}"))
    rows += [
        (f"weight of the loss {text}" if name != _TASK else f"weight of the {text}", f"{train[name]:g}")
        for name, text in _LOSSES.items()
        if name in train
    ]
    rows += [(f"last {name}", f"{value:.4f}") for name, value in figures.get("losses", {}).items()]
    rows += [
        (text, f"{train[name]}")
        for name, text in (
            ("ema_decay", "moving average of the weights"),
            ("caption_dropout", "captions dropped"),
            ("precision", "precision"),
        )
        if train.get(name)
    ]
    rows.append(("seed", manifest.seed))
    data = ", ".join(
        f"{name} {value}" for name, value in train.get("data", {}).items() if value not in (None, 0, False, [], {})
    )
    rows.append(("data", f"sha256 `{manifest.inputs.get('data', 'unknown')}`" + (f"; {data}" if data else "")))
    return "## How it was trained\n\n| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)


def _license_note(manifest: Manifest, license: str | None, base: str) -> str:
    if license is None:
        return (
            f"## Licence\n\n**To be checked:** this model derives from `{base}`, and its licence decides which one this"
            " model may carry. None was stated when this card was written.\n"
        )
    return (
        f"## Licence\n\n{license}, as stated by who uploaded it. This model derives from `{base}`, whose licence binds"
        " it too.\n"
    )


def _origin(manifest: Manifest, base: str) -> str:
    role = "teacher" if "teacher" in manifest.inputs else "model"
    versions = ", ".join(
        f"{name} {manifest.versions[name]}"
        for name in ("sdcompress", "torch", "diffusers")
        if name in manifest.versions
    )
    made = f", {manifest.created[:10]}" if manifest.created else ""
    return (
        f"## Where it comes from\n\n- {'teacher' if role == 'teacher' else 'base model'}: `{base}`, sha256"
        f" `{manifest.inputs.get(role, 'unknown')}`\n- made with {versions}{made}; `{MANIFEST_NAME}` holds the whole"
        " configuration and the sha256 of every file\n"
    )
