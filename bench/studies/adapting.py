"""Can a student learn something new? nano-tiny learns a word that it has never seen, by LoRA and by full finetuning.

    python bench/studies/adapting.py -o bench/results/adapting-nano.json --work build/adapting

The word is "sketch". The training pictures are nano's line drawings, with captions "a sketch of ..." in place of "a
black line drawing of ...". The models are judged on concepts of held-out pairs, prompted "a sketch of ...", before and
after: the share of pictures that nano-CLIP calls line drawings, and retrieval top-5. LoRA steps a second on the teacher
and on the student are measured in turn.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdcompress_bench.environment import environment
from sdcompress_bench.nano_word import STYLE, WORD, WordJudge, write_word_pictures
from sdcompress_engines.progress import Reporter

from sdcompress.data.build_cache import build_cache
from sdcompress.data.cache import LatentCache
from sdcompress.data.sources import open_source
from sdcompress.lora.files import read_lora
from sdcompress.lora.fuse import fuse_lora
from sdcompress.lora.names import unet_modules
from sdcompress.models.load import LoadedPipeline, load_pipeline
from sdcompress.support.console import ConsoleReporter
from sdcompress.train.config import FinetuneConfig, LoraConfig
from sdcompress.train.finetune import finetune
from sdcompress.train.lora import KOHYA_FILE, LORA, train_lora
from sdcompress.train.recipes import load_config


def train_and_judge(
    student: LoadedPipeline, cache: LatentCache, lora: LoraConfig, judge: WordJudge, work: Path, report: Reporter
) -> dict[str, dict[str, Any]]:
    """Returns the results before training, after LoRA, and after full finetuning.

    Args:
        student: what learns the word.
        cache: latents of the training pictures.
        lora: config of LoRA.
        judge: judges the pipelines.
        work: folder for the runs.
        report: shows progress.
    """
    rows: dict[str, dict[str, Any]] = {"before": judge.judge(student.pipeline)}
    run = train_lora(student, cache, lora, work / "lora", report=report)
    adapted, file = load_pipeline("nano-tiny").pipeline, work / "lora" / LORA / KOHYA_FILE
    fuse_lora(adapted, read_lora(file, unet_modules(adapted.unet)))
    costs = {"steps": lora.steps, "seconds": run.seconds, "file_bytes": file.stat().st_size}
    rows["LoRA"] = judge.judge(adapted) | costs
    full = load_config(FinetuneConfig, "nano-finetune", {"sample_every": 0})
    run = finetune(student, cache, full, work / "full", report=report)
    costs = {"steps": full.steps, "seconds": run.seconds}
    rows["full finetuning"] = judge.judge(load_pipeline(work / "full").pipeline) | costs
    return rows


def measure_speed(
    models: Sequence[LoadedPipeline], caches: dict[str, LatentCache], config: LoraConfig, rounds: int, work: Path
) -> dict[str, list[float]]:
    """Returns model → LoRA steps a second of each round; the models run in turn.

    Args:
        models: in the order of their turns.
        caches: model → latents of its pictures.
        config: of the training.
        rounds: how many.
        work: folder for the runs.
    """
    config = config.model_copy(update={"steps": 30, "log_every": 1000})
    speed: dict[str, list[float]] = {model.name: [] for model in models}
    for _ in range(rounds):
        for model in models:
            run = train_lora(replace(model), caches[model.name], config, work / "speed", force=True)
            speed[model.name].append(config.steps / run.seconds)
    return speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="emptied first")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3, help="of the speed comparison")
    args = parser.parse_args()
    report = ConsoleReporter()
    shutil.rmtree(args.work, ignore_errors=True)
    write_word_pictures(args.work / "data")
    student, teacher = load_pipeline("nano-tiny"), load_pipeline("nano")
    source = open_source(args.work / "data")
    caches = {
        model.name: build_cache(source, model, args.work / f"cache-{model.name}", report=report)
        for model in (student, teacher)
    }
    judge = WordJudge(args.prompts)
    lora = load_config(LoraConfig, "nano-lora", {"sample_every": 0})
    rows = train_and_judge(student, caches["nano-tiny"], lora, judge, args.work, report)
    speed = measure_speed((teacher, student), caches, lora, args.rounds, args.work)
    result = {
        "teacher_sha256": teacher.sha256,
        "student_sha256": student.sha256,
        "word": WORD,
        "style": STYLE,
        "prompts": len(judge.captions),
        "batch_size": lora.batch_size,
        "rows": rows,
        "lora_steps_per_s": speed,
        "lora_student_over_teacher": statistics.median(speed["nano-tiny"]) / statistics.median(speed["nano"]),
        "environment": environment(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    text = format_table(result)
    args.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def format_table(result: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
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
