"""The training loop: one for every objective, on accelerate, resumable, the same for any number of processes."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from sdcompress_engines.errors import TrainingError
from sdcompress_engines.progress import SILENT, Reporter
from torch import nn

from sdcompress.data.cache import LatentCache

from .checkpoint import load_newest, save_checkpoint
from .config import DistillConfig
from .objectives import BlockDistillation, NoisyBatch

Sampler = Callable[[nn.Module, int], None]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: steps done, the last losses, seconds spent in this process, the step it started from."""

    steps: int
    losses: dict[str, float]
    seconds: float
    resumed_from: int


def generator_for(seed: int, kind: str, number: int) -> torch.Generator:
    """A CPU generator of its own for each (seed, kind, number), by hash: torch's takes only the low 32 bits of what it is given."""
    digest = hashlib.blake2b(f"{seed} {kind} {number}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class Batches:
    """Noisy batches from a cache, each a function of (seed, step, position) alone: never of rank, worker or history.

    Args:
        cache: latents and text embeddings.
        scheduler: the teacher's, for the noise schedule and prediction type.
        scaling_factor: the VAE's.
    """

    def __init__(self, cache: LatentCache, scheduler: Any, scaling_factor: float, config: DistillConfig) -> None:
        self.cache, self.config, self.scaling_factor = cache, config, scaling_factor
        self.alphas = torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float32)
        self.prediction_type = scheduler.config.prediction_type
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.cache))
        if epoch != self._epoch:
            generator = generator_for(self.config.seed, "epoch", epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.cache), generator=generator)
        return int(self._order[offset])

    def noisy(self, positions: range, device: torch.device) -> NoisyBatch:
        """The batch for these positions in the stream of samples (position = step × batch size + place in the batch)."""
        rows = [self._sample(position) for position in positions]
        latents, noise, text = (torch.stack(part) for part in list(zip(*rows, strict=True))[:3])
        timesteps = torch.tensor([row[3] for row in rows])
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        sample = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        target = noise if self.prediction_type == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        weight = torch.ones(len(rows))
        if self.config.snr_gamma is not None:
            snr = self.alphas[timesteps] / (1 - self.alphas[timesteps])
            weight = snr.clamp(max=self.config.snr_gamma) / (snr if self.prediction_type == "epsilon" else snr + 1)
        return NoisyBatch(*(t.to(device, non_blocking=True) for t in (sample, timesteps, text, target, weight)))

    def _sample(self, position: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        i = self._index(position)
        generator = generator_for(self.config.seed, "sample", position)
        mean, std = self.cache.mean[i].float(), self.cache.std[i].float()
        latents = (mean + std * torch.randn(mean.shape, generator=generator)) * self.scaling_factor
        noise = torch.randn(mean.shape, generator=generator)
        timestep = int(torch.randint(len(self.alphas), (), generator=generator))
        dropped = float(torch.rand((), generator=generator)) < self.config.caption_dropout
        text = self.cache.text[-1 if dropped else int(self.cache.caption_index[i])].float()
        return latents, noise, text, timestep


def choose_precision(precision: str, device_type: str) -> str:
    """`auto` resolved: bf16 where the device computes in it, else fp32; others as given."""
    if precision != "auto":
        return precision
    if device_type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if device_type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"


def learning_rate(config: DistillConfig, step: int) -> float:
    """The rate of 0-based `step`."""
    rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
    if config.lr_schedule == "cosine" and step >= config.lr_warmup_steps:
        rate *= 0.5 * (1 + math.cos(math.pi * (step - config.lr_warmup_steps) / max(1, config.steps - config.lr_warmup_steps)))
    return rate


def train(student: nn.Module, objective: BlockDistillation, batches: Batches, config: DistillConfig, output: Path, identity: dict[str, Any], *, sampler: Sampler | None = None, report: Reporter = SILENT) -> TrainResult:
    """Train `student` in place to `config.steps`, going on from the newest whole checkpoint under `output` if there is one.

    On return `student` holds the weights to keep: the average where `ema_decay` is set.

    Args:
        identity: what makes this run itself (plan, teacher, data, config); a checkpoint of another identity is refused.
        sampler: called with (the student, step) every `sample_every` steps, on the main process.

    Raises:
        TrainingError: the loss is not finite, or the checkpoint belongs to another run.
    """
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    precision = choose_precision(config.precision, device_type)
    # accelerate keeps the first run's precision for the life of the process and refuses another; each run here has its own.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision, gradient_accumulation_steps=config.gradient_accumulation, cpu=device_type == "cpu")
    micro = config.gradient_accumulation * accelerator.num_processes
    if config.batch_size % micro:
        raise TrainingError(f"batch_size {config.batch_size} does not divide into {accelerator.num_processes} processes x {config.gradient_accumulation} accumulation steps", expected=f"a multiple of {micro}")
    share = config.batch_size // micro
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    state = load_newest(output / "checkpoints")
    start = 0
    average: dict[str, torch.Tensor] | None = None
    if state is not None:
        check_identity(state["identity"], identity, output)
        student.load_state_dict(state["student"])
        start = state["step"]
    student.train()
    wrapped, optimizer = accelerator.prepare(student.to(accelerator.device), optimizer)
    if objective.teacher is not None:
        objective.teacher.to(accelerator.device)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
    if config.ema_decay:
        average = {k: v.detach().to(accelerator.device) for k, v in (state["average"] if state else student.state_dict()).items()}
        average = {k: v.clone() for k, v in average.items()}
    metrics = output / "metrics.jsonl"
    if accelerator.is_main_process:
        keep_lines_up_to(metrics, start)
    last: dict[str, float] = {}
    began = time.monotonic()
    with report.task("distill", config.steps) if accelerator.is_main_process else nullcontext(lambda *a, **k: None) as advance:
        if start:
            advance(start, "resumed")
        for step in range(start, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            totals: dict[str, torch.Tensor] = {}
            for part in range(config.gradient_accumulation):
                first = step * config.batch_size + (part * accelerator.num_processes + accelerator.process_index) * share
                with accelerator.accumulate(wrapped), accelerator.autocast():
                    losses = objective.losses(wrapped, student, batches.noisy(range(first, first + share), accelerator.device))
                    accelerator.backward(losses["loss"])
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                for name, value in losses.items():
                    totals[name] = totals.get(name, 0) + value.detach() / config.gradient_accumulation
            done = step + 1
            if average is not None:
                decay = min(config.ema_decay, done / (10 + done))
                torch._foreach_lerp_(list(average.values()), [v.detach() for v in student.state_dict().values()], 1 - decay)
            if done % config.log_every == 0 or done == config.steps or done == 1:
                last = {name: float(accelerator.reduce(value, "mean")) for name, value in totals.items()}
                if not all(math.isfinite(v) for v in last.values()):
                    raise TrainingError(f"the loss is not finite at step {done}", where=output, hint=f"a smaller --learning-rate or --precision fp32; {_last_good(output)}")
                if accelerator.is_main_process:
                    line = {"step": done, "seconds": round(time.monotonic() - began, 2), "learning_rate": learning_rate(config, step), "grad_norm": float(norm)} | last
                    with metrics.open("a") as file:
                        file.write(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()}) + "\n")
            advance(1, f"loss {last.get('loss', float('nan')):.3f}")
            if accelerator.is_main_process:
                if done % config.checkpoint_every == 0 and done < config.steps:
                    saved = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "identity": json.dumps(identity)}
                    save_checkpoint(output / "checkpoints", done, saved, config.keep_checkpoints)
                if sampler and config.sample_every and (done % config.sample_every == 0 or done == config.steps):
                    with swapped_in(student, average):
                        sampler(student, done)
    accelerator.wait_for_everyone()
    if average is not None:
        student.load_state_dict(average)
    return TrainResult(config.steps, last, time.monotonic() - began, start)


