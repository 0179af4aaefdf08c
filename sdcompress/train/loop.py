"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from sdcompress_engines.errors import TrainingError
from sdcompress_engines.progress import SILENT, Reporter
from torch import nn

from sdcompress.train.accelerator import make_accelerator
from sdcompress.train.averaging import averaged_weights, update_average
from sdcompress.train.batches import Batch, BatchSource, make_generator
from sdcompress.train.checkpoint import CHECKPOINTS, DIFFERENCES_SHOWN, Checkpoints, flatten, trainable_state
from sdcompress.train.config import LoopConfig, TrainConfig
from sdcompress.train.feed import BatchFeed
from sdcompress.train.kernels import compile_blocks, tune_convolutions, use_plain_attention
from sdcompress.train.metrics import LossMonitor, MetricsLog
from sdcompress.train.objectives.objective import Objective
from sdcompress.train.optim import compute_learning_rate, make_optimizer
from sdcompress.train.sharding import SHARDING, gather, is_set, shard, whole
from sdcompress.train.stopping import any_process_stops, catch_stop_signals

Sampler = Callable[[nn.Module, int], None]
"""Draws pictures with (network, steps done)."""


class Stopped(TrainingError):
    """Ctrl-C or SIGTERM ended the training; a checkpoint was written."""

    exit_code = 130


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        steps: steps done in all.
        losses: of the last logged step, by name.
        seconds: spent by this process.
        resumed_from: the step at which this process started.
        waited_s: of `seconds`, waiting for the next batch.
        samples_per_s: over all processes; the time of sample pictures and checkpoints does not count.
        peak_memory_mib: of the GPU; None on a CPU.
        processes: number of processes that shared the batches.
    """

    steps: int
    losses: dict[str, float]
    seconds: float
    resumed_from: int
    waited_s: float = 0.0
    samples_per_s: float = 0.0
    peak_memory_mib: float | None = None
    processes: int = 1


def train(
    trained: nn.Module,
    objective: Objective,
    batches: BatchSource,
    config: LoopConfig,
    output: Path,
    identity: dict[str, Any],
    *,
    frozen: nn.Module | None = None,
    sampler: Sampler | None = None,
    label: str = "train",
    report: Reporter = SILENT,
) -> TrainResult:
    """Train the parameters of `trained` that require a gradient, in place, up to step `config.steps`.

    The run continues from the newest intact checkpoint in `output`. On return `trained` holds the weights to keep: the
    average where `ema_decay` is set. Where the weights are in shards (FSDP), only the main process's `trained` does.

    Args:
        trained: the network, on any device; its trained parameters are float32.
        objective: computes the losses of a batch.
        batches: makes the batches.
        config: steps, learning rate, precision and the rest.
        output: the training folder: checkpoints and `metrics.jsonl`.
        identity: what distinguishes the run from others (plan, teacher, data, configuration); a checkpoint of
            another identity is refused.
        frozen: the teacher, if the objective has one; it only moves to the device.
        sampler: called with (network, steps done) every `sample_every` steps, on the main process. Where the
            weights are in shards, so that no process has all of them, it is not called.
        label: names the run in the progress report.
        report: shows the progress.

    Raises:
        TrainingError: the loss is not finite or explodes, the checkpoint belongs to another run, or the processes do
            different runs.
        UsageError: the batch does not divide over the processes, or an option does not fit them.
        Stopped: Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    run = TrainingRun(trained, objective, batches, config, output, identity, frozen)
    main = run.accelerator.is_main_process
    if main and sampler is not None and run.sharded:
        report.show_line(f"{label}: no sample pictures, because no process has all weights")
        sampler = None
    if main and (unused := batches.order.never_drawn):
        total, shown = len(batches.order.buckets), f"fewer than a batch of {config.batch_size} have their shape"
        report.show_line(f"{label}: {unused:,} of {total:,} pictures are never used: {shown}")
    with (
        run.active(),
        catch_stop_signals() as signals,
        report.task(label, config.steps) if main else nullcontext(lambda *a, **k: None) as advance,
    ):
        if run.first_step:
            advance(run.first_step, "resumed")
        for step in range(run.first_step, config.steps):
            run.do_step(step)
            advance(1, f"loss {run.losses.get('loss', float('nan')):.3f}")
            run.save_or_stop(step + 1, bool(signals))
            if main and sampler is not None:
                run.draw_samples(sampler, step + 1)
    return run.finish()


