"""The cost of building TensorRT engines at full size without a GPU: time and memory of `sdcompress export --trt`.

    python bench/studies/engines.py -o bench/results/engines-cpu.json --work build/engines

Weights are random, because the size and the build time of an engine do not depend on them. Memory is the largest sum of
resident memory over the command and its descendants, sampled ten times a second. On Linux it is the proportional set
size, which counts shared pages once; elsewhere it is the resident size.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from sdcompress_bench.environment import environment
from sdcompress_engines.manifest import read_manifest

from sdcompress.models.random import random_pipeline

CASES = {
    "SD1.5 bk-tiny": ("sd1", "bk-tiny", "sd15-512"),
    "SD1.5 whole": ("sd1", None, "sd15-512"),
    "SD2.1 whole": ("sd2", None, "batch=2,height=768,width=768,tokens=77"),
    "SDXL bk-small": ("sdxl", "bk-small", "sdxl-1024"),
    "SDXL whole": ("sdxl", None, "sdxl-1024"),
}


def memory_mib(pid: int) -> float:
    """Returns the resident memory of a process and its descendants, proportional if the system counts that."""
    total = 0
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.Error):  # it has ended
                memory = process.memory_full_info()
                total += getattr(memory, "pss", memory.rss)
    return total / 2**20


def run(command: list[str], log: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run a command; returns its seconds, exit status and peak memory.

    Args:
        command: what is run.
        log: file of its output.
        environment: its variables.
    """
    peak, done = 0.0, threading.Event()
    started = time.monotonic()
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment) as process,
    ):

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.1):
                peak = max(peak, memory_mib(process.pid))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        process.wait()
        done.set()
        watcher.join()
    return {"seconds": round(time.monotonic() - started, 1), "peak_mib": round(peak), "status": process.returncode}


def measure_case(name: str, work: Path) -> dict[str, Any]:
    """Returns the row of a case: time, memory and sizes of its export, or the last line of a failed one."""
    family, plan, profile = CASES[name]
    model, out, log = work / "model", work / "out", work / "log.txt"
    for folder in (model, out, work / "cache"):
        shutil.rmtree(folder, ignore_errors=True)
    pipeline = random_pipeline(family, plan, dtype=torch.float16)
    pipeline.save_pretrained(model)
    parameters = sum(p.numel() for p in pipeline.unet.parameters())
    del pipeline
    options = ["--trt", "--flavour", "tensorrt-rtx", "--component", "unet", "--profile", profile]
    command = [sys.executable, "-m", "sdcompress", "export", str(model), "-o", str(out), *options]
    figures = run(command, log, os.environ | {"SDCOMPRESS_CACHE": str((work / "cache").absolute())})
    row: dict[str, Any] = {"parameters": parameters, "profile": profile, **figures}
    if figures["status"]:
        return row | {"last_line": log.read_text(encoding="utf-8").strip().splitlines()[-1][:300]}
    graph, engine = read_manifest(out / "onnx"), read_manifest(out / "engine")
    if graph is None or engine is None:
        raise SystemExit(f"{out} has no manifest")
    return row | {
        "onnx_bytes": sum(e.bytes for n, e in graph.files.items() if n.startswith("unet.onnx")),
        "engine_bytes": engine.figures["unet"]["bytes"],
        "build_s": engine.figures["unet"]["seconds"],
        "build_peak_mib": engine.figures["unet"]["peak_mib"],
        "export_s": graph.figures["unet"]["seconds"],
        "parity": graph.figures["unet"]["parity"],
        "flavour": engine.config["flavour"],
        "version": engine.config["version"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--work", type=Path, required=True, help="for the models and engines; emptied before and after each case"
    )
    parser.add_argument("--case", action="append", choices=CASES, help="measure only this case; may be repeated")
    args = parser.parse_args()
    rows: dict[str, Any] = json.loads(args.output.read_text(encoding="utf-8"))["rows"] if args.output.is_file() else {}
    args.work.mkdir(parents=True, exist_ok=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for name in args.case or CASES:
        rows[name] = measure_case(name, args.work)
        text = json.dumps({"rows": rows, "environment": environment()}, indent=1) + "\n"
        args.output.write_text(text, encoding="utf-8")
        shutil.rmtree(args.work / "cache", ignore_errors=True)
        print(format_table({name: rows[name]}).splitlines()[-1], flush=True)
    print(format_table(rows))


def format_table(rows: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    lines = [
        "| UNet | parameters | whole command | peak memory | engine | of it: build | fp16 error (torch's own) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if row["status"]:
            lines.append(
                f"| {name} | {row['parameters'] / 1e6:,.0f} M | failed after {row['seconds']:.0f} s |"
                f" {row['peak_mib'] / 1024:.1f} GiB | {row['last_line']} | | |"
            )
            continue
        parity = row["parity"]
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:,.0f} M | {row['seconds']:.0f} s | {row['peak_mib'] / 1024:.1f} GiB |"
            f" {row['engine_bytes'] / 2**20:,.0f} MiB | {row['build_s']:.0f} s | {parity['relative_l2']:.1e}"
            f" ({parity['torch_relative_l2']:.1e}) |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
