"""A module in memory as a runner, so that what compares backends treats torch as one of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import Runner, TensorSpec


class TorchRunner(Runner):
    """`module` called with its inputs in the order of `inputs`; it answers with a tensor or a tuple in the order of `outputs`."""

    backend = "torch"

    def __init__(self, module: torch.nn.Module, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        held = next(module.parameters(), None)
        super().__init__(None, torch.device("cpu") if held is None else held.device)
        self.module, self.inputs, self.outputs = module, tuple(inputs), tuple(outputs)

    def _load(self) -> None:
        self.module.eval()

    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        results = self.module(*feeds.values())
        return dict(zip((spec.name for spec in self.outputs), results if isinstance(results, (tuple, list)) else (results,), strict=True))

    def _release(self) -> None:
        """The module belongs to whoever made it."""
