"""`sdcompress plan`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from sdcompress_engines.command import as_argument, command_line

from sdcompress.cli._console import card, json_option, millions, print_json
from sdcompress.cli._types import NAME, FilePath

if TYPE_CHECKING:
    from sdcompress.prune.cost import Cost
    from sdcompress.prune.plan import BlockPlan


@click.command()
@click.argument("teacher", type=NAME)
@click.option(
    "--preset",
    type=NAME,
    default="bk-tiny",
    show_default=True,
    help="bk-base (alias sd-small), bk-small, bk-tiny (alias sd-tiny), or the path of a plan.json.",
)
@click.option(
    "-o",
    "--output",
    type=FilePath(dir_okay=False),
    default=None,
    metavar="FILE",
    help="Write the plan here, for `distill --plan FILE`.",
)
@json_option
def command(teacher: str, preset: str, output: Path | None, as_json: bool) -> None:
    """Show what a block-removal plan keeps of TEACHER's UNet; no weights are loaded.

    What `distill` would refuse is refused here too: a student, and a plan that removes nothing.

    \b
      sdcompress plan nano --preset bk-tiny
      sdcompress plan ./realistic-vision-v4 --preset sd-small -o plan.json
    """

    from sdcompress_engines.output_folders import check_file, staged_file

    from sdcompress.models.locate import local_paths, read_unet_config, refuse_student
    from sdcompress.prune.cost import unet_cost
    from sdcompress.prune.presets import plan_files, read_plan

    if output:
        check_file(output, [*local_paths(teacher), *plan_files(preset)])
        _refuse_other_file(output)
    config = read_unet_config(teacher)
    refuse_student(config, teacher)
    plan = read_plan(preset, config)
    before, after = unet_cost(plan.teacher), unet_cost(plan.student_config())
    rows = _rows(plan, before, after)
    if output:
        with staged_file(output) as partial:
            partial.write_text(plan.to_json(), encoding="utf-8")
        rows.append(("plan", str(output)))
    if as_json:
        costs = {"before": before["total"].__dict__, "after": after["total"].__dict__}
        print_json({"plan": plan.to_content(), **costs})
        return
    card(
        f"{plan.name} for {teacher}",
        rows,
        f"sdcompress distill {command_line([as_argument(teacher), '--plan', str(output or preset)])} --data DATA"
        " -o student",
    )


def _refuse_other_file(output: Path) -> None:
    """Refuse to replace a file that is no plan: this command has no `--force`."""
    from sdcompress_engines.errors import ArtifactError, PlanError

    from sdcompress.prune.plan import BlockPlan

    if output.is_file():
        try:
            BlockPlan.from_json(output.read_text(encoding="utf-8"), output)
        except (PlanError, UnicodeDecodeError) as error:
            raise ArtifactError("exists and is no plan", where=output, hint="choose another -o") from error


def _rows(plan: BlockPlan, before: dict[str, Cost], after: dict[str, Cost]) -> list[tuple[str, object]]:
    """Returns one row for each level, for the mid block and for the whole UNet."""
    total = len(plan.teacher["block_out_channels"])
    rows: list[tuple[str, object]] = []
    for i, channels in enumerate(plan.teacher["block_out_channels"]):
        level = plan.levels[i] if i < len(plan.levels) else None
        old = before[f"down_blocks.{i}"] + before[f"up_blocks.{total - 1 - i}"]
        new = after[f"down_blocks.{i}"] + after[f"up_blocks.{len(plan.levels) - 1 - i}"] if level else None
        keeps = f"down pairs {_join(level.down)}, up pairs {_join(level.up)}" if level else "dropped"
        rows.append((f"level {i} ({channels} ch)", f"{keeps:<32} {_change(old, new)}"))
    if "mid_block" in before:
        keeps = "kept" if plan.mid else "dropped"
        rows.append(("mid block", f"{keeps:<32} {_change(before['mid_block'], after.get('mid_block'))}"))
    rows.append(("UNet", f"{'':<32} {_change(before['total'], after['total'])}"))
    old_count, new_count = before["total"].parameters, after["total"].parameters
    rows.append(("", f"{old_count:,} → {new_count:,} parameters, {1 - new_count / old_count:.1%} smaller"))
    return rows


def _join(indices: tuple[int, ...]) -> str:
    return ", ".join(map(str, indices))


def _change(old: Cost, new: Cost | None) -> str:
    parameters, macs = (new.parameters, new.macs) if new else (0, 0)
    return (
        f"{millions(old.parameters):>9} → {millions(parameters):>9}   {old.macs / 1e9:>8.2f} → {macs / 1e9:>8.2f} GMACs"
    )
