"""The contract of a runner: open a graph, give it torch tensors by name, get torch tensors by name, close it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from ..errors import EngineError, EngineMismatch, UsageError

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: an int is a fixed size, a name a free one (the same name is the same size on every input)."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')} ({', '.join(map(str, self.shape))})"


class Runner(ABC):
    """One backend session over one graph.

    `inputs` and `outputs` are known once it is open; opening twice is opening once.

    Attributes:
        backend: `torch`, `aot-inductor`, `onnxruntime`, `tensorrt` or `tensorrt-rtx`.
        path: the graph's file; None for a module in memory.
        device: where `infer` takes and gives its tensors.
    """

    backend: str

    def __init__(self, path: str | PathLike[str] | None, device: torch.device | str) -> None:
        self.path = None if path is None else Path(path)
        self.device = torch.device(device)
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()
        self._is_open = False

    def open(self) -> Self:
        """Load the graph.

        Raises:
            UsageError: there is no such file. BackendMissing: the runtime or its device is not there.
            EngineError: the file is damaged. EngineMismatch: it was made for another card, version or platform.
        """
        if not self._is_open:
            if self.path is not None and not self.path.is_file():
                raise UsageError("no such file", where=self.path, hint="make it with: sdcompress export MODEL -o DIR")
            self._load()
            self._is_open = True
        return self

    def infer(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Every output by name, fresh tensors on `device` that belong to the caller.

        Args:
            feeds: every input by name, with the dtype and a shape its spec allows, on `device`.

        Raises:
            EngineMismatch: a name, dtype, shape or device that the graph does not take. EngineError: it is closed, or
                it failed.
        """
        if not self._is_open:
            raise EngineError("the runner is not open", where=self.path, hint="with open_runner(path) as runner: ...")
        self._check(feeds)
        # Not in inference mode, whatever the caller is in: a scheduler may not change such tensors in place, and a CUDA
        # graph's static tensors could not be written to from a later call outside of it.
        with torch.inference_mode(False), torch.no_grad():
            return self._run({spec.name: feeds[spec.name].detach().contiguous() for spec in self.inputs})

    def close(self) -> None:
        """Free the session and its memory; it can be opened again."""
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
        """Make the session and set `inputs` and `outputs`."""

    @abstractmethod
    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run checked, contiguous feeds."""

    @abstractmethod
    def _release(self) -> None:
        """Drop the session."""
