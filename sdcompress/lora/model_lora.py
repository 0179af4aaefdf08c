"""A LoRA file → layers of one model, which may be a student of the model that the file was made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import ModelError, shorten

from sdcompress.checkpoints.weights import open_weights
from sdcompress.families.registry import family_of
from sdcompress.lora.adapters import Layers
from sdcompress.lora.files import read_lora
from sdcompress.lora.fuse import find_targets
from sdcompress.lora.names import unet_modules
from sdcompress.lora.remap import remap_lora
from sdcompress.prune.plan import BlockPlan
from sdcompress.prune.student import meta_unet

UNET_ENTRY = "sdcompress_unet"
"""The entry of a file's header that says whose layers it names: `WHOLE`, or the plan of a student."""
WHOLE = "whole"

LORA_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
"""What a LoRA can change."""

LayerShapes = Mapping[str, "tuple[int, ...]"]
"""Name of a linear layer or convolution → the shape of its weight."""


@dataclass(frozen=True)
class ModelLora:
    """A LoRA by the layers of a model.

    Attributes:
        layers: by the model's own names.
        kept_norm: share of its change of the UNet that is left where it was made for the whole model and this is a
            student, see `RemappedLora`; None where it was made for this model.
        dropped: number of its layers that the student does not have.
    """

    layers: Layers
    kept_norm: float | None = None
    dropped: int = 0

    def describe(self, file: Path, plan: BlockPlan | None) -> str | None:
        """Returns a sentence for the user where the LoRA was carried over to a student, else None."""
        if self.kept_norm is None or plan is None:
            return None
        return (
            f"{file.name} was made for the whole model: {plan.name} has {len(self.layers)} of its"
            f" {len(self.layers) + self.dropped} layers, {self.kept_norm:.0%} of its change by norm"
        )


def unet_entry(unet_config: Mapping[str, Any], plan: BlockPlan | None) -> dict[str, str]:
    """Returns the entry of a LoRA's header that says whose layers it names; none of a student without a plan.

    Args:
        unet_config: of the UNet that the LoRA was trained on.
        plan: from the whole model to this student, or None.
    """
    if plan is not None:
        return {UNET_ENTRY: plan.name}
    return {UNET_ENTRY: WHOLE} if family_of(unet_config).student_of(unet_config) is None else {}


def read_model_lora(file: Path, networks: Mapping[str, LayerShapes | None], plan: BlockPlan | None = None) -> ModelLora:
    """Returns a LoRA by the layers of a model.

    Of a student with a plan, the LoRA may be the student's own or one of the whole model. The header says which, if it
    was written here. Otherwise it is the student's own if the student has every layer of it.

    Args:
        file: the LoRA.
        networks: component → its layers; None where the model has no such component.
        plan: from the whole model to this student; None of a whole model, or where it is not known.

    Raises:
        UsageError: there is no such file.
        ModelError: as `read_lora`, or it fits neither the model nor the whole one that a student was made from.
    """
    unet = networks.get("unet") or {}
    made_for = open_weights(file).metadata.get(UNET_ENTRY) if file.is_file() else None
    own = None if plan is None else plan.name
    if made_for not in (None, WHOLE, own):
        raise ModelError(
            f"was trained on a student of the plan {shorten(made_for, 60)}",
            where=file,
            expected="a LoRA for the whole model" if own is None else f"one for the whole model, or for {own}",
            hint="sdcompress lora remap FILE --teacher TEACHER --plan PLAN --reverse -o WHOLE",
        )
    if plan is None or made_for == own:
        layers = read_lora(file, unet)
        find_targets(layers, networks)
        return ModelLora(layers)
    if made_for is None:
        try:
            layers = read_lora(file, unet)
            find_targets(layers, networks)
        except ModelError:  # it is the whole model's, or the same error comes below
            pass
        else:
            return ModelLora(layers)
    remapped = remap_lora(read_lora(file, unet_modules(meta_unet(plan.teacher))), plan, unet)
    find_targets(remapped.layers, networks)
    if not remapped.layers:
        raise ModelError(f"changes only blocks that {plan.name} removes", where=file)
    return ModelLora(remapped.layers, remapped.kept_norm, len(remapped.dropped))
