"""`sdcompress demo`: the whole chain on the built-in teacher."""

from __future__ import annotations

from pathlib import Path

import click

from sdcompress.cli._console import force_option
from sdcompress.cli._types import TRAINING_STEPS, FilePath


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
@force_option
def command(output: Path, steps: int | None, force: bool) -> None:
    """Run every stage on nano, the built-in teacher: two students, their ONNX graphs and engines, and the report.

    It needs no download and no GPU, and takes minutes on two cores. It is `sdcompress run` with nano's own data and
    recipe.

    \b
      sdcompress demo
      sdcompress demo --steps 1000 -o demo-long
    """
    from sdcompress_bench.chain_inputs import ChainSettings

    from sdcompress.cli.run import run_and_print

    plans = ("bk-base", "bk-tiny")
    run_and_print(ChainSettings("nano", "nano", plans, "nano", {"steps": steps}, output, quick=True, force=force))
