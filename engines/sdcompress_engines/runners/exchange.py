"""Exchanging the weights of a runner: what every backend has in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Protocol

import torch

from ..errors import EngineError, EngineMismatch
from ..graph_weights import WeightSpec, exchangeable_layers

NAMES_SHOWN = 3
"""Weights that a message names."""


class OriginalWeights(Protocol):
    """The weights of a graph before any exchange.

    Attributes:
        specs: the weights that can be exchanged, by the names of their parameters in torch.
    """

    specs: dict[str, WeightSpec]

    def read(self, name: str) -> torch.Tensor:
        """Returns the original value of a weight as torch has it, on the CPU. Do not write to it."""


class ModuleWeights:
    """The weights of a module in memory. The originals of those that were changed are kept on the CPU.

    Args:
        module: whose linear layers and convolutions can be changed.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._weights = {
            f"{name}.weight": layer.get_parameter("weight") for name, layer in exchangeable_layers(module).items()
        }
        self._originals: dict[str, torch.Tensor] = {}
        self.specs = {name: WeightSpec(tuple(weight.shape), weight.dtype) for name, weight in self._weights.items()}

    def read(self, name: str) -> torch.Tensor:
        kept = self._originals.get(name)
        return self._weights[name].detach().cpu() if kept is None else kept

    @torch.no_grad()
    def write(self, name: str, value: torch.Tensor) -> None:
        """Change a weight in place; its address stays.

        Args:
            name: a key of `specs`.
            value: of its shape, any dtype, on any device.
        """
        weight = self._weights[name]
        if name not in self._originals:
            self._originals[name] = weight.detach().to("cpu", copy=True)
        weight.copy_(value)

    @torch.no_grad()
    def restore(self, name: str) -> None:
        """Give a weight its original value again, bit-equal; one that was not changed stays."""
        original = self._originals.pop(name, None)
        if original is not None:
            self._weights[name].copy_(original)


class CheckedChanges(Mapping[str, torch.Tensor]):
    """Changes of weights, each checked and converted when it is asked for.

    So a mapping that computes its values holds one of them in memory at a time.

    Args:
        changes: weight → its value as torch has it, any float dtype, on any device.
        specs: of the weights that can be exchanged.
        where: the graph, for messages.

    Raises:
        EngineMismatch: a name that the graph does not have.
    """

    def __init__(
        self,
        changes: Mapping[str, torch.Tensor],
        specs: Mapping[str, WeightSpec],
        where: str | PathLike[str] | None,
    ) -> None:
        self._changes, self._specs, self._where = changes, specs, where
        if unknown := sorted(set(changes) - set(specs)):
            more = f" and {len(unknown) - NAMES_SHOWN} more" if len(unknown) > NAMES_SHOWN else ""
            raise EngineMismatch(
                f"has no weight {', '.join(unknown[:NAMES_SHOWN])}{more} to exchange",
                where=where,
                expected=f"some of its {len(specs)} weights of linear layers and convolutions",
            )

    def __getitem__(self, name: str) -> torch.Tensor:
        """Returns a value in the dtype of the graph.

        Raises:
            EngineMismatch: it has another shape. EngineError: it has numbers that are not finite.
        """
        value, spec = self._changes[name].detach(), self._specs[name]
        if tuple(value.shape) != spec.shape:
            raise EngineMismatch(
                f"the weight {name} has the shape {tuple(value.shape)}", where=self._where, expected=str(spec.shape)
            )
        value = value.to(spec.dtype)
        if not bool(value.isfinite().all()):
            raise EngineError(f"the new weight {name} has numbers that are not finite", where=self._where)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)
