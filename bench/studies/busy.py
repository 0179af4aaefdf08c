"""The cost of waiting threads on a busy machine: UNet steps by how threads wait, alone and beside other work.

    python bench/studies/busy.py -o bench/results/busy-machine.json --work build/busy
    python bench/studies/busy.py -o bench/results/busy-nano.json --models nano

The threads of OpenMP (PyTorch) and of ONNX Runtime spin while they wait for each other. On a busy machine they spin on
a core that the awaited thread needs. Each setting runs in its own process: on a quiet machine, beside a busy loop on
every core, and beside a second copy of itself. Settings take turns; the figure is the median step of all rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sdcompress_bench.environment import environment
from sdcompress_engines.runners import OnnxRuntimeRunner, Runner, TorchRunner

from sdcompress.backends.torch_unet import PositionalUNet
from sdcompress.export.components import random_inputs, signature_of
from sdcompress.export.onnx import export_onnx
from sdcompress.models.load import load_pipeline
from sdcompress.models.random import random_pipeline

MODELS = {"nano": 60, "SD1.5 bk-tiny, 512 px": 2}
"""Model → timed steps of a process."""
BACKENDS: dict[str, dict[str, dict[str, str]]] = {
    "torch": {
        "OpenMP's default": {},
        "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
        "one thread": {"OMP_NUM_THREADS": "1"},
        "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
        "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
    },
    "onnxruntime": {
        "spinning (its default)": {"SPIN": "1"},
        "no spinning": {"SPIN": "0"},
        "one thread": {"OMP_NUM_THREADS": "1"},
    },
}
"""Backend → setting → environment variables of the process; this study itself reads `SPIN`."""
LOADS = ("quiet", "a busy loop on every core", "a second copy of itself")
LIMIT_S = 300.0


def load_unet(model: str) -> Any:
    """Returns the UNet of a model of `MODELS`, in fp32 on the CPU."""
    pipeline = load_pipeline("nano").pipeline if model == "nano" else random_pipeline("sd1", "bk-tiny")
    return pipeline.unet.eval()


def open_unet(model: str, backend: str, work: Path, spin: bool) -> tuple[Runner, dict[str, torch.Tensor]]:
    """Returns the open runner of a model's UNet, and the inputs of one picture with guidance.

    Args:
        model: a key of `MODELS`.
        backend: a key of `BACKENDS`.
        work: folder of the graphs.
        spin: whether ONNX Runtime's threads spin.
    """
    unet = load_unet(model)
    signature = signature_of("unet", unet, "fp32")
    side = int(unet.config.sample_size)
    feeds = random_inputs(signature, unet.config, {"batch": 2, "height": side, "width": side, "tokens": 77}, 501)
    if backend == "torch":
        return TorchRunner(PositionalUNet(unet), signature.inputs, signature.outputs).open(), feeds
    config = {"session.intra_op.allow_spinning": str(int(spin)), "session.inter_op.allow_spinning": str(int(spin))}
    return OnnxRuntimeRunner(graph_path(work, model), config=config).open(), feeds


def graph_path(work: Path, model: str) -> Path:
    return work / model.replace(" ", "-").replace(",", "") / "unet.onnx"


def time_steps(model: str, backend: str, work: Path) -> list[float]:
    """Returns the milliseconds of each step, without the first.

    Args:
        model: a key of `MODELS`.
        backend: a key of `BACKENDS`.
        work: folder of the graphs.
    """
    runner, feeds = open_unet(model, backend, work, os.environ.get("SPIN") == "1")
    times = []
    with runner:
        for _ in range(MODELS[model] + 1):
            started = time.perf_counter()
            runner.infer(feeds)
            times.append(1000 * (time.perf_counter() - started))
            if sum(times) > 1000 * LIMIT_S / 3:
                break
    return times[1:] or times


@contextlib.contextmanager
def load_machine(load: str, command: list[str], environment: dict[str, str]) -> Iterator[None]:
    """Run the other work of a load beside the block.

    Args:
        load: one of `LOADS`.
        command: of the measured process, for its second copy.
        environment: variables of the other work.
    """
    if load == LOADS[0]:
        yield
        return
    beside = command if load == LOADS[2] else [sys.executable, "-c", "while True: pass"]
    count = 1 if load == LOADS[2] else os.cpu_count() or 1
    started = [
        subprocess.Popen(beside, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(count)
    ]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def measure(model: str, backend: str, settings: dict[str, str], load: str, work: Path) -> list[float]:
    """Returns the milliseconds of the steps of one process.

    Args:
        model: a key of `MODELS`.
        backend: a key of `BACKENDS`.
        settings: environment variables.
        load: one of `LOADS`.
        work: folder of the graphs.
    """
    command = [sys.executable, __file__, "--child", model, backend, "--work", str(work)]
    variables = os.environ | settings
    with load_machine(load, command, variables):
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    times: list[float] = json.loads(done.stdout.splitlines()[-1])
    return times


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a row for each model, backend, setting and load, measured in turn."""
    for model in args.models:
        if not graph_path(args.work, model).is_file():
            pipeline: Any = load_pipeline("nano").pipeline if model == "nano" else random_pipeline("sd1", "bk-tiny")
            export_onnx(pipeline, graph_path(args.work, model).parent, components=("unet",))
    cases = [
        (model, backend, setting, load)
        for model in args.models
        for backend, settings in BACKENDS.items()
        for setting in settings
        for load in LOADS
    ]
    times: dict[tuple[str, str, str, str], list[float]] = {case: [] for case in cases}
    for number in range(args.rounds):
        for case in cases if number % 2 == 0 else cases[::-1]:
            model, backend, setting, load = case
            times[case] += measure(model, backend, BACKENDS[backend][setting], load, args.work)
            print(f"{number + 1}/{args.rounds} {', '.join(case)}: {statistics.median(times[case]):.1f} ms", flush=True)
    return [
        {"model": model, "backend": backend, "setting": setting, "load": load, "step_ms": statistics.median(values)}
        | {"steps": len(values)}
        for (model, backend, setting, load), values in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("bench/results/busy-machine.json"))
    parser.add_argument("--work", type=Path, default=Path("build/busy"), help="where graphs are kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "BACKEND"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        model, backend = args.child
        print(json.dumps(time_steps(model, backend, args.work)))
        return
    rows = measure_all(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"rounds": args.rounds, "rows": rows, "environment": environment()}
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
