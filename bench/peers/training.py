"""Our training loop beside a loop in the public scripts' manner, on one machine in one run: samples a second, memory.

    python bench/peers/training.py -o bench/results/training-peers-nano.json
    python bench/peers/training.py --model sd15 --precision bf16 -o bench/results/training-peers-sd15.json

The first command measures nano, in fp32 and bf16, with one thread and with two. The second is for a GPU. The manner of
the public distillation scripts (BK-SDM, distill-sd): the VAE's encoder and the text encoder at every step, pictures
decoded in the loop, fused attention as torch chooses it. The teacher stays in fp32, as distill-sd keeps its weights
(under autocast); BK-SDM casts them. Both loops compute the same losses (bk-tiny, weights 1, 1, 1) on the same pictures
with the same optimizer and the student under the same autocast. Each measurement is a process of its own, in turn A B A
B. Our loop has its cache before the clock starts; building it is timed separately. SD1.5 has random weights, because
they do not change the time. The share of the peak is that of the UNets' own operations in the best matrix product of
this machine.
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sdcompress_bench.environment import environment
from sdcompress_bench.peaks import measure_peaks
from sdcompress_engines.resources import peak_rss_mib

from sdcompress.data.build_cache import build_cache
from sdcompress.data.cache import LatentCache
from sdcompress.data.sources import open_source
from sdcompress.data.views import to_pixels
from sdcompress.models.load import LoadedPipeline, load_pipeline
from sdcompress.models.locate import read_unet_config
from sdcompress.models.random import family_configs, random_pipeline
from sdcompress.prune.cost import unet_cost
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import build_student
from sdcompress.train.batches import Batches
from sdcompress.train.config import DistillConfig
from sdcompress.train.features import collect_features
from sdcompress.train.loop import train
from sdcompress.train.objectives.block_distillation import BlockDistillation
from sdcompress.train.pipelines import make_training_scheduler
from sdcompress.train.precision import copy_frozen, resolve_precision

WARMUP = 4
PLAN = "bk-tiny"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        model: `nano`, `sd15` (random weights) or a pipeline.
        size_px: side of the pictures.
        batch: pictures in a step.
        work: folder of the cache.
        data: what `open_source` takes.
        pictures: at most this many of the data; None is all.
        steps: number of timed steps.
        seconds: the timed steps end after this time; None is no limit.
        precision: of the training.
        threads: of the CPU; None is torch's own choice.
        compile: torch.compile in our loop.
    """

    model: str
    size_px: int
    batch: int
    work: Path
    data: str = "nano"
    pictures: int | None = None
    steps: int = 20
    seconds: float | None = None
    precision: str = "auto"
    threads: int | None = None
    compile: bool = False


def load_teacher(model: str) -> LoadedPipeline:
    """Returns the teacher; `sd15` in fp32 has random weights, created on the device."""
    if model != "sd15":
        return load_pipeline(model)
    return LoadedPipeline("sd15-random", random_pipeline("sd1", device=DEVICE), "random", Path("random"))


