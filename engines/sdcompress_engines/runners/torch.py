"""A torch module in memory as a runner, so that torch is compared as one of the backends."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from ..errors import BackendMissing, UsageError
from .base import Runner, TensorSpec, name_outputs
from .cuda_graphs import GraphedCall, check_graph_device
from .exchange import ModuleWeights

MODES = ("eager", "channels_last", "compile")
COMPILER = "install a C++ compiler (Debian, Ubuntu: apt-get install g++)"


class TorchRunner(Runner):
    """A module that takes tensors in the order of `inputs` and returns a tensor, or a tuple in the order of `outputs`.

    It runs in its own dtype and on its own device.

    Args:
        module: in memory; it belongs to the caller.
        inputs, outputs: names, shapes and dtypes, in the order of the call.
        mode: `eager`; `channels_last`, a memory layout with which convolutions are faster on most processors and cards;
            or `compile`, `torch.compile` at the first call of a shape, in the same layout. The last two change the
            layout of the module's weights, not their values. On CUDA, GroupNorm returns its result channels first
            (`native_group_norm` in ATen's group_norm.cpp). So in eager mode every convolution after one converts its
            input, and `channels_last` gains little there; `compile` keeps the layout.
        cuda_graph: replay a captured graph for each shape, so that the host launches no single kernels; on a GPU only.
            The module's weights may change in place, but must not move.
        named: the module by whose names of parameters `set_weights` takes weights; by default `module`.

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
        named: torch.nn.Module | None = None,
    ) -> None:
        weight = next(module.parameters(), None)
        super().__init__(None, torch.device("cpu") if weight is None else weight.device)
        if mode not in MODES:
            raise UsageError(f"no torch mode {mode!r}", expected=" or ".join(MODES))
        self.module, self.inputs, self.outputs, self.mode = module, tuple(inputs), tuple(outputs), mode
        self.cuda_graph, self._named = cuda_graph, named or module
        check_graph_device(cuda_graph, self.device)
        self._call: Callable[..., Any] = module
        self._graphed: GraphedCall | None = None
        self._module_weights: ModuleWeights | None = None

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
        tensors = [self._convert(tensor) for tensor in feeds.values()]
        try:
            results = self._call(*tensors)
        except RuntimeError as error:
            if lacks_compiler(error):
                raise BackendMissing(
                    "torch.compile finds no C++ compiler", hint=f"{COMPILER}, or run the model without torch.compile"
                ) from error
            raise
        return name_outputs(self.outputs, results)

    def _convert(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the tensor as the mode needs it: channels last.

        A compiled module would compile again for an inference tensor, so it gets a copy.
        """
        if self.mode != "eager" and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor.clone() if self.mode == "compile" and tensor.is_inference() else tensor

    def _open_originals(self) -> ModuleWeights:
        if self._module_weights is None:
            self._module_weights = ModuleWeights(self._named)
        return self._module_weights

    def _exchange(self, changes: Mapping[str, torch.Tensor], key: Hashable) -> None:
        """Change the module's weights in place, so that compiled code and CUDA graphs stay valid."""
        originals = self._open_originals()
        for name in self._changed - set(changes):
            originals.restore(name)
        for name in changes:
            originals.write(name, changes[name])

    def _release(self) -> None:
        """Drop what was compiled and captured, and restore the weights. The module stays with the caller."""
        for name in self._changed:
            self._open_originals().restore(name)
        self._call, self._graphed = self.module, None


def lacks_compiler(error: BaseException) -> bool:
    """Returns whether torch's compiler failed because there is no C++ compiler."""
    return any(sign in f"{type(error).__name__} {error}" for sign in ("InvalidCxxCompiler", "No working C++ compiler"))
