"""Checkpoints that are either whole or not there, and the newest of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sdcompress_engines.errors import ArtifactError, TrainingError
from sdcompress_engines.files import replace_file
from sdcompress_engines.manifest import faults, read_manifest, storage_errors, write_manifest
from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator

PREFIX = "step-"
STATE = "state.pt"
SHARDED = "sharded"


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, whole or not."""
    return sorted(folder.glob(f"{PREFIX}*")) if folder.is_dir() else []


def is_whole(path: Path) -> bool:
    """Whether a checkpoint folder is all there and unaltered, its manifest too."""
    try:
        return not faults(path, "checkpoint")
    except ArtifactError:
        return False


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, under `folder`.

    A checkpoint holds the trained weights, their average, the optimizer's and the gradient scaler's state. Under FSDP
    and DeepSpeed, where no process has the whole, accelerate writes what each one has. Everything random in a run is a
    function of (seed, step, sample), so no generator's state is needed.

    Attributes:
        identity: what makes the run itself; a checkpoint of another one is refused.
    """

    folder: Path
    accelerator: Accelerator
    identity: dict[str, Any]
    keep: int

    @property
    def sharded(self) -> bool:
        """Whether the weights are spread over the processes."""
        return str(self.accelerator.distributed_type.value) in ("FSDP", "DEEPSPEED", "MEGATRON_LM")

    def save(self, step: int, trained: nn.Module, optimizer: Any, average: dict[str, torch.Tensor] | None) -> None:
        """Write `step-<n>/` by one rename and drop all but the newest; every process calls it.

        Raises:
            StorageError: no space, no permission; the older checkpoints are still there.
        """
        target = self.folder / f"{PREFIX}{step:08d}"
        staging = self.folder / f".{PREFIX}{step:08d}.partial"
        main = self.accelerator.is_main_process
        with storage_errors(target):
            if main:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            if self.sharded:
                self.accelerator.save_state(str(staging / SHARDED))
            elif main:
                scaler = self.accelerator.scaler
                torch.save(
                    {
                        "trained": trainable_state(trained),
                        "optimizer": optimizer.state_dict(),
                        "average": average,
                        "scaler": scaler.state_dict() if scaler else None,
                    },
                    staging / STATE,
                )
            self.accelerator.wait_for_everyone()
            if main:
                write_manifest(
                    staging, "checkpoint", config={"step": step, "identity": json.loads(json.dumps(self.identity))}
                )
                if target.exists():
                    shutil.rmtree(target)
                replace_file(staging, target)
                for old in checkpoints(self.folder)[: -self.keep]:
                    shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def newest(self) -> tuple[int, Path] | None:
        """Step and folder of the newest whole checkpoint; cut or altered ones are passed over.

        Raises:
            TrainingError: it is of another run; names what differs.
        """
        for path in reversed(checkpoints(self.folder)):
            if is_whole(path):
                manifest = read_manifest(path)
                if manifest is not None:
                    check_identity(manifest.config["identity"], self.identity, self.folder.parent)
                    return manifest.config["step"], path
        return None

    def load(self, path: Path, trained: nn.Module, optimizer: Any) -> dict[str, torch.Tensor] | None:
        """Put a checkpoint's state in place; returns the average.

        Raises:
            TrainingError: whole but unreadable.
        """
        try:
            if self.sharded:
                self.accelerator.load_state(str(path / SHARDED))
                return None
            state = torch.load(path / STATE, weights_only=True, map_location="cpu")
            trained.load_state_dict(state["trained"], strict=False)
            optimizer.load_state_dict(state["optimizer"])
            if state["scaler"] and self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            average: dict[str, torch.Tensor] | None = state["average"]
            return average
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise TrainingError(
                f"cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})",
                where=path,
                hint="delete it; the one before is used then",
            ) from error


def trainable_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that are trained, by name."""
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}


def check_identity(theirs: dict[str, Any], ours: dict[str, Any], output: Path) -> None:
    """Refuse a checkpoint of another run.

    Raises:
        TrainingError: names what differs.
    """
    theirs, mine = flat(theirs), flat(json.loads(json.dumps(ours)))
    differing = [
        f"{k}: {theirs.get(k)!r:.60} there, {mine.get(k)!r:.60} here"
        for k in sorted(theirs | mine)
        if theirs.get(k) != mine.get(k)
    ]
    if differing:
        raise TrainingError(
            "holds the checkpoints of another run: " + "; ".join(differing[:5]),
            where=output,
            hint="--force to start over, or another -o",
        )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