class Clock:
    """Adds up the seconds of each named part; on a GPU the device is idle at both ends."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    @contextmanager
    def time_part(self, name: str) -> Iterator[None]:
        wait()
        started = time.perf_counter()
        yield
        wait()
        self.spent[name] += time.perf_counter() - started


def wait() -> None:
    """Wait until the GPU, if there is one, is idle."""
    if CUDA:
        torch.cuda.synchronize()


class PublicLoop:
    """A distillation loop in the manner of the public scripts.

    Args:
        case: what is trained.

    Attributes:
        clock: seconds of each part of the steps.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.clock = case, Clock()
        self.pipeline: Any = load_teacher(case.model).pipeline
        plan = make_plan(self.pipeline.unet.config, PLAN)
        self.pairs = plan.feature_pairs()
        self.student = build_student(self.pipeline.unet, plan).float().to(DEVICE).train()
        self.teacher = self.pipeline.unet.requires_grad_(False).to(DEVICE)
        for part in (self.pipeline.vae, self.pipeline.text_encoder):
            part.requires_grad_(False).to(DEVICE)
        precision = resolve_precision(case.precision, DEVICE.type)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.bfloat16)
        self.autocast = torch.autocast(DEVICE.type, dtype, enabled=precision != "fp32")
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=5e-5, foreach=True)
        self.alphas = make_training_scheduler(self.pipeline.scheduler).alphas_cumprod.to(DEVICE)
        self.records = [record for _, record in zip(range(case.batch * 8), open_source(case.data), strict=False)]

    def step(self, number: int) -> None:
        """Train one step, on the `number`-th batch."""
        latents, text = self._encode(number)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(1000, (self.case.batch,), device=DEVICE)
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        with (
            collect_features(self.student, [student for student, _ in self.pairs]) as student_features,
            collect_features(self.teacher, [teacher for _, teacher in self.pairs]) as teacher_features,
        ):
            with self.clock.time_part("teacher"), torch.no_grad():
                target = self.teacher(noisy, timesteps, text).sample
            with self.clock.time_part("student forward"), self.autocast:
                noise_pred = self.student(noisy, timesteps, text).sample
                loss = F.mse_loss(noise_pred.float(), noise) + F.mse_loss(noise_pred.float(), target)
                loss = loss + sum(
                    F.mse_loss(student_features[student].float(), teacher_features[teacher].float())
                    for student, teacher in self.pairs
                )
        with self.clock.time_part("student backward"):
            loss.backward()
        with self.clock.time_part("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _encode(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the latents and the text embeddings of a batch."""
        batch, pipeline = self.case.batch, self.pipeline
        with self.clock.time_part("pictures"):
            chosen = [self.records[(number * batch + i) % len(self.records)] for i in range(batch)]
            pixels = torch.stack([to_pixels(record.picture(), self.case.size_px) for record in chosen]).to(DEVICE)
            captions = [record.caption for record in chosen]
            options = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
            ids = pipeline.tokenizer(captions, **options).input_ids
        with torch.no_grad():
            with self.clock.time_part("vae"):
                latents = pipeline.vae.encode(pixels).latent_dist.sample() * pipeline.vae.config.scaling_factor
            with self.clock.time_part("text encoder"):
                text = pipeline.text_encoder(ids.to(DEVICE))[0]
        return latents, text


def measure_public(case: Case) -> dict[str, Any]:
    """Returns samples a second of a loop in the public scripts' manner, where its time goes, and the peak memory."""
    use_threads(case)
    loop, started, step = PublicLoop(case), 0.0, 0
    while step < WARMUP + case.steps:
        if step == WARMUP:
            loop.clock = Clock()
            wait()
            started = time.perf_counter()
        if step > WARMUP and case.seconds is not None and time.perf_counter() - started > case.seconds:
            break
        loop.step(step)
        step += 1
    wait()
    timed, seconds = step - WARMUP, time.perf_counter() - started
    return {
        "samples_per_s": timed * case.batch / seconds,
        "steps": timed,
        "seconds": {name: value / timed for name, value in loop.clock.spent.items()},
        "peak_memory_mib": peak_memory_mib(),
    }


def measure_sdcompress(case: Case) -> dict[str, Any]:
    """Returns samples a second of our loop, which trains from a cache, and its peak memory."""
    use_threads(case)
    loaded = load_teacher(case.model)
    pipeline: Any = loaded.pipeline
    plan = make_plan(pipeline.unet.config, PLAN)
    began = time.perf_counter()
    cache = open_cache(case, loaded)
    result: dict[str, Any] = {"cache_s": time.perf_counter() - began, "cached_pictures": len(cache)}
    frozen = copy_frozen(pipeline.unet, case.precision)
    scheduler, scaling_factor = make_training_scheduler(pipeline.scheduler), pipeline.vae.config.scaling_factor
    student = build_student(pipeline.unet, plan).float()
    del pipeline, loaded
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def run(steps: int) -> Any:
        config = DistillConfig(
            steps=steps,
            batch_size=case.batch,
            checkpoint_every=10**6,
            log_every=10**6,
            precision=case.precision,
            compile=case.compile,
        )
        weights = {"task_loss": 1.0, "output_kd_loss": 1.0, "feature_kd_loss": 1.0}
        objective = BlockDistillation(frozen, plan.feature_pairs(), weights)
        output = case.work / f"run-{time.time_ns()}"
        output.mkdir(parents=True)
        return train(
            student, objective, Batches(cache, scheduler, scaling_factor, config), config, output, {}, frozen=frozen
        )

    first = run(WARMUP)  # compiles, chooses kernels
    steps = case.steps
    if case.seconds is not None:
        again = run(2)
        steps = max(2, min(steps, int(case.seconds * again.samples_per_s / case.batch)))
    last = run(steps)
    result |= {"warm_up_s": first.seconds, "steps": steps, "samples_per_s": last.samples_per_s}
    return result | {"waited_s_per_step": last.waited_s / steps, "peak_memory_mib": peak_memory_mib()}


def open_cache(case: Case, loaded: LoadedPipeline) -> LatentCache:
    """Returns the latents of the case's pictures; they are encoded now if there is no cache yet."""
    folder = case.work / "cache"
    if folder.is_dir():
        return LatentCache.open(folder)
    data = case.data
    if case.pictures is not None:
        data = str(case.work / "pictures")
        Path(data).mkdir(parents=True)
        for number, record in zip(range(case.pictures), open_source(case.data), strict=False):
            record.picture().save(Path(data) / f"{number:05}.png")
            (Path(data) / f"{number:05}.txt").write_text(record.caption, encoding="utf-8")
    return build_cache(open_source(data), loaded, folder, case.size_px)


def flops_per_sample(config: Mapping[str, Any]) -> int:
    """Returns the operations of a sample: the teacher forward, the student forward, and twice as many backward.

    Args:
        config: of the teacher's UNet. Attention counts by its matrix products alone; the VAE and the text encoder do
            not count.
    """
    teacher, student = (unet_cost(each)["total"].macs for each in (config, make_plan(config, PLAN).student_config()))
    return 2 * (teacher + 3 * student)


def measure_limit(case: Case) -> dict[str, Any]:
    """Returns the samples a second if a step took only its operations at this machine's best matrix product."""
    use_threads(case)
    precision = resolve_precision(case.precision, DEVICE.type)
    peak = measure_peaks(str(DEVICE), precision).matmul_flops_per_s
    config = family_configs("sd1")["unet"] if case.model == "sd15" else read_unet_config(case.model)
    return {"matmul_tflops": peak / 1e12, "samples_per_s": peak / flops_per_sample(config)}


def use_threads(case: Case) -> None:
    """Set the number of CPU threads of this process, if the case has one."""
    if case.threads:
        torch.set_num_threads(case.threads)


def peak_memory_mib() -> float:
    """Returns the peak memory on the GPU, or of this process."""
    return torch.cuda.max_memory_allocated() / 2**20 if CUDA else peak_rss_mib()


LOOPS = {"public manner": measure_public, "ours": measure_sdcompress}
LIMIT = "limit"
MEASURES = LOOPS | {LIMIT: measure_limit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--model", default="nano", help="nano, sd15 (random weights) or a pipeline")
    parser.add_argument("--data", default="nano")
    size_help = "side of the pictures in pixels; default: 128 for nano, else 512"
    parser.add_argument("--size", type=int, help=size_help)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--threads", nargs="+", type=int, default=None, help="of the CPU; default: 1 2 on a CPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile in our loop")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        values = json.loads(args.child)
        loop, values["work"] = MEASURES[values.pop("loop")], Path(values["work"])
        print(json.dumps(loop(Case(**values))))
        return
    threads = args.threads or ([None] if CUDA else [1, 2])
    size_px = args.size or (128 if args.model == "nano" else 512)
    with tempfile.TemporaryDirectory() as work:
        first = Case(args.model, size_px, args.batch, Path(work), args.data, steps=args.steps, compile=args.compile)
        cases = [
            replace(first, precision=precision, threads=count) for precision in args.precision for count in threads
        ]
        rows = [measure_row(case, args.rounds) for case in cases]
    settings = {"model": args.model, "size": size_px, "batch": args.batch, "steps": args.steps, "rounds": args.rounds}
    settings |= {"compile": args.compile, "plan": PLAN}
    result = {"settings": settings, "rows": rows, "environment": environment()}
    print(format_table(rows))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")


def measure_row(case: Case, rounds: int) -> dict[str, Any]:
    """Returns the results of both loops in one case, run in turn, and of the machine's limit."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in LOOPS}
    for _ in range(rounds):
        for name in LOOPS:
            found[name].append(run_apart(case, name))
            speed = f"{found[name][-1]['samples_per_s']:.1f} samples/s"
            print(case.precision, case.threads, name, speed, file=sys.stderr, flush=True)
    medians = {name: statistics.median(each["samples_per_s"] for each in row) for name, row in found.items()}
    limit = run_apart(case, LIMIT)
    return {
        "precision": resolve_precision(case.precision, DEVICE.type),
        "threads": case.threads,
        "samples_per_s": medians,
        "speedup": medians["ours"] / medians["public manner"],
        "limit": limit,
        "share_of_peak": medians["ours"] / limit["samples_per_s"],
        "rounds": found,
    }


def run_apart(case: Case, measure: str) -> dict[str, Any]:
    """Returns the result of a function of `MEASURES` in a process of its own."""
    argument = json.dumps(asdict(case) | {"loop": measure, "work": str(case.work)})
    command = [sys.executable, __file__, "--child", argument]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def format_table(rows: list[dict[str, Any]]) -> str:
    """Returns a line for each precision and number of threads, and how the last case spends its time."""
    lines = [
        "| precision | threads | public manner, samples/s | ours | times as fast | ours, of peak |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = []
        for name, found in row["rounds"].items():
            values = [each["samples_per_s"] for each in found]
            cells.append(f"{row['samples_per_s'][name]:.1f} ({min(values):.1f} to {max(values):.1f})")
        lines.append(
            f"| {row['precision']} | {row['threads'] or '–'} | {' | '.join(cells)} | {row['speedup']:.2f} |"
            f" {row['share_of_peak']:.0%} |"
        )
    last = rows[-1]["rounds"]["public manner"][-1]["seconds"]
    share = ", ".join(
        f"{name} {1000 * value:.0f} ms" for name, value in sorted(last.items(), key=lambda item: -item[1])
    )
    return "\n".join([*lines, "", f"a step in the public manner: {share}"])


if __name__ == "__main__":
    main()
