"""The losses of a run: its `metrics.jsonl`, its tracker, and the check that the loss stays sound."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from sdcompress_engines.errors import ArtifactError, TrainingError
from sdcompress_engines.files import append_line, write_atomically
from sdcompress_engines.json_files import parse_json

from sdcompress.train.checkpoint import CHECKPOINTS, flatten, list_checkpoints
from sdcompress.train.config import LoopConfig

METRICS = "metrics.jsonl"


class MetricsLog:
    """`metrics.jsonl` in the training folder, and the tracker, if there is one.

    Args:
        config: names the tracker; a tracker records the whole configuration.
        output: the training folder.
        accelerator: the run's; only its main process writes.
        first_step: the step at which this process starts. Lines of later steps are removed.
    """

    def __init__(self, config: LoopConfig, output: Path, accelerator: Accelerator, first_step: int) -> None:
        self.path, self.accelerator = output / METRICS, accelerator
        if accelerator.is_main_process:
            keep_lines_up_to(self.path, first_step)
        if config.tracker != "none":
            settings = flatten(config.model_dump(mode="json"))
            plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.items()}
            accelerator.init_trackers("sdcompress", config=plain)
        self.began = time.monotonic()

    def write(self, step: int, losses: dict[str, float], *, learning_rate: float, grad_norm: float) -> None:
        """Append the line of a step; call it on the main process.

        Args:
            step: steps done.
            losses: by name.
            learning_rate: of this step.
            grad_norm: before clipping.
        """
        line: dict[str, Any] = {
            "step": step,
            "seconds": round(time.monotonic() - self.began, 2),
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
        } | losses
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()}
        append_line(self.path, json.dumps(rounded))
        self.accelerator.log(line, step=step)


class LossMonitor:
    """Stops a run whose loss is not finite, or far above its running average.

    Args:
        config: its `divergence_factor` is the limit.
        output: the training folder.
    """

    def __init__(self, config: LoopConfig, output: Path) -> None:
        self.factor, self.output = config.divergence_factor, output
        self.running_average: float | None = None

    def check(self, losses: dict[str, float], step: int) -> None:
        """Check the losses of a step and add `loss` to the running average.

        Raises:
            TrainingError: a loss is not finite, or `loss` is far above the average.
        """
        if not all(math.isfinite(value) for value in losses.values()):
            raise TrainingError(
                f"the loss is not finite at step {step}",
                where=self.output,
                hint=f"a smaller --learning-rate or --precision fp32; {self._describe_last_checkpoint()}",
            )
        loss, average = losses["loss"], self.running_average
        if average is not None and loss > self.factor * average:
            raise TrainingError(
                f"the loss jumped from about {average:.3g} to {loss:.3g} at step {step}",
                where=self.output,
                hint=f"a smaller --learning-rate; {self._describe_last_checkpoint()}",
            )
        self.running_average = loss if average is None else 0.9 * average + 0.1 * loss

    def _describe_last_checkpoint(self) -> str:
        known = list_checkpoints(self.output / CHECKPOINTS)
        return f"the last good checkpoint is {known[-1].name}" if known else "no checkpoint had been written yet"


def keep_lines_up_to(path: Path, step: int) -> None:
    """Remove the lines of later steps, which a killed run wrote after its last checkpoint, and what is no such line.

    Afterwards `path` is a file of its own: lines are never appended to where a link leads, or to a pipe.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    kept = [line for line in lines if (found := _read_step(line)) is not None and found <= step]
    write_atomically(path, "".join(line + "\n" for line in kept))


def _read_step(line: str) -> int | None:
    """Returns the step of a line, or None where it was cut or edited."""
    try:
        entry = parse_json(line)
    except ArtifactError:
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    return step if isinstance(step, int) else None
