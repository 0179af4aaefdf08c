"""How good are few steps? bk-tiny of nano, trained for 1 to 8 steps, against itself at 25 steps with guidance.

    python bench/studies/few_step.py -o bench/results/few-step-nano.json --work build/few-step

All arms begin with the same student, nano-tiny, and train for equal steps with the recipe nano-few-step, with several
seeds: latent consistency (one phase) once for all steps, phased consistency once for each number of steps, phases along
the trajectory of the student itself in the place of the teacher's, and, with one seed, other guidance in the weights.
For scale the student is drawn untrained at as many steps by DPM++ 2M and UniPC, with guidance (each step counts twice)
and without.

The pictures of all held-out prompts are judged by nano-CLIP (right caption among the first five, right style) and
compared with the student's own pictures of the same seeds at 25 steps with guidance: LPIPS, and the relative L2 of the
pixels in [-1, 1]. Each run is an ordinary `few-step`, and is resumed when the study is started again.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sdcompress_bench.environment import environment
from sdcompress_bench.metrics import Lpips
from sdcompress_bench.nano_students import open_cache
from sdcompress_bench.quality import ClipMetric, judge, to_pixels
from sdcompress_bench.scenario import Prompt
from sdcompress_engines.files import write_atomically
from sdcompress_engines.progress import Reporter

from sdcompress.data import nano_prompts
from sdcompress.data.cache import LatentCache
from sdcompress.models import nano
from sdcompress.models.load import LoadedPipeline, load_pipeline
from sdcompress.sampling import generate
from sdcompress.support.console import ConsoleReporter
from sdcompress.train.config import FewStepConfig
from sdcompress.train.few_step import few_step
from sdcompress.train.pipelines import PIPELINE
from sdcompress.train.recipes import load_config

TEACHER, STUDENT = "nano", "nano-tiny"
STEPS = (1, 2, 4, 8)
GUIDANCE = (1.0, 4.0)
SOLVERS = {"DPM++ 2M": "DPMSolverMultistepScheduler", "UniPC": "UniPCMultistepScheduler"}
FIGURES = {
    "retrieval_top5": "right caption in the top 5",
    "style_accuracy": "right style",
    "lpips": "LPIPS to its 25 steps",
    "relative_l2": "relative L2 to its 25 steps",
}


@dataclass(frozen=True)
class Arm:
    """A training that is judged.

    Attributes:
        name: in the table.
        knobs: of the recipe.
        teacher: whose trajectory is learned.
        steps: numbers of steps at which the result draws.
        one_seed: train with the first seed only.
    """

    name: str
    knobs: dict[str, Any] = field(default_factory=dict)
    teacher: str = TEACHER
    steps: tuple[int, ...] = (4,)
    one_seed: bool = False


ARMS = (
    Arm("phases"),
    Arm("one phase (LCM)", {"phases": 1}, steps=STEPS),
    Arm("phases, from itself", teacher=STUDENT),
    *(Arm("phases", {"num_inference_steps": steps}, steps=(steps,)) for steps in (2, 8)),
    Arm("phases, loss of samples", {"loss_unit": "sample"}, one_seed=True),
    Arm("phases, average 0.95 as target", {"ema_decay": 0.95}, one_seed=True),
    *(Arm(f"phases, guidance {scale:g}", {"guidance_scale": scale}, one_seed=True) for scale in GUIDANCE),
)


class Judge:
    """Judges pipelines by their pictures of the held-out prompts.

    Args:
        student: the pipeline before few-step training, whose pictures at 25 steps are the reference.
        count: number of prompts.
    """

    def __init__(self, student: Any, count: int) -> None:
        self.metric, self.styles, self.lpips = ClipMetric(nano.metric_folder()), nano.styles(), Lpips()
        self.prompts = [Prompt(each.caption, each.style) for each in nano_prompts.draw_prompts("heldout", count)]
        self.reference = self.draw(student)[1]

    def draw(self, pipeline: Any, **options: Any) -> tuple[list[Any], torch.Tensor]:
        """Returns the pictures, one a prompt with the prompt's number as its seed, and their pixels in [0, 1]."""
        captions = [prompt.caption for prompt in self.prompts]
        half = torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())
        with torch.inference_mode(), half:
            pictures = generate(pipeline, captions, seeds=list(range(len(captions))), batch_size=50, **options)
        return pictures, torch.stack([to_pixels(picture) for picture in pictures])

    def judge(self, pipeline: Any, **options: Any) -> dict[str, float]:
        """Returns the figures of `FIGURES`.

        Args:
            pipeline: draws the pictures.
            options: keyword arguments of `generate`; by default the pipeline's own.
        """
        pictures, pixels = self.draw(pipeline, **options)
        found = judge(self.metric, pictures, self.prompts, self.styles)
        errors = ((pixels - self.reference) * 2).flatten(1).norm(dim=1)
        sizes = (self.reference * 2 - 1).flatten(1).norm(dim=1)
        return {
            "retrieval_top5": found["top5"].share,
            "style_accuracy": found["style"].share,
            "lpips": float(self.lpips(pixels, self.reference).mean()),
            "relative_l2": float((errors / sizes).mean()),
        }


