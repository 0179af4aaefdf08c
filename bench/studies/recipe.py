"""Which settings make the better student in equal steps? A sweep for the recipe `nano`: bk-tiny of nano.

    python bench/studies/recipe.py -o bench/results/recipe-nano.json --work build/recipe

First each arm trains with one seed. The arms that are closest to the teacher, and the starting point, then train with
two more seeds. Everything else is as in `distillation.py`: equal steps, equal batches for a seed, the same judge. Each
run is an ordinary `distill`, and is resumed when the study is started again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from sdcompress_bench.environment import environment
from sdcompress_bench.nano_students import PLAN, StudentJudge, open_cache, write_study
from sdcompress_engines.progress import Reporter

from sdcompress.data.cache import LatentCache
from sdcompress.models.load import LoadedPipeline, load_pipeline
from sdcompress.prune.presets import make_plan
from sdcompress.support.console import ConsoleReporter
from sdcompress.train.config import DistillConfig
from sdcompress.train.distill import distill
from sdcompress.train.pipelines import PIPELINE

START = DistillConfig(
    steps=180, batch_size=16, learning_rate=5e-4, lr_warmup_steps=10, lr_schedule="cosine", feature_norm="teacher"
)
ARMS: dict[str, dict[str, Any]] = {
    "starting point": {},
    "feature loss as it is": {"feature_norm": "none"},
    "feature loss × 3": {"feature_kd_weight": 3.0},
    "no feature loss": {"feature_kd_weight": 0.0},
    "attention loss too": {"attention_kd_weight": 1.0},
    "rate 1e-3": {"learning_rate": 1e-3},
    "rate 2e-3": {"learning_rate": 2e-3},
    "Muon, rate 1e-3": {"optimizer": "muon", "learning_rate": 1e-3},
    "Muon, rate 2e-3": {"optimizer": "muon", "learning_rate": 2e-3},
    "Muon, rate 4e-3": {"optimizer": "muon", "learning_rate": 4e-3},
    "rate 4e-3": {"learning_rate": 4e-3},
}
FINALISTS, FINAL_SEEDS = 2, 3
DISTANCE = "output_relative_l2"


class Sweep:
    """Trains and judges arms; a run that is there already is not repeated.

    Args:
        teacher: the pipeline that is distilled.
        cache: latents of the training pictures.
        judge: of the students.
        work: folder for the runs.
        report: shows progress.
    """

    def __init__(
        self, teacher: LoadedPipeline, cache: LatentCache, judge: StudentJudge, work: Path, report: Reporter
    ) -> None:
        self.teacher, self.cache, self.judge, self.work, self.report = teacher, cache, judge, work, report
        self.plan = make_plan(teacher.pipeline.unet.config, PLAN)

    def run(self, arm: str, seed: int, overrides: dict[str, Any]) -> dict[str, Any]:
        """Returns the row of one run: its figures, and the seconds of its training.

        Args:
            arm: its name.
            seed: of the training.
            overrides: what differs from `START`.
        """
        config = START.model_copy(update={"seed": seed, "checkpoint_every": 60, "sample_every": 0} | overrides)
        folder = self.work / f"{list(ARMS).index(arm):02}-{config.steps}-{seed}"
        kept = folder / "row.json"
        if kept.is_file():
            return json.loads(kept.read_text(encoding="utf-8"))
        if not (folder / PIPELINE).is_dir():
            resume = (folder / "checkpoints").is_dir()
            distill(self.teacher, self.plan, self.cache, config, folder, resume=resume, report=self.report)
        last = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        row = {"arm": arm, "seed": seed, "train_s": last["seconds"]}
        row |= self.judge.judge(load_pipeline(folder).pipeline)
        self.report.show_line(json.dumps(row))
        kept.write_text(json.dumps(row), encoding="utf-8")
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where the runs and the cache are kept")
    parser.add_argument("--prompts", type=int, default=100)
    args = parser.parse_args()
    report = ConsoleReporter()
    teacher = load_pipeline("nano")
    judge = StudentJudge(teacher.pipeline, args.prompts)
    sweep = Sweep(teacher, open_cache(teacher, args.work / "cache", report), judge, args.work, report)
    rows = [sweep.run(arm, 0, overrides) for arm, overrides in ARMS.items()]
    best = sorted(rows[1:], key=lambda row: row[DISTANCE])[:FINALISTS]
    for arm in ("starting point", *(row["arm"] for row in best)):
        rows += [sweep.run(arm, seed, ARMS[arm]) for seed in range(1, FINAL_SEEDS)]
    result = {
        "teacher_sha256": teacher.sha256,
        "plan": PLAN,
        "steps": START.steps,
        "start": START.model_dump(mode="json"),
        "arms": ARMS,
        "prompts": len(judge.prompts),
        "finalists": [row["arm"] for row in best],
        "train_s": {arm: statistics.median(row["train_s"] for row in rows if row["arm"] == arm) for arm in ARMS},
        "rows": rows,
        "environment": environment(),
    }
    write_study(args.output, result)


if __name__ == "__main__":
    main()