class TrainingRun:
    """The state of one run, and what it does at each step. The arguments are those of `train`.

    Attributes:
        trained: the network in training; a copy of the argument where its weights are in shards.
        first_step: the step to start at, counted from 0: that of the newest checkpoint, else 0.
        losses: of the last logged step, by name.
    """

    def __init__(
        self,
        trained: nn.Module,
        objective: Objective,
        batches: BatchSource,
        config: LoopConfig,
        output: Path,
        identity: dict[str, Any],
        frozen: nn.Module | None,
    ) -> None:
        self.kept, self.objective, self.frozen = trained, objective, frozen
        self.config, self.output = config, output
        self.accelerator = make_accelerator(config, output)
        self.sharded = is_set(SHARDING) and self.accelerator.num_processes > 1
        self.checkpoints = Checkpoints(output / CHECKPOINTS, self.accelerator, identity, config.keep_checkpoints)
        self.first_step, checkpoint = self.checkpoints.find_newest() or (0, None)
        check_same_start(self.first_step, identity, output)
        self.trained = place_networks(trained, frozen, config, self.accelerator, sharded=self.sharded)
        self.parameters = [p for p in self.trained.parameters() if p.requires_grad]
        self._prepare(checkpoint)
        self.losses: dict[str, float] = {}
        self.monitor = LossMonitor(config, output)
        self.metrics = MetricsLog(config, output, self.accelerator, self.first_step)
        self.feed = BatchFeed(batches, config, self.accelerator)
        self.passes = self.feed.iterate(self.first_step)
        if self.accelerator.device.type == "cuda":  # the cache may have been built in this process
            torch.cuda.reset_peak_memory_stats()
        self.began, self.paused_s = time.monotonic(), 0.0

    def _prepare(self, checkpoint: Path | None) -> None:
        """Make the optimizer, wrap network and optimizer for the processes of the run, and load the checkpoint."""
        self.wrapped: Any = self.trained
        self.optimizer: Any = self.accelerator.prepare(make_optimizer(self.config, self.trained))
        if not self.sharded:
            self.wrapped = self.accelerator.prepare(self.trained)
        average = self.checkpoints.load(checkpoint, self.trained, self.optimizer) if checkpoint else None
        self.average: dict[str, torch.Tensor] | None = None
        if self.config.ema_decay:
            start = average or trainable_state(self.trained)
            self.average = {name: weight.clone() for name, weight in start.items()}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Choose the kernels and attach the objective's hooks, for the block; the batch feed ends with it."""
        with ExitStack() as stack:
            stack.callback(self.feed.close)
            if self.accelerator.device.type != "cpu":
                stack.enter_context(tune_convolutions())
            elif self.accelerator.mixed_precision == "bf16":
                stack.enter_context(use_plain_attention(self.trained))
            self.objective.use_average(self.average or {})
            stack.enter_context(self.objective.attach_hooks(self.trained))
            if self.config.compile:
                for network, hooked in zip((self.trained, self.frozen), self.objective.hooked_modules, strict=True):
                    stack.enter_context(compile_blocks(network, hooked))
            yield

    def do_step(self, step: int) -> None:
        """Do one optimizer step, counted from 0; log its losses where that is due."""
        learning_rate = compute_learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        seed = make_generator(self.config.seed, f"step {self.accelerator.process_index}", step).initial_seed()
        torch.random.default_generator.manual_seed(seed)
        totals: dict[str, torch.Tensor] = {}
        for _ in range(self.config.gradient_accumulation):
            with self.accelerator.accumulate(self.wrapped):
                losses = self._compute_losses(next(self.passes))
                self.accelerator.backward(losses["loss"])
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach() / self.config.gradient_accumulation
        done = step + 1
        if self.average is not None:
            update_average(self.average, self.trained, self.config.ema_decay, done)
        logged = done % self.config.log_every == 0 or done in (1, self.config.steps)
        if logged or self._checkpoint_is_due(done):
            self.losses = self._reduce(totals)
            self.monitor.check(self.losses, done)
        if logged:
            grad_norm = float(whole(norm))
            if self.accelerator.is_main_process:
                self.metrics.write(done, self.losses, learning_rate=learning_rate, grad_norm=grad_norm)

    def _compute_losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        with self.accelerator.autocast():
            return self.objective.compute_losses(self.wrapped, batch)

    def _reduce(self, losses: dict[str, torch.Tensor]) -> dict[str, float]:
        """Returns the losses' means over the processes."""
        means = self.accelerator.reduce(torch.stack([*losses.values()]), "mean").tolist()
        return dict(zip(losses, means, strict=True))

    def _checkpoint_is_due(self, done: int) -> bool:
        return done % self.config.checkpoint_every == 0 and done < self.config.steps

    def save_or_stop(self, done: int, signaled: bool) -> None:
        """Write a checkpoint where one is due, or where a process received a stop signal.

        Args:
            done: steps done.
            signaled: whether this process received a stop signal.

        Raises:
            Stopped: a process received a stop signal before the last step.
        """
        stopping = any_process_stops(self.accelerator, signaled, done) and done < self.config.steps
        if stopping or self._checkpoint_is_due(done):
            with self._pause():
                self.checkpoints.save(done, self.trained, self.optimizer, self.average)
        if stopping:
            raise Stopped(
                f"stopped at step {done} of {self.config.steps}; its checkpoint is written",
                where=self.output,
                hint="the same command with --resume; `run` and `demo` need no option",
            )

    def draw_samples(self, sampler: Sampler, done: int) -> None:
        """Draw the validation pictures with the averaged weights, where that is due."""
        every = self.config.sample_every
        if every and (done % every == 0 or done == self.config.steps):
            with self._pause(), averaged_weights(self.trained, self.average):
                sampler(self.trained, done)

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Leave the block's time out of the training speed."""
        began = time.monotonic()
        yield
        self.paused_s += time.monotonic() - began

    def finish(self) -> TrainResult:
        """Put the weights to keep into the network; returns how the run ended."""
        weights = self.average or (trainable_state(self.trained) if self.sharded else {})
        weights = gather(weights, keep=self.accelerator.is_main_process)
        if self.accelerator.is_main_process or not self.sharded:
            self.kept.load_state_dict(weights, strict=False)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        seconds = time.monotonic() - self.began
        steps, batch_size = self.config.steps, self.config.batch_size
        on_cpu = self.accelerator.device.type == "cpu"
        return TrainResult(
            steps=steps,
            losses=self.losses,
            seconds=seconds,
            resumed_from=self.first_step,
            waited_s=self.feed.waited_s,
            samples_per_s=(steps - self.first_step) * batch_size / max(1e-9, seconds - self.paused_s),
            peak_memory_mib=None if on_cpu else torch.cuda.max_memory_allocated() / 2**20,
            processes=self.accelerator.num_processes,
        )


