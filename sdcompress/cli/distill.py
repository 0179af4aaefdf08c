"""`sdcompress distill`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ._console import ConsoleReporter, card, force_option, mib, millions, output_option


@click.command()
@click.argument("teacher")
@click.option("--plan", "plan_name", default="bk-tiny", show_default=True, help="bk-base, bk-small, bk-tiny, or the path of a plan.json.")
@click.option("--data", required=True, metavar="DATA", help="Folder of captioned pictures, webdataset shards (folder or glob), or nano.")
@click.option("--cache", "cache_folder", type=click.Path(path_type=Path), default=None, metavar="DIR", help="Latents and text embeddings; made here if not there.  [default: beside the output, DIR-cache]")
@click.option("--recipe", default=None, metavar="NAME|FILE", help="Named settings, e.g. nano; the options below override it.")
@click.option("--steps", type=int, default=None, help="Optimizer steps.")
@click.option("--batch-size", type=int, default=None, help="Pictures a step.")
@click.option("--learning-rate", type=float, default=None, help="AdamW's.")
@click.option("--task-weight", type=float, default=None, help="Weight of the loss against the true noise.")
@click.option("--output-kd-weight", type=float, default=None, help="Weight of the loss against the teacher's prediction.")
@click.option("--feature-kd-weight", type=float, default=None, help="Weight of the loss against the teacher's block outputs.")
@click.option("--precision", default=None, help="auto, fp32, bf16 or fp16.")
@click.option("--checkpoint-every", type=int, default=None, help="Steps between checkpoints.")
@click.option("--sample-every", type=int, default=None, help="Steps between pictures of the validation prompts; 0 is never.")
@click.option("--validation-prompt", "validation_prompts", multiple=True, help="Prompt drawn at those steps; repeat for more.")
@click.option("--size", "size_px", type=int, default=None, metavar="PX", help="Side of the training pictures. Default: the UNet's own.")
@click.option("--seed", type=int, default=None, help="Of everything random.")
@click.option("--resume", is_flag=True, help="Go on from the newest whole checkpoint in the output folder.")
@output_option("Training folder: checkpoints, metrics.jsonl, samples, and the student under pipeline/.")
@force_option
def command(teacher: str, plan_name: str, data: str, cache_folder: Path | None, recipe: str | None, size_px: int | None, resume: bool, output: Path, force: bool, **overrides: Any) -> None:
    """Train a smaller student of TEACHER: its blocks are removed as the plan says, then it learns from the teacher.

    \b
      sdcompress distill nano --plan bk-tiny --data nano --recipe nano -o student
      sdcompress distill ./realistic-vision-v4 --plan sd-small --data ./pictures --steps 50000 -o sd-small
      sdcompress distill ... -o sd-small --resume           go on after a stop
    """
    from sdcompress_engines.manifest import check_free, storage_errors

    from sdcompress.data.sources import open_source
    from sdcompress.prune.plan import read_plan
    from sdcompress.prune.student import count_parameters, meta_unet
    from sdcompress.teacher import load_teacher, unet_config
    from sdcompress.train.config import load_config
    from sdcompress.train.distill import PIPELINE, distill

    overrides["validation_prompts"] = overrides["validation_prompts"] or None
    config = load_config(recipe, overrides)
    plan = read_plan(plan_name, unet_config(teacher))
    source = open_source(data)
    if not resume:
        check_free(output, force)
    with storage_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    report = ConsoleReporter()
    loaded = load_teacher(teacher)
    cache = prepare_cache(source, loaded, cache_folder or output.with_name(f"{output.name}-cache"), size_px, report)
    result = distill(loaded, plan, cache, config, output, resume=resume, force=force, report=report)
    folder = output / PIPELINE
    before, after = count_parameters(meta_unet(plan.teacher)), count_parameters(meta_unet(plan.student_config()))
    card(
        f"{plan.name} student of {loaded.name}",
        [
            ("student", folder),
            ("UNet", f"{millions(before)} → {millions(after)} parameters ({1 - after / before:.1%} smaller)"),
            ("size", mib(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()))),
            ("steps", f"{result.steps}" + (f" (resumed at {result.resumed_from})" if result.resumed_from else "")),
            ("losses", ", ".join(f"{k} {v:.4f}" for k, v in result.losses.items())),
            ("time", f"{result.seconds:.0f} s"),
        ],
        f"sdcompress export {folder} -o {output.name}-onnx",
    )


def prepare_cache(source: Any, teacher: Any, folder: Path, size_px: int | None, report: ConsoleReporter) -> Any:
    """The cache in `folder`: opened where it is whole and fits, made where nothing is."""
    from sdcompress.data.cache import LatentCache, build_cache, default_size_px

    if not folder.exists():
        return build_cache(source, teacher, folder, size_px, report=report)
    cache = LatentCache.open(folder, teacher.sha256, source, size_px or default_size_px(teacher.pipeline))
    report.say(f"cache: {len(cache)} pictures in {folder}")
    return cache