@contextmanager
def swapped_in(student: nn.Module, average: dict[str, torch.Tensor] | None) -> Iterator[None]:
    """The averaged weights in the student for the block, its own again after."""
    if average is None:
        yield
        return
    own = {k: v.clone() for k, v in student.state_dict().items()}
    student.load_state_dict(average)
    try:
        yield
    finally:
        student.load_state_dict(own)


def keep_lines_up_to(metrics: Path, step: int) -> None:
    """Drop the lines a killed run wrote after the checkpoint it is resumed from."""
    if metrics.is_file():
        lines = [line for line in metrics.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
        metrics.write_text("".join(line + "\n" for line in lines))


def check_identity(saved: str, ours: dict[str, Any], output: Path) -> None:
    """Refuse a checkpoint of another run.

    Raises:
        TrainingError: names what differs.
    """
    theirs, mine = json.loads(saved), json.loads(json.dumps(ours))
    differing = [f"{k}: {theirs.get(k)!r:.60} there, {mine.get(k)!r:.60} here" for k in sorted(theirs | mine) if theirs.get(k) != mine.get(k)]
    if differing:
        raise TrainingError("holds the checkpoints of another run: " + "; ".join(differing), where=output, hint="--force to start over, or another -o")


def _last_good(output: Path) -> str:
    from .checkpoint import checkpoints

    found = checkpoints(output / "checkpoints")
    return f"the last good checkpoint is {found[-1].name}" if found else "no checkpoint had been written yet"
