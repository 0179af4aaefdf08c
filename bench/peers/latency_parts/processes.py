"""Runs commands in other processes and reads their answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

LIMIT_S = 1800
SCRIPT = Path(__file__).parents[1] / "latency.py"


def run_child(python: str | Path, case: dict[str, Any], work: Path) -> dict[str, Any]:
    """Returns the answer of `latency.py --child` in a new process, or `{"failed": reason}`.

    Args:
        python: of its environment.
        case: plain values.
        work: folder of the run.
    """
    # Another environment must see nothing of ours. -I would also hide the folder of this script.
    isolated = [] if str(python) == sys.executable else ["-E", "-s"]
    return run_command([str(python), *isolated, str(SCRIPT), "--child", json.dumps(case)], work)


def run_command(command: list[str], work: Path) -> dict[str, Any]:
    """Returns the JSON in the last line that a command prints, or `{"failed": reason}`."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
    }
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=LIMIT_S, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"did not finish in {LIMIT_S} s"}
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return {"failed": f"ended by {name}" + ("; out of memory is the usual cause" if name == "SIGKILL" else "")}
    if done.returncode:
        return {"failed": clean(last_line(done.stderr), work)}
    try:
        return dict(json.loads(last_line(done.stdout)))
    except ValueError:
        return {}


def last_line(text: str) -> str:
    """Returns the last line that is not blank."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it printed nothing")


def clean(text: str, work: Path) -> str:
    """Returns a reason without this machine's paths, at most 200 characters."""
    for path in (work, Path(sys.prefix), Path.home()):
        text = text.replace(f"{path}/", "").replace(str(path), path.name)
    return text[:200]
