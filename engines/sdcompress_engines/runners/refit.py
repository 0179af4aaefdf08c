"""Exchanging the weights of a TensorRT engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from typing import Any

import torch

from ..errors import EngineError, shorten
from .tensorrt_library import DTYPES

PART_BYTES = 2**28
"""Weights that are on the GPU at once during an exchange, besides the engine's own."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Refit:
    """An exchange of weights, in parts that need little memory.

    Args:
        trt: the library's module.
        engine: of the library; it must not run meanwhile.
        log: the library's; `last_errors()` returns its last errors.
        device: of the engine.
        where: the engine's path, for messages.
    """

    def __init__(
        self, trt: Any, engine: Any, log: Any, device: torch.device, where: str | PathLike[str] | None
    ) -> None:
        self._trt, self._log, self._device, self._where = trt, log, device, where
        self._refitter = trt.Refitter(engine, log)
        self._on_device = hasattr(self._refitter, "get_weights_location")

    def exchange(self, names: Iterable[str], read: Callable[[str], torch.Tensor]) -> None:
        """Set weights to new values.

        Args:
            names: of the weights.
            read: returns the value of a weight as the graph has it, contiguous or not, on any device. It is asked for
                further weights where the library has fused one with another.

        Raises:
            EngineError: the engine does not take a weight, or the library failed.
        """
        for part in _parts(names, read):
            kept = {name: self._set(name, value) for name, value in part.items()}
            for name in self._refitter.get_missing_weights():
                kept[name] = self._set(name, read(name))
            stream = torch.cuda.current_stream(self._device)
            has_async = hasattr(self._refitter, "refit_cuda_engine_async")
            done = (
                self._refitter.refit_cuda_engine_async(stream.cuda_stream)
                if has_async
                else self._refitter.refit_cuda_engine()
            )
            stream.synchronize()  # the values in `kept` must live until then
            if not done:
                raise EngineError(f"the engine did not take the weights ({self._log.last_errors()})", where=self._where)

    def _set(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Give the library a value. Returns the tensor whose memory it reads."""
        trt = self._trt
        value = value.to(self._device if self._on_device else "cpu").contiguous()
        weights = trt.Weights(getattr(trt.DataType, _NAMES[value.dtype]), value.data_ptr(), value.numel())
        location = (trt.TensorLocation.DEVICE,) if self._on_device else ()
        if not self._refitter.set_named_weights(name, weights, *location):
            raise EngineError(
                f"the engine did not take the weight {shorten(name, 80)} ({self._log.last_errors()})", where=self._where
            )
        return value


def _parts(names: Iterable[str], read: Callable[[str], torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the values in parts of about `PART_BYTES`."""
    part: dict[str, torch.Tensor] = {}
    for name in names:
        part[name] = read(name)
        if sum(value.numel() * value.element_size() for value in part.values()) >= PART_BYTES:
            yield part
            part = {}
    if part:
        yield part
