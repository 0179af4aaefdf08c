"""Build a student UNet from a teacher and a plan, and count what a plan saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from sdcompress_engines.errors import PlanError

from sdcompress.prune.plan import BlockPlan

if TYPE_CHECKING:
    from torch import nn


def meta_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    """A UNet of this config without memory: parameters on the meta device."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def build_student(teacher: UNet2DConditionModel, plan: BlockPlan) -> UNet2DConditionModel:
    """The student's UNet with the teacher's weights in the blocks that stay; the teacher is left as it is.

    Every tensor is a copy of one teacher tensor of the same shape, in the teacher's dtype and on its device.

    Raises:
        PlanError: a tensor of the student has no tensor of its shape in this teacher.
    """
    source = teacher.state_dict()
    student = meta_unet(plan.student_config())
    weights = {}
    for key, shape in ((k, v.shape) for k, v in student.state_dict().items()):
        name = plan.teacher_key(key)
        if name not in source or source[name].shape != shape:
            found = tuple(source[name].shape) if name in source else "nothing"
            raise PlanError(
                f"the teacher has {found} at {name}",
                where=key,
                expected=f"shape {tuple(shape)}",
                hint="make the plan from this teacher's own config",
            )
        weights[key] = source[name].detach().clone()
    student.load_state_dict(weights, assign=True)
    return student.train(teacher.training).requires_grad_(True)


@dataclass(frozen=True)
class Cost:
    """Parameters, and multiply–accumulates of one forward pass at batch 1."""

    parameters: int
    macs: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.macs + other.macs)


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def unet_cost(config: dict[str, Any]) -> dict[str, Cost]:
    """Cost of each top-level part (`down_blocks.0`, `mid_block`, `rest`, ...) and of the `total`, on the meta device.

    MACs are counted by torch's FLOP counter on one forward pass at the UNet's own sample size with 77 tokens.
    """
    from torch.utils.flop_counter import FlopCounterMode

    unet = meta_unet(config).eval()
    size = config.get("sample_size") or 64
    height, width = size if isinstance(size, list | tuple) else (size, size)
    cross = config["cross_attention_dim"]
    context = torch.empty(1, 77, cross[0] if isinstance(cross, list | tuple) else cross, device="meta")
    extra: dict[str, Any] = {}
    if config.get("addition_embed_type") == "text_time":
        ids = 6
        extra["added_cond_kwargs"] = {
            "text_embeds": torch.empty(
                1,
                config["projection_class_embeddings_input_dim"] - ids * config["addition_time_embed_dim"],
                device="meta",
            ),
            "time_ids": torch.empty(1, ids, device="meta"),
        }
    with FlopCounterMode(display=False, depth=3) as counter, torch.no_grad():
        unet(
            torch.empty(1, config["in_channels"], height, width, device="meta"),
            torch.empty(1, device="meta"),
            context,
            **extra,
        )
    flops = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    total = Cost(count_parameters(unet), flops["Global"] // 2)
    parts = {}
    names = (
        [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
        + (["mid_block"] if unet.mid_block is not None else [])
        + [f"up_blocks.{i}" for i in range(len(unet.up_blocks))]
    )
    for name in names:
        parts[name] = Cost(
            count_parameters(unet.get_submodule(name)), flops.get(f"{type(unet).__name__}.{name}", 0) // 2
        )
    named = sum(parts.values(), Cost(0, 0))
    return parts | {"rest": Cost(total.parameters - named.parameters, total.macs - named.macs), "total": total}


def attention_pairs(student: UNet2DConditionModel, plan: BlockPlan) -> list[tuple[str, str]]:
    """(student module, teacher module) of every self-attention of the student."""
    return [(name, plan.teacher_key(name)) for name, _ in student.named_modules() if name.endswith(".attn1")]
