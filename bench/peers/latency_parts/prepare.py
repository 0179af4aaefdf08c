"""Prepares what the setups run from: environments, exported graphs, compiled packages and engines."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from .processes import LIMIT_S, clean, last_line, run_child, run_command
from .setups import PeerSetup, Run, artifact_of


def prepare_own(setup: PeerSetup, folder: Path, device: str) -> None:
    """Export, compile or build for one of our backends, in this process.

    Args:
        setup: what to prepare.
        folder: of the run's model.
        device: `cpu` or `cuda`.
    """
    from sdcompress.export.aot import compile_unet
    from sdcompress.export.onnx import export_onnx
    from sdcompress.export.tensorrt import build_engines
    from sdcompress.models.load import load_pipeline

    precision: Any = setup.precision
    loaded = load_pipeline(folder / "model")
    graphs = folder / f"onnxruntime-{precision}"
    if setup.kind == "aot":
        compile_unet(loaded, artifact_of(setup, folder), device=device, precision=precision)
    elif not graphs.is_dir():
        export_onnx(loaded.pipeline, graphs, precision=precision)
    if setup.kind == "tensorrt":
        profile = () if loaded.pipeline.unet.config.sample_size != 64 else ("sd15-512",)
        build_engines(graphs, artifact_of(setup, folder), profiles=profile)


def environment_of(setup: PeerSetup, work: Path) -> Path:
    """Returns the Python of a setup: ours, or one with its own packages, which are installed first.

    Its torch has the version of ours, so that only the setup differs.

    Raises:
        RuntimeError: the packages do not install.
    """
    if not setup.install:
        return Path(sys.executable)
    wanted = [f"torch=={metadata.version('torch').partition('+')[0]}", *setup.install]
    folder = work / f"venv-{setup.kind}"
    python, ready = folder / "bin" / "python", folder / "installed.json"
    if not ready.is_file() or json.loads(ready.read_text(encoding="utf-8")) != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-I", "-m", "pip", "install", "--quiet", *wanted],
        ):
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=LIMIT_S, check=False
            )
            if done.returncode:
                raise RuntimeError(f"does not install: {last_line(done.stderr)}")
        ready.write_text(json.dumps(wanted), encoding="utf-8")
    return python


def prepare(name: str, setup: PeerSetup, run: Run) -> tuple[str | None, float | None]:
    """Prepare what a setup needs, unless it exists.

    Returns the reason if that failed, else None; and the seconds of exporting, compiling or building, without
    installing, now or in an earlier run.

    Args:
        name: of the setup.
        setup: what to prepare.
        run: what all setups share.
    """
    if run.device not in setup.runs_on:
        return f"runs on {' or '.join(setup.runs_on)} only", None
    try:
        python = environment_of(setup, run.work)
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        return clean(str(error), run.work), None
    target, note = artifact_of(setup, run.folder), run.folder / "prepared.json"
    known: dict[str, float] = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    if target.is_dir():
        return None, known.get(name)
    started = time.monotonic()
    if setup.kind == "optimum":
        outcome = export_with_optimum(python, setup, run)
    else:
        outcome = run_child(python, run.case("prepare", name), run.work)
    if "failed" in outcome:
        return str(outcome["failed"]), None
    known[name] = round(time.monotonic() - started, 1)
    note.write_text(json.dumps(known), encoding="utf-8")
    return None, known[name]


def export_with_optimum(python: Path, setup: PeerSetup, run: Run) -> dict[str, Any]:
    """Export with optimum-onnx's own command line.

    Args:
        python: of its environment.
        setup: what to export.
        run: what all setups share.
    """
    target = artifact_of(setup, run.folder)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    options = ["--dtype", "fp16", "--device", "cuda"] if setup.precision == "fp16" else []
    command = [
        str(python),
        "-I",
        "-m",
        "optimum.commands.optimum_cli",
        "export",
        "onnx",
        "--model",
        str(run.folder / "model"),
        "--task",
        "text-to-image",
        *options,
        str(partial),
    ]
    outcome = run_command(command, run.work)
    if "failed" not in outcome:
        partial.rename(target)
    return outcome
