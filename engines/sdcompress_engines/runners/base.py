"""The contract of a runner: open a graph, give it torch tensors by name, get torch tensors by name, close it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from ..errors import EngineError, EngineMismatch, UsageError

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: as in the graph.
        shape: an int is a fixed size, a name a free one. The same name is the same size on every input.
        dtype: of the tensor.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')} ({', '.join(map(str, self.shape))})"


class Runner(ABC):
    """One backend session over one graph.

    `inputs` and `outputs` are known once it is open. To open it twice has no further effect.

    Attributes:
        backend: `torch`, `aot-inductor`, `onnxruntime`, `tensorrt` or `tensorrt-rtx`.
        path: the graph's file; None for a module in memory.
        device: of the tensors that `infer` takes and returns.
        inputs, outputs: in the order of the graph.
    """

    backend: str

    def __init__(self, path: str | PathLike[str] | None, device: torch.device | str) -> None:
        self.path = None if path is None else Path(path)
        self.device = torch.device(device)
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()
        self._is_open = False

    def open(self) -> Self:
        """Load the graph. Returns the runner itself.

        Raises:
            UsageError: there is no such file. BackendMissing: the runtime or its device is not there.
            EngineError: the file is damaged. EngineMismatch: it was built for another card, version or platform.
        """
        if not self._is_open:
            if self.path is not None and not self.path.is_file():
                raise UsageError("no such file", where=self.path, hint="make it with: sdcompress export MODEL -o DIR")
            self._load()
            self._is_open = True
        return self

    def infer(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns every output by name: fresh tensors on `device` that belong to the caller.

        Args:
            feeds: every input by name, with the dtype and a shape that its spec allows, on `device`.

        Raises:
            EngineMismatch: a name, dtype, shape or device that the graph does not take. EngineError: the runner is
                closed, or the graph failed.
        """
        if not self._is_open:
            raise EngineError("the runner is not open", where=self.path, hint="with open_runner(path) as runner: ...")
        self._check(feeds)
        # Outside of inference mode, even when the caller is in it: a scheduler could not change such tensors in place,
        # and a later call outside of that mode could not write to a CUDA graph's static tensors.
        with torch.inference_mode(False), torch.no_grad():
            return self._run({spec.name: feeds[spec.name].detach().contiguous() for spec in self.inputs})

    def close(self) -> None:
        """Free the session and its memory. The runner can be opened again."""
        if self._is_open:
            self._release()
            self._is_open = False

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, feeds: Mapping[str, torch.Tensor]) -> None:
        expected = ", ".join(map(str, self.inputs))
        names = {spec.name for spec in self.inputs}
        for label, odd in (("unknown input", set(feeds) - names), ("missing input", names - set(feeds))):
            if odd:
                raise EngineMismatch(f"{label} {', '.join(sorted(odd))}", where=self.path, expected=expected)
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            tensor = feeds[spec.name]
            if tensor.dtype != spec.dtype:
                raise EngineMismatch(
                    f"input {spec.name} is {str(tensor.dtype).removeprefix('torch.')}",
                    where=self.path,
                    expected=str(spec),
                )
            fits = tensor.ndim == len(spec.shape) and all(
                size == want if isinstance(want, int) else size == sizes.setdefault(want, size)
                for size, want in zip(tensor.shape, spec.shape, strict=True)
            )
            if not fits:
                raise EngineMismatch(
                    f"input {spec.name} has shape {tuple(tensor.shape)}", where=self.path, expected=expected
                )
            if tensor.device.type != self.device.type or self.device.index not in (None, tensor.device.index):
                raise EngineMismatch(
                    f"input {spec.name} is on {tensor.device}", where=self.path, expected=f"a tensor on {self.device}"
                )

    @abstractmethod
    def _load(self) -> None:
        """Create the session and set `inputs` and `outputs`."""

    @abstractmethod
    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run checked, contiguous feeds."""

    @abstractmethod
    def _release(self) -> None:
        """Drop the session."""


def cuda_device(index: int | None) -> torch.device:
    """Returns a CUDA device with its index; None is the current device."""
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


def name_outputs(outputs: Iterable[TensorSpec], results: Any) -> dict[str, torch.Tensor]:
    """Returns what a module returned, by name.

    Args:
        outputs: of the module, in order.
        results: one tensor, or a tuple or list of tensors in that order.
    """
    tensors = results if isinstance(results, (tuple, list)) else (results,)
    return dict(zip((spec.name for spec in outputs), tensors, strict=True))
