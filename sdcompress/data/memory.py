"""The memory that encoding takes, and what a device has left."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdcompress.data.precision import DTYPES, Precision, copy_encoder

_ALLOCATORS = ("DefaultCPUAllocator", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an exception means that a CPU's or a GPU's allocator has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in _ALLOCATORS)


def count_free_bytes(device: torch.device, processes: int = 1) -> int:
    """Returns the bytes that a process can still allocate on a device.

    Args:
        device: a CUDA device or the CPU.
        processes: number of processes that share a CPU's memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available // processes


def count_picture_bytes(vae: Any, width: int, height: int, precision: Precision) -> int:
    """Returns the most bytes that encoding one picture holds at once, without the weights.

    They are counted on the meta device, so nothing is computed. Memory that an operator takes for itself and frees
    again is not counted.

    Args:
        vae: an AutoencoderKL.
        width, height: of the picture, in pixels.
        precision: in which it is encoded.
    """
    encoder = copy_encoder(vae, torch.device("meta"), precision)
    with torch.no_grad(), _FusedAttention(), _LiveBytes(encoder.parameters()) as live:
        encoder.encode(torch.empty(1, vae.config.in_channels, height, width, dtype=DTYPES[precision], device="meta"))
    return live.peak


class _FusedAttention(TorchFunctionMode):
    """Computes attention as one operator, as CPU and GPU do: they never hold the scores.

    On the meta device torch would split it into operators that hold them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


class _LiveBytes(TorchDispatchMode):
    """Adds up the bytes of the tensors that are alive, without the weights, and keeps the largest sum in `peak`.

    torch has `torch.distributed._tools.mem_tracker` for this, but it is private and needs `torch.distributed`.
    """

    def __init__(self, weights: Iterator[torch.Tensor]) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: dict[int, Any] = {weight.untyped_storage()._cdata: None for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._watch(leaf.untyped_storage())
        return out

    def _watch(self, storage: Any) -> None:
        """Count a storage from now until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def drop(_: weakref.ref[Any]) -> None:
            del self._known[key]
            self._now -= size

        self._known[key] = weakref.ref(storage, drop)
        self._now += size
        self.peak = max(self.peak, self._now)
