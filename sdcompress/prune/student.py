"""A student UNet from a teacher and a plan."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from sdcompress_engines.errors import PlanError, shorten

from sdcompress.families.build import build_module
from sdcompress.families.unet_blocks import DEPTHS, UP_DEPTHS, read_blocks
from sdcompress.prune.plan import BlockPlan

_HINT = "make the plan from this teacher's own config"


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

    Every tensor is a copy of one teacher tensor of the same shape, in the teacher's dtype and on its device. Every
    tensor of the teacher that the plan keeps is in the student.

    Raises:
        PlanError: the plan was made for another UNet, or its student lacks a tensor that the plan keeps.
    """
    _check_teacher(teacher, plan)
    source = teacher.state_dict()
    student = meta_unet(plan.student_config())
    weights = {}
    for key, shape in ((k, v.shape) for k, v in student.state_dict().items()):
        name = plan.teacher_key(key)
        if name not in source or source[name].shape != shape:
            stored = tuple(source[name].shape) if name in source else "nothing"
            raise PlanError(
                f"the teacher has {stored} at {name}", where=key, expected=f"shape {tuple(shape)}", hint=_HINT
            )
        weights[key] = source[name].detach().clone()
    for name in source:
        key = plan.student_key(name)
        if key is not None and (key not in weights or plan.teacher_key(key) != name):
            raise PlanError(f"the plan keeps {name}, and its student has no place for it", where=key, hint=_HINT)
    student.load_state_dict(weights, assign=True)
    return student.train(teacher.training).requires_grad_(True)


def _check_teacher(teacher: UNet2DConditionModel, plan: BlockPlan) -> None:
    """Refuse a plan of another UNet: numbers of heads, for example, leave no trace in the weights' shapes."""
    if read_blocks(teacher.config) != plan.blocks:
        raise PlanError("was made for a UNet with other blocks than the teacher's", where=plan.name, hint=_HINT)
    planned, found = _read_settings(plan.teacher), _read_settings(teacher.config)
    for key, value in found.items():
        if planned[key] != value:
            raise PlanError(
                f"was made for a UNet with {key} {shorten(planned[key], 100)}",
                where=plan.name,
                expected=f"{shorten(value, 100)}, as the teacher has",
                hint=_HINT,
            )


def _read_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a UNet by name, those that are not in its config with diffusers' defaults.

    The size of the samples is left out, which has no effect on the network, and so are the numbers of transformer
    blocks, which have more than one form.
    """
    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters
    defaults = {name: each.default for name, each in parameters.items() if each.default is not inspect.Parameter.empty}
    levels = len(config["block_out_channels"])
    settings = {}
    for name in defaults.keys() - {"sample_size", DEPTHS, UP_DEPTHS}:
        value = config.get(name, defaults[name])
        value = list(value) if isinstance(value, list | tuple) else value
        settings[name] = value[0] if isinstance(value, list) and value == [value[0]] * levels else value
    return settings


def attention_pairs(student: UNet2DConditionModel, plan: BlockPlan) -> list[tuple[str, str]]:
    """Returns (student module, teacher module) for every self-attention of the student."""
    return [(name, plan.teacher_key(name)) for name, _ in student.named_modules() if name.endswith(".attn1")]
