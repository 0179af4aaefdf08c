"""The contract of a runner: open a graph, give it torch tensors by name, get torch tensors by name, close it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from ..errors import EngineError, EngineMismatch, UsageError
from ..graph import weights_path
from ..graph_weights import GraphWeights, WeightSpec
from ..manifest import read_manifest
from .exchange import CheckedChanges, OriginalWeights

if TYPE_CHECKING:
    from typing_extensions import Self

ORIGINAL: Hashable = ()
"""The key of the original weights."""


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
        self._originals: OriginalWeights | None = None
        self._changed: frozenset[str] = frozenset()
        self._weights_key: Hashable = ORIGINAL

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
            self._originals, self._changed, self._weights_key = None, frozenset(), ORIGINAL

    @property
    def weights(self) -> Mapping[str, WeightSpec]:
        """The weights that `set_weights` exchanges, by the names of their parameters in torch; empty where it cannot.

        Raises:
            ArtifactError: the file beside the graph is damaged.
        """
        originals = self._open_originals()
        return {} if originals is None else originals.specs

    @property
    def weights_key(self) -> Hashable:
        """The key of the current weights: `ORIGINAL`, that of the last `set_weights`, or None where it had none."""
        return self._weights_key

    def read_weight(self, name: str) -> torch.Tensor:
        """Returns the original value of a weight as torch has it, on the CPU. Do not write to it.

        Args:
            name: a key of `weights`.
        """
        originals = self._open_originals()
        if originals is None:
            raise self._fixed_weights()
        return originals.read(name)

    def set_weights(self, changes: Mapping[str, torch.Tensor], key: Hashable = None) -> None:
        """Exchange weights. Those that are not named get their original values back, bit-equal; `{}` is all of them.

        If it fails, all weights are the original ones again.

        Args:
            changes: name, a key of `weights` → its value as torch has it, any float dtype, on any device. Each value is
                asked for once, so a mapping may compute it then.
            key: equal for equal changes. With the key of the current weights nothing is done, and no value is asked
                for. A backend may keep what it made for a key.

        Raises:
            EngineError: the runner is closed, its weights are fixed, or a value is not finite. EngineMismatch: a name
                or shape that the graph does not have.
        """
        if not self._is_open:
            raise EngineError("the runner is not open", where=self.path, hint="with open_runner(path) as runner: ...")
        key = key if changes else ORIGINAL
        if key is not None and key == self._weights_key:
            return
        if changes and not self.weights:
            raise self._fixed_weights()
        self._weights_key = None
        with torch.inference_mode(False), torch.no_grad():
            try:
                self._exchange(CheckedChanges(changes, self.weights, self.path), key)
            except BaseException:
                self._changed |= frozenset(changes) & frozenset(self.weights)
                self._exchange({}, ORIGINAL)
                self._changed, self._weights_key = frozenset(), ORIGINAL
                raise
        self._changed, self._weights_key = frozenset(changes), key

    def _open_originals(self) -> OriginalWeights | None:
        """Returns the original weights, from the file beside the graph; None where there is none."""
        if self._originals is None and self.path is not None and (file := weights_path(self.path)).is_file():
            self._originals = GraphWeights(file)
        return self._originals

    def _fixed_weights(self) -> EngineError:
        """Returns the error for a graph whose weights cannot be exchanged."""
        manifest = None if self.path is None else read_manifest(self.path.parent)
        precision = str((manifest.config if manifest else {}).get("precision", ""))
        if precision in ("int8", "fp8"):
            reason, hint = f"its weights are rounded to {precision}", "an export in fp16, or with --lora FILE:WEIGHT"
        else:
            reason, hint = (
                "it has no file with its weights beside it",
                "export it again: sdcompress export MODEL -o DIR",
            )
        return EngineError(f"takes no LoRA: {reason}", where=self.path, hint=hint)

    def _exchange(self, changes: Mapping[str, torch.Tensor], key: Hashable) -> None:
        """Exchange weights; `_changed` has the names of those that are not the original ones now.

        Args:
            changes: checked, in the dtypes of the graph, on any device.
            key: see `set_weights`.
        """
        raise self._fixed_weights()

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
