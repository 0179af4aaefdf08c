"""`sdcompress few-step`: train a model to draw in few steps."""

from __future__ import annotations

import click
from sdcompress_engines.command import as_argument, command_line

from sdcompress.cli._console import ConsoleReporter, card, mib
from sdcompress.cli._options import field_options
from sdcompress.cli._training import TrainingArguments, folder_size_bytes, load_inputs, result_rows, training_options
from sdcompress.cli._types import NAME
from sdcompress.train.config import FewStepConfig


@click.command()
@click.argument("model", type=NAME)
@click.option(
    "--teacher",
    type=NAME,
    default=None,
    help=(
        "Model whose guided pictures are learned. Needed if MODEL was distilled from a local file.  [default: the"
        " built-in or hub model that MODEL was distilled from; for a whole model, MODEL itself]"
    ),
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
    run: TrainingArguments,
) -> None:
    """Train MODEL, a student or a whole model, to draw in few steps and without guidance.

    Each step then costs half, because nothing is computed for the absent caption, and a negative prompt has no effect.
    Without --recipe it is a short trial; for a real model take the recipe few-step, or few-step-lora.

    \b
      sdcompress few-step nano-tiny --data nano --recipe nano-few-step -o fast
      sdcompress few-step student/pipeline --teacher rv4.safetensors --data drawn --recipe few-step -o fast
      sdcompress few-step segmind/tiny-sd --teacher SG161222/Realistic_Vision_V4.0_noVAE --data drawn \\
          --recipe few-step-lora -o fast
    """
    from functools import cache

    from sdcompress.models.load import load_pipeline
    from sdcompress.models.locate import local_paths
    from sdcompress.models.origin import find_teacher
    from sdcompress.train.few_step import check_pair, few_step
    from sdcompress.train.lora import FILE, LORA
    from sdcompress.train.pipelines import PIPELINE

    config = run.read_config(FewStepConfig)
    report = ConsoleReporter()
    load_student = cache(lambda: load_pipeline(model))  # after the checks of options and data
    loaded, latents = load_inputs(
        teacher or find_teacher(model),
        run,
        config,
        report,
        files=local_paths(model),
        check=lambda loaded: check_pair(load_student(), loaded, config),
    )
    student = load_student()
    result = few_step(student, loaded, latents, config, run.output, resume=run.resume, force=run.force, report=report)
    folder = run.output / PIPELINE
    rows: list[tuple[str, object]] = [
        ("pipeline", folder),
        ("size", mib(folder_size_bytes(folder))),
        *([] if config.lora_rank is None else [("LoRA", run.output / LORA / FILE)]),
        ("draws in", f"{config.num_inference_steps} steps, without guidance or a negative prompt"),
    ]
    card(
        f"{student.name} in {config.num_inference_steps} steps, from {loaded.name}",
        rows + result_rows(result),
        f'sdcompress generate {command_line([as_argument(folder)])} "PROMPT" -o out.png',
    )
