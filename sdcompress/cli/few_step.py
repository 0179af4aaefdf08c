"""`sdcompress few-step`: train a model to draw in few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from sdcompress_engines.command import as_argument, command_line

from sdcompress.cli._console import ConsoleReporter, card, mib
from sdcompress.cli._options import field_options
from sdcompress.cli._training import folder_size_bytes, load_inputs, result_rows, training_config, training_options
from sdcompress.cli._types import NAME
from sdcompress.train.config import FewStepConfig


@click.command()
@click.argument("model", type=NAME)
@click.option(
    "--teacher",
    type=NAME,
    default=None,
    help="Model whose guided pictures are learned.  [default: the one MODEL was distilled from, or MODEL itself]",
)
@field_options(
    FewStepConfig,
    ("num_inference_steps", "phases", "guidance_scale", "lora_rank"),
    metavars={"lora_rank": "RANK"},
    flags={"num_inference_steps": "--steps", "guidance_scale": "--guidance", "lora_rank": "--lora"},
)
@training_options(
    FewStepConfig,
    "Training folder: checkpoints, metrics.jsonl, samples, the pipeline under pipeline/, and a LoRA under lora/.",
    flags={"steps": "--train-steps"},
)
def command(
    model: str,
    teacher: str | None,
    data: str,
    cache_folder: Path | None,
    recipe: str | None,
    settings: tuple[str, ...],
    resume: bool,
    output: Path,
    force: bool,
    **options: Any,
) -> None:
    """Train MODEL, a student or a whole model, to draw in few steps and without guidance.

    Each step then costs half, because nothing is computed for the absent caption, and a negative prompt has no effect.

    \b
      sdcompress few-step nano-tiny --data nano --recipe nano-few-step -o fast
      sdcompress few-step student/pipeline --teacher rv4.safetensors --data drawn --steps 4 -o fast
      sdcompress few-step segmind/tiny-sd --teacher SG161222/Realistic_Vision_V4.0_noVAE --data drawn --lora 64 -o fast
    """
    from sdcompress.models.load import load_pipeline
    from sdcompress.models.locate import local_paths
    from sdcompress.models.origin import find_teacher
    from sdcompress.train.few_step import check_pair, few_step
    from sdcompress.train.pipelines import PIPELINE
    from sdcompress.train.recipes import recipe_files

    config = training_config(FewStepConfig, recipe, settings, options)
    report = ConsoleReporter()
    student = load_pipeline(model)
    loaded, cache = load_inputs(
        teacher or find_teacher(model),
        data,
        cache_folder,
        config,
        output,
        resume=resume,
        force=force,
        report=report,
        files=[*recipe_files(recipe), *local_paths(model)],
        check=lambda loaded: check_pair(student, loaded, config),
    )
    result = few_step(student, loaded, cache, config, output, resume=resume, force=force, report=report)
    folder = output / PIPELINE
    rows: list[tuple[str, object]] = [
        ("pipeline", folder),
        ("size", mib(folder_size_bytes(folder))),
        ("draws in", f"{config.num_inference_steps} steps, without guidance or a negative prompt"),
    ]
    card(
        f"{student.name} in {config.num_inference_steps} steps, from {loaded.name}",
        rows + result_rows(result),
        f'sdcompress generate {command_line([as_argument(folder)])} "PROMPT" -o out.png',
    )
