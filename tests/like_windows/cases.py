"""What the tests of `test_windows.py` run in processes of their own, which find this file beside `sitecustomize.py` on
their path.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(os.environ.get("LIKE_WINDOWS_ROOT") or Path(__file__).parents[2])
SLEEP = "import time; time.sleep(60)"


def double(case: dict[str, Any]) -> dict[str, Any]:
    print("noise on stdout")
    return {"twice": 2 * case["number"]}


def crash(case: dict[str, Any]) -> dict[str, Any]:
    os.write(2, b"boom\n")
    os._exit(3)


def hang(case: dict[str, Any]) -> dict[str, Any]:
    """Start a process that starts another one, and wait for both."""
    code = (
        f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); print(child.pid,"
        " flush=True); child.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as helper:
        assert helper.stdout is not None
        Path(case["file"]).write_text(json.dumps([helper.pid, int(helper.stdout.readline())]))
        time.sleep(60)
    return {}


def call_isolated(folder: str) -> None:
    """Print what `isolated.call` answers to each of the three."""
    from sdcompress_bench.isolated import call

    file = str(Path(folder) / "started.json")
    cases: list[tuple[Any, dict[str, Any], float]] = [
        (double, {"number": 4}, 60),
        (crash, {}, 60),
        (hang, {"file": file}, 8),
    ]
    answers: list[Any] = [call(function, case, limit_s) for function, case, limit_s in cases]
    print(json.dumps([*answers, json.loads(Path(file).read_text())]))


def import_all() -> None:
    """Import every module of the packages, of the plugins that no host is needed for, and the programs in `bench`;
    print how many.
    """
    tops = [(ROOT, "sdcompress"), (ROOT / "engines", "sdcompress_engines"), (ROOT / "bench", "sdcompress_bench")]
    tops += [(ROOT / "plugins" / "sd_webui_sdcompress", "sdcompress_webui"), (ROOT / "plugins", "comfyui_sdcompress")]
    hosts = ("modules", "backend", "gradio", "comfy", "folder_paths", "nodes")
    sys.path[:0] = [str(top) for top, _ in tops]
    sys.path.append(str(ROOT / "bench" / "peers"))  # as Python adds the folder of a program that it runs
    done = skipped = 0
    for top, package in tops:
        for path in sorted((top / package).rglob("*.py")):
            name = ".".join(path.relative_to(top).with_suffix("").parts).removesuffix(".__init__")
            if name == "comfyui_sdcompress":  # its `__init__` registers nodes in the host
                continue
            try:
                importlib.import_module(name)
                done += 1
            except ModuleNotFoundError as error:
                if (error.name or "").partition(".")[0] not in hosts:
                    raise
                skipped += 1
    for path in sorted(
        [
            *(ROOT / "bench").glob("*.py"),
            *(ROOT / "bench" / "studies").glob("*.py"),
            *(ROOT / "bench" / "peers").glob("*.py"),
        ]
    ):
        spec = importlib.util.spec_from_file_location(f"program_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        done += 1
    print(json.dumps({"imported": done, "needs a host": skipped}))


if __name__ == "__main__":
    if sys.argv[1] == "isolated":
        call_isolated(sys.argv[2])
    else:
        import_all()
