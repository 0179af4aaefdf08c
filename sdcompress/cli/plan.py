"""`sdcompress plan`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sdcompress.cli._console import card, json_option, millions

if TYPE_CHECKING:
    from sdcompress.prune.student import Cost


@click.command()
@click.argument("teacher")
@click.option(
    "--preset",
    default="bk-tiny",
    show_default=True,
    help="bk-base (alias sd-small), bk-small, bk-tiny (alias sd-tiny), or the path of a plan.json.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    metavar="FILE",
    help="Write the plan here, for `distill --plan FILE`.",
)
@json_option
def command(teacher: str, preset: str, output: Path | None, as_json: bool) -> None:
    """Show what a block-removal plan keeps of TEACHER's UNet; no weights are loaded.

    \b
      sdcompress plan nano --preset bk-tiny
      sdcompress plan ./realistic-vision-v4 --preset sd-small -o plan.json
    """
    import json

    from sdcompress_engines.errors import storage_errors

    from sdcompress.models.locate import unet_config
    from sdcompress.prune.plan import read_plan
    from sdcompress.prune.student import unet_cost

    plan = read_plan(preset, unet_config(teacher))
    before, after = unet_cost(plan.teacher), unet_cost(plan.student_config())
    total = len(plan.teacher["block_out_channels"])
    rows = []
    for i in range(total):
        level = plan.levels[i] if i < len(plan.levels) else None
        channels = plan.teacher["block_out_channels"][i]
        up = f"up_blocks.{total - 1 - i}"
        student_up = f"up_blocks.{len(plan.levels) - 1 - i}"
        keeps = f"down pairs {_list(level.down)}, up pairs {_list(level.up)}" if level else "dropped"
        was = before[f"down_blocks.{i}"] + before[up]
        now = after[f"down_blocks.{i}"] + after[student_up] if level else None
        rows.append((f"level {i} ({channels} ch)", f"{keeps:<32} {_change(was, now)}"))
    if "mid_block" in before:
        rows.append(
            (
                "mid block",
                f"{'kept' if plan.mid else 'dropped':<32} {_change(before['mid_block'], after.get('mid_block'))}",
            )
        )
    rows.append(("UNet", f"{'':<32} {_change(before['total'], after['total'])}"))
    share = 1 - after["total"].parameters / before["total"].parameters
    rows.append(("", f"{before['total'].parameters:,} → {after['total'].parameters:,} parameters, {share:.1%} smaller"))
    if output:
        with storage_errors(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(plan.to_json(), encoding="utf-8")
        rows.append(("plan", str(output)))
    if as_json:
        click.echo(
            json.dumps(
                {
                    "plan": json.loads(plan.to_json()),
                    "before": before["total"].__dict__,
                    "after": after["total"].__dict__,
                }
            )
        )
        return
    card(
        f"{plan.name} for {teacher}",
        rows,
        f"sdcompress distill {teacher} --plan {output or preset} --data DATA -o student",
    )


def _list(indices: tuple[int, ...]) -> str:
    return ", ".join(map(str, indices))


def _change(was: Cost, now: Cost | None) -> str:
    parameters, macs = (now.parameters, now.macs) if now else (0, 0)
    return (
        f"{millions(was.parameters):>9} → {millions(parameters):>9}   {was.macs / 1e9:>8.2f} → {macs / 1e9:>8.2f} GMACs"
    )
