"""accelerate's part of a run: processes, mixed precision, gradient accumulation and trackers."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment
from sdcompress_engines.errors import BackendMissing, UsageError

from sdcompress.train.config import TrainConfig
from sdcompress.train.precision import resolve_precision
from sdcompress.train.sharding import SHARDING, refuse_unsupported


def make_accelerator(config: TrainConfig, output: Path) -> Accelerator:
    """Returns the run's accelerator.

    Args:
        config: precision, batch, accumulation and tracker.
        output: the training folder; trackers write there.

    Raises:
        UsageError: the batch does not divide over processes and accumulation steps, or accelerate's launcher asks for
            what training cannot do.
        BackendMissing: the tracker is not installed.
    """
    refuse_unsupported()
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    precision = resolve_precision(config.precision, device_type)
    # accelerate keeps the first run's precision for the life of the process and refuses another. Here each run has its
    # own.
    AcceleratorState._reset_state()
    if config.tf32 and device_type == "cuda":
        torch.set_float32_matmul_precision("high")
    with patch_environment(**{SHARDING: "false"}):  # `shard` does it
        accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            gradient_accumulation_steps=config.gradient_accumulation,
            cpu=device_type == "cpu",
            project_dir=str(output),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
            log_with=None if config.tracker == "none" else config.tracker,
        )
    if config.tracker != "none" and not accelerator.log_with:
        raise BackendMissing(
            f"tracker {config.tracker} is not installed", hint=f"pip install {config.tracker}, or --set tracker=none"
        )
    passes = config.gradient_accumulation * accelerator.num_processes
    if config.batch_size % passes:
        raise UsageError(
            f"batch_size {config.batch_size} does not divide into {accelerator.num_processes} processes x"
            f" {config.gradient_accumulation} accumulation steps",
            expected=f"a multiple of {passes}",
        )
    return accelerator
