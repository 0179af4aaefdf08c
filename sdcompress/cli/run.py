"""`sdcompress run`: every stage in turn, each skipped if its artifact is complete."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
from sdcompress_engines.command import as_argument, command_line

from sdcompress.cli._console import (
    ConsoleReporter,
    card,
    force_option,
    mib,
    millions,
    output_option,
    typed_command,
)
from sdcompress.cli._training import DATA_HELP
from sdcompress.cli._types import FEW_STEPS, NAME, TRAINING_STEPS, Capability, FilePath

if TYPE_CHECKING:
    from sdcompress_bench.chain import ChainResult
    from sdcompress_bench.chain_inputs import ChainSettings


@click.command()
@click.argument("teacher", type=NAME)
@click.option(
    "--data",
    type=NAME,
    required=True,
    metavar="DATA",
    help=DATA_HELP,
)
@click.option(
    "--plan",
    "plans",
    type=NAME,
    multiple=True,
    default=("bk-tiny",),
    show_default=True,
    help="bk-base, bk-small, bk-tiny, or a plan.json; repeat for several students.",
)
@click.option("--recipe", type=NAME, default=None, metavar="NAME|FILE", help="Training settings, such as nano.")
@click.option("--steps", type=TRAINING_STEPS, default=None, help="Training steps; overrides the recipe.")
@click.option(
    "--few-step",
    "few_step",
    type=FEW_STEPS,
    default=None,
    metavar="N",
    help="Train the smallest student further, to draw in N steps without guidance; it is measured beside the others.",
)
@click.option(
    "--few-step-recipe",
    type=NAME,
    default=None,
    metavar="NAME|FILE",
    help="Settings of that training, such as few-step or nano-few-step.  [default: those of sdcompress few-step]",
)
@click.option(
    "--compute-capability",
    type=Capability(),
    default=None,
    help="GPU to build engines for.  [default: this machine's GPU; without one, 8.0 and newer]",
)
@click.option(
    "--prompts",
    "prompts_file",
    type=FilePath(),
    default=None,
    metavar="FILE",
    help="Captions for the report, one a line.",
)
@click.option("--quick", is_flag=True, help="Measure less: a first look, not for publication.")
@output_option("Folder of the run; an earlier run in it is continued.")
@force_option
def command(
    compute_capability: tuple[int, int] | None,
    steps: int | None,
    few_step: int | None,
    few_step_recipe: str | None,
    **settings: Any,
) -> None:
    """Take TEACHER through every stage: plan → distill → few steps → export → engine → bench.

    If a run is interrupted, the same command continues it.

    \b
      sdcompress run nano --data nano --recipe nano -o demo
      sdcompress run ./realistic-vision-v4 --data ./pictures --plan sd-small --plan sd-tiny --steps 50000 -o rv4
      sdcompress run ./realistic-vision-v4 --data ./pictures --few-step 4 --few-step-recipe few-step -o rv4
    """
    from sdcompress_bench.chain_inputs import ChainSettings, FewStepSettings
    from sdcompress_engines.errors import UsageError

    if few_step_recipe is not None and few_step is None:
        raise UsageError("--few-step-recipe without --few-step", hint="add --few-step 4")
    capabilities = None if compute_capability is None else [compute_capability]
    run_and_print(
        ChainSettings(
            **settings,
            overrides={"steps": steps},
            compute_capabilities=capabilities,
            few_step=None if few_step is None else FewStepSettings(few_step, few_step_recipe),
        )
    )


_STAGES = {
    "cache": "data",
    "student": "training",
    "few-step": "few steps",
    "onnx": "graphs",
    "engine": "engines",
    "results": "bench",
}
"""Kind of artifact → what the card calls the stages that make it."""


def run_and_print(settings: ChainSettings) -> None:
    """Run the chain and print the closing card.

    Args:
        settings: what to do.
    """
    from sdcompress_bench.chain import run_chain
    from sdcompress_bench.report import headline

    result = run_chain(settings, ConsoleReporter(), typed_command())
    rows: list[tuple[str, object]] = [("answer", headline(result.results))]
    rows += [row for model in result.results.models for row in _model_rows(result, model)]
    if result.no_engine is not None:
        rows.append(("no engine", result.no_engine))
    parts = ", ".join(f"{_STAGES[kind]} {seconds:.0f} s" for kind, seconds in result.stage_seconds.items())
    rows += [("time", f"{result.seconds:.0f} s{f' ({parts})' if parts else ''}"), ("report", result.report)]
    rows.append(("side by side", result.report.with_name("grid.webp")))
    student = result.students[result.few_step or next(iter(result.students))]
    card(
        f"{result.teacher} → {', '.join(result.students)}",
        rows,
        command_line(["sdcompress", "generate", as_argument(student), result.results.captions[0], "-o", "out.png"]),
    )


def _model_rows(result: ChainResult, model: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """Yields the lines about a model: its sizes, its speed on each backend, and its quality."""
    name, results = model["name"], result.results
    sizes = [f"UNet {millions(model['parameters']['unet'])} parameters"]
    sizes += [
        f"{kind} {mib(sizes_by_model[name])}"
        for kind, sizes_by_model in (("ONNX", result.graphs), ("engine", result.engines))
        if name in sizes_by_model
    ]
    yield name, ", ".join(sizes)
    for row in results.rows():
        if row.model == name and row.unet_step is not None:
            faster = f", {row.speedup:.2f}× the teacher in PyTorch" if row.speedup else ""
            yield (
                "",
                f"{row.setup}, {row.sampling}: {row.images_per_s or 0:.2f} pictures/s{faster};"
                f" one UNet step {row.unet_step.median:.1f} ms",
            )
    if name in results.students:
        distance = results.students[name]["relative_l2_mean"]
        yield "", f"noise prediction {distance:.3f} relative L2 from the teacher's, mean over timesteps"
    quality = results.quality.get(name, {})
    if "style" in quality:
        style, top5 = quality["style"]["share"], quality["top5"]["share"]
        yield "", f"right style {style:.0%}, right caption in the top 5 {top5:.0%}"
