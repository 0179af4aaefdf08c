"""Is anything lost where a command is killed? Commands are killed at random moments, resumed, and compared.

    python bench/studies/kills.py --kills 200 -o bench/results/kills.jsonl --work build/kills
    python bench/studies/kills.py --kills 200 -o bench/results/kills.jsonl --work build/kills --resume

Commands on nano with the smallest settings: a training, a cache, a set of pictures, an export, an engine (TensorRT for
RTX builds without a GPU), an install into the tree of a host, and the chain. Each is measured once without
interruption. A round kills it by SIGKILL or SIGTERM at a random fraction of that time, starts it again, kills it
once more, and lets it end. After each kill, what carries the name of a finished artifact must be whole; at the end the
files and their content must be those of the uninterrupted command, with nothing beside them. Then two processes
write one output: one result must remain, whole, and a process that fails must say why in one line.

A row of the result is a round; rows are written as they are made, and `--resume` goes on after them. POSIX only.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdcompress_bench import interrupted
from sdcompress_bench.environment import environment

ROOT = Path(__file__).parents[2]
PICTURES, KILLS_A_ROUND, CHAIN_KILLS_A_ROUND = 12, 2, 3
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
VOLATILE = ("created", "seconds", "waited_s", "samples_per_s", "resumed_from", "command", "files", "build_seconds")
"""Keys of JSON files that name a time, or the hash or size of a file with one."""
GOES_ON = ("checkpoints", "metrics.jsonl")


@dataclass(frozen=True)
class Case:
    """A command that is killed.

    Attributes:
        name: of the command.
        share: of all kills.
        command: the arguments, of the case's folder.
        again: what is added where the output exists.
        finished: the artifact's folder within the case's folder: by its name it is finished.
        compared: patterns of the files in the case's folder that must be equal.
        checks: commands that must end without a fault after a kill, of the case's folder.
        kills: in a round.
    """

    name: str
    share: float
    command: Callable[[Path], list[str]]
    finished: str
    compared: tuple[str, ...]
    again: tuple[str, ...] = ()
    checks: tuple[Callable[[Path], list[str]], ...] = ()
    kills: int = KILLS_A_ROUND


def make_cases(inputs: Path) -> dict[str, Case]:
    """Returns the cases, by name.

    Args:
        inputs: the folder of `make_inputs`.
    """
    pictures, cache, engine = str(inputs / "pictures"), str(inputs / "cache"), str(inputs / "engine")
    distill = ["distill", "nano", "--data", pictures, "--cache", cache, "--steps", "8", "--batch-size", "2"]
    distill += ["--checkpoint-every", "2", "--precision", "fp32", "--set", "log_every=1", "--set", "ema_decay=0.9"]
    drawn = ["data", "generate", "nano", "--prompts", str(inputs / "prompts.txt"), "-n", "8", "--batch-size", "2"]
    drawn += ["--steps", "2", "--size", "64", "--guidance", "1", "--format", "png"]
    graphs = ["export", "nano", "--component", "text_encoder", "--component", "vae_decoder"]
    engines = ["export", "nano", "--component", "text_encoder", "--trt", "--flavour", "tensorrt-rtx"]
    engines += ["--compute-capability", "8.6", "--profile", "batch=1:1:2,height=128,width=128"]
    chain = ["run", "nano", "--data", pictures, "--steps", "2", "--quick"]

    def verify(folder: Path) -> list[str]:
        return ["engines", "verify", "--store", str(folder / "store" / "engines")]

    def status(folder: Path) -> list[str]:
        return ["status", "webui", str(folder / "host")]

    cases = (
        Case("distill", 0.24, lambda f: [*distill, "-o", str(f / "out")], "out/pipeline",
             ("out/pipeline/**/*", "out/metrics.jsonl", "out/plan.json"), ("--resume",)),
        Case("data cache", 0.22, lambda f: ["data", "cache", pictures, "nano", "-o", str(f / "out")], "out",
             ("out/**/*",)),
        Case("data generate", 0.18, lambda f: [*drawn, "-o", str(f / "out")], "out", ("out/**/*",)),
        Case("export", 0.12, lambda f: [*graphs, "-o", str(f / "out")], "out", ("out/**/*",)),
        Case("engine build", 0.1, lambda f: [*engines, "-o", str(f / "out")], "out/engine",
             ("out/onnx/**/*", "out/engine/**/*.json"), checks=(verify,)),
        Case("install", 0.1, lambda f: ["install", "webui", str(f / "host"), engine], "host/models/sdcompress",
             ("host/**/*",), checks=(status,)),
        Case("run", 0.04, lambda f: [*chain, "-o", str(f / "out")], "out/report",
             ("out/*/pipeline/**/*.safetensors", "out/*/onnx*/*.onnx", "out/cache/*.safetensors"),
             kills=CHAIN_KILLS_A_ROUND),
    )  # fmt: skip
    return {case.name: case for case in cases}
