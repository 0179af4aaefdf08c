"""A network in shards: each process holds a part of every weight, gradient and optimizer state (FSDP).

`accelerate launch --use_fsdp` asks for it. torch's `fully_shard` does it, on GPUs and on CPUs alike: accelerate shards
on GPUs only, and its many ways of wrapping rename weights or need whole ones.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from accelerate import Accelerator
from sdcompress_engines.errors import UsageError
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

SHARDING = "ACCELERATE_USE_FSDP"
"""The environment variable in which accelerate's launcher passes `--use_fsdp`."""
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "--use_fsdp, or no option for DDP"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "--use_fsdp, or no option for DDP"),
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", "false"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing", "--set gradient_checkpointing=true"),
}
"""What accelerate's launcher asks for by an environment variable and training cannot do: name, and what to use."""
GATHERED_TOGETHER = ("ResnetBlock2D", "BasicTransformerBlock", "CLIPEncoderLayer")
"""Classes of modules whose weights are gathered for one forward pass and then dropped again."""


def is_set(variable: str) -> bool:
    """Returns whether an environment variable of accelerate's launcher is true."""
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")


def refuse_unsupported() -> None:
    """Check what accelerate's launcher asks for.

    Raises:
        UsageError: training cannot do it.
    """
    for variable, (name, expected) in REFUSED.items():
        if is_set(variable):
            raise UsageError(f"{name} is not supported by training", where="accelerate launch", expected=expected)


def shard(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Returns a copy of a network whose parameters, by the same names, are spread over all processes.

    Args:
        network: whole, on the CPU and equal in every process; it stays unchanged.
        accelerator: the run's.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    sharded = copy.deepcopy(network)
    for module in list(sharded.modules()):
        if type(module).__name__ in GATHERED_TOGETHER:
            fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    return sharded.to(accelerator.device)


def gather(state: Any, *, keep: bool) -> Any:
    """Returns nested containers with whole tensors, on the CPU, in place of shards; every process calls it.

    One tensor at a time is whole on the device. Tensors that are not shards stay as they are.

    Args:
        state: dicts and lists with tensors.
        keep: whether this process needs the result; without, it gets None for each shard.
    """

    def gather_one(tensor: DTensor) -> torch.Tensor | None:
        gathered = whole(tensor)
        return gathered.cpu() if keep else None

    return tree_map_only(DTensor, gather_one, state)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor with the shards of all processes; every process calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Returns this process's shard of a tensor, placed as `own`; the whole tensor, on its device, if `own` is whole.

    Args:
        tensor: whole, equal in every process.
        own: of the same shape.
    """
    moved = tensor.to(own.device)
    if not isinstance(own, DTensor):
        return moved
    return distribute_tensor(moved, own.device_mesh, own.placements, src_data_rank=None)


def shard_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns the optimizer's state of all processes as that of this process.

    Args:
        state: the state dict of an optimizer of the whole network.
        optimizer: of the network's parameters, whole or in shards.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    own = dict(zip(numbers, parameters, strict=True))
    entries = {
        number: {
            name: shard_like(value, own[number]) if _has_shape_of(value, own[number]) else value
            for name, value in entry.items()
        }
        for number, entry in state["state"].items()
    }
    return state | {"state": entries}


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the part of a tensor that this process holds; it shares the tensor's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _has_shape_of(value: Any, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape
