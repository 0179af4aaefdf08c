"""A student UNet from a teacher and a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from sdcompress_engines.errors import PlanError

from sdcompress.families.build import build_module
from sdcompress.prune.plan import BlockPlan


def meta_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """Returns a UNet of a config whose parameters are on the meta device and take no memory.

    Raises:
        ModelError: the config is broken.
    """
    with torch.device("meta"):
        unet: UNet2DConditionModel = build_module("unet", config, "the UNet's config")
        return unet


def build_student(teacher: UNet2DConditionModel, plan: BlockPlan) -> UNet2DConditionModel:
    """Returns the student's UNet with the teacher's weights in the blocks that stay; the teacher does not change.

    Every tensor is a copy of one teacher tensor of the same shape, in the teacher's dtype and on its device.

    Raises:
        PlanError: the teacher has no tensor of a student tensor's name and shape.
    """
    source = teacher.state_dict()
    student = meta_unet(plan.student_config())
    weights = {}
    for key, shape in ((k, v.shape) for k, v in student.state_dict().items()):
        name = plan.teacher_key(key)
        if name not in source or source[name].shape != shape:
            stored = tuple(source[name].shape) if name in source else "nothing"
            raise PlanError(
                f"the teacher has {stored} at {name}",
                where=key,
                expected=f"shape {tuple(shape)}",
                hint="make the plan from this teacher's own config",
            )
        weights[key] = source[name].detach().clone()
    student.load_state_dict(weights, assign=True)
    return student.train(teacher.training).requires_grad_(True)


def attention_pairs(student: UNet2DConditionModel, plan: BlockPlan) -> list[tuple[str, str]]:
    """Returns (student module, teacher module) for every self-attention of the student."""
    return [(name, plan.teacher_key(name)) for name, _ in student.named_modules() if name.endswith(".attn1")]