def judge_untrained(student: LoadedPipeline, judge: Judge) -> Iterator[dict[str, Any]]:
    """Yields the rows of the student as it is: at 25 steps, and at few with each solver."""
    import diffusers

    pipeline: Any = student.pipeline
    yield {"arm": "untrained, its own solver", "steps": 25, "seed": None} | judge.judge(pipeline)
    no_guidance = judge.judge(pipeline, guidance_scale=1.0)
    yield {"arm": "untrained, its own solver, no guidance", "steps": 25, "seed": None} | no_guidance
    for name, class_name in SOLVERS.items():
        other = copy.copy(pipeline)
        scheduler: Any = getattr(diffusers, class_name)
        other.register_modules(scheduler=scheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing"))
        for guidance_scale, label in ((None, "with guidance"), (1.0, "no guidance")):
            for steps in STEPS:
                figures = judge.judge(other, steps=steps, guidance_scale=guidance_scale)
                yield {"arm": f"untrained, {name}, {label}", "steps": steps, "seed": None} | figures


def train_arm(
    arm: Arm, seed: int, models: dict[str, LoadedPipeline], cache: dict[str, LatentCache], args: Any, report: Reporter
) -> Path:
    """Train an arm with a seed; returns the folder of the run. A finished run is kept, a stopped one resumed."""
    config = load_config(FewStepConfig, "nano-few-step", {"steps": args.train_steps, "sample_every": 0, "seed": seed})
    config = FewStepConfig.model_validate(config.model_dump() | arm.knobs)
    knobs = "-".join(f"{name}-{value}" for name, value in arm.knobs.items()) or "recipe"
    folder: Path = args.work / f"{arm.teacher}-{knobs}-{config.steps}-{seed}"
    if not (folder / PIPELINE).is_dir():
        resume = (folder / "checkpoints").is_dir()
        few_step(models[STUDENT], models[arm.teacher], cache[arm.teacher], config, folder, resume=resume, report=report)
    return folder


def format_table(result: dict[str, Any]) -> str:
    """Returns the mean over seeds (lowest to highest) of each arm at each number of steps, as Markdown."""
    lines = [
        f"bk-tiny of nano in few steps, {result['train_steps']} training steps; {result['prompts']} held-out prompts",
        "",
        "| | steps | " + " | ".join(FIGURES.values()) + " |",
        "|---|---|" + "---|" * len(FIGURES),
    ]
    for arm, steps in dict.fromkeys((row["arm"], row["steps"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["arm"], row["steps"]) == (arm, steps)]
        cells = []
        for name in FIGURES:
            values = [row[name] for row in rows]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}")
        lines.append(f"| {arm} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_result(args: Any, result: dict[str, Any]) -> None:
    """Write the result as JSON, and its table as Markdown beside it; what is measured so far is kept."""
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output, json.dumps(result, indent=1, default=str) + "\n")
    write_atomically(args.output.with_suffix(".md"), format_table(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where the runs and the caches are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-steps", type=int, default=None, help="default: the recipe's")
    parser.add_argument("--prompts", type=int, default=154, help="default: all held-out pairs")
    args = parser.parse_args()
    report = ConsoleReporter()
    models = {name: load_pipeline(name) for name in (TEACHER, STUDENT)}
    caches = {name: open_cache(model, args.work / f"cache-{name}", report) for name, model in models.items()}
    judge = Judge(models[STUDENT].pipeline, args.prompts)
    args.train_steps = load_config(FewStepConfig, "nano-few-step", {"steps": args.train_steps}).steps
    result: dict[str, Any] = {
        "teacher_sha256": models[TEACHER].sha256,
        "student_sha256": models[STUDENT].sha256,
        "train_steps": args.train_steps,
        "prompts": len(judge.prompts),
        "rows": [{"arm": "teacher", "steps": 25, "seed": None} | judge.judge(models[TEACHER].pipeline)],
        "environment": environment(),
    }
    result["rows"] += judge_untrained(models[STUDENT], judge)
    write_result(args, result)
    for seed in range(args.seeds):
        for arm in ARMS:
            if seed and arm.one_seed:
                continue
            pipeline = load_pipeline(train_arm(arm, seed, models, caches, args, report)).pipeline
            for steps in arm.steps:
                result["rows"].append({"arm": arm.name, "steps": steps, "seed": seed})
                result["rows"][-1] |= judge.judge(pipeline, steps=steps)
                report.show_line(json.dumps(result["rows"][-1]))
            write_result(args, result)
    print(format_table(result))


if __name__ == "__main__":
    main()
