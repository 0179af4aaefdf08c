"""What a `HostedUNet` needs from the program it runs in."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .torch_unet import Deltas
from .traits import Traits

_PATCHES = ("patches", "patches_replace", "block_modifiers", "block_inner_modifiers", "group_norm_wrapper")
"""The `transformer_options` that change layers of the UNet."""


@dataclass(frozen=True)
class Settings:
    """The choices on the settings page.

    Attributes:
        fallback: what to do if no engine covers a call: `error` or `torch`.
        cuda_graph: whether to replay a captured CUDA graph for shapes that repeat.
    """

    fallback: str = "error"
    cuda_graph: bool = True


@dataclass(frozen=True)
class Change:
    """A change of the UNet that a picture asks for besides the UNet's inputs.

    Attributes:
        what: its name for the user.
        hint: how to get it without an engine, or with another one.
        deltas: what it adds to the weights, or None if torch cannot apply it.
        key: equal for equal changes; of a LoRA it begins with the file.
        bake: the LoRA as `--lora` takes it, or None.
        layers: of the checkpoint's UNet that it changes, by LDM's names with underscores for dots → the shape of their
            weights.
    """

    what: str
    hint: str
    deltas: Deltas | None = None
    key: tuple[Hashable, ...] = ()
    bake: str | None = None
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class Host(Protocol):
    """What a `HostedUNet` needs from the program it runs in."""

    @property
    def device(self) -> torch.device:
        """Where the program's models run."""

    def checkpoint(self) -> tuple[Hashable, Traits]:
        """Returns a key that changes when another checkpoint is loaded, and the traits of the loaded one."""

    def changes(self) -> Sequence[Change]:
        """Returns what the current picture asks of the UNet besides its inputs."""

    def warn(self, text: str) -> None:
        """Show a message to the user."""


def find_unsupported(arguments: Mapping[str, Any]) -> list[str]:
    """Returns those of a host's further arguments that would change the picture, in words for the user.

    Args:
        arguments: keyword → value, as the host passes them to its UNet.
    """
    unsupported = []
    for name, value in arguments.items():
        if name == "transformer_options":
            unsupported += [f"patches of the UNet's layers ({key})" for key in _PATCHES if (value or {}).get(key)]
        elif name == "control" and value is not None:
            unsupported.append("ControlNet: it acts inside the UNet; turn it off, or choose no engine for this picture")
        elif name != "control_model" and value is not None and value is not False:
            unsupported.append(f"the argument {name}")
    return unsupported


def sum_deltas(changes: Sequence[Change]) -> Deltas:
    """Returns what several changes add to a layer, one after another: each gets the weight that the one before left.

    Args:
        changes: each with `deltas`.
    """

    def deltas(layer: str, weight: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        total: torch.Tensor | None = None
        total_bias: torch.Tensor | None = None
        for change in changes:
            assert change.deltas is not None
            now = weight if total is None else weight + total.to(weight).reshape(weight.shape)
            more, bias = change.deltas(layer, now)
            if more is not None:
                total = more if total is None else total + more
            if bias is not None:
                total_bias = bias if total_bias is None else total_bias + bias
        return total, total_bias

    return deltas
