"""A teacher's LoRA for a block-pruned student."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sdcompress.lora.files import Layers
from sdcompress.prune.plan import BlockPlan


@dataclass(frozen=True)
class Remapped:
    """A LoRA for a student: its layers, and the names of the teacher's layers that have no place in it."""

    layers: Layers
    dropped: list[str]


def remap_lora(layers: Layers, plan: BlockPlan, student_modules: Iterable[str]) -> Remapped:
    """A LoRA made for the plan's teacher as one for its student.

    Layers of blocks that are gone are dropped and named.
    """
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
    return Remapped(kept, dropped)
