"""An engine is built once and found again. A failed build leaves nothing, and pruning removes only what it should."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sdcompress_engines.errors import (
    ArtifactError,
    EngineError,
    EngineMismatch,
    StorageError,
    UsageError,
)
from sdcompress_engines.flavour import (
    TENSORRT_RTX,
    platform_name,
)
from sdcompress_engines.manifest import (
    MANIFEST_NAME,
)
from sdcompress_engines.store import EngineStore
from sdcompress_engines.store_entries import StoredEngine

from .stored_engines import KEY, PAYLOAD, Notes, builder, needs_rtx, refuse


def test_a_second_build_is_a_hit_and_builds_nothing(store: EngineStore) -> None:
    first, _ = store.get_or_build(KEY, builder())
    second, hit = store.get_or_build(KEY, refuse)
    assert hit
    assert second == first
    assert store.find(KEY) == first
    assert store.find(replace(KEY, precision="fp32")) is None
    assert first.path.read_bytes() == PAYLOAD
    assert first.bytes == len(PAYLOAD)
    assert [entry.digest for entry in store.entries()] == [KEY.digest]
    assert store.verify().clean


def stop(folder: Path) -> Any:
    (folder / "unet.engine").write_bytes(PAYLOAD)
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda folder: ({}, {}), EngineError),
        (builder(config={"version": "1.6.0.1"}), EngineMismatch),
        (builder(config={"profiles": {}}), ArtifactError),
        (stop, KeyboardInterrupt),
    ],
    ids=["no file", "another engine", "no engine", "stopped"],
)
def test_a_failed_build_leaves_nothing_and_frees_the_key(
    store: EngineStore, build: Any, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        store.get_or_build(KEY, build)
    assert store.entries() == []
    assert [path.name for path in store.root.iterdir()] == ["locks"]
    assert not store.get_or_build(KEY, builder())[1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry.path.write_bytes(PAYLOAD[:-1] + b"x"),
        lambda entry: entry.path.unlink(),
        lambda entry: (entry.folder / MANIFEST_NAME).write_text("{"),
    ],
)
def test_a_damaged_entry_is_reported_and_built_again(
    store: EngineStore, damage: Callable[[StoredEngine], object]
) -> None:
    entry, _ = store.get_or_build(KEY, builder())
    damage(entry)
    assert store.find(KEY) is None
    notes = Notes()
    again, hit = store.get_or_build(KEY, builder(), notes)
    assert not hit
    assert "damaged" in notes.said[0]
    assert again.path.read_bytes() == PAYLOAD
    assert store.verify().clean


def test_an_engine_goes_into_an_output_folder_and_outlives_the_store(store: EngineStore, tmp_path: Path) -> None:
    entry, _ = store.get_or_build(KEY, builder())
    target = store.link_or_copy(entry, tmp_path / "out")
    assert target == tmp_path / "out/unet.engine"
    assert target.samefile(entry.path)
    assert store.link_or_copy(entry, tmp_path / "out").read_bytes() == PAYLOAD
    (gone,) = store.prune(all=True)
    assert gone.bytes < len(PAYLOAD)  # the file lives on in the output
    assert target.read_bytes() == PAYLOAD
    with pytest.raises(ArtifactError, match="removed in the meantime"):
        store.link_or_copy(entry, tmp_path / "out")


def test_a_copy_where_there_are_no_links(store: EngineStore, tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system")
    entry, _ = store.get_or_build(KEY, builder())
    folder = shared / f"sdcompress-{tmp_path.name}-{time.time_ns()}"
    try:
        target = store.link_or_copy(entry, folder)
        assert target.read_bytes() == PAYLOAD
        assert not target.samefile(entry.path)
    finally:
        shutil.rmtree(folder)


def test_a_store_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for root in (tmp_path / "file", tmp_path / "file/deeper"):
        with pytest.raises(StorageError, match="SDCOMPRESS_CACHE"):
            EngineStore(root).get_or_build(KEY, refuse)
    with pytest.raises(StorageError):
        EngineStore(tmp_path / "file").entries()
    store = EngineStore(tmp_path / "store")
    entry, _ = store.get_or_build(KEY, builder())
    shutil.rmtree(store.root / "locks")
    (store.root / "locks").write_text("in the way")
    assert store.get_or_build(KEY, refuse)[1]  # what is there needs no lock
    with pytest.raises(StorageError):
        store.prune(all=True)
    assert entry.path.is_file()


def test_pruning_removes_what_its_conditions_select_and_no_more(store: EngineStore) -> None:
    keys = [replace(KEY, options={"number": number}) for number in range(4)]
    entries = [store.get_or_build(key, builder())[0] for key in keys]
    week = time.time() - 7 * 86400
    for entry in entries[:2]:
        os.utime(entry.folder / MANIFEST_NAME, (week, week))
    store.get_or_build(keys[0], refuse)  # asked for again: young
    entries[3].path.write_bytes(b"cut")
    assert [p.folder.name for p in store.prune(older_than_days=3, dry_run=True)] == [keys[1].digest]
    assert len(store.entries()) == 4
    (gone,) = store.prune(older_than_days=3)
    assert gone.folder.name == keys[1].digest
    assert gone.bytes > len(PAYLOAD)
    assert gone.reason == "not used for 7 days"
    assert {p.folder.name for p in store.prune(unusable=True)} == {keys[3].digest}
    assert {p.folder.name for p in store.prune(keys=[keys[0].digest])} == {keys[0].digest}
    with pytest.raises(UsageError, match="no engine"):
        store.prune(keys=["0" * 20])
    assert [p.folder.name for p in store.prune(all=True)] == [keys[2].digest]
    assert store.entries() == []
    assert store.prune(all=True) == []


@needs_rtx
def test_engines_for_elsewhere_are_unusable_and_those_that_only_lack_a_gpu_are_not(store: EngineStore) -> None:
    here = replace(KEY, version=TENSORRT_RTX.version, platform=platform_name(), compute_capabilities=())
    for key in (here, replace(here, version="1.0.0.1"), replace(here, platform="plan9-mips")):
        store.get_or_build(key, builder())
    assert len(store.prune(unusable=True)) == 2
    assert store.find(here) is not None


def test_the_store_needs_nothing_but_the_standard_library() -> None:
    code = (
        "import sys\nclass Block:\n    def find_spec(self, name, path=None, target=None):\n        if"
        " name.split('.')[0] in ('torch', 'numpy', 'onnx', 'polygraphy', 'tensorrt', 'tensorrt_rtx', 'diffusers',"
        " 'pydantic', 'click'): raise ImportError(name)\nsys.meta_path.insert(0, Block())\nimport"
        " sdcompress_engines.store,"
        " sdcompress_engines.flavour\nsdcompress_engines.store.EngineStore('nowhere').entries()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
