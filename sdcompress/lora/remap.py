"""Carry a teacher's LoRA over to a block-pruned student, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from sdcompress_engines.errors import ModelError

from sdcompress.families.family import UNetConfig
from sdcompress.lora.adapters import Layers
from sdcompress.lora.fuse import find_targets, shapes_of
from sdcompress.prune.plan import BlockPlan
from sdcompress.prune.student import meta_unet


@dataclass(frozen=True)
class RemappedLora:
    """A LoRA for a student.

    Attributes:
        layers: by the student's module names.
        dropped: the teacher's layers that the student does not have.
        kept_norm: the root of the sum of squares of `Adapter.norm` over the UNet layers that were kept, divided by that
            over all UNet layers: 1 if nothing was dropped, 0 if no UNet layer was kept. Of a LoRA that changes nothing
            in the UNet it is 1. It measures the weights, not the pictures.
    """

    layers: Layers
    dropped: list[str]
    kept_norm: float


def remap_lora(layers: Layers, plan: BlockPlan, student_modules: Iterable[str]) -> RemappedLora:
    """Returns a LoRA for the student from one for its teacher; layers of removed blocks are dropped.

    Args:
        layers: of the teacher's LoRA.
        plan: from the teacher to the student.
        student_modules: the layers of the student's UNet.

    Raises:
        ModelError: the teacher's UNet does not have one of the layers, or has it in another shape, or a layer's numbers
            are too large for a norm.
    """
    _check_unet_layers(layers, plan.teacher)
    places = {plan.teacher_key(name): name for name in student_modules}
    kept: Layers = {}
    dropped = []
    for (component, name), layer in layers.items():
        if component != "unet":
            kept[component, name] = layer
        elif name in places:
            kept[component, places[name]] = layer
        else:
            dropped.append(name)
    norms = {name: layer.norm() for (component, name), layer in layers.items() if component == "unet"}
    whole = math.hypot(*norms.values())
    if not math.isfinite(whole):
        raise ModelError("the LoRA has numbers too large for the norm of its change", expected="a LoRA for this model")
    lost = set(dropped)
    part = math.hypot(*(norm for name, norm in norms.items() if name not in lost))
    return RemappedLora(kept, dropped, part / whole if whole else 1.0)


def remap_to_teacher(layers: Layers, plan: BlockPlan) -> Layers:
    """Returns a LoRA for the teacher from one for its student: the same layers by the names of the whole model.

    A loader that knows the layers of the whole model only, such as a WebUI's, finds them by these names.

    Args:
        layers: of the student's LoRA.
        plan: from the teacher to the student.

    Raises:
        ModelError: the student's UNet does not have one of the layers, or has it in another shape.
    """
    _check_unet_layers(layers, plan.student_config())
    return {
        (component, plan.teacher_key(name) if component == "unet" else name): layer
        for (component, name), layer in layers.items()
    }


def _check_unet_layers(layers: Layers, config: UNetConfig) -> None:
    """Refuse a LoRA whose UNet layers a UNet does not have.

    Raises:
        ModelError: names the layers.
    """
    unet = {place: layer for place, layer in layers.items() if place[0] == "unet"}
    find_targets(unet, {"unet": shapes_of(meta_unet(config))})
