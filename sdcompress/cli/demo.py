"""`sdcompress demo`: the whole chain on the built-in teacher."""

from __future__ import annotations

from pathlib import Path

import click

from sdcompress.cli._console import force_option
from sdcompress.cli._types import FEW_STEPS, TRAINING_STEPS, FilePath

_FEW_STEP_TRAINING = 200
"""Training steps of the student in few steps: half of the recipe's, so that the demo stays short."""


@click.command()
@click.option(
    "-o",
    "--output",
    type=FilePath(),
    default=Path("demo"),
    show_default=True,
    metavar="DIR",
    help="Folder of the run; an earlier demo in it is continued.",
)
@click.option(
    "--steps",
    type=TRAINING_STEPS,
    default=None,
    help="Training steps of each student.  [default: the nano recipe's]",
)
@click.option(
    "--few-step",
    "few_step",
    type=FEW_STEPS,
    default=4,
    show_default=True,
    metavar="N",
    help="Steps in which the smaller student learns to draw, without guidance.",
)
@force_option
def command(output: Path, steps: int | None, few_step: int, force: bool) -> None:
    """Run every stage on nano, the built-in teacher: two students, one of them also in four steps, their ONNX graphs
    and engines, and the report.

    It needs no download and no GPU, and takes minutes on two cores. It is `sdcompress run` with nano's own data and
    recipes.

    \b
      sdcompress demo
      sdcompress demo --steps 1000 -o demo-long
    """
    from sdcompress_bench.chain_inputs import ChainSettings, FewStepSettings

    from sdcompress.cli.run import run_and_print

    plans, further = ("bk-base", "bk-tiny"), FewStepSettings(few_step, "nano-few-step", {"steps": _FEW_STEP_TRAINING})
    run_and_print(
        ChainSettings(
            "nano", "nano", plans, "nano", {"steps": steps}, output, quick=True, force=force, few_step=further
        )
    )
