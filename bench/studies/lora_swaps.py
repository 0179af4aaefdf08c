"""How fast does a LoRA go into a running UNet, is the result that of the LoRA baked in, and does it leave a trace?

    python bench/studies/lora_swaps.py -o bench/results/lora-swaps-cpu.json --work build/lora-swaps

bk-tiny of SD1.5's size with random weights, and a LoRA of rank 32 over all attention layers of the whole UNet, put into
the student by its plan. Each backend runs in turn:

1. one swap, compared with the same graph exported (or compiled, or loaded) with the LoRA baked in; in half precision,
   where both round differently, both are compared with fp32, and the swap may have twice the error of the other,
2. no LoRA again, compared bit by bit with the call before,
3. swaps in a row between LoRAs that differ, with the memory of the process before and after,
4. the time of a swap to a new LoRA, to none, and, where a backend keeps sessions, back to a kept one.

Then packages of AOTInductor that take LoRAs are timed against those that take none, call by call in turn.

The last line is JSON: backend → median seconds of a swap.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sdcompress_bench.environment import environment
from sdcompress_engines.exactness import FP32_LIMIT, HALF_FACTOR, relative_l2
from sdcompress_engines.files import write_atomically
from sdcompress_engines.runners import Runner, TorchRunner, open_runner

from sdcompress.backends.torch_unet import PositionalUNet
from sdcompress.export.aot import PACKAGE, compile_unet
from sdcompress.export.components import DTYPES, Precision, random_inputs, signature_of
from sdcompress.export.onnx import export_onnx
from sdcompress.lora.apply import apply_loras
from sdcompress.lora.fuse import shapes_of
from sdcompress.lora.model_lora import read_model_lora
from sdcompress.lora.pipeline_loras import ChangedWeights
from sdcompress.models.load import LoadedPipeline
from sdcompress.models.random import family_configs, random_pipeline
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import meta_unet

FAMILY, PLAN, RANK = "sd1", "bk-tiny", 32
SIZES = {"batch": 2, "height": 64, "width": 64, "tokens": 77}
OUTPUT = "out_sample"
PACKAGED: tuple[Precision, ...] = ("bf16", "fp32")


def write_lora_file(path: Path, seed: int = 0) -> Path:
    """Write a LoRA over every attention layer of the whole UNet, in kohya's naming."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in meta_unet(family_configs(FAMILY)["unet"]).named_modules():
        if isinstance(module, torch.nn.Linear) and ".attn" in name:
            prefix = f"lora_unet_{name.replace('.', '_')}"
            up = torch.randn(module.out_features, RANK, generator=generator) / 50
            down = torch.randn(RANK, module.in_features, generator=generator) / 50
            tensors |= {
                f"{prefix}.lora_up.weight": up,
                f"{prefix}.lora_down.weight": down,
                f"{prefix}.alpha": torch.tensor(float(RANK)),
            }
    save_file(tensors, path)
    return path


