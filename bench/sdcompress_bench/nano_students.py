"""What the studies of nano's students share: the data, the judge on held-out prompts, and the table of the arms."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from sdcompress_engines.files import write_atomically
from sdcompress_engines.progress import Reporter

from sdcompress.data import nano_prompts
from sdcompress.data.build_cache import build_cache
from sdcompress.data.cache import LatentCache
from sdcompress.data.sources import open_source
from sdcompress.models import nano
from sdcompress.models.load import LoadedPipeline

from .fidelity import compare_steps, make_probe, predict
from .quality import ClipMetric, judge_pipeline, real_pictures
from .scenario import Prompt

PLAN = "bk-tiny"
TIMESTEPS = (1, 101, 301, 501, 701, 901, 999)


class StudentJudge:
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


def write_study(output: Path, result: dict[str, Any]) -> None:
    """Write the result of a study as JSON and its table as Markdown beside it, and print the table.

    Args:
        output: the JSON file.
        result: with `rows` and `steps`.
    """
    table = format_arms(result["rows"], result["steps"])
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, json.dumps(result, indent=1, default=str) + "\n")
    write_atomically(output.with_suffix(".md"), table)
    print(table)


def format_arms(rows: list[dict[str, Any]], steps: int) -> str:
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
