"""`sdcompress finetune`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sdcompress.cli._console import ConsoleReporter, card, mib
from sdcompress.cli._training import begin, outcome, training_config, training_options


@click.command()
@click.argument("model")
@training_options("Training folder: checkpoints, metrics.jsonl, samples, and the pipeline under pipeline/.")
def command(
    model: str,
    data: str,
    cache_folder: Path | None,
    recipe: str | None,
    settings: tuple[str, ...],
    resume: bool,
    output: Path,
    force: bool,
    **options: Any,
) -> None:
    """Train every weight of MODEL's UNet, a teacher's or a student's, on new pictures.

    \b
      sdcompress finetune nano-tiny --data ./pictures --recipe nano-finetune -o finetuned
      sdcompress finetune segmind/tiny-sd --data ./portraits --recipe segmind-portrait -o portrait
      sdcompress finetune ... -o portrait --resume           go on after a stop
    """
    from sdcompress.train.config import FinetuneConfig
    from sdcompress.train.finetune import finetune
    from sdcompress.train.run_folder import PIPELINE

    config = training_config(FinetuneConfig, recipe, settings, options)
    report = ConsoleReporter()
    loaded, cache = begin(model, data, cache_folder, config, output, resume=resume, force=force, report=report)
    result = finetune(loaded, cache, config, output, resume=resume, force=force, report=report)
    folder = output / PIPELINE
    rows: list[tuple[str, object]] = [
        ("pipeline", folder),
        ("size", mib(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()))),
    ]
    card(f"{loaded.name}, finetuned", rows + outcome(result), f"sdcompress bench {model} {folder} -o report")
