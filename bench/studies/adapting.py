"""Can a student be taught something new? nano-tiny learns a word it has never seen, by LoRA and by full finetuning.

    python bench/studies/adapting.py -o bench/results/adapting-nano.json --work build/adapting

The word is "sketch": the training pictures are nano's line drawings with captions "a sketch of ..." in the place of "a
black line drawing of ...". Judged on concepts of held-out pairs, prompted "a sketch of ...": the share of pictures that
nano-CLIP calls line drawings, and retrieval top-5, before and after. LoRA steps a second on the teacher and on the
student are taken in turn.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from sdcompress_bench.environment import environment
from sdcompress_bench.quality import ClipMetric, Share, judge
from sdcompress_bench.scenario import Prompt

from sdcompress.data import nano_prompts
from sdcompress.data.build_cache import build_cache
from sdcompress.data.sources import open_source
from sdcompress.lora.files import read_lora
from sdcompress.lora.fuse import fuse_lora
from sdcompress.lora.names import unet_modules
from sdcompress.models import nano
from sdcompress.models.load import load_pipeline
from sdcompress.sampling import generate
from sdcompress.support.console import ConsoleReporter
from sdcompress.train.config import FinetuneConfig, LoraConfig
from sdcompress.train.finetune import finetune
from sdcompress.train.lora import KOHYA_FILE, LORA, train_lora
from sdcompress.train.recipes import load_config

STYLE, WORD = "line", "a sketch of"


def write_data(folder: Path) -> None:
    """The line drawings of the training shards as an image folder, captioned with the new word."""
    folder.mkdir(parents=True)
    phrase = nano.styles()[STYLE]
    for number, record in enumerate(r for r in open_source("nano") if r.meta["style"] == STYLE):
        (folder / f"{number:04d}.webp").write_bytes(record.encoded)
        (folder / f"{number:04d}.txt").write_text(record.caption.replace(phrase, WORD, 1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="emptied first")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3, help="of the speed comparison")
    args = parser.parse_args()
    report = ConsoleReporter()
    shutil.rmtree(args.work, ignore_errors=True)
    write_data(args.work / "data")
    student, teacher = load_pipeline("nano-tiny"), load_pipeline("nano")
    source = open_source(args.work / "data")
    caches = {
        model.name: build_cache(source, model, args.work / f"cache-{model.name}", report=report)
        for model in (student, teacher)
    }
    metric, styles = ClipMetric(nano.metric_folder()), nano.styles()
    asked = nano_prompts.draw_prompts("heldout", args.prompts)
    # The judge is asked in the words it knows; the model is prompted with the new one.
    known = [Prompt(p.caption.replace(styles[p.style], styles[STYLE], 1), STYLE) for p in asked]
    prompts = [p.caption.replace(styles[p.style], WORD, 1) for p in asked]

    def figures(pipeline: Any) -> dict[str, float]:
        with (
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()),
        ):
            images = generate(pipeline, prompts, seeds=list(range(len(prompts))), batch_size=50)
        judged = {
            k: asdict(v)["share"] if isinstance(v, Share) else v
            for k, v in judge(metric, images, known, styles).items()
        }
        return {"style_accuracy": judged["style"], "retrieval_top5": judged["top5"]}

    lora, full = (
        load_config(LoraConfig, "nano-lora", {"sample_every": 0}),
        load_config(FinetuneConfig, "nano-finetune", {"sample_every": 0}),
    )
    rows: dict[str, dict[str, Any]] = {"before": figures(student.pipeline)}
    found = train_lora(student, caches["nano-tiny"], lora, args.work / "lora", report=report)
    adapted = load_pipeline("nano-tiny").pipeline
    fuse_lora(adapted, read_lora(args.work / "lora" / LORA / KOHYA_FILE, unet_modules(adapted.unet)))
    rows["LoRA"] = figures(adapted) | {
        "steps": lora.steps,
        "seconds": found.seconds,
        "file_bytes": (args.work / "lora" / LORA / KOHYA_FILE).stat().st_size,
    }
    found = finetune(student, caches["nano-tiny"], full, args.work / "full", report=report)
    rows["full finetuning"] = figures(load_pipeline(args.work / "full").pipeline) | {
        "steps": full.steps,
        "seconds": found.seconds,
    }
    speed: dict[str, list[float]] = {"nano": [], "nano-tiny": []}
    for _ in range(args.rounds):
        for model in (teacher, student):
            config = lora.model_copy(update={"steps": 30, "log_every": 1000})
            run = train_lora(replace(model), caches[model.name], config, args.work / "speed", force=True)
            speed[model.name].append(config.steps / run.seconds)
    ratio = statistics.median(speed["nano-tiny"]) / statistics.median(speed["nano"])
    result = {
        "teacher_sha256": teacher.sha256,
        "student_sha256": student.sha256,
        "word": WORD,
        "style": STYLE,
        "prompts": len(prompts),
        "batch_size": lora.batch_size,
        "rows": rows,
        "lora_steps_per_s": speed,
        "lora_student_over_teacher": ratio,
        "environment": environment(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    text = table(result)
    args.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def table(result: dict[str, Any]) -> str:
    lines = [
        f'nano-tiny learns "{result["word"]} ..."; {result["prompts"]} held-out prompts',
        "",
        "| | right style | right caption in the top 5 |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['style_accuracy']:.2f} | {row['retrieval_top5']:.2f} |"
        for name, row in result["rows"].items()
    ]
    speed = {name: statistics.median(values) for name, values in result["lora_steps_per_s"].items()}
    lines += [
        "",
        (
            f"LoRA steps a second: {speed['nano-tiny']:.2f} on the student, {speed['nano']:.2f} on the teacher"
            f" ({result['lora_student_over_teacher']:.2f} times)"
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