def check_same_start(first_step: int, identity: dict[str, Any], output: Path) -> None:
    """Check that all processes do the same run from the same step.

    Args:
        first_step: of this process's newest checkpoint.
        identity: of this process's run.
        output: the training folder, named in the message.

    Raises:
        TrainingError: the processes see different checkpoints, or were given different settings, models or data.
    """
    starts = gather_object([(first_step, flatten(identity))])
    if len({step for step, _ in starts}) > 1:
        raise TrainingError(
            "the processes see different checkpoints",
            where=output,
            expected="an output folder that every machine shares",
        )
    first, names = starts[0][1], {name for _, facts in starts for name in facts}
    differing = sorted(name for name in names for _, facts in starts if facts.get(name) != first.get(name))
    if differing:
        raise TrainingError(
            f"the processes differ in {', '.join(list(dict.fromkeys(differing))[:DIFFERENCES_SHOWN])}",
            where=output,
            expected="the same command, with equal copies of model and data, on every machine",
        )


def place_networks(
    trained: nn.Module,
    frozen: nn.Module | None,
    config: LoopConfig,
    accelerator: Accelerator,
    *,
    sharded: bool = False,
) -> nn.Module:
    """Move the networks to the device, in the memory format that is fast there; `trained` goes to train mode.

    Returns the network to train: `trained`, or its copy in shards.

    Args:
        trained: gets gradient checkpointing if so configured.
        frozen: the teacher, or None; it is whole in every process.
        config, accelerator: the run's.
        sharded: spread the weights of `trained` over the processes. They keep their memory format: `fully_shard` takes
            no other.
    """
    trained.train()
    if isinstance(config, TrainConfig) and config.gradient_checkpointing:
        for module in trained.modules():
            enable: Any = getattr(module, "enable_gradient_checkpointing", None)
            if enable is not None:
                enable()
    networks = [network for network in (frozen, None if sharded else trained) if network is not None]
    for network in networks:
        network.to(accelerator.device)
    if accelerator.device.type != "cpu" and accelerator.mixed_precision != "no":
        for network in networks:
            # torch documents this argument, its stubs do not
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return shard(trained, accelerator) if sharded else trained
