"""How long does a model take to load, with all its checks, and how long did it take in another version?

    python bench/studies/loading.py -o bench/results/loading.json --work build/loading
    python bench/studies/loading.py --against ../sdcompress-0.1 -o bench/results/loading.json --work build/loading

Models: nano, a folder of SD1.5's full size in fp32 and in fp16 with random weights, and exported graphs of nano and of
the fp16 folder, opened with ONNX Runtime. Every load is a process of its own, which has imported the libraries before
its clock starts. The versions take turns, in another order each round. The first load of a model, which reads it from
the disk, is not counted, but a check that is remembered is paid in it: `first_s` is that load with an empty cache
folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from sdcompress_bench.environment import environment

from sdcompress.models.random import random_pipeline

ROOT = Path(__file__).parents[2]
LOAD = """
import sys, time
import diffusers, transformers, torch, onnxruntime
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
from sdcompress.backends.assemble import open_pipeline
model, backend = sys.argv[1:]
start = time.perf_counter()
open_pipeline(model, backend)
print(time.perf_counter() - start)
"""


NAMES = ("nano", "SD1.5 fp32", "SD1.5 fp16", "nano, graphs", "SD1.5 fp16, graphs")


def make_models(work: Path, names: Collection[str]) -> dict[str, tuple[str, str]]:
    """Write the models that are missing. Returns name → (path or name of the model, backend)."""
    folders = {"SD1.5 fp32": work / "sd15-fp32", "SD1.5 fp16": work / "sd15-fp16"}
    if not any("SD1.5" in name for name in names):
        folders = {}
    for name, folder in folders.items():
        if not (folder / "model_index.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            random_pipeline("sd1", dtype=torch.float16 if "fp16" in name else torch.float32).save_pretrained(folder)
    graphs = {"nano": work / "nano-onnx", "SD1.5 fp16": work / "sd15-fp16-onnx"}
    for name, graph in graphs.items():
        if f"{name}, graphs" in names and not (graph / "sdcompress.json").is_file():
            model = "nano" if name == "nano" else str(folders[name])
            precision = [] if name == "nano" else ["--precision", "fp16"]
            command = [sys.executable, "-P", "-m", "sdcompress", "export", model, *precision, "-o", str(graph)]
            subprocess.run(command, check=True, env=variables(ROOT, work / "cache"))
    models = {"nano": ("nano", "torch")} | {name: (str(folder), "torch") for name, folder in folders.items()}
    models |= {f"{name}, graphs": (str(graph), "onnxruntime") for name, graph in graphs.items()}
    return {name: models[name] for name in NAMES if name in names}


def variables(checkout: Path, cache: Path) -> dict[str, str]:
    """Returns the environment of a process that imports a checkout and uses a cache folder."""
    paths = [checkout, checkout / "engines", checkout / "bench"]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "SDCOMPRESS_CACHE": str(cache)}


def load_s(checkout: Path, model: tuple[str, str], cache: Path) -> float:
    """Returns the seconds of one load in a process of its own."""
    command = [sys.executable, "-P", "-c", LOAD, *model]
    ended = subprocess.run(command, check=True, env=variables(checkout, cache), stdout=subprocess.PIPE, text=True)
    return float(ended.stdout.split()[-1])


def measure(model: tuple[str, str], checkouts: dict[str, Path], work: Path, rounds: int) -> dict[str, Any]:
    """Returns version → `first_s`, `median_s` and `samples_s`."""
    caches = {name: work / f"cache-{name}" for name in checkouts}
    for cache in caches.values():
        shutil.rmtree(cache, ignore_errors=True)
    first = {name: load_s(checkout, model, caches[name]) for name, checkout in checkouts.items()}
    samples: dict[str, list[float]] = {name: [] for name in checkouts}
    for number in range(rounds):
        names = list(checkouts) if number % 2 else list(reversed(checkouts))
        for name in names:
            samples[name].append(load_s(checkouts[name], model, caches[name]))
    return {
        name: {"first_s": first[name], "median_s": statistics.median(values), "samples_s": values}
        for name, values in samples.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="a checkout of another version")
    parser.add_argument("--work", type=Path, required=True, help="folder for the models, 15 GB; kept for the next run")
    parser.add_argument("--only", action="append", choices=NAMES, help="of the models; repeat for more")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    checkouts = {"this": ROOT} | ({"other": args.against.resolve()} if args.against else {})
    rows = {}
    for name, model in make_models(args.work.resolve(), args.only or NAMES).items():
        rows[name] = measure(model, checkouts, args.work, args.rounds)
        times = ", ".join(
            f"{version} {row['median_s']:.2f} s (first {row['first_s']:.2f})" for version, row in rows[name].items()
        )
        print(f"{name:<20} {times}", flush=True)
    content = {"environment": environment(), "rounds": args.rounds, "models": rows}
    args.output.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
