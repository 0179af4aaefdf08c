"""The model card of a finished pipeline or LoRA. All of its figures come from the manifest."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from sdcompress_engines.errors import ModelError, UsageError, shorten
from sdcompress_engines.few_steps import HOST_TITLES, FewStepSampling, read_few_steps
from sdcompress_engines.json_files import read_json_object
from sdcompress_engines.manifest import MANIFEST_NAME, Manifest

from sdcompress.models.locate import read_unet_config
from sdcompress.publish.finished_model import PICTURE, FinishedModel
from sdcompress.support.markdown import code_span, escape_markdown
from sdcompress.support.pipeline import NOISE_OPTIONS, scheduler_config

if TYPE_CHECKING:
    from sdcompress.prune.plan import BlockPlan, LevelPlan

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_HUB_ID = re.compile(r"[a-z0-9][\w.-]*/[a-z0-9][\w.-]*", re.ASCII | re.IGNORECASE)
_TAGS = {
    "student": ("distillation", "block-pruning"),
    "few-step": ("distillation", "consistency"),
    "finetuned": (),
    "lora": ("lora",),
}
_LOSSES = {
    "task_weight": "weight of the denoising loss against the true noise",
    "output_kd_weight": "weight of the loss against the teacher's prediction",
    "feature_kd_weight": "weight of the loss against the teacher's block outputs",
    "attention_kd_weight": "weight of the loss against the teacher's self-attention outputs",
}
_OPTIONS = {
    "ema_decay": "moving average of the weights",
    "caption_dropout": "captions dropped",
    "precision": "precision",
}


def check_names(license: str | None, base_model: str | None) -> None:
    """Refuse a license or a base model that the hub would refuse.

    Args:
        license, base_model: see `model_card`.

    Raises:
        UsageError: the license or the base model is no such name.
    """
    if license is not None and not _LICENSE.fullmatch(license):
        raise UsageError(
            f"license {license!r}",
            expected="the hub's name of one, such as creativeml-openrail-m, openrail++ or apache-2.0",
        )
    if base_model is not None and not _HUB_ID.fullmatch(base_model):
        raise UsageError(f"base model {base_model!r}", expected="a hub id, OWNER/NAME")


def model_card(model: FinishedModel, repo: str, license: str | None = None, base_model: str | None = None) -> str:
    """Returns the text of a model card: front matter, then Markdown.

    Args:
        model: as `find_finished_model` returns it.
        repo: OWNER/NAME on the hub, under which the model will be loaded.
        license: the hub's name of a license; None is `other`, with a line that asks to check it.
        base_model: the hub id of the teacher or base model; None is the name it was trained under, where that is such
            an id.

    Raises:
        UsageError: the repository, the license or the base model is no such name.
        ModelError, PlanError: the config of the UNet, the plan or the record of the training cannot be read.
    """
    check_names(license, base_model)
    if not _HUB_ID.fullmatch(repo):
        raise UsageError("is not a repository name", where=repo, expected="OWNER/NAME")
    try:
        return _write_card(model, repo, license, base_model)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise ModelError(
            f"its record of the training has an unexpected value ({type(error).__name__}: {shorten(error, 120)})",
            where=model.folder / MANIFEST_NAME,
            hint="train it again",
        ) from error


def _write_card(model: FinishedModel, repo: str, license: str | None, base_model: str | None) -> str:
    manifest = model.manifest
    base = base_model or _name_of_base(manifest)
    sampling = _read_sampling(model)
    sections = [
        _front_matter(manifest, license, base),
        f"# {escape_markdown(repo.rpartition('/')[2])}\n",
        _summary(model, base, sampling),
        _samples(model),
        _loading(manifest, repo, base, sampling),
        _hosts(sampling),
        _architecture(model),
        _training(manifest),
        _license_note(license, base),
        _origin(manifest, base),
    ]
    return "\n".join(section for section in sections if section)


def _name_of_base(manifest: Manifest) -> str:
    return str(manifest.config.get("teacher_name" if manifest.kind == "student" else "model_name", "unknown"))


def _front_matter(manifest: Manifest, license: str | None, base: str) -> str:
    values: dict[str, Any] = {"license": license or "other"}
    if _HUB_ID.fullmatch(base):  # the hub accepts only its own ids here
        values["base_model"] = base
    values |= {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["stable-diffusion", "text-to-image", "sdcompress", *_TAGS[manifest.kind]],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n"


def _summary(model: FinishedModel, base: str, sampling: FewStepSampling | None) -> str:
    if model.manifest.kind == "lora":
        if sampling is None:
            return f"A LoRA for {code_span(base)}.\n"
        return f"A LoRA for {code_span(base)}, trained {_describe_few_steps(sampling)}\n"
    if model.manifest.kind == "finetuned":
        return f"{code_span(base)}, with every weight of its UNet trained further.\n"
    if model.manifest.kind == "few-step":
        return f"{code_span(base)}, trained {_describe_few_steps(sampling)}\n"
    plan = _read_plan(model)
    before, after = _count_teacher_parameters(plan), _count_unet_parameters(model.folder)
    return (
        f"A smaller student of {code_span(base)}: blocks of its UNet were removed ({escape_markdown(plan.name)}), and"
        f" the rest was trained by distillation. The UNet has {after:,} parameters and the teacher's {before:,}:"
        f" {1 - after / before:.1%} fewer.\n"
    )


def _describe_few_steps(sampling: FewStepSampling | None) -> str:
    steps = sampling.steps if sampling else "few"
    return f"by consistency distillation (arXiv 2310.04378, 2405.18407) to draw in {steps} steps, without guidance."


def _read_sampling(model: FinishedModel) -> FewStepSampling | None:
    if model.manifest.kind == "lora":
        from sdcompress.lora.sampling import read_sampling
        from sdcompress.train.lora import FILE

        own = read_sampling(model.file(FILE))
        return None if own is None else read_few_steps(own[0], scheduler_config(own[1]))
    names = ("model_index.json", "scheduler/scheduler_config.json")
    configs = [read_json_object(model.file(name)) if name in model.manifest.files else {} for name in names]
    return read_few_steps(*configs)


def _samples(model: FinishedModel) -> str:
    if model.samples is None:
        return ""
    prompts = model.manifest.config.get("train", {}).get("validation_prompts", [])
    lines = [f"![samples]({PICTURE})\n"]
    if prompts:
        lines += ["Drawn during training, row by row:\n", *(f"- {escape_markdown(prompt)}" for prompt in prompts)]
    return "\n".join(lines) + "\n"


def _loading(manifest: Manifest, repo: str, base: str, sampling: FewStepSampling | None) -> str:
    imported = "DiffusionPipeline"
    if manifest.kind == "lora":
        from sdcompress.train.lora import FILE, KOHYA_FILE

        base_id = base if _HUB_ID.fullmatch(base) else "BASE_MODEL"
        code = [
            f'pipeline = DiffusionPipeline.from_pretrained("{base_id}").to(device)',
            f'pipeline.load_lora_weights("{repo}", weight_name="{FILE}")',
        ]
        usage = [f"`{KOHYA_FILE}` is the same LoRA in the naming that the WebUIs read.\n"]
        if sampling is None:
            usage += [
                "For a student of the base model:\n",
                f"    sdcompress lora remap {FILE} --teacher TEACHER --plan bk-tiny -o lora-bk-tiny.safetensors",
            ]
        else:
            imported = f"DiffusionPipeline, {sampling.scheduler['_class_name']}"
            code += _scheduler_lines(sampling)
            usage += [
                "With sdcompress, which reads the scheduler from the LoRA:\n",
                f'    sdcompress generate {base_id} "PROMPT" --lora {FILE} -o picture.png',
            ]
    else:
        code = [f'pipeline = DiffusionPipeline.from_pretrained("{repo}").to(device)']
        usage = [
            "With sdcompress:\n",
            f'    sdcompress generate {repo} "PROMPT" -o picture.png',
            f"    sdcompress export {repo} -o engines --trt",
        ]
    drawn = "num_inference_steps=25"
    if sampling is not None:
        drawn = f"num_inference_steps={sampling.steps}, guidance_scale={sampling.guidance_scale}"
    lines = [
        "## How to load it\n",
        "```python",
        "import torch",
        f"from diffusers import {imported}",
        "",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        *code,
        f'pipeline("PROMPT", {drawn}).images[0].save("picture.png")',
        "```\n",
        *usage,
    ]
    return "\n".join(lines) + "\n"


def _scheduler_lines(sampling: FewStepSampling) -> list[str]:
    """Returns the lines of Python that give a pipeline a few-step LoRA's scheduler; the noise stays the pipeline's."""
    name = sampling.scheduler["_class_name"]
    options = {key: value for key, value in sampling.scheduler.items() if key[0] != "_" and key not in NOISE_OPTIONS}
    lines = [f"    {key}={value!r}," for key, value in sorted(options.items())]
    return [f"pipeline.scheduler = {name}.from_config(", "    pipeline.scheduler.config,", *lines, ")"]


def _hosts(sampling: FewStepSampling | None) -> str:
    """Returns what to choose for a few-step model in programs that do not read its scheduler."""
    if sampling is None:
        return ""
    rows = [
        f"| {title} | {choice.sampler} | {' + '.join(filter(None, (choice.schedule, choice.node)))} |"
        for host, title in HOST_TITLES.items()
        if (choice := sampling.choice(host)) is not None
    ]
    table = ["\n| | sampler | schedule |\n|---|---|---|", *rows] if rows else []
    text = f"This model was trained for {sampling}"
    if sampling.guidance_scale <= 1:
        text += ": the guidance is in its weights, and a negative prompt has no effect"
    return "\n".join(["## Steps and sampler\n", f"{text}.", *table]) + "\n"


def _architecture(model: FinishedModel) -> str:
    if model.manifest.kind == "lora":
        train = model.manifest.config.get("train", {})
        rank, targets = ("lora_rank", "lora_targets") if "lora_rank" in train else ("rank", "targets")
        rank, alpha = train[rank], train.get("alpha") or train[rank]
        layers = escape_markdown(", ".join(train.get(targets, []))) + (
            " and the text encoder" if train.get("text_encoder") else ""
        )
        return f"## What is in it\n\nMatrices of rank {rank:d} (alpha {alpha:g}) for the layers {layers}.\n"
    after = _count_unet_parameters(model.folder)
    if model.manifest.kind in ("finetuned", "few-step"):
        return (
            f"## What is in it\n\nA UNet of {after:,} parameters; its architecture is the base model's, and so are text"
            " encoder, tokenizer and VAE.\n"
        )
    plan = _read_plan(model)
    lines = [
        "## What was removed\n",
        f"Of the teacher's resnet–attention pairs, counted from 0 (plan {escape_markdown(plan.name)}, after"
        " [BK-SDM](https://arxiv.org/abs/2305.15798)):\n",
        "| | removed | stays |\n|---|---|---|",
        *_block_rows(plan),
        "",
        "| | parameters of the UNet |\n|---|---|",
        f"| teacher | {_count_teacher_parameters(plan):,} |\n| this model | {after:,} |\n",
        "Text encoder, tokenizer and VAE are the teacher's.",
    ]
    return "\n".join(lines) + "\n"


def _block_rows(plan: BlockPlan) -> list[str]:
    """Returns the rows of the table of removed blocks: one for each level of the teacher, and one for the mid block."""
    from sdcompress.prune.plan import spread_over_levels

    layers = spread_over_levels(plan.teacher, "layers_per_block", 2)
    rows = []
    for i, channels in enumerate(plan.teacher["block_out_channels"]):
        removed, stays = _describe_level(plan.levels[i], layers[i]) if i < len(plan.levels) else ("all", "nothing")
        rows.append(f"| level {i} ({channels:d} channels) | {removed} | {stays} |")
    if plan.teacher.get("mid_block_type", "") is not None:
        rows.append(f"| mid block | {'nothing | all' if plan.mid else 'all | nothing'} |")
    return rows


def _describe_level(level: LevelPlan, layers: int) -> tuple[str, str]:
    """Returns what is removed from a level whose down block has `layers` pairs, and what stays."""
    sides = (("down", level.down, layers), ("up", level.up, layers + 1))
    stays = [f"{side} pairs {_join(kept)}" for side, kept, _ in sides]
    removed = [
        f"{side} pairs {_join(gone)}"
        for side, kept, count in sides
        if (gone := [n for n in range(count) if n not in kept])
    ]
    if level.transformer_blocks is not None:
        stays.append(f"transformer blocks {_join(level.transformer_blocks)}")
        removed.append("the other transformer blocks")
    return "; ".join(removed) or "nothing", "; ".join(stays)


def _join(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices))


def _read_plan(model: FinishedModel) -> BlockPlan:
    from sdcompress.prune.plan import BlockPlan

    return BlockPlan.from_json(json.dumps(model.manifest.config["plan"]), model.folder / MANIFEST_NAME)


def _count_teacher_parameters(plan: BlockPlan) -> int:
    from sdcompress.prune.cost import count_unet_parameters

    return count_unet_parameters(plan.teacher)


def _count_unet_parameters(folder: Path) -> int:
    from sdcompress.prune.cost import count_unet_parameters

    return count_unet_parameters(read_unet_config(folder))


def _training(manifest: Manifest) -> str:
    train: dict[str, Any] = manifest.config.get("train", {})
    figures = manifest.figures
    steps, batch_size = figures.get("steps", 0), train.get("batch_size", 0)
    rate = f"{train.get('learning_rate', 0):g}, {train.get('lr_schedule')}"
    if train.get("lr_warmup_steps"):
        rate += f", after {train['lr_warmup_steps']} steps of warm-up"
    data = [f"{name} {value}" for name, value in train.get("data", {}).items() if value not in (None, 0, False, [], {})]
    rows: list[tuple[str, object]] = [
        ("steps", f"{steps:,} of {batch_size} pictures ({steps * batch_size:,} seen)"),
        ("learning rate", rate),
        ("optimizer", f"{train.get('optimizer')}, weight decay {train.get('weight_decay'):g}"),
        *((text, f"{train[name]:g}") for name, text in _LOSSES.items() if name in train),
        *_few_step_rows(manifest.config, train),
        *((f"last {name}", f"{value:.4f}") for name, value in figures.get("losses", {}).items()),
        *((text, f"{train[name]}") for name, text in _OPTIONS.items() if train.get(name)),
        ("seed", manifest.seed),
    ]
    lines = [f"| {escape_markdown(name)} | {escape_markdown(value)} |" for name, value in rows]
    source = "; ".join([code_span(manifest.inputs.get("data", "unknown")), *map(escape_markdown, data)])
    return "\n".join(["## How it was trained\n\n| | |\n|---|---|", *lines, f"| data | sha256 {source} |\n"])


def _few_step_rows(config: Mapping[str, Any], train: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Returns the rows of a few-step training; of another, none."""
    if "num_inference_steps" not in train:
        return []
    phases = train.get("phases") or train["num_inference_steps"]
    return [("guidance in the weights", config.get("guidance_scale")), ("phases", f"{phases:d}")]


def _license_note(license: str | None, base: str) -> str:
    derived = f"this model derives from {code_span(base)}, whose license"
    if license is None:
        return (
            f"## License\n\n**To be checked:** {derived} decides which one this model may have. None was stated when"
            " this card was written.\n"
        )
    return f"## License\n\n{license}, as stated by the uploader; {derived} binds it too.\n"


def _origin(manifest: Manifest, base: str) -> str:
    role, title = ("teacher", "teacher") if "teacher" in manifest.inputs else ("model", "base model")
    versions = ", ".join(
        f"{name} {manifest.versions[name]}"
        for name in ("sdcompress", "torch", "diffusers")
        if name in manifest.versions
    )
    made = escape_markdown(f"{versions}, {manifest.created[:10]}" if manifest.created else versions)
    return (
        f"## Where it comes from\n\n- {title}: {code_span(base)}, sha256"
        f" {code_span(manifest.inputs.get(role, 'unknown'))}\n"
        f"- made with {made}; `{MANIFEST_NAME}` holds the whole configuration and the sha256 of every file\n"
    )
