"""Part 6: samples a second of distilling bk-tiny: in the public scripts' manner, in our loop, and with compile."""

from __future__ import annotations

import functools
import gc
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from sdcompress_engines.errors import BackendMissing

from sdcompress.models.locate import read_unet_config
from sdcompress.models.random import family_configs

from .child import PartRun
from .models import known_peaks

PEER = Path(__file__).resolve().parents[2] / "peers" / "training.py"
STUDENT = "bk-tiny"
TIMED_S = 8.0
"""The most timed seconds; a loop also loads its models, fills its cache and warms up."""
BATCHES_OF_PICTURES = 2
LEAST_BATCH = 8


@dataclass(frozen=True)
class Setup:
    """What is trained.

    Attributes:
        model: the teacher's name in bench/peers/training.py.
        size_px: side of the pictures.
        batch: pictures in a step.
        config: of the teacher's UNet.
    """

    model: str
    size_px: int
    batch: int
    config: dict[str, Any]


@dataclass(frozen=True)
class Loop:
    """A training loop.

    Attributes:
        name: of its row.
        function: in bench/peers/training.py.
        compile: use torch.compile, in our loop.
        runs_small: it is part of a smoke run.
    """

    name: str
    function: str
    compile: bool = False
    runs_small: bool = True


LOOPS = (
    Loop("public manner", "measure_public"),
    Loop("sdcompress", "measure_sdcompress"),
    Loop("sdcompress compile", "measure_sdcompress", compile=True, runs_small=False),
)


def training(run: PartRun) -> None:
    """Write a row for each loop."""
    train_rows(run, nano_setup(4) if run.smoke else Setup("sd15", 512, 64, family_configs("sd1")["unet"]), "")


def nano_rows(run: PartRun) -> None:
    """Write the rows of nano's distillation."""
    train_rows(run, nano_setup(4 if run.smoke else 64), "nano ")


def nano_setup(batch: int) -> Setup:
    return Setup("nano", 128, batch, read_unet_config("nano"))


def train_rows(run: PartRun, setup: Setup, prefix: str) -> None:
    """Write a row for each loop.

    Args:
        run: the part.
        setup: what is trained.
        prefix: of the rows' names.
    """
    labels = {"teacher": setup.model, "student": STUDENT, "size_px": setup.size_px}
    for loop in LOOPS:
        if run.smoke and not loop.runs_small:
            run.skip(prefix + loop.name, "compiling a training step takes minutes on a CPU", **labels)
        else:
            run.measure(prefix + loop.name, functools.partial(measure_loop, run, setup, loop), **labels)


def measure_loop(run: PartRun, setup: Setup, loop: Loop) -> dict[str, Any]:
    """Returns the figures of a loop at the setup's batch; while memory does not suffice, the batch is halved.

    Args:
        run: the part.
        setup: what is trained.
        loop: how.

    Raises:
        BackendMissing: this is no checkout.
    """
    batch = setup.batch
    while True:
        try:
            return measure_batch(run, setup, loop, batch)
        except torch.OutOfMemoryError:
            if batch <= LEAST_BATCH:
                raise
            run.log(f"{loop.name}: out of memory at batch {batch}")
        batch //= 2


def measure_batch(run: PartRun, setup: Setup, loop: Loop, batch: int) -> dict[str, Any]:
    """Returns the figures of a loop.

    Args:
        run: the part.
        setup: what is trained.
        loop: how.
        batch: pictures in a step.
    """
    peer = load_peer()
    gc.collect()
    if run.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(run.device)
    case = peer.Case(
        setup.model,
        setup.size_px,
        batch,
        run.scratch / f"training-{setup.model}",
        pictures=BATCHES_OF_PICTURES * setup.batch,
        steps=2 if run.smoke else 1000,
        seconds=TIMED_S,
        compile=loop.compile,
    )
    found = dict(getattr(peer, loop.function)(case))
    peak_mib = found.pop("peak_memory_mib")
    part_seconds = found.pop("seconds", None)
    if part_seconds is not None:
        found["part_ms"] = {name: 1000 * seconds for name, seconds in part_seconds.items()}
    if run.is_cuda:  # on a CPU, the peak of a process covers all its rows
        found["peak_mib"] = peak_mib
    return {"batch": batch, **found, "share_of_peak": share_of_peak(run, setup, found["samples_per_s"])}


def share_of_peak(run: PartRun, setup: Setup, samples_per_s: float) -> float:
    """Returns the operations of the two UNets as a share of the bf16 peak.

    Args:
        run: has the peaks.
        setup: what was trained.
        samples_per_s: measured.
    """
    flops = load_peer().flops_per_sample(setup.config) * samples_per_s
    return float(flops / known_peaks(run, "bf16").matmul_flops_per_s)


def load_peer() -> ModuleType:
    """Returns bench/peers/training.py as a module; it is in no package.

    Raises:
        BackendMissing: it does not exist.
    """
    name = "sdcompress_peers_training"
    if name not in sys.modules:
        if not PEER.is_file():
            raise BackendMissing("needs a checkout, which has bench/peers")
        spec = importlib.util.spec_from_file_location(name, PEER)
        if spec is None or spec.loader is None:
            raise BackendMissing(f"{PEER.name} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look up their module there
        spec.loader.exec_module(module)
    return sys.modules[name]
