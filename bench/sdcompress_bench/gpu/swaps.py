"""The time in which a LoRA goes into a running UNet, and out again."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from sdcompress_engines.runners import Runner

from sdcompress.lora.adapters import LowRank
from sdcompress.lora.pipeline_loras import ChangedWeights

from .child import PartRun
from .models import Models
from .timing import synchronize

RANK = 32
"""Of the LoRA, which changes every attention layer, as most files do."""
SWAPS = 5


def measure_swaps(run: PartRun, models: Models, name: str, runner: Runner) -> dict[str, Any]:
    """Returns the milliseconds of putting a LoRA into a runner and of taking it out, and whether that left a trace.

    Args:
        run: the part.
        models: has the inputs.
        name: of the UNet.
        runner: an open runner of it.
    """
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for weight, spec in runner.weights.items():
        if ".attn" in weight:
            rows, columns = spec.shape[:2]
            up, down = torch.randn(rows, RANK, generator=generator), torch.randn(RANK, columns, generator=generator)
            layers[weight.removesuffix(".weight")] = LowRank(
                (1e-3 * down).to(runner.device), up.to(runner.device), float(RANK)
            )
    feeds = {spec.name: models.feeds(name, 2)[spec.name].to(spec.dtype) for spec in runner.inputs}
    before = runner.infer(feeds)
    times: dict[str, list[float]] = {"set_ms": [], "reset_ms": []}
    for number in range(2 if run.smoke else SWAPS):
        changed = ChangedWeights(runner, {layer: [(each, 1.0 + number / 10)] for layer, each in layers.items()})
        for kind, changes in (("set_ms", changed), ("reset_ms", {})):
            synchronize(run.device)
            began = time.perf_counter()
            runner.set_weights(changes)
            synchronize(run.device)
            times[kind].append(1000 * (time.perf_counter() - began))
    after = runner.infer(feeds)
    return {
        **{kind: statistics.median(samples) for kind, samples in times.items()},
        "samples": times,
        "layers": len(layers),
        "reset_is_bit_equal": all(torch.equal(after[key], value) for key, value in before.items()),
    }