class Subject:
    """The student, the LoRA, and the backends that run the student.

    Args:
        work: folder for the LoRA, graphs and packages.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.plan = make_plan(family_configs(FAMILY)["unet"], PLAN)
        self.file = write_lora_file(work / "lora.safetensors")
        unet = meta_unet(self.plan.student_config())
        lora = read_model_lora(self.file, {"unet": shapes_of(unet)}, self.plan)
        self.layers = {name: layer for (_, name), layer in lora.layers.items()}
        self.kept_norm = lora.kept_norm

    def pipeline(self, *, baked: bool, precision: Precision = "fp32") -> Any:
        """Returns the student's pipeline, with the LoRA fused into fp32 weights or without."""
        pipeline = random_pipeline(FAMILY, PLAN)
        if baked:
            apply_loras(pipeline, [(self.file, 1.0)], self.plan)
        pipeline.unet = pipeline.unet.to(DTYPES[precision]).eval()
        return pipeline

    def open_torch(self, baked: bool, precision: Precision) -> Runner:
        """Returns a runner of torch in eager mode."""
        unet = self.pipeline(baked=baked, precision=precision).unet
        if precision != "fp32":
            unet.to(memory_format=torch.channels_last)
        wanted = signature_of("unet", unet, precision)
        mode = "eager" if precision == "fp32" else "channels_last"
        return TorchRunner(PositionalUNet(unet), wanted.inputs, wanted.outputs, mode, named=unet).open()

    def open_onnx(self, baked: bool, precision: Precision) -> Runner:
        """Returns a runner of the exported graph on ONNX Runtime."""
        folder = self.work / f"onnx-{precision}-{'baked' if baked else 'plain'}"
        if not folder.is_dir():
            pipeline = self.pipeline(baked=baked)
            export_onnx(pipeline, folder, precision=precision, components=("unet",), plan=self.plan)
        return open_runner(folder / "unet.onnx")

    def open_package(self, baked: bool, precision: Precision, loras: bool = True) -> Runner:
        """Returns a runner of the package that takes LoRAs, or of the one that takes none."""
        folder = self.work / f"aot-{precision}-{'baked' if baked else 'plain' if loras else 'fixed'}"
        if not folder.is_dir():
            pipeline = self.pipeline(baked=baked)
            loaded = LoadedPipeline(PLAN, pipeline, "random", self.work / "none", plan=self.plan)
            compile_unet(loaded, folder, precision=precision, loras=loras)
        return open_runner(folder / PACKAGE)

    def compute_exactly(self, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns what torch computes in fp32 with the LoRA baked in.

        Args:
            feeds: inputs by name, of any dtype.
        """
        with self.open_torch(True, "fp32") as runner:
            return runner.infer({name: value.float() for name, value in feeds.items()})[OUTPUT]

    def changes(self, runner: Runner, factor: float) -> ChangedWeights:
        """Returns the runner's weights with the LoRA at a strength."""
        return ChangedWeights(runner, {name: [(layer, factor)] for name, layer in self.layers.items()})


def measure(subject: Subject, open_backend: Callable[[bool], Runner], swaps: int) -> dict[str, Any]:
    """Returns the figures of one backend.

    Args:
        subject: the student and the LoRA.
        open_backend: returns an open runner, with the LoRA baked in or without.
        swaps: in a row.
    """
    with open_backend(True) as baked:
        feeds = draw_feeds(baked)
        reference = baked.infer(feeds)[OUTPUT]
        is_half = baked.outputs[0].dtype != torch.float32
    exact = subject.compute_exactly(feeds) if is_half else reference
    with open_backend(False) as runner:
        before = runner.infer(feeds)[OUTPUT]
        runner.set_weights(subject.changes(runner, 1.0), key="lora")
        with_lora = runner.infer(feeds)[OUTPUT]
        runner.set_weights({})
        after = runner.infer(feeds)[OUTPUT]
        times, memory = swap_in_turn(subject, runner, swaps)
        calls = [seconds(lambda: runner.infer(feeds)) for _ in range(5)]
    return {
        "relative_l2": relative_l2(with_lora, exact),
        "limit": HALF_FACTOR * relative_l2(reference, exact) if is_half else FP32_LIMIT,
        "relative_l2_of_the_lora": relative_l2(with_lora, before),
        "reset_is_bit_equal": torch.equal(after, before),
        "layers": len(subject.layers),
        "swaps": swaps,
        "set_s": times["set"],
        "reset_s": times["reset"],
        "again_s": times["again"],
        "step_s": calls,
        "resident_mib": memory,
    }


def time_packages(subject: Subject, precision: Precision, rounds: int = 7) -> dict[str, list[float]]:
    """Returns the seconds of calls of the package with fixed weights and of the one that takes LoRAs, in turn.

    Args:
        subject: the student.
        precision: of the packages.
        rounds: calls of each; a first one is not counted.
    """
    kinds = {"fixed_s": False, "exchangeable_s": True}
    runners = {kind: subject.open_package(False, precision, loras) for kind, loras in kinds.items()}
    feeds = draw_feeds(runners["fixed_s"])
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind, runner in runners.items():
            taken = seconds(lambda: runner.infer(feeds))  # noqa: B023 (called at once)
            times[kind] += [taken] if number else []
    return times


def swap_in_turn(subject: Subject, runner: Runner, swaps: int) -> tuple[dict[str, list[float]], list[float]]:
    """Returns the seconds of swaps by kind, and the resident memory after each fifth swap, MiB."""
    times: dict[str, list[float]] = {"set": [], "reset": [], "again": []}
    memory = []
    for number in range(swaps):
        changes, key = subject.changes(runner, 0.5 + number / 100), f"lora {number}"
        times["set"].append(seconds(lambda: runner.set_weights(changes, key)))  # noqa: B023 (called at once)
        times["reset"].append(seconds(lambda: runner.set_weights({})))
        if number < 5:
            times["again"].append(seconds(lambda: runner.set_weights(changes, key)))  # noqa: B023
            runner.set_weights({})
        if number % 5 == 4:
            memory.append(resident_mib())
    return times, memory


def seconds(call: Callable[[], Any]) -> float:
    """Returns the wall time of a call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def resident_mib() -> float:
    """Returns the memory that this process holds now."""
    import psutil

    return float(psutil.Process().memory_info().rss / 2**20)


def draw_feeds(runner: Runner) -> Mapping[str, torch.Tensor]:
    """Returns random inputs of a 512 px picture with guidance."""
    unet = meta_unet(make_plan(family_configs(FAMILY)["unet"], PLAN).student_config())
    feeds = random_inputs(signature_of("unet", unet, "fp32"), unet.config, SIZES, timestep=500)
    return {spec.name: feeds[spec.name].to(spec.dtype) for spec in runner.inputs}


def format_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the figures as Markdown."""
    lines = [
        "| backend | LoRA in | out | in again | a step | relative L2 (limit) | bit-equal after | memory, 5 → last |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        medians = (statistics.median(row[f"{key}_s"]) for key in ("set", "reset", "again", "step"))
        times = " | ".join(f"{value:.2f} s" for value in medians)
        first, last = row["resident_mib"][0], row["resident_mib"][-1]
        is_equal = "yes" if row["reset_is_bit_equal"] else "no"
        error = f"{row['relative_l2']:.1e} ({row['limit']:.1e})"
        lines.append(f"| {name} | {times} | {error} | {is_equal} | {first:,.0f} → {last:,.0f} MiB |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="graphs and packages that are there are used again")
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--backends", default="torch fp32,torch bf16,onnxruntime fp32,aot bf16")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    subject = Subject(args.work)
    openers = {"torch": subject.open_torch, "onnxruntime": subject.open_onnx, "aot": subject.open_package}
    rows: dict[str, Any] = {}
    kept = args.work / "rows.json"
    if kept.is_file():
        rows = json.loads(kept.read_text(encoding="utf-8"))
    for name in args.backends.split(","):
        backend, precision = name.split()
        if name in rows:
            continue

        def open_backend(baked: bool, opener: Any = openers[backend], precision: Any = precision) -> Runner:
            runner: Runner = opener(baked, precision)
            return runner

        rows[name] = measure(subject, open_backend, args.swaps)
        write_atomically(kept, json.dumps(rows, indent=1) + "\n")
        print(format_table({name: rows[name]}), flush=True)
    packages = {precision: time_packages(subject, precision) for precision in PACKAGED}
    result = {
        "model": f"{FAMILY} {PLAN}, random weights",
        "lora": f"rank {RANK}, all attention layers of the whole UNet",
        "kept_norm": subject.kept_norm,
        "rows": rows,
        "packages": packages,
        "environment": environment(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output, json.dumps(result, indent=1, default=str) + "\n")
    write_atomically(args.output.with_suffix(".md"), format_table(rows))
    print(json.dumps({name: round(statistics.median(row["set_s"]), 3) for name, row in rows.items()}))


if __name__ == "__main__":
    main()
