"""`sdcompress distill`: train a student from a teacher."""

from __future__ import annotations

import click
from sdcompress_engines.command import as_argument, command_line

from sdcompress.cli._console import ConsoleReporter, card, mib, millions
from sdcompress.cli._options import field_options
from sdcompress.cli._training import TrainingArguments, folder_size_bytes, load_inputs, result_rows, training_options
from sdcompress.cli._types import NAME
from sdcompress.train.config import DistillConfig


@click.command()
@click.argument("teacher", type=NAME)
@click.option(
    "--plan",
    "plan_name",
    type=NAME,
    default=None,
    help="bk-base, bk-small, bk-tiny, or the path of a plan.json.  [default: the recipe's, else bk-tiny]",
)
@field_options(DistillConfig, ("task_weight", "output_kd_weight", "feature_kd_weight"))
@training_options(
    DistillConfig, "Training folder: checkpoints, metrics.jsonl, samples, and the student under pipeline/."
)
def command(
    teacher: str,
    plan_name: str | None,
    run: TrainingArguments,
) -> None:
    """Train a smaller student of TEACHER: blocks are removed by a plan, then the student learns from the teacher.

    \b
      sdcompress distill nano --plan bk-tiny --data nano --recipe nano -o student
      sdcompress distill rv4.safetensors --data "laion-art/{00000..00099}.tar" --where "aesthetic >= 7.5" \\
          --recipe segmind-small -o sd-small
      sdcompress distill ... -o sd-small --resume           continue after a stop
    """
    from sdcompress.models.locate import read_unet_config, refuse_student
    from sdcompress.prune.cost import count_parameters
    from sdcompress.prune.presets import plan_files, read_plan
    from sdcompress.prune.student import meta_unet
    from sdcompress.train.distill import distill, find_attentions
    from sdcompress.train.pipelines import PIPELINE

    config = run.read_config(DistillConfig)
    teacher_config = read_unet_config(teacher)
    refuse_student(teacher_config, teacher)
    plan = read_plan(plan_name or config.plan or "bk-tiny", teacher_config)
    student = meta_unet(plan.student_config())
    find_attentions(student, plan, config)
    report = ConsoleReporter()
    loaded, cache = load_inputs(teacher, run, config, report, files=plan_files(plan_name, config.plan))
    result = distill(loaded, plan, cache, config, run.output, resume=run.resume, force=run.force, report=report)
    folder = run.output / PIPELINE
    before, after = count_parameters(meta_unet(plan.teacher)), count_parameters(student)
    card(
        f"{plan.name} student of {loaded.name}",
        [
            ("student", folder),
            ("UNet", f"{millions(before)} → {millions(after)} parameters ({1 - after / before:.1%} smaller)"),
            ("size", mib(folder_size_bytes(folder))),
            *result_rows(result),
        ],
        command_line(["sdcompress", "export", as_argument(folder), "-o", f"{run.output.absolute().name}-onnx"]),
    )
