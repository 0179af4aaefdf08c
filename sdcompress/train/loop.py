"""The training loop: one for every objective, on accelerate, resumable, the same for any number of processes."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from sdcompress_engines.errors import BackendMissing, TrainingError
from sdcompress_engines.progress import SILENT, Reporter
from torch import nn

from .batches import Batches, NoisyBatch, generator_for
from .checkpoint import Checkpoints, checkpoints, flat, trainable_state
from .config import TrainConfig
from .objectives import Objective

Sampler = Callable[[nn.Module, int], None]
_ASK_EVERY = 10


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


def choose_precision(precision: str, device_type: str) -> str:
    """`auto` resolved: bf16 where the device computes in it, else fp16 on a GPU and fp32 on a CPU; others as given."""
    if precision != "auto":
        return precision
    if device_type == "cuda":
        return "bf16" if computes_bf16() else "fp16"
    return "bf16" if device_type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"


def computes_bf16(device: Any = None) -> bool:
    """Returns whether a GPU has instructions for bfloat16: from compute capability 8.0 on.

    `torch.cuda.is_bf16_supported` counts emulation too.
    """
    return torch.cuda.get_device_capability(device) >= (8, 0)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of 0-based `step`."""
    rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
    if config.lr_schedule == "cosine" and step >= config.lr_warmup_steps:
        rate *= 0.5 * (
            1 + math.cos(math.pi * (step - config.lr_warmup_steps) / max(1, config.steps - config.lr_warmup_steps))
        )
    return rate


def make_optimizer(config: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, fused where torch has it, or bitsandbytes' with its state in 8 bits.

    Raises:
        BackendMissing: bitsandbytes is not installed.
    """
    if config.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise BackendMissing(
                "optimizer adamw8bit needs bitsandbytes", hint="pip install bitsandbytes, or --set optimizer=adamw"
            ) from error
        return AdamW8bit(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


@contextmanager
def plain_attention(trained: Any) -> Iterator[None]:
    """Attention by plain matrix products for the block.

    In bfloat16 on a CPU their backward is up to 5 times as fast as the fused one's. The teacher, which has no backward,
    keeps the fused one: nano, batch 16, two threads of an AMD EPYC, 177 ms a step instead of 185.
    In float32 the fused one is faster for both: 422 against 467 ms on one thread.
    """
    from diffusers.models.attention_processor import AttnProcessor

    if not hasattr(trained, "attn_processors"):
        yield
        return
    before = dict(trained.attn_processors)
    trained.set_attn_processor(AttnProcessor())
    try:
        yield
    finally:
        trained.set_attn_processor(before)


@contextmanager
def tuned_convolutions() -> Iterator[None]:
    """Let cuDNN measure the convolutions of each shape once and use the quickest, for the block: a run has few shapes
    and many steps.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def compiled_blocks(network: nn.Module | None, hooked: Collection[str] = (), **options: Any) -> Iterator[int]:
    """Compile the resnets and transformers of a UNet for the block, and give how many there are.

    They hold nearly all of its work. Compared with the whole network in one piece, they compile in a fraction of the
    time.

    Args:
        hooked: names of modules with forward hooks. torch shares compiled code between modules of one kind without
            looking at hooks, so a block that has such a module inside is not compiled, only what is free of hooks
            within it.
        options: of `torch.compile`.
    """
    blocks = [] if network is None else list(_free_blocks("", network, hooked))
    # All blocks of a kind share one code object, and each width of each level is a compilation of its own: torch would
    # give up after eight.
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({limit: max(getattr(torch._dynamo.config, limit), 8 * len(blocks))}):
        for block in blocks:
            block.forward = torch.compile(block.forward, dynamic=False, **options)
        try:
            yield len(blocks)
        finally:
            for block in blocks:
                del block.forward


def _free_blocks(name: str, module: nn.Module, hooked: Collection[str]) -> Iterator[nn.Module]:
    """The outermost resnets and transformers without a hook inside."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    kinds = (ResnetBlock2D, Transformer2DModel, BasicTransformerBlock)
    if isinstance(module, kinds) and not any(each.startswith(f"{name}.") for each in hooked):
        yield module
        return
    for child_name, child in module.named_children():
        yield from _free_blocks(f"{name}.{child_name}" if name else child_name, child, hooked)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that a SIGINT or SIGTERM is put in instead of ending the process; a second one ends it."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever owns it handles its signals
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
            # type: ignore[call-overload]  # torch documents it, its stubs do not
            network.to(memory_format=torch.channels_last)
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


def _agree(accelerator: Accelerator, mine: bool, step: int) -> bool:
    """Whether any process has been told to stop.

    Several processes ask one another every `_ASK_EVERY` steps, as each time they wait for the device.
    """
    if accelerator.num_processes == 1:
        return mine
    if step % _ASK_EVERY:
        return False
    return float(accelerator.reduce(torch.tensor(float(mine), device=accelerator.device), "sum")) > 0


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
