"""Does distillation work? bk-tiny of nano, untrained, trained with the task loss alone, and distilled.

    python bench/studies/distillation.py -o bench/results/distillation-nano.json --work build/study

All arms train for equal steps, with several seeds. They are judged on held-out prompts: style accuracy and retrieval
top-5 by nano-CLIP, and the relative L2 of the noise prediction to the teacher's, on noised latents of real held-out
pictures, over timesteps. Each run is an ordinary `distill`, and is resumed when the study is started again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdcompress_bench.environment import environment
from sdcompress_bench.nano_students import PLAN, StudentJudge, open_cache, write_study
from sdcompress_engines.progress import Reporter

from sdcompress.data.cache import LatentCache
from sdcompress.models.load import LoadedPipeline, load_pipeline
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import build_student
from sdcompress.support.console import ConsoleReporter
from sdcompress.train.config import DistillConfig
from sdcompress.train.distill import distill
from sdcompress.train.pipelines import PIPELINE, with_unet
from sdcompress.train.recipes import load_config

ARMS: dict[str, dict[str, float]] = {
    "task loss alone": {"output_kd_weight": 0.0, "feature_kd_weight": 0.0},
    "distilled": {},
}


def run_arms(
    teacher: LoadedPipeline, cache: LatentCache, config: DistillConfig, seeds: int, work: Path, report: Reporter
) -> Iterator[tuple[str, int, Path]]:
    """Train every arm with every seed; yields the arm, the seed and the folder of each run. Finished runs are kept.

    Args:
        teacher: the pipeline that is distilled.
        cache: latents of the training pictures.
        config: of the training, without the weights of an arm.
        seeds: how many.
        work: folder for the runs.
        report: shows progress.
    """
    plan = make_plan(teacher.pipeline.unet.config, PLAN)
    for seed in range(seeds):
        for arm, weights in ARMS.items():
            folder = work / f"{arm.replace(' ', '-')}-{config.steps}-{seed}"
            if not (folder / PIPELINE).is_dir():
                own = config.model_copy(update={"seed": seed} | weights)
                resume = (folder / "checkpoints").is_dir()
                distill(teacher, plan, cache, own, folder, resume=resume, report=report)
            yield arm, seed, folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where the runs and the cache are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None, help="default: the nano recipe's")
    parser.add_argument("--prompts", type=int, default=154, help="default: all held-out pairs")
    args = parser.parse_args()
    report = ConsoleReporter()
    teacher = load_pipeline("nano")
    pipeline: Any = teacher.pipeline
    cache = open_cache(teacher, args.work / "cache", report)
    judge = StudentJudge(pipeline, args.prompts)
    untrained = with_unet(pipeline, build_student(pipeline.unet, make_plan(pipeline.unet.config, PLAN)).eval())
    rows: list[dict[str, Any]] = [{"arm": "teacher", "seed": None} | judge.judge(pipeline)]
    rows.append({"arm": "untrained", "seed": None} | judge.judge(untrained))
    config = load_config(DistillConfig, "nano", {"steps": args.steps, "sample_every": 0})
    for arm, seed, folder in run_arms(teacher, cache, config, args.seeds, args.work, report):
        rows.append({"arm": arm, "seed": seed} | judge.judge(load_pipeline(folder).pipeline))
        report.show_line(json.dumps(rows[-1]))
    result = {
        "teacher_sha256": teacher.sha256,
        "plan": PLAN,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "prompts": len(judge.prompts),
        "rows": rows,
        "environment": environment(),
    }
    write_study(args.output, result)


if __name__ == "__main__":
    main()
