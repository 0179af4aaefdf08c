"""Does distillation work? bk-tiny of nano, untrained, trained with the task loss alone, and distilled.

    python bench/studies/distillation.py -o bench/results/distillation-nano.json --work build/study

All arms train for equal steps, with several seeds. They are judged on held-out prompts: style accuracy and retrieval
top-5 by nano-CLIP, and the relative L2 of the noise prediction to the teacher's, on noised latents of real held-out
pictures, over timesteps. Each run is an ordinary `distill`, and is resumed when the study is started again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdcompress_bench.environment import environment
from sdcompress_bench.fidelity import compare_steps, make_probe, predict
from sdcompress_bench.quality import ClipMetric, judge_pipeline, real_pictures
from sdcompress_bench.scenario import Prompt
from sdcompress_engines.progress import Reporter

from sdcompress.data import nano_prompts
from sdcompress.data.build_cache import build_cache
from sdcompress.data.cache import LatentCache
from sdcompress.data.sources import open_source
from sdcompress.models import nano
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
PLAN = "bk-tiny"
TIMESTEPS = (1, 101, 301, 501, 701, 901, 999)


class Judge:
    """Judges pipelines on held-out prompts, and against the teacher's noise prediction.

    Args:
        teacher: the teacher's pipeline.
        count: number of prompts.
    """

    def __init__(self, teacher: Any, count: int) -> None:
        self.metric, self.styles = ClipMetric(nano.metric_folder()), nano.styles()
        heldout = nano_prompts.draw_prompts("heldout", count)
        self.prompts = [Prompt(prompt.caption, prompt.style) for prompt in heldout]
        pictures, prompts = real_pictures(nano.shards("heldout")[0], self.prompts)
        self.probe = make_probe(teacher, pictures[:16], [prompt.caption for prompt in prompts[:16]], TIMESTEPS, 0)
        self.reference = predict(teacher, self.probe)

    def judge(self, pipeline: Any) -> dict[str, float]:
        """Returns style accuracy, retrieval top-5, and the mean relative L2 to the teacher over timesteps."""
        captions = [prompt.caption for prompt in self.prompts]
        shares = judge_pipeline(self.metric, pipeline, captions, self.prompts, self.styles)
        steps = compare_steps(predict(pipeline, self.probe), self.reference, self.probe.timesteps)
        return shares | {"output_relative_l2": statistics.fmean(step.relative_l2 for step in steps)}


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


def open_cache(teacher: LoadedPipeline, folder: Path, report: Reporter) -> LatentCache:
    """Returns the latents of nano's training pictures; they are encoded first if the folder does not exist.

    Args:
        teacher: its VAE encodes the pictures.
        folder: of the cache.
        report: shows progress.
    """
    if folder.is_dir():
        return LatentCache.open(folder, teacher.sha256)
    return build_cache(open_source("nano"), teacher, folder, report=report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where the runs and the cache are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None, help="default: the nano recipe's")
    parser.add_argument("--prompts", type=int, default=100)
    args = parser.parse_args()
    report = ConsoleReporter()
    teacher = load_pipeline("nano")
    pipeline: Any = teacher.pipeline
    cache = open_cache(teacher, args.work / "cache", report)
    judge = Judge(pipeline, args.prompts)
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
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    args.output.with_suffix(".md").write_text(format_table(rows, config.steps), encoding="utf-8")
    print(format_table(rows, config.steps))


def format_table(rows: list[dict[str, Any]], steps: int) -> str:
    """Returns the mean over seeds (lowest to highest) of each arm, as Markdown."""
    names = {
        "style_accuracy": "right style",
        "retrieval_top5": "right caption in the top 5",
        "output_relative_l2": "noise prediction, relative L2 to the teacher",
    }
    lines = [
        f"bk-tiny of nano, {steps} steps; held-out prompts",
        "",
        "| | " + " | ".join(names.values()) + " |",
        "|---|" + "---|" * len(names),
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = []
        for name in names:
            values = [row[name] for row in rows if row["arm"] == arm]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
