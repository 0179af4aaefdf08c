"""`sdcompress finetune`: train every weight of a UNet."""

from __future__ import annotations

import click
from sdcompress_engines.command import as_argument, command_line

from sdcompress.cli._console import ConsoleReporter, card, mib
from sdcompress.cli._training import (
    TrainingArguments,
    folder_size_bytes,
    load_inputs,
    note_few_steps,
    result_rows,
    training_options,
)
from sdcompress.cli._types import NAME
from sdcompress.train.config import FinetuneConfig


@click.command()
@click.argument("model", type=NAME)
@training_options(
    FinetuneConfig, "Training folder: checkpoints, metrics.jsonl, samples, and the pipeline under pipeline/."
)
def command(
    model: str,
    run: TrainingArguments,
) -> None:
    """Train every weight of MODEL's UNet, a teacher's or a student's, on new pictures.

    \b
      sdcompress finetune nano-tiny --data ./pictures --recipe nano-finetune -o finetuned
      sdcompress finetune segmind/tiny-sd --data ./portraits --recipe segmind-portrait -o portrait
      sdcompress finetune ... -o portrait --resume           continue after a stop
    """
    from sdcompress.train.finetune import finetune
    from sdcompress.train.pipelines import PIPELINE

    config = run.read_config(FinetuneConfig)
    report = ConsoleReporter()
    loaded, cache = load_inputs(model, run, config, report, check=lambda loaded: note_few_steps(loaded, report))
    result = finetune(loaded, cache, config, run.output, resume=run.resume, force=run.force, report=report)
    folder = run.output / PIPELINE
    rows: list[tuple[str, object]] = [
        ("pipeline", folder),
        ("size", mib(folder_size_bytes(folder))),
    ]
    card(
        f"{loaded.name}, finetuned",
        rows + result_rows(result),
        command_line(["sdcompress", "bench", as_argument(model), as_argument(folder), "-o", "report"]),
    )
