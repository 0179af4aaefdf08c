"""Our training loop beside a loop in the public scripts' manner, on one machine in one run: samples a second and peak memory.

    python bench/peers/training.py -o bench/results/training-peers-nano.json                       nano, on whatever is here
    python bench/peers/training.py --model sd15 --batch 16 -o bench/results/training-peers-sd15.json   random SD1.5 weights, for a GPU

The manner of the public distillation scripts (BK-SDM, distill-sd): the teacher in fp32, the VAE's encoder and the text encoder at every
step, pictures decoded in the loop, fused attention as torch picks it. Both loops compute the same losses (bk-tiny, weights 1, 1, 1) on the
same pictures with the same optimizer and the student under the same autocast. Each measurement is a process of its own, in turn
A B A B; ours has its cache made before the clock starts, and the time that took is given apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sdcompress_bench.environment import environment
from sdcompress_engines.resources import peak_rss_mib

from sdcompress.data.cache import LatentCache, build_cache, to_pixels
from sdcompress.data.sources import open_source
from sdcompress.prune.plan import make_plan
from sdcompress.prune.student import build_student
from sdcompress.teacher import LoadedPipeline, load_teacher
from sdcompress.train.batches import Batches
from sdcompress.train.config import DistillConfig
from sdcompress.train.distill import frozen_copy
from sdcompress.train.features import collect_features
from sdcompress.train.loop import choose_precision, train
from sdcompress.train.objectives import BlockDistillation
from sdcompress.train.runs import training_scheduler

WARMUP = 4
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def sd15() -> LoadedPipeline:
    """SD1.5's shapes with random weights: how long a step takes does not depend on them."""
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    configs = Path(__file__).parents[2] / "sdcompress/assets/configs/sd1"
    torch.manual_seed(0)
    parts = {name: json.loads((configs / name / "config.json").read_text()) for name in ("unet", "vae", "text_encoder")}
    pipeline = StableDiffusionPipeline(
        unet=UNet2DConditionModel.from_config(parts["unet"]),
        vae=AutoencoderKL.from_config(parts["vae"]),
        text_encoder=CLIPTextModel(CLIPTextConfig(**{k: v for k, v in parts["text_encoder"].items() if k != "architectures"})).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(configs / "tokenizer"),
        scheduler=DDPMScheduler.from_pretrained(configs / "scheduler"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return LoadedPipeline("sd15-random", pipeline, "random", Path("."))


def load(model: str) -> LoadedPipeline:
    return sd15() if model == "sd15" else load_teacher(model)


class Clock:
    """Seconds of each named part; on a GPU the device is waited for at both ends."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        wait()
        began = time.perf_counter()
        yield
        wait()
        self.spent[name] += time.perf_counter() - began


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def public_manner(args: argparse.Namespace) -> dict[str, Any]:
    """Samples a second of the loop as the public scripts have it, with where the time goes."""
    loaded = load(args.model)
    pipeline: Any = loaded.pipeline
    plan = make_plan(pipeline.unet.config, "bk-tiny")
    student = build_student(pipeline.unet, plan).float().to(DEVICE).train()
    teacher = pipeline.unet.requires_grad_(False).to(DEVICE)
    for part in (pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).to(DEVICE)
    precision = choose_precision(args.precision, DEVICE.type)
    autocast = torch.autocast(DEVICE.type, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.bfloat16), enabled=precision != "fp32")
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5, foreach=True)
    alphas = pipeline.scheduler.alphas_cumprod.to(DEVICE)
    records = [record for _, record in zip(range(args.batch * 8), open_source(args.data), strict=False)]
    pairs, clock, started = plan.feature_pairs(), Clock(), 0.0
    for step in range(WARMUP + args.steps):
        if step == WARMUP:
            clock = Clock()
            wait()
            started = time.perf_counter()
        with clock.part("pictures"):
            chosen = [records[(step * args.batch + i) % len(records)] for i in range(args.batch)]
            pixels = torch.stack([to_pixels(record.picture(), args.size) for record in chosen]).to(DEVICE)
            ids = pipeline.tokenizer([record.caption for record in chosen], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids.to(DEVICE)
        with torch.no_grad():
            with clock.part("vae"):
                latents = pipeline.vae.encode(pixels).latent_dist.sample() * pipeline.vae.config.scaling_factor
            with clock.part("text encoder"):
                text = pipeline.text_encoder(ids)[0]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(1000, (args.batch,), device=DEVICE)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        with collect_features(student, [s for s, _ in pairs]) as ours, collect_features(teacher, [t for _, t in pairs]) as theirs:
            with clock.part("teacher"), torch.no_grad():
                expected = teacher(noisy, timesteps, text).sample
            with clock.part("student forward"), autocast:
                predicted = student(noisy, timesteps, text).sample
                loss = F.mse_loss(predicted.float(), noise) + F.mse_loss(predicted.float(), expected) + sum(F.mse_loss(ours[s].float(), theirs[t].float()) for s, t in pairs)
        with clock.part("student backward"):
            loss.backward()
        with clock.part("optimizer"):
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    wait()
    seconds = time.perf_counter() - started
    return {"samples_per_s": args.steps * args.batch / seconds, "seconds": {name: value / args.steps for name, value in clock.spent.items()}}


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """Samples a second of `train` from a cache."""
    loaded = load(args.model)
    pipeline: Any = loaded.pipeline
    plan = make_plan(pipeline.unet.config, "bk-tiny")
    began = time.perf_counter()
    folder = args.work / "cache"
    cache = LatentCache.open(folder) if folder.is_dir() else build_cache(open_source(args.data), loaded, folder, args.size)
    result: dict[str, Any] = {"cache_s": time.perf_counter() - began, "cached_pictures": len(cache)}

    frozen = frozen_copy(pipeline.unet, args.precision)
    scheduler, scaling_factor = training_scheduler(pipeline.scheduler), pipeline.vae.config.scaling_factor
    student = build_student(pipeline.unet, plan).float()
    del pipeline, loaded

    def run(steps: int) -> Any:
        config = DistillConfig(steps=steps, batch_size=args.batch, checkpoint_every=10**6, log_every=10**6, precision=args.precision, compile=args.compile)
        objective = BlockDistillation(frozen, plan.feature_pairs(), {"task_loss": 1.0, "output_kd_loss": 1.0, "feature_kd_loss": 1.0})
        output = args.work / f"run-{time.time_ns()}"
        output.mkdir()
        return train(student, objective, Batches(cache, scheduler, scaling_factor, config), config, output, {}, frozen=frozen)

    run(WARMUP)
    found = run(args.steps)
    return result | {"samples_per_s": found.samples_per_s, "waited_s_per_step": found.waited_s / args.steps}


def child(args: argparse.Namespace) -> None:
    found = (ours if args.child == "ours" else public_manner)(args)
    found["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20 if CUDA else peak_rss_mib()
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--model", default="nano", help="nano, sd15 (random weights) or a pipeline")
    parser.add_argument("--data", default="nano")
    parser.add_argument("--size", type=int, default=None, help="side of the pictures in pixels; default: 128 for nano, else 512")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", action="store_true", help="torch.compile in our loop")
    parser.add_argument("--child", choices=["ours", "public"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.size = args.size or (128 if args.model == "nano" else 512)
    if args.child:
        child(args)
        return
    rounds: dict[str, list[dict[str, Any]]] = {"public manner": [], "ours": []}
    with tempfile.TemporaryDirectory() as work:
        for _ in range(args.rounds):
            for name, kind in (("public manner", "public"), ("ours", "ours")):
                command = [sys.executable, *sys.argv, "--child", kind, "--work", work]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr)
                rounds[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(name, rounds[name][-1], file=sys.stderr, flush=True)
    speed = {name: statistics.median(r["samples_per_s"] for r in found) for name, found in rounds.items()}
    settings = {k: getattr(args, k) for k in ("model", "size", "batch", "steps", "rounds", "compile")} | {"precision": choose_precision(args.precision, DEVICE.type), "plan": "bk-tiny"}
    result = {"settings": settings, "samples_per_s": speed, "speedup": speed["ours"] / speed["public manner"], "rounds": rounds, "environment": environment()}
    print(table(result))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1, default=str) + "\n")


def table(result: dict[str, Any]) -> str:
    lines = ["| loop | samples/s | peak memory |", "|---|---|---|"]
    for name, found in result["rounds"].items():
        values = [r["samples_per_s"] for r in found]
        lines.append(f"| {name} | {result['samples_per_s'][name]:.1f} ({min(values):.1f} to {max(values):.1f}) | {statistics.median(r['peak_memory_mib'] for r in found):,.0f} MiB |")
    last = result["rounds"]["public manner"][-1]["seconds"]
    share = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in sorted(last.items(), key=lambda item: -item[1]))
    return "\n".join([*lines, "", f"{result['speedup']:.2f} times as fast; a step in the public manner: {share}"])


if __name__ == "__main__":
    main()
