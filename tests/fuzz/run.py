"""Fuzzes readers with atheris, which follows the lines that an input reaches.

    python -m tests.fuzz.run --seconds 60                         every target, one process each
    python -m tests.fuzz.run --seconds 60 -o FILE manifest plan   these two; figures as JSON

A finding is written to corpus/TARGET, where it stays as a test.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .samples import CORPUS, SAMPLES

SLOWEST_S = 20
"""Limit of one input, wide enough for a machine with other work."""
MOST_MEMORY_MIB = 4096
LONGEST_INPUT = 20_000
READERS = (
    "sdcompress.data.sources",
    "sdcompress.hosts.record",
    "sdcompress.lora.files",
    "sdcompress.models.describe",
    "sdcompress.models.load",
    "sdcompress.prune.presets",
    "sdcompress.train.recipes",
    "sdcompress_bench.results",
    "sdcompress_bench.suite_file",
    "sdcompress_engines.graph",
    "sdcompress_engines.manifest",
    "sdcompress_engines.runners.aot_package",
)
INSTRUMENTED = ("sdcompress", "sdcompress_engines", "sdcompress_bench", "json", "yaml", "tarfile", "zipfile")


def fuzz_here(target: str, seconds: int, seed: int) -> None:
    """Fuzz one target in this process, which ends with libFuzzer's exit status."""
    import atheris

    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        for module in READERS:
            importlib.import_module(module)
        targets = importlib.import_module("tests.fuzz.targets")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        found, folder = Path(scratch) / "corpus", Path(scratch) / "files"
        found.mkdir()
        folder.mkdir()
        for known in ((CORPUS / target / "sample").read_bytes(), b""):  # late imports are no input's time
            targets.run_target(target, folder, known)
        arguments = [
            f"-max_total_time={seconds}",
            f"-seed={seed}",
            f"-timeout={SLOWEST_S}",
            f"-rss_limit_mb={MOST_MEMORY_MIB}",
            f"-max_len={LONGEST_INPUT}",
            f"-artifact_prefix={CORPUS / target}/",
            "-print_final_stats=1",
        ]
        atheris.Setup(
            [sys.argv[0], *arguments, str(found), str(CORPUS / target)],
            lambda data: targets.run_target(target, folder, data) and None,
        )
        atheris.Fuzz()


def fuzz(target: str, seconds: int = 60, seed: int = 1) -> dict[str, Any]:
    """Fuzz one target in a process of its own.

    Returns:
        `executions`, `seconds`, and `finding`: the last lines of a finding, or an empty text.
    """
    command = [sys.executable, "-m", "tests.fuzz.run", "--here", "--seconds", str(seconds), "--seed", str(seed), target]
    root = CORPUS.parents[2]
    ended = subprocess.run(
        command,
        cwd=root,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))},
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    executions = re.search(r"number_of_executed_units:\s*(\d+)", ended.stdout)
    lines = [line for line in ended.stdout.splitlines() if line.strip()]
    return {
        "target": target,
        "executions": int(executions[1]) if executions else 0,
        "seconds": seconds,
        "finding": "\n".join(lines[-25:]) if ended.returncode else "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"any of {', '.join(SAMPLES)}; default: all")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--here", action="store_true", help="fuzz one target in this process")
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    if args.here:
        fuzz_here(args.targets[0], args.seconds, args.seed)
        return
    rows = []
    for target in args.targets or SAMPLES:
        rows.append(fuzz(target, args.seconds, args.seed))
        print(
            f"{target:<14}{rows[-1]['executions']:>10,} executions  {'FINDING' if rows[-1]['finding'] else ''}",
            flush=True,
        )
        if rows[-1]["finding"]:
            print(rows[-1]["finding"])
    if args.output:
        content = {"machine": platform.processor() or platform.machine(), "seed": args.seed, "targets": rows}
        args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(row["finding"] for row in rows))


if __name__ == "__main__":
    main()
