"""The training loop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from sdcompress_engines.errors import BackendMissing, TrainingError
from sdcompress_engines.progress import SILENT, Reporter
from torch import nn

from sdcompress.train.batches import Batches, NoisyBatch, generator_for
from sdcompress.train.checkpoint import Checkpoints, checkpoints, flat, trainable_state
from sdcompress.train.config import TrainConfig
from sdcompress.train.faster import compiled_blocks, plain_attention, tuned_convolutions
from sdcompress.train.objectives.objective import Objective
from sdcompress.train.optim import choose_precision, learning_rate, make_optimizer
from sdcompress.train.stopping import _agree, stop_signals

Sampler = Callable[[nn.Module, int], None]


class Stopped(TrainingError):
    """Ctrl-C or SIGTERM during training: a checkpoint was written."""

    exit_code = 130


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        steps: steps done in all. losses: the last ones. resumed_from: the step this process started at.
        seconds: spent by this process. waited_s: of these, waiting for the next batch.
        samples_per_s: over all processes, samples and checkpoints left out.
        peak_memory_mib: of the GPU, None on a CPU.
        processes: that shared the batches.
    """

    steps: int
    losses: dict[str, float]
    seconds: float
    resumed_from: int
    waited_s: float = 0.0
    samples_per_s: float = 0.0
    peak_memory_mib: float | None = None
    processes: int = 1


def make_accelerator(config: TrainConfig, output: Path) -> Accelerator:
    """The run's accelerator.

    Raises:
        TrainingError: the batch does not divide over processes and accumulation steps. BackendMissing: the tracker is
            not installed.
    """
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    precision = choose_precision(config.precision, device_type)
    # accelerate keeps the first run's precision for the life of the process and refuses another; each run here has its
    # own.
    AcceleratorState._reset_state()
    if config.tf32 and device_type == "cuda":
        torch.set_float32_matmul_precision("high")
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        gradient_accumulation_steps=config.gradient_accumulation,
        cpu=device_type == "cpu",
        project_dir=str(output),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        log_with=None if config.tracker == "none" else config.tracker,
    )
    if config.tracker != "none" and not accelerator.log_with:
        raise BackendMissing(
            f"tracker {config.tracker} is not installed", hint=f"pip install {config.tracker}, or --set tracker=none"
        )
    micro = config.gradient_accumulation * accelerator.num_processes
    if config.batch_size % micro:
        raise TrainingError(
            f"batch_size {config.batch_size} does not divide into {accelerator.num_processes} processes x"
            f" {config.gradient_accumulation} accumulation steps",
            expected=f"a multiple of {micro}",
        )
    return accelerator


class Feed:
    """This process's share of each batch, made one ahead on a thread while the step before is computed."""

    def __init__(self, batches: Batches, config: TrainConfig, accelerator: Accelerator) -> None:
        self.batches, self.config, self.accelerator = batches, config, accelerator
        self.share = config.batch_size // (config.gradient_accumulation * accelerator.num_processes)
        # One thread for its sums too: a second pool of OpenMP threads, spinning beside the first, was seen to halve a
        # CPU's speed.
        self.pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self.waited_s = 0.0

    def _positions(self, part: int) -> range:
        step, within = divmod(part, self.config.gradient_accumulation)
        first = (
            step * self.config.batch_size
            + (within * self.accelerator.num_processes + self.accelerator.process_index) * self.share
        )
        return range(first, first + self.share)

    def parts(self, start: int) -> Iterator[NoisyBatch]:
        """From step `start` on without end, `gradient_accumulation` of them a step, on the training device."""
        part = start * self.config.gradient_accumulation
        ahead = self.pool.submit(self.batches.noisy, self._positions(part))
        while True:
            began = time.perf_counter()
            batch = ahead.result()
            self.waited_s += time.perf_counter() - began
            part += 1
            ahead = self.pool.submit(self.batches.noisy, self._positions(part))
            yield batch.each(lambda tensor: tensor.to(self.accelerator.device, non_blocking=True))


