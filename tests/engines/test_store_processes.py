"""Several processes share one store, and killed ones leave nothing that looks like an engine."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from sdcompress_engines.builder import build_engine
from sdcompress_engines.engine_files import read_engine
from sdcompress_engines.engine_key import EngineKey
from sdcompress_engines.flavour import (
    TENSORRT_RTX,
    platform_name,
)
from sdcompress_engines.profiles import Profile
from sdcompress_engines.store import EngineStore

from .stored_engines import KEY, PAYLOAD, builder, needs_rtx

WORKER = """
import json, sys, time
from pathlib import Path
from sdcompress_engines.progress import Reporter
from sdcompress_engines.engine_key import EngineKey
from sdcompress_engines.store import EngineStore

root, notes, seconds, key = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), EngineKey(**json.loads(sys.argv[4]))
gate = Path(sys.argv[5]) if len(sys.argv) > 5 else None  # the build ends when this file is there

class Say(Reporter):
    def show_line(self, text):
        print(text, flush=True)

def build(folder):
    with notes.open("a") as file:
        file.write("began\\n")
    with (folder / "unet.engine").open("wb") as file:
        for part in range(64):
            file.write(bytes(range(256)))
            file.flush()
            time.sleep(seconds / 64)
    while gate and not gate.exists():
        time.sleep(0.01)
    return {"vae_scale": 8}, {}

print("ready", flush=True)
print("hit" if EngineStore(root).get_or_build(key, build, Say())[1] else "built", flush=True)
"""


def start(
    store: EngineStore,
    notes: Path,
    seconds: float,
    key: EngineKey = KEY,
    gate: Path | None = None,
    out: Any = subprocess.PIPE,
) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        WORKER,
        str(store.root),
        str(notes),
        str(seconds),
        json.dumps(asdict(key)),
        *([str(gate)] if gate else []),
    ]
    return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_processes_that_want_one_engine_build_it_once(store: EngineStore, tmp_path: Path) -> None:
    outs = [tmp_path / f"{number}.txt" for number in range(3)]
    workers = []
    for out in outs:
        with out.open("w") as file:
            workers.append(start(store, tmp_path / "notes", 0, gate=tmp_path / "go", out=file))
    wait_for(lambda: sum("waiting for another process" in out.read_text() for out in outs) == 2)
    (tmp_path / "go").touch()
    assert [worker.wait(timeout=60) for worker in workers] == [0, 0, 0], [out.read_text() for out in outs]
    assert sorted(out.read_text().splitlines()[-1] for out in outs) == ["built", "hit", "hit"]
    assert (tmp_path / "notes").read_text() == "began\n"
    assert store.find(KEY) is not None


def test_a_running_build_is_left_alone(store: EngineStore, tmp_path: Path) -> None:
    worker = start(store, tmp_path / "notes", 0, gate=tmp_path / "go")
    wait_for(lambda: (tmp_path / "notes").is_file())
    (partial,) = store.root.glob(".*.partial")
    assert store.verify().swept == ()
    assert store.prune(all=True) == []
    assert partial.is_dir()
    (tmp_path / "go").touch()
    assert worker.communicate(timeout=60)[0].splitlines()[-1] == "built"
    assert store.verify().clean


def test_a_build_killed_at_any_moment_leaves_a_store_that_verifies_clean(store: EngineStore, tmp_path: Path) -> None:
    moments = random.Random(4)
    swept = 0
    for number in range(10):
        key = replace(KEY, options={"number": number})
        worker = start(store, tmp_path / "notes", 0.3, key)
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0, 0.4))
        worker.kill()
        worker.communicate()
        verdict = store.verify()
        swept += len(verdict.swept)
        assert verdict.clean, verdict
        assert [path.name for path in store.root.iterdir() if path.name.startswith(".")] == []
        entry, _ = store.get_or_build(key, builder())
        assert entry.path.read_bytes() == PAYLOAD
    assert swept >= 3, "too few of the moments were within a build"
    assert len(store.entries()) == 10
    assert store.verify().clean


def test_the_next_build_of_a_key_clears_what_the_killed_one_left(store: EngineStore, tmp_path: Path) -> None:
    worker = start(store, tmp_path / "notes", 30)
    wait_for(lambda: (tmp_path / "notes").is_file())
    worker.kill()
    worker.communicate()
    assert len(list(store.root.glob(".*.partial"))) == 1
    assert not store.get_or_build(KEY, builder())[1]
    assert list(store.root.glob(".*.partial")) == []


def real_key() -> EngineKey:
    card = torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 9)
    ranges = ((1, 8), (2, 8), (4, 8))
    return replace(
        KEY,
        version=TENSORRT_RTX.version,
        platform=platform_name(),
        compute_capabilities=(card,),
        profiles=({"left": ranges, "right": ranges},),
        options={},
    )


def write_graph(path: Path) -> Path:
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", 8]) for name in ("left", "right", "total")
    ]
    graph = helper.make_graph([helper.make_node("Add", ["left", "right"], ["total"])], "sum", ports[:2], ports[2:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def real_builder(graph: Path, key: EngineKey) -> Callable[[Path], tuple[dict[str, Any], dict[str, Any]]]:
    def build(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        built = build_engine(
            graph, folder / "unet.engine", Profile(key.profiles[0]), TENSORRT_RTX, key.compute_capabilities
        )
        return {
            "version": built.version,
            "compute_capabilities": [list(card) for card in built.compute_capabilities],
        }, {"unet": {"seconds": built.seconds}}

    return build


@needs_rtx
def test_a_real_engine_is_built_once(store: EngineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path / "cache"))
    key = real_key()
    build = real_builder(write_graph(tmp_path / "sum.onnx"), key)
    first, hit = store.get_or_build(key, build)
    assert not hit
    again, hit = store.get_or_build(key, build)
    assert hit
    assert again == first
    assert read_engine(again.path)[0] == store.link_or_copy(again, tmp_path / "out").read_bytes()
    assert first.bytes > 1000
    assert store.verify().clean


REAL_WORKER = """
import json, sys
from pathlib import Path
from sdcompress_engines.builder import build_engine
from sdcompress_engines.flavour import TENSORRT_RTX
from sdcompress_engines.profiles import Profile
from sdcompress_engines.engine_key import EngineKey
from sdcompress_engines.store import EngineStore

key = EngineKey(**json.loads(sys.argv[3]))

def build(folder):
    print("building", flush=True)
    build_engine(sys.argv[2], folder / "unet.engine", Profile(key.profiles[0]), TENSORRT_RTX, key.compute_capabilities)
    return {}, {}

EngineStore(sys.argv[1]).get_or_build(key, build)
"""


@needs_rtx
@pytest.mark.slow
def test_a_real_build_killed_leaves_a_clean_store_and_its_own_child_writes_nothing_more(
    store: EngineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path / "cache"))
    key, graph, moments = real_key(), write_graph(tmp_path / "sum.onnx"), random.Random(5)
    for _ in range(3):
        worker = subprocess.Popen(
            [sys.executable, "-c", REAL_WORKER, str(store.root), str(graph), json.dumps(asdict(key))],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert worker.stdout is not None
        assert worker.stdout.readline() == "building\n"
        time.sleep(moments.uniform(0, 3))
        worker.kill()
        worker.communicate()
        assert store.verify().clean
        entry, _ = store.get_or_build(key, real_builder(graph, key))
        time.sleep(1)  # the killed one's child, which works on alone until it next wants to say something
        assert [path.name for path in store.root.iterdir() if path.name.startswith(".")] == []
        assert store.find(key) == entry
        store.prune(all=True)
