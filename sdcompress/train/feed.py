"""Batches for one process of a run, prepared ahead of the step that uses them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from accelerate import Accelerator

from sdcompress.train.batches import Batch, BatchSource
from sdcompress.train.config import LoopConfig


class BatchFeed:
    """This process's share of each batch, made one ahead on a thread while the step before is computed.

    Args:
        batches: makes the batches.
        config: batch size and gradient accumulation.
        accelerator: the run's.

    Attributes:
        waited_s: seconds for which the training loop has waited for a batch.
    """

    def __init__(self, batches: BatchSource, config: LoopConfig, accelerator: Accelerator) -> None:
        self.batches, self.config, self.accelerator = batches, config, accelerator
        self.share = config.batch_size // (config.gradient_accumulation * accelerator.num_processes)
        # Its tensor operations run on one thread too: a second pool of OpenMP threads, spinning beside the first,
        # halved a CPU's speed when measured.
        self.pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self.waited_s = 0.0

    def iterate(self, first_step: int) -> Iterator[Batch]:
        """Yield batches without end, on the training device: `gradient_accumulation` of them per step.

        Args:
            first_step: counted from 0.
        """
        index = first_step * self.config.gradient_accumulation
        ahead = self.pool.submit(self.batches.make_batch, self._positions(index))
        while True:
            began = time.perf_counter()
            batch = ahead.result()
            self.waited_s += time.perf_counter() - began
            index += 1
            ahead = self.pool.submit(self.batches.make_batch, self._positions(index))
            yield batch.map_tensors(lambda tensor: tensor.to(self.accelerator.device, non_blocking=True))

    def close(self) -> None:
        """End the thread; the batch it has not begun is dropped."""
        self.pool.shutdown(cancel_futures=True)

    def _positions(self, index: int) -> range:
        """Returns the positions in the stream of samples of this process's `index`-th forward pass."""
        step, part = divmod(index, self.config.gradient_accumulation)
        first = (
            step * self.config.batch_size
            + (part * self.accelerator.num_processes + self.accelerator.process_index) * self.share
        )
        return range(first, first + self.share)
