"""Carry a teacher's LoRA over to a block-pruned student."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sdcompress.lora.files import Layers
from sdcompress.lora.fuse import find_targets
from sdcompress.prune.plan import BlockPlan
from sdcompress.prune.student import meta_unet


@dataclass(frozen=True)
class RemappedLora:
    """A LoRA for a student.

    Attributes:
        layers: by the student's module names.
        dropped: the teacher's layers that the student does not have.
    """

    layers: Layers
    dropped: list[str]


def remap_lora(layers: Layers, plan: BlockPlan, student_modules: Iterable[str]) -> RemappedLora:
    """Returns a LoRA for the student from one for its teacher; layers of removed blocks are dropped.

    Args:
        layers: of the teacher's LoRA.
        plan: from the teacher to the student.
        student_modules: the layers of the student's UNet.

    Raises:
        ModelError: the teacher's UNet does not have one of the layers, or has it in another shape.
    """
    find_targets(
        {place: layer for place, layer in layers.items() if place[0] == "unet"}, {"unet": meta_unet(plan.teacher)}
    )
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
    return RemappedLora(kept, dropped)
