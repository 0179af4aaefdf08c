"""Does memory stay flat over thousands of calls? `generate` and the WebUI's UNet, over changing shapes and LoRAs.

    python bench/studies/soak.py -o bench/results/soak.json --work build/soak
    python bench/studies/soak.py -o soak.json --work build/soak --calls 200 --only "generate, torch"

Subjects, each in a process of its own, all on nano: `generate` in PyTorch and in ONNX Runtime, and the extension's
`HostedUNet` on an ONNX graph. Batches, sizes and prompts or token lengths are drawn anew for each call. In PyTorch
every second call has a LoRA, which is taken out again; the hosted UNet gets one in its torch fallback, and sizes that
its graph refuses. After every hundredth of the calls, and a garbage collection, the resident memory is read. The first
fifth is warm-up: every shape has been seen then. The median of the last tenth must be within 2% of that of the first
tenth after warm-up; the exit code is 3 if it is not.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from sdcompress_bench import isolated
from sdcompress_bench.environment import environment

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "plugins" / "sd_webui_sdcompress"
LIMIT, READINGS, WARM_UP, TENTH = 0.02, 100, 0.2, 0.1
BATCHES, SIDES_PX, TOKENS = (1, 2, 3), (64, 128, 192), (77, 154)
WORDS = ("a flat icon of a cat", "a 3d render of a red apple on a table", "a cat", "an outline drawing of a tree " * 6)
RANK = 4
LONGEST_S = 3 * 3600.0


def make_lora(unet: Any, seed: int) -> dict[tuple[str, str], Any]:
    """Returns a LoRA with random weights for every attention's query of a UNet."""
    from sdcompress.lora.adapters import LowRank

    draw = torch.Generator().manual_seed(seed)
    return {
        ("unet", name): LowRank(
            0.02 * torch.randn(RANK, module.in_features, generator=draw),
            0.02 * torch.randn(module.out_features, RANK, generator=draw),
            float(RANK),
        )
        for name, module in unet.named_modules()
        if name.endswith("to_q")
    }


def prepare_generate(backend: str, folder: Path) -> Callable[[random.Random, int], None]:
    """Returns one call of `generate` on a backend, of (draw, number of the call).

    Args:
        backend: `torch` or `onnxruntime`.
        folder: for the graphs.
    """
    from sdcompress.backends.assemble import open_pipeline
    from sdcompress.lora.fuse import fuse_lora
    from sdcompress.sampling import generate

    pipeline = open_pipeline("nano", backend, export("diffusers", folder) if backend == "onnxruntime" else None)

    def call(draw: random.Random, number: int) -> None:
        count = draw.choice(BATCHES)
        prompts = [draw.choice(WORDS) for _ in range(count)]
        lora = make_lora(pipeline.unet, number) if backend == "torch" and number % 2 else {}
        with torch.no_grad():
            fuse_lora(pipeline, lora)
            generate(pipeline, prompts, seeds=range(count), steps=draw.choice((1, 2)), size_px=draw.choice(SIDES_PX))
            fuse_lora(pipeline, lora, -1.0)

    return call


def export(host: str, folder: Path) -> Path:
    """Returns the folder of nano's graphs for a host, written first if it does not exist."""
    from sdcompress.export.onnx import export_onnx
    from sdcompress.models.load import load_pipeline

    target = folder / f"onnx-{host}"
    if not target.is_dir():
        export_onnx(load_pipeline("nano").pipeline, target, host=host, name="nano")
    return target


