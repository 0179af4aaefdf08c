"""`sdcompress distill`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sdcompress.cli._console import ConsoleReporter, card, mib, millions
from sdcompress.cli._training import begin, outcome, training_config, training_options


@click.command()
@click.argument("teacher")
@click.option(
    "--plan",
    "plan_name",
    default=None,
    help="bk-base, bk-small, bk-tiny, or the path of a plan.json.  [default: the recipe's, else bk-tiny]",
)
@click.option("--task-weight", type=float, default=None, help="Weight of the loss against the true noise.")
@click.option(
    "--output-kd-weight", type=float, default=None, help="Weight of the loss against the teacher's prediction."
)
@click.option(
    "--feature-kd-weight", type=float, default=None, help="Weight of the loss against the teacher's block outputs."
)
@training_options("Training folder: checkpoints, metrics.jsonl, samples, and the student under pipeline/.")
def command(
    teacher: str,
    plan_name: str | None,
    data: str,
    cache_folder: Path | None,
    recipe: str | None,
    settings: tuple[str, ...],
    resume: bool,
    output: Path,
    force: bool,
    **options: Any,
) -> None:
    """Train a smaller student of TEACHER: its blocks are removed as the plan says, then it learns from the teacher.

    \b
      sdcompress distill nano --plan bk-tiny --data nano --recipe nano -o student
      sdcompress distill rv4.safetensors --data "laion-art/{00000..00099}.tar" --where "aesthetic >= 7.5" \\
          --recipe segmind-small -o sd-small
      sdcompress distill ... -o sd-small --resume           go on after a stop
    """
    from sdcompress.models.locate import refuse_student, unet_config
    from sdcompress.prune.plan import read_plan
    from sdcompress.prune.student import count_parameters, meta_unet
    from sdcompress.train.config import DistillConfig
    from sdcompress.train.distill import distill
    from sdcompress.train.run_folder import PIPELINE

    config = training_config(DistillConfig, recipe, settings, options)
    theirs = unet_config(teacher)
    refuse_student(theirs, teacher)
    plan = read_plan(plan_name or config.plan or "bk-tiny", theirs)
    report = ConsoleReporter()
    loaded, cache = begin(teacher, data, cache_folder, config, output, resume=resume, force=force, report=report)
    result = distill(loaded, plan, cache, config, output, resume=resume, force=force, report=report)
    folder = output / PIPELINE
    before, after = count_parameters(meta_unet(plan.teacher)), count_parameters(meta_unet(plan.student_config()))
    card(
        f"{plan.name} student of {loaded.name}",
        [
            ("student", folder),
            ("UNet", f"{millions(before)} → {millions(after)} parameters ({1 - after / before:.1%} smaller)"),
            ("size", mib(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()))),
            *outcome(result),
        ],
        f"sdcompress export {folder} -o {output.name}-onnx",
    )
