"""A module in memory as a runner, so that what compares backends treats torch as one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import BackendMissing, UsageError
from .base import Runner, TensorSpec
from .cuda_graphs import GraphedCall, check_graph_device

MODES = ("eager", "channels_last", "compile")
COMPILER = "a C++ compiler: apt-get install g++"


class TorchRunner(Runner):
    """`module` called with its inputs in the order of `inputs`; it answers with a tensor or a tuple in the order of
    `outputs`. Its dtype is what it has.

    Args:
        mode: `eager`; `channels_last`, where convolutions keep pixels together, which most processors and cards are
            faster at; or `compile`, by `torch.compile` at the first call of a shape, over channels-last weights too.
            The last two change the module's memory layout, not its values. On CUDA, GroupNorm returns its result
            channels first (`native_group_norm` in ATen's group_norm.cpp), so in eager mode every convolution after one
            converts its input, and `channels_last` gains little there; `compile` keeps the layout.
        cuda_graph: replay a captured graph for each shape, which takes the launches of single kernels off the host; on
            a GPU only. The module must stay where it is: its weights may change in place, not move.

    Raises:
        UsageError: an unknown mode, or a CUDA graph of a module that is on no GPU.
    """

    backend = "torch"

    def __init__(
        self,
        module: torch.nn.Module,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        mode: str = "eager",
        *,
        cuda_graph: bool = False,
    ) -> None:
        held = next(module.parameters(), None)
        super().__init__(None, torch.device("cpu") if held is None else held.device)
        if mode not in MODES:
            raise UsageError(f"no torch mode {mode!r}", expected=" or ".join(MODES))
        self.module, self.inputs, self.outputs, self.mode = module, tuple(inputs), tuple(outputs), mode
        self.cuda_graph = cuda_graph
        check_graph_device(cuda_graph, self.device)
        self._call: Callable[..., Any] = module
        self._graphed: GraphedCall | None = None

    def _load(self) -> None:
        self.module.eval()
        if self.mode != "eager":
            # torch documents this argument, its stubs do not
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._call = torch.compile(self.module) if self.mode == "compile" else self.module
        self._graphed = GraphedCall(self._compute, self.device) if self.cuda_graph else None

    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self._compute(feeds) if self._graphed is None else self._graphed(feeds)

    def _compute(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = [self._laid_out(tensor) for tensor in feeds.values()]
        try:
            results = self._call(*tensors)
        except RuntimeError as error:
            if no_compiler(error):
                raise BackendMissing(
                    "torch.compile finds no C++ compiler", hint=f"{COMPILER}, or mode 'channels_last'"
                ) from error
            raise
        return dict(
            zip(
                (spec.name for spec in self.outputs),
                results if isinstance(results, (tuple, list)) else (results,),
                strict=True,
            )
        )

    def _laid_out(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the tensor as the mode wants it: channels last, and for a compiled module no inference tensor, for
        which it would compile again.
        """
        if self.mode != "eager" and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor.clone() if self.mode == "compile" and tensor.is_inference() else tensor

    def _release(self) -> None:
        """The module belongs to the caller and stays."""
        self._call, self._graphed = self.module, None


def no_compiler(error: BaseException) -> bool:
    """Whether torch's compiler gave up for want of a C++ compiler."""
    return any(sign in f"{type(error).__name__} {error}" for sign in ("InvalidCxxCompiler", "No working C++ compiler"))
