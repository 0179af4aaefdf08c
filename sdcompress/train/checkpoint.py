"""The checkpoints of a run: written completely or not at all, found and loaded again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from sdcompress_engines.errors import ArtifactError, TrainingError, storage_errors
from sdcompress_engines.manifest import faults, read_manifest, write_manifest
from sdcompress_engines.output_folders import replace_folder
from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINTS = "checkpoints"
PREFIX = "step-"
STATE = "state.pt"
SHARDED = "sharded"
DIFFERENCES_SHOWN = 5


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoint folders, oldest first, damaged ones included."""
    return sorted(folder.glob(f"{PREFIX}*")) if folder.is_dir() else []


def is_intact(path: Path) -> bool:
    """Returns whether every file of a checkpoint folder, its manifest included, is there and unchanged."""
    try:
        return not faults(path, "checkpoint")
    except ArtifactError:
        return False


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    A checkpoint holds the trained weights, their average, the optimizer's and the gradient scaler's state. Under FSDP
    and DeepSpeed, where no process has all weights, accelerate writes what each process has. Everything random in a run
    is a function of (seed, step, sample), so no generator state is needed.

    Attributes:
        folder: holds one folder per checkpoint.
        accelerator: the run's.
        identity: what distinguishes the run from others; a checkpoint of another run is refused.
        keep: number of newest checkpoints to keep.
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
        """Write `step-<n>/` by one rename and delete all but the newest checkpoints; every process calls it.

        Args:
            step: steps done.
            trained: the bare network, without accelerate's wrapper.
            optimizer: as `Accelerator.prepare` returned it.
            average: weight averages by parameter name, shapes as in `trained`; None without averaging.

        Raises:
            StorageError: no space or no permission; the older checkpoints remain.
        """
        target = self.folder / f"{PREFIX}{step:08d}"
        staging = self.folder / f".{PREFIX}{step:08d}.partial"
        with storage_errors(target), _removed_after(staging):
            if self.accelerator.is_main_process:
                staging.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            if self.sharded:
                self.accelerator.save_state(str(staging / SHARDED))
            elif self.accelerator.is_main_process:
                scaler = self.accelerator.scaler
                state = {
                    "trained": trainable_state(trained),
                    "optimizer": optimizer.state_dict(),
                    "average": average,
                    "scaler": scaler.state_dict() if scaler else None,
                }
                torch.save(state, staging / STATE)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                self._publish(step, staging, target)
        self.accelerator.wait_for_everyone()

    def _publish(self, step: int, staging: Path, target: Path) -> None:
        """Write the manifest, rename `staging` to `target` and delete the checkpoints that are not kept."""
        identity = json.loads(json.dumps(self.identity))
        write_manifest(staging, "checkpoint", config={"step": step, "identity": identity})
        replace_folder(staging, target)
        for old in list_checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def find_newest(self) -> tuple[int, Path] | None:
        """Returns step and folder of the newest intact checkpoint, or None; damaged ones are passed over.

        Raises:
            TrainingError: the checkpoint is of another run; the message names the differences.
        """
        for path in reversed(list_checkpoints(self.folder)):
            if is_intact(path):
                manifest = read_manifest(path)
                if manifest is not None:
                    check_identity(manifest.config["identity"], self.identity, self.folder.parent)
                    return manifest.config["step"], path
        return None

    def load(self, path: Path, trained: nn.Module, optimizer: Any) -> dict[str, torch.Tensor] | None:
        """Load a checkpoint into the network, the optimizer and the gradient scaler; returns the weight average.

        Args:
            path: the checkpoint's folder.
            trained: the bare network, without accelerate's wrapper.
            optimizer: of the trained parameters.

        Raises:
            TrainingError: the checkpoint is intact but cannot be read.
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
                hint="delete it; the run then resumes from the checkpoint before it",
            ) from error


@contextmanager
def _removed_after(staging: Path) -> Iterator[None]:
    """Remove a staging folder on the main process: that of a killed run before the block, and a failed one after it."""
    try:
        if PartialState().is_main_process:
            shutil.rmtree(staging, ignore_errors=True)
        yield
    finally:
        if PartialState().is_main_process:
            shutil.rmtree(staging, ignore_errors=True)


def trainable_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the parameters that are trained, by name, detached but not copied."""
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}


def check_identity(saved: dict[str, Any], current: dict[str, Any], output: Path) -> None:
    """Refuse the checkpoint of another run.

    Args:
        saved: the identity in the checkpoint's manifest.
        current: the identity of this run.
        output: the training folder, named in the message.

    Raises:
        TrainingError: the two differ; the message names the differences.
    """
    before, now = flatten(saved), flatten(json.loads(json.dumps(current)))
    differing = [
        f"{k}: {before.get(k)!r:.60} in the checkpoint, {now.get(k)!r:.60} in this run"
        for k in sorted(before | now)
        if before.get(k) != now.get(k)
    ]
    if differing:
        raise TrainingError(
            "holds the checkpoints of another run: " + "; ".join(differing[:DIFFERENCES_SHOWN]),
            where=output,
            hint="--force to start over, or another -o",
        )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as one mapping with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