def prepare_hosted(folder: Path) -> Callable[[random.Random, int], None]:
    """Returns one call of a `HostedUNet` on a graph that takes sizes up to 128 px, of (draw, number of the call).

    Args:
        folder: for the graph and the weights beside it.
    """
    sys.path[:0] = [str(ROOT), str(PLUGIN)]
    from sdcompress_webui.host import Change, Settings
    from sdcompress_webui.menu import Model
    from sdcompress_webui.unet import HostedUNet

    from sdcompress.models.load import load_pipeline
    from tests.plugins.webui_cases import PlainHost, add_weights, ranges, read_only_artifact

    graphs, unet = export("webui", folder), load_pipeline("nano").pipeline.unet
    add_weights(graphs, unet)
    width, host = unet.config.cross_attention_dim, PlainHost()
    # An ONNX graph takes every shape; with an engine's limits the larger ones go to torch, as in a WebUI.
    limited = {
        name: tuple((*shape[:-1], width) if name != "sample" and len(shape) == 3 else shape for shape in shapes)
        for name, shapes in ranges((1, 2, 3), (64, 128, 128), (77, 77, 154)).items()
    }
    artifact = replace(read_only_artifact(graphs.parent), profiles=(limited,))
    hosted = HostedUNet(Model("nano", (artifact,)), host, lambda: Settings("torch"))

    def deltas(layer: str, weight: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return (0.01 * torch.randn_like(weight) if layer.endswith("to_q") else None), None

    def call(draw: random.Random, number: int) -> None:
        host.asked = [Change("a LoRA", "bake it in", deltas, ("lora", number))] if number % 2 else []
        count, side, tokens = draw.choice(BATCHES), draw.choice(SIDES_PX) // 8, draw.choice(TOKENS)
        x, context = torch.randn(count, 4, side, side), torch.randn(count, tokens, width)
        output = hosted.forward(x, torch.full((count,), 501.0), context)
        if not torch.isfinite(output).all():
            raise RuntimeError(f"call {number}: the output is not finite")

    return call


SUBJECTS: dict[str, Callable[[Path], Callable[[random.Random, int], None]]] = {
    "generate, torch": lambda folder: prepare_generate("torch", folder),
    "generate, onnxruntime": lambda folder: prepare_generate("onnxruntime", folder),
    "HostedUNet": prepare_hosted,
}


def soak(argument: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the resident memory over the calls of a subject. It runs in a process of its own.

    Args:
        argument: `subject`, `calls`, `seed` and `folder`, for what is exported.
    """
    Path(argument["folder"]).mkdir(parents=True, exist_ok=True)
    call, draw = SUBJECTS[argument["subject"]](Path(argument["folder"])), random.Random(argument["seed"])
    process, every = psutil.Process(), max(1, argument["calls"] // READINGS)
    memory_mib, started = [], time.monotonic()
    for number in range(argument["calls"]):
        call(draw, number)
        if (number + 1) % every == 0:
            gc.collect()
            memory_mib.append(round(process.memory_info().rss / 2**20, 2))
    return {"calls": argument["calls"], "seconds": round(time.monotonic() - started, 1), "memory_mib": memory_mib}


def judge(outcome: dict[str, Any]) -> dict[str, Any]:
    """Returns the medians of the first tenth after warm-up and of the last, their change, and whether it is flat."""
    readings = outcome["memory_mib"]
    warm, tenth = int(len(readings) * WARM_UP), max(1, round(len(readings) * TENTH))
    first, last = statistics.median(readings[warm : warm + tenth]), statistics.median(readings[-tenth:])
    change = last / first - 1
    return {"first_mib": first, "last_mib": last, "change": round(change, 4), "flat": abs(change) <= LIMIT}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/soak"))
    parser.add_argument("--calls", type=int, default=2000, help="of each subject")
    parser.add_argument("--only", action="append", choices=SUBJECTS, help="a subject; repeat for more")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    subjects: dict[str, Any] = {}
    for subject in options.only or SUBJECTS:
        argument = {"subject": subject, "calls": options.calls, "seed": options.seed, "folder": str(options.work)}
        outcome = isolated.call(soak, argument, LONGEST_S)
        if "failed" in outcome:
            raise SystemExit(f"{subject}: {outcome['failed']}")
        subjects[subject] = judge(outcome) | outcome
        figures = subjects[subject]
        span = f"{figures['first_mib']:.0f} → {figures['last_mib']:.0f} MiB ({figures['change']:+.1%})"
        print(f"{subject}: {figures['calls']} calls in {figures['seconds']:.0f} s, {span}", flush=True)
        result = {"limit": LIMIT, "seed": options.seed, "subjects": subjects, "environment": environment()}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    flat = all(figures["flat"] for figures in subjects.values())
    print(f"memory is {'' if flat else 'not '}flat within {LIMIT:.0%}")
    return 0 if flat else 3


if __name__ == "__main__":
    sys.exit(main())
