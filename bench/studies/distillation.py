"""Does distillation work? bk-tiny of nano: untrained, trained with the task loss alone, and distilled; equal steps,
several seeds.

    python bench/studies/distillation.py -o bench/results/distillation-nano.json --work build/study

Judged on held-out prompts: style accuracy and retrieval top-5 by nano-CLIP, and the relative L2 of the noise prediction
against the teacher's on noised latents of real held-out pictures, over timesteps. Each run is an ordinary `distill` and
is resumed when the study is started again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sdcompress_bench.environment import environment
from sdcompress_bench.fidelity import compare_steps, make_probe, predict
from sdcompress_bench.quality import ClipMetric, Share, judge, real_pictures
from sdcompress_bench.scenario import Prompt

from sdcompress.data import nano_prompts
from sdcompress.data.build_cache import build_cache
from sdcompress.data.cache import LatentCache
from sdcompress.data.sources import open_source
from sdcompress.models import nano
from sdcompress.models.load import load_pipeline
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import build_student
from sdcompress.sampling import generate
from sdcompress.support.console import ConsoleReporter
from sdcompress.train.config import DistillConfig
from sdcompress.train.distill import distill
from sdcompress.train.recipes import load_config
from sdcompress.train.pipelines import PIPELINE, with_unet

ARMS: dict[str, dict[str, float]] = {
    "task loss alone": {"output_kd_weight": 0.0, "feature_kd_weight": 0.0},
    "distilled": {},
}
TIMESTEPS = (1, 101, 301, 501, 701, 901, 999)


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
    plan = make_plan(pipeline.unet.config, "bk-tiny")
    folder = args.work / "cache"
    cache = (
        LatentCache.open(folder, teacher.sha256)
        if folder.is_dir()
        else build_cache(open_source("nano"), teacher, folder, report=report)
    )
    metric, styles = ClipMetric(nano.metric_folder()), nano.styles()
    prompts = [Prompt(p.caption, p.style) for p in nano_prompts.draw_prompts("heldout", args.prompts)]
    pictures, pictured = real_pictures(nano.shards("heldout")[0], prompts)
    probe = make_probe(pipeline, pictures[:16], [p.caption for p in pictured[:16]], TIMESTEPS, 0)
    truth = predict(pipeline, probe)

    def figures(tested: Any) -> dict[str, float]:
        with (
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()),
        ):
            images = generate(tested, [p.caption for p in prompts], seeds=list(range(len(prompts))), batch_size=50)
        judged = {
            k: asdict(v)["share"] if isinstance(v, Share) else v
            for k, v in judge(metric, images, prompts, styles).items()
        }
        steps = compare_steps(predict(tested, probe), truth, probe.timesteps)
        return {
            "style_accuracy": judged["style"],
            "retrieval_top5": judged["top5"],
            "output_relative_l2": statistics.fmean(s.relative_l2 for s in steps),
        }

    rows: list[dict[str, Any]] = [{"arm": "teacher", "seed": None} | figures(pipeline)]
    rows.append(
        {"arm": "untrained", "seed": None} | figures(with_unet(pipeline, build_student(pipeline.unet, plan).eval()))
    )
    config = load_config(DistillConfig, "nano", {"steps": args.steps, "sample_every": 0})
    for seed in range(args.seeds):
        for arm, weights in ARMS.items():
            run = args.work / f"{arm.replace(' ', '-')}-{config.steps}-{seed}"
            if not (run / PIPELINE).is_dir():
                distill(
                    teacher,
                    plan,
                    cache,
                    config.model_copy(update={"seed": seed} | weights),
                    run,
                    resume=(run / "checkpoints").is_dir(),
                    report=report,
                )
            rows.append({"arm": arm, "seed": seed} | figures(load_pipeline(run).pipeline))
            report.say(json.dumps(rows[-1]))
    result = {
        "teacher_sha256": teacher.sha256,
        "plan": "bk-tiny",
        "steps": config.steps,
        "batch_size": config.batch_size,
        "prompts": len(prompts),
        "rows": rows,
        "environment": environment(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    args.output.with_suffix(".md").write_text(table(rows, config.steps), encoding="utf-8")
    print(table(rows, config.steps))


def table(rows: list[dict[str, Any]], steps: int) -> str:
    """Mean over seeds (lowest to highest) of each arm, as Markdown."""
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