def train(
    trained: nn.Module,
    objective: Objective,
    batches: Batches,
    config: TrainConfig,
    output: Path,
    identity: dict[str, Any],
    *,
    frozen: nn.Module | None = None,
    sampler: Sampler | None = None,
    label: str = "train",
    report: Reporter = SILENT,
) -> TrainResult:
    """Train the parameters of `trained` that want a gradient, in place, to `config.steps`, going on from the newest
    whole checkpoint.

    On return `trained` holds the weights to keep: the average where `ema_decay` is set.

    Args:
        identity: what makes this run itself (plan, teacher, data, config); a checkpoint of another identity is refused.
        frozen: the teacher, if the objective has one; it only comes to the device.
        sampler: called with (the network, step) every `sample_every` steps, on the main process.

    Raises:
        TrainingError: the loss is not finite or explodes, or the checkpoint belongs to another run.
        Stopped: Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    accelerator = make_accelerator(config, output)
    on_cpu = accelerator.device.type == "cpu"
    parameters = [p for p in trained.parameters() if p.requires_grad]
    bare_optimizer = make_optimizer(config, parameters)
    saved = Checkpoints(output / "checkpoints", accelerator, identity, config.keep_checkpoints)
    if saved.sharded and config.ema_decay:
        raise TrainingError(
            "ema_decay needs whole weights, which FSDP and DeepSpeed spread over the processes",
            expected="--set ema_decay=0, or DDP",
        )
    found = saved.newest()
    start = found[0] if found else 0
    seen = accelerator.gather(torch.tensor([start], device=accelerator.device))
    if int(seen.min()) != int(seen.max()):
        raise TrainingError(
            "the processes see different checkpoints",
            where=output,
            expected="an output folder that every machine shares",
        )
    trained.train()
    if config.gradient_checkpointing:
        for module in trained.modules():
            enable: Any = getattr(module, "enable_gradient_checkpointing", None)
            if enable is not None:
                enable()
    if frozen is not None:
        frozen.to(accelerator.device)
    trained.to(accelerator.device)
    if not on_cpu and accelerator.mixed_precision != "no":
        for network in (trained, *([] if frozen is None else [frozen])):
            # torch documents this argument, its stubs do not
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average: dict[str, torch.Tensor] | None = None
    if found and not saved.sharded:  # the weights have to be there before DDP copies them to its peers
        average = saved.load(found[1], trained, bare_optimizer)
    wrapped, optimizer = accelerator.prepare(trained, bare_optimizer)
    if found and saved.sharded:
        saved.load(found[1], trained, optimizer)
    if config.ema_decay:
        average = {k: v.to(accelerator.device).clone() for k, v in (average or trainable_state(trained)).items()}
    main = accelerator.is_main_process
    metrics = output / "metrics.jsonl"
    if main:
        keep_lines_up_to(metrics, start)
    if config.tracker != "none":
        accelerator.init_trackers(
            "sdcompress",
            config={
                k: v if isinstance(v, int | float | str | bool) else str(v)
                for k, v in flat(config.model_dump(mode="json")).items()
            },
        )
    feed = Feed(batches, config, accelerator)
    parts = feed.parts(start)
    last: dict[str, float] = {}
    usual: float | None = None
    began, paused_s = time.monotonic(), 0.0

    def checkpoint(step: int) -> None:
        nonlocal paused_s
        paused = time.monotonic()
        saved.save(step, trained, optimizer, average)
        paused_s += time.monotonic() - paused

    with (
        (
            tuned_convolutions()
            if not on_cpu
            else plain_attention(trained)
            if accelerator.mixed_precision == "bf16"
            else nullcontext()
        ),
        objective.attached(trained),
        compiled_blocks(trained, objective.hooked[0]) if config.compile else nullcontext(),
        compiled_blocks(frozen, objective.hooked[1]) if config.compile else nullcontext(),
        stop_signals() as received,
        report.task(label, config.steps) if main else nullcontext(lambda *a, **k: None) as advance,
    ):
        if start:
            advance(start, "resumed")
        for step in range(start, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            torch.random.default_generator.manual_seed(
                generator_for(config.seed, f"step {accelerator.process_index}", step).initial_seed()
            )
            totals: dict[str, torch.Tensor] = {}
            for _ in range(config.gradient_accumulation):
                with accelerator.accumulate(wrapped):
                    with accelerator.autocast():
                        losses = objective.losses(wrapped, next(parts))
                    accelerator.backward(losses["loss"])
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                for name, value in losses.items():
                    totals[name] = totals.get(name, 0) + value.detach() / config.gradient_accumulation
            done = step + 1
            if average is not None:
                decay = min(config.ema_decay, done / (10 + done))
                torch._foreach_lerp_(list(average.values()), list(trainable_state(trained).values()), 1 - decay)
            due = done % config.checkpoint_every == 0 and done < config.steps
            if due or done % config.log_every == 0 or done == config.steps or done == 1:
                last = dict(
                    zip(totals, accelerator.reduce(torch.stack([*totals.values()]), "mean").tolist(), strict=True)
                )
                usual = _check_loss(last, usual, done, config, output)
                if main and (done % config.log_every == 0 or done in (1, config.steps)):
                    line = {
                        "step": done,
                        "seconds": round(time.monotonic() - began, 2),
                        "learning_rate": learning_rate(config, step),
                        "grad_norm": float(norm),
                    } | last
                    with metrics.open("a") as file:
                        file.write(
                            json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()})
                            + "\n"
                        )
                    accelerator.log(line, step=done)
            advance(1, f"loss {last.get('loss', float('nan')):.3f}")
            stopping = _agree(accelerator, bool(received), done) and done < config.steps
            if due or stopping:
                checkpoint(done)
            if stopping:
                raise Stopped(
                    f"stopped at step {done} of {config.steps}; its checkpoint is written",
                    where=output,
                    hint="the same command with --resume",
                )
            if main and sampler and config.sample_every and (done % config.sample_every == 0 or done == config.steps):
                paused = time.monotonic()
                with swapped_in(trained, average):
                    sampler(trained, done)
                paused_s += time.monotonic() - paused
    feed.pool.shutdown(cancel_futures=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if average is not None:
        trained.load_state_dict(average, strict=False)
    if saved.sharded:
        trained.load_state_dict(accelerator.get_state_dict(wrapped), strict=False)
    seconds = time.monotonic() - began
    per_s = (config.steps - start) * config.batch_size / max(1e-9, seconds - paused_s)
    peak = None if on_cpu else torch.cuda.max_memory_allocated() / 2**20
    return TrainResult(config.steps, last, seconds, start, feed.waited_s, per_s, peak, accelerator.num_processes)


def _check_loss(losses: dict[str, float], usual: float | None, step: int, config: TrainConfig, output: Path) -> float:
    """The running average of the loss with this step's in it.

    Raises:
        TrainingError: not finite, or far over the average.
    """
    known = checkpoints(output / "checkpoints")
    good = f"the last good checkpoint is {known[-1].name}" if known else "no checkpoint had been written yet"
    if not all(math.isfinite(v) for v in losses.values()):
        raise TrainingError(
            f"the loss is not finite at step {step}",
            where=output,
            hint=f"a smaller --learning-rate or --precision fp32; {good}",
        )
    if usual is not None and losses["loss"] > config.divergence_factor * usual:
        raise TrainingError(
            f"the loss jumped from about {usual:.3g} to {losses['loss']:.3g} at step {step}",
            where=output,
            hint=f"a smaller --learning-rate; {good}",
        )
    return losses["loss"] if usual is None else 0.9 * usual + 0.1 * losses["loss"]


@contextmanager
def swapped_in(trained: nn.Module, average: dict[str, torch.Tensor] | None) -> Iterator[None]:
    """The averaged weights in the network for the block, its own again after."""
    if average is None:
        yield
        return
    own = {k: v.clone() for k, v in trainable_state(trained).items()}
    trained.load_state_dict(average, strict=False)
    try:
        yield
    finally:
        trained.load_state_dict(own, strict=False)


def keep_lines_up_to(metrics: Path, step: int) -> None:
    """Drop the lines a killed run wrote after the checkpoint it is resumed from."""
    if metrics.is_file():
        lines = [
            line for line in metrics.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step
        ]
        metrics.write_text("".join(line + "\n" for line in lines))
