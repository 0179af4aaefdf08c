"""The checkpoints of a run: written completely or not at all, found and loaded again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from sdcompress_engines.errors import ArtifactError, TrainingError, shorten, storage_errors
from sdcompress_engines.manifest import Manifest, faults, read_manifest, write_manifest
from sdcompress_engines.output_folders import replace_folder
from torch import nn

from sdcompress.checkpoints.tensor_files import is_dense, one_error, read_pickle
from sdcompress.train.sharding import gather, shard_like, shard_optimizer_state

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINTS = "checkpoints"
PREFIX = "step-"
_NAME = re.compile(rf"{PREFIX}\d{{8}}")
STATE = "state.pt"
DIFFERENCES_SHOWN = 5
AVERAGES = ("exp_avg", "exp_avg_sq", "average", "first", "second")
"""Names of running averages in the states of torch's AdamW and of `Muon`."""
_DELETE = "delete the folder; the run then resumes from the checkpoint before it"


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoint folders, oldest first, damaged ones included; a copy under another name is none."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if _NAME.fullmatch(path.name))


def is_intact(path: Path, *, contents: bool = True) -> bool:
    """Returns whether every file of a checkpoint folder, its manifest included, is there and unchanged.

    Args:
        path: the folder.
        contents: read the files' bytes; without it only their sizes are checked.
    """
    try:
        return not faults(path, "checkpoint", contents=contents)
    except ArtifactError:
        return False


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    A checkpoint holds the trained weights, their average, the optimizer's and the gradient scaler's state, all of them
    whole: shards are gathered, so a run may go on with another number of processes. Everything random in a run is a
    function of (seed, step, sample), so no generator state is needed.

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
            scaler = self.accelerator.scaler
            state = {
                "trained": trainable_state(trained),
                "optimizer": optimizer.state_dict(),
                "average": average,
                "scaler": scaler.state_dict() if scaler else None,
            }
            state = gather(state, keep=self.accelerator.is_main_process)
            if self.accelerator.is_main_process:
                torch.save(state, staging / STATE)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                self._publish(step, staging, target)
        self.accelerator.wait_for_everyone()

    def _publish(self, step: int, staging: Path, target: Path) -> None:
        """Write the manifest, rename `staging` to `target` and delete the checkpoints that are not kept.

        Later ones were damaged, because the run began before them; they do not count.
        """
        identity = json.loads(json.dumps(self.identity))
        write_manifest(staging, "checkpoint", config={"step": step, "identity": identity})
        replace_folder(staging, target)
        for old in [path for path in list_checkpoints(self.folder) if path <= target][: -self.keep]:
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
                    step, identity = _read_facts(path, manifest)
                    check_identity(identity, self.identity, self.folder.parent)
                    return step, path
        return None

    def load(self, path: Path, trained: nn.Module, optimizer: Any) -> dict[str, torch.Tensor] | None:
        """Load a checkpoint into the network, the optimizer and the gradient scaler; returns the weight average.

        Args:
            path: the checkpoint's folder.
            trained: the network in training, whole or in shards, without accelerate's wrapper.
            optimizer: as `Accelerator.prepare` returned it.

        Raises:
            TrainingError: the checkpoint is intact but cannot be read.
        """
        state = read_pickle(path / STATE, TrainingError, hint=_DELETE)
        _check_state(path / STATE, state, trained, optimizer)
        own = trainable_state(trained)
        with one_error(path / STATE, "checkpoint", TrainingError, _DELETE):
            for name, weight in own.items():
                weight.copy_(shard_like(state["trained"][name], weight))
            optimizer.load_state_dict(shard_optimizer_state(state["optimizer"], optimizer))
            if state["scaler"] and self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            average: dict[str, torch.Tensor] | None = state["average"]
            return average and {name: shard_like(average[name], weight) for name, weight in own.items()}


def _read_facts(path: Path, manifest: Manifest) -> tuple[int, dict[str, Any]]:
    """Returns the step and the identity in a checkpoint's manifest.

    Raises:
        TrainingError: they are missing or of another kind.
    """
    step, identity = manifest.config.get("step"), manifest.config.get("identity")
    if not isinstance(step, int) or isinstance(step, bool) or step < 1 or not isinstance(identity, dict):
        raise TrainingError(
            f"has a manifest with the step {shorten(repr(step), 40)}",
            where=path,
            expected="a number from 1 on, and what distinguishes the run",
            hint=_DELETE,
        )
    return step, identity


def _check_state(path: Path, state: Any, trained: nn.Module, optimizer: Any) -> None:
    """Refuse a checkpoint that does not hold every trained weight, its average and its optimizer state.

    Args:
        path: of the file, for the message.
        state: its content.
        trained, optimizer: what it is loaded into.

    Raises:
        TrainingError: something is missing, of another shape, or not finite.
    """
    wanted = {name: weight.shape for name, weight in trainable_state(trained).items()}
    faults = []
    if not isinstance(state, dict) or not {"trained", "optimizer", "average", "scaler"} <= state.keys():
        faults.append("it lacks a part")
    else:
        for part in ("trained", "average"):
            if part == "trained" or state[part] is not None:
                faults += [f"{part} {fault}" for fault in _find_weight_faults(state[part], wanted)]
        faults += [f"optimizer {fault}" for fault in _find_optimizer_faults(state["optimizer"], optimizer)]
    if faults:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise TrainingError(
            f"is not a checkpoint of this run ({shorten(faults[0], 160)}{more})", where=path, hint=_DELETE
        )


def _find_weight_faults(stored: Any, wanted: dict[str, torch.Size]) -> list[str]:
    if not isinstance(stored, dict):
        return ["holds no weights"]
    faults = [f"has no {name}" for name in wanted if name not in stored]
    faults += [f"has an unknown {name}" for name in stored if name not in wanted]
    for name, shape in wanted.items():
        value = stored.get(name)
        if value is None:
            continue
        if not is_dense(value) or value.shape != shape or not value.is_floating_point():
            faults.append(f"has {name} in another shape or type")
        elif not value.isfinite().all():
            faults.append(f"has {name} with numbers that are not finite")
    return faults


def _find_optimizer_faults(stored: Any, optimizer: Any) -> list[str]:
    """Returns what does not fit: averages have their parameter's shape; 8-bit states have further tensors."""
    if not isinstance(stored, dict) or not isinstance(stored.get("state"), dict):
        return ["has no state"]
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    faults = []
    for place, values in stored["state"].items():
        if place not in range(len(shapes)) or not isinstance(values, dict):
            faults.append(f"has an unknown state {shorten(repr(place), 40)}")
            continue
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        faults += [
            f"has a {name} of {tuple(value.shape)} for parameter {place}"
            for name, value in tensors.items()
            if not is_dense(value) or (name in AVERAGES and value.shape != shapes[place])
        ]
    return faults


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
    """Refuse the checkpoint or the recipe of another run.

    Args:
        saved: the identity in the checkpoint's manifest, or the recipe in the folder.
        current: the same of this run.
        output: the training folder, named in the message.

    Raises:
        TrainingError: the two differ; the message names the differences.
    """
    before, now = flatten(saved), flatten(json.loads(json.dumps(current)))
    differing = [
        f"{k}: {before.get(k)!r:.60} in the folder, {now.get(k)!r:.60} in this run"
        for k in sorted(before | now)
        if before.get(k) != now.get(k)
    ]
    if differing:
        raise TrainingError(
            "holds another run: " + shorten("; ".join(differing[:DIFFERENCES_SHOWN])),
            where=output,
            hint="--force to start over, or another -o",
        )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as one mapping with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
