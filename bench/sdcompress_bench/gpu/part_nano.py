"""Part 9: train all of nano in the minutes there are, with the scripts of `tools/nano`; only on request.

The weights and logs lie in the folder `nano` of the results; `tools/nano/assemble.py` puts them into the package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .child import PartRun

ROOT = Path(__file__).resolve().parents[3]
RESERVE_S = 25.0
"""Seconds for starting the last script and writing its results."""

SMOKE = ["--batch", "4", "--pictures", "24", "--steps", "10"]
"""Steps, not minutes: on a busy machine the imports alone take long."""


@dataclass(frozen=True)
class Training:
    """One script of `tools/nano`.

    Attributes:
        row: name of its row.
        script: its name and options.
        log: its log's name in the work folder.
        share: of the part's time.
        batch: pictures in a step on a GPU (concepts, for a CLIP).
    """

    row: str
    script: tuple[str, ...]
    log: str
    share: float
    batch: int


IN_TURN = (
    Training("VAE", ("train_vae.py",), "vae", 0.27, 64),
    Training("text encoder", ("train_clip.py", "--role", "teacher"), "clip-teacher", 0.13, 96),
    Training("UNet", ("train_unet.py",), "unet", 0.60, 256),
)
JUDGE = Training("judge", ("train_clip.py", "--role", "metric"), "clip-metric", 0.9, 96)
"""It needs nothing of the others, and runs beside them."""


def nano(run: PartRun) -> None:
    """Write a row for each part of nano: steps, the last figures of its log, and the time that it took."""
    work = run.folder / "nano"
    work.mkdir(parents=True, exist_ok=True)
    seconds = max(20.0, run.seconds_left() - RESERVE_S)
    beside = threading.Thread(target=run.measure, args=(JUDGE.row, partial(train, run, JUDGE, work, seconds)))
    beside.start()
    for training in IN_TURN:
        row = run.measure(training.row, partial(train, run, training, work, seconds))
        if "failed" in row:  # the next one needs its weights
            break
    beside.join()


def train(run: PartRun, training: Training, work: Path, seconds: float) -> Mapping[str, Any]:
    """Run one script to its end; returns the last value of each figure in its log.

    Args:
        run: gives the device; gets the script's output in gpu.log.
        training: what to run.
        work: the scripts' folder.
        seconds: of all scripts in turn.

    Raises:
        RuntimeError: the script failed; the message is its last line.
    """
    script, *options = training.script
    limit_s = min(training.share * seconds, max(5.0, run.seconds_left() - RESERVE_S))
    command = [sys.executable, str(ROOT / "tools/nano" / script), *options, "--work", str(work)]
    command += ["--device", run.device.type, "--minutes", f"{limit_s / 60:.3f}"]
    command += SMOKE if run.smoke else ["--batch", str(training.batch), "--steps", "1000000"]
    if (wide := ROOT / "build/nano/wide-data").is_dir() and training.row in ("VAE", "judge"):
        command += ["--data", str(wide)]
    own_folder = os.environ | {"PYTHONSAFEPATH": ""}  # the script imports the modules beside it
    ended = subprocess.run(
        command, cwd=ROOT, env=own_folder, capture_output=True, text=True, errors="replace", check=False
    )
    run.log(ended.stdout + ended.stderr)
    if ended.returncode:
        last = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
        raise RuntimeError(f"{script}: {last[-1]}")
    return read_last_figures(work / f"{training.log}.jsonl")


def read_last_figures(log: Path) -> dict[str, Any]:
    """Returns the last value of each figure in a log of JSON lines; empty where nothing was logged."""
    found: dict[str, Any] = {}
    if log.is_file():
        for line in log.read_text(encoding="utf-8").splitlines():
            found |= json.loads(line)
    return {name: value for name, value in found.items() if name != "seconds"}
