"""LoRAs on their way into an engine: refused when they are added, or put into it before the next call."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .folders import EngineFolder, check_weights
from .library import errors
from .loras import (
    PREFIX,
    Calculate,
    Patch,
    PatchedWeights,
    Patches,
    content_key,
    measure_change,
    select_patches,
)
from .whole_model import WholeModel

LOG = logging.getLogger("sdcompress")
_BAKE = "bake it in: sdcompress export MODEL --trt --signature comfyui --lora FILE:STRENGTH -o DIR"


@dataclass(frozen=True)
class _Chosen:
    """The patches of the MODEL that samples.

    Attributes:
        kept: LDM name → patches, of the layers that the engine has.
        removed: the same of those that it lacks.
        calculate: ComfyUI's `calculate_weight`.
    """

    kept: Mapping[str, list[Patch]] = field(default_factory=dict)
    removed: Mapping[str, list[Patch]] = field(default_factory=dict)
    calculate: Calculate | None = None


class EngineLoras:
    """The LoRAs of an engine.

    Args:
        folder: the engine.
        whole: the layers of the whole model.
    """

    def __init__(self, folder: EngineFolder, whole: WholeModel) -> None:
        self._folder, self._whole = folder, whole
        self._chosen = _Chosen()
        self._applied: _Chosen | None = None
        self._reported = ""

    def check(self, patches: Mapping[Any, Any], strength: float, strength_model: float = 1.0) -> None:
        """Refuse patches that the engine does not take. Those of strength 0 change nothing.

        Args:
            patches: as ComfyUI's `add_patches` gets them: key, or (key, offset[, function]) → value.
            strength: of the patches.
            strength_model: factor of the weights themselves.

        Raises:
            EngineError: they merge another model, the engine has fixed weights or no such layers, or they change
                biases or norms.
        """
        keys = {key if isinstance(key, str) else key[0]: value for key, value in patches.items()}
        names = {key.removeprefix(PREFIX): value for key, value in keys.items() if key.startswith(PREFIX)}
        if not names or (strength == 0 and strength_model == 1):
            return
        where = self._folder.graph.parent
        if strength_model != 1 or any(isinstance(value, list) for value in names.values()):
            raise errors.EngineError(
                f"a node merges another model into {len(names)} of the UNet's weights, which an engine does not take",
                where=where,
                hint="merge the models first, and export the result: sdcompress export MODEL --trt --signature comfyui",
            )
        if self._whole.obstacle:
            raise errors.EngineError(
                f"the engine takes no LoRA, because {self._whole.obstacle}, and this one changes {len(names)} layers",
                where=where,
                expected="strength_model 0, or no LoRA on this model",
                hint=f"{self._way_out}{_BAKE}",
            )
        if fixed := sorted(filter(self._whole.is_fixed, names)):
            raise errors.EngineError(
                f"the LoRA changes {len(fixed)} biases or norms of the UNet, which are built into the engine:"
                f" {errors.shorten(fixed[0], 120)}{' and others' if len(fixed) > 1 else ''}",
                where=where,
                expected="a LoRA of linear layers and convolutions",
                hint=_BAKE,
            )
        if all(map(self._whole.is_removed, names)):
            raise errors.EngineError(
                f"the LoRA changes {len(names)} layers of the UNet, and this student has none of them",
                where=where,
                expected="a LoRA that changes blocks which the student has",
            )

    @property
    def _way_out(self) -> str:
        """What makes an engine that takes LoRAs, as the beginning of a hint."""
        if self._folder.precision in ("int8", "fp8"):
            return "export it in fp16, or "
        if self._folder.weights is not None:
            return "export it again from the folder of the student, or "
        if self._folder.graph.suffix == ".onnx":
            return "export it again, or "
        return "export it again without --no-lora, on the machine with the card, or "

    def choose(self, patches: Patches, calculate: Calculate | None = None) -> None:
        """Set the patches for the calls that follow; none of them is the engine as it was exported.

        Args:
            patches: of a MODEL, as ComfyUI holds them: key → patches.
            calculate: ComfyUI's `calculate_weight`.
        """
        selected = select_patches(patches)
        places = self._whole.places
        self._chosen = _Chosen(
            {name: found for name, found in selected.items() if name in places},
            {name: found for name, found in selected.items() if name not in places},
            calculate,
        )

    def forget(self) -> None:
        """Note that the engine was closed: it has its own weights when it is opened again."""
        self._applied = None

    def apply(self, engine: Any) -> None:
        """Exchange the weights of an open engine if other patches were chosen than it has.

        Args:
            engine: the open `EngineUNet`.

        Raises:
            EngineError: the engine does not take them. EngineMismatch: a patch does not fit its layer.
        """
        chosen = self._chosen
        if self._applied is chosen:
            return
        if not chosen.kept or chosen.calculate is None:
            engine.set_weights({})
        else:
            check_weights(self._folder)
            where, device = self._folder.graph.parent, engine.device
            changed = PatchedWeights(
                engine.read_weight, chosen.kept, self._whole.places, chosen.calculate, device, where
            )
            engine.set_weights(changed, content_key(chosen.kept))
            if chosen.removed and changed.norms:
                self._report_removed(chosen, changed.norms, device)
        self._applied = chosen

    def _report_removed(self, chosen: _Chosen, norms: Mapping[str, float], device: torch.device) -> None:
        """Log the number and the share of the changes for which the student has no layers."""
        assert chosen.calculate is not None
        lost = [
            measure_change(found, self._whole.shapes[name], name, chosen.calculate, device)
            for name, found in chosen.removed.items()
        ]
        kept = math.hypot(*norms.values())
        total = math.hypot(kept, *(norm for norm in lost if norm is not None))
        known = total > 0 and all(norm is not None for norm in lost)
        share = f": {kept / total:.0%} of its change by norm is left" if known else ""
        line = (
            f"{self._folder.name}: the LoRA changes {len(norms) + len(lost)} layers, {len(lost)} of which this student"
            f" does not have{share}"
        )
        if line != self._reported:
            LOG.warning("%s", line)
        self._reported = line
