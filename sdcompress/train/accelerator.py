"""accelerate's part of a run: processes, mixed precision, gradient accumulation and trackers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import patch_environment
from sdcompress_engines.errors import BackendMissing, UsageError

from sdcompress.train.config import LoopConfig
from sdcompress.train.precision import resolve_precision
from sdcompress.train.sharding import SHARDING, refuse_unsupported


def make_accelerator(config: LoopConfig, output: Path) -> Accelerator:
    """Returns the run's accelerator.

    Args:
        config: precision, batch, accumulation and tracker.
        output: the training folder; trackers write there.

    Raises:
        UsageError: the batch does not divide over processes and accumulation steps, or accelerate's launcher asks for
            what training cannot do.
        BackendMissing: as `check_settings`.
    """
    refuse_unsupported()
    check_settings(config)
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
    _check_batch(config, accelerator.num_processes)
    return accelerator


def check_settings(config: LoopConfig) -> None:
    """Refuse what no training can do here, so that nobody waits for the data to be encoded before.

    Raises:
        UsageError: the batch does not divide over accumulation steps.
        BackendMissing: the tracker or the optimizer's package is not installed.
    """
    _check_batch(config, 1)
    if config.tracker != "none" and config.tracker not in get_available_trackers():
        raise BackendMissing(
            f"tracker {config.tracker} is not installed", hint=f"pip install {config.tracker}, or --set tracker=none"
        )
    if config.optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise BackendMissing(
            "optimizer adamw8bit needs bitsandbytes", hint="pip install bitsandbytes, or --set optimizer=adamw"
        )


def _check_batch(config: LoopConfig, processes: int) -> None:
    passes = config.gradient_accumulation * processes
    if config.batch_size % passes:
        raise UsageError(
            f"batch_size {config.batch_size} does not divide into {processes} processes x"
            f" {config.gradient_accumulation} accumulation steps",
            expected=f"a multiple of {passes}",
        )
