"""Checkpoints that are either whole or not there, and the newest of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.errors import TrainingError
from sdcompress_engines.manifest import faults, staged, write_manifest

PREFIX = "step-"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` (tensors, numbers and containers of them) as `step-<n>/` and drop all but the newest `keep`.

    Raises:
        StorageError: no space, no permission; the older checkpoints are still there.
    """
    target = folder / f"{PREFIX}{step:08d}"
    with staged(target, force=True) as out:
        torch.save(state | {"step": step}, out / "state.pt")
        write_manifest(out, "checkpoint", config={"step": step})
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, whole or not."""
    return sorted(folder.glob(f"{PREFIX}*")) if folder.is_dir() else []


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The state of the newest whole checkpoint; cut or altered ones are passed over. None where there is none.

    Raises:
        TrainingError: a checkpoint is whole but cannot be read.
    """
    for path in reversed(checkpoints(folder)):
        if not faults(path, "checkpoint"):
            try:
                state: dict[str, Any] = torch.load(path / "state.pt", weights_only=True, map_location="cpu")
                return state
            except Exception as error:
                raise TrainingError(f"cannot be read ({type(error).__name__})", where=path, hint="delete it; the one before is used then") from error
    return None
