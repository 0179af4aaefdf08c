"""Forward hooks that collect the outputs of named modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def collect_features(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield a mapping of name → output of that submodule in the latest forward pass, (B, C, h, w) in the pass's dtype.

    A down block returns its hidden states first and its skip tensors second; the hidden states are kept. The hooks are
    removed when the block ends.
    """
    features: dict[str, torch.Tensor] = {}

    def make_hook(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            features[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.get_submodule(name).register_forward_hook(make_hook(name)) for name in names]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()
