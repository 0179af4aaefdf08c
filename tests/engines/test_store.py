"""An engine is built once and found again, whole, whoever is killed or altered in between; one that cannot load here is
refused by name.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from sdcompress_engines import flavour
from sdcompress_engines.builder import build_engine
from sdcompress_engines.errors import (
    ArtifactError,
    BackendMissing,
    EngineError,
    EngineMismatch,
    SdCompressError,
    StorageError,
    UsageError,
)
from sdcompress_engines.flavour import (
    TENSORRT_RTX,
    binding,
    check_fits_here,
    check_model,
    obstacle,
    platform_name,
    why_not_here,
)
from sdcompress_engines.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    faults,
    read_manifest,
    save_manifest,
    write_manifest,
)
from sdcompress_engines.profiles import Profile
from sdcompress_engines.progress import Reporter
from sdcompress_engines.engine_files import engine_faults, read_engine
from sdcompress_engines.engine_key import EngineKey
from sdcompress_engines.store import EngineStore
from sdcompress_engines.store_entries import StoredEngine

needs_rtx = pytest.mark.skipif(TENSORRT_RTX.missing() is not None, reason="tensorrt-rtx is not installed")
PAYLOAD = bytes(range(256)) * 64
KEY = EngineKey(
    model="a" * 64,
    component="unet",
    precision="fp16",
    signature="diffusers",
    flavour="tensorrt-rtx",
    version="1.7.1.116",
    compute_capabilities=((8, 9),),
    platform="linux-x86_64",
    profiles=({"sample": ((1, 4, 32, 32), (2, 4, 64, 64), (8, 4, 96, 96))},),
    options={"optimization_level": 3, "timing_cache": True},
)


class Notes(Reporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def builder(
    payload: bytes = PAYLOAD, config: Mapping[str, Any] | None = None
) -> Callable[[Path], tuple[dict[str, Any], dict[str, Any]]]:
    def build(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        (folder / "unet.engine").write_bytes(payload)
        return {"vae_scale": 8, **(config or {})}, {"unet": {"seconds": 1.5}}

    return build


def refuse(folder: Path) -> Any:
    raise AssertionError("built again")


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "store")


# -- keys


def test_a_key_is_the_same_from_python_and_from_the_manifest(store: EngineStore) -> None:
    entry, hit = store.get_or_build(KEY, builder())
    assert not hit
    assert entry.digest == KEY.digest
    assert EngineKey.of(entry.manifest.config, "unet").digest == KEY.digest
    assert entry.manifest.config["keys"] == {"unet": KEY.digest}
    assert entry.manifest.config["model"] == {"unet": "a" * 64}
    assert entry.manifest.config["vae_scale"] == 8
    assert entry.manifest.figures == {"unet": {"seconds": 1.5}}


@pytest.mark.parametrize(
    "change",
    [
        {"model": "b" * 64},
        {"component": "vae_decoder"},
        {"precision": "bf16"},
        {"signature": "webui"},
        {"flavour": "tensorrt"},
        {"version": "1.7.2.1"},
        {"compute_capabilities": ((8, 9), (12, 0))},
        {"platform": "linux-aarch64"},
        {"profiles": KEY.profiles * 2},
        {"profiles": ({"sample": ((1, 4, 32, 32), (2, 4, 64, 64), (8, 4, 96, 97))},)},
        {"options": {"optimization_level": 4, "timing_cache": True}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_that_decides_an_engine_changes_its_key(change: dict[str, Any]) -> None:
    assert replace(KEY, **change).digest != KEY.digest


def test_what_does_not_bind_an_engine_is_not_in_its_key() -> None:
    assert replace(KEY, platform="windows-amd64").digest == KEY.digest  # an RTX engine goes over to another system
    plain = replace(KEY, flavour="tensorrt", version="10.14.1.48")
    assert replace(plain, platform="windows-amd64").digest != plain.digest
    assert replace(plain, version="10.14.2.1").digest != plain.digest
    forward = replace(plain, options={"version_compatible": True})
    assert replace(forward, version="10.14.2.1").digest == forward.digest
    assert replace(forward, version="10.15.0.1").digest != forward.digest
    ampere = replace(plain, options={"hardware_compatible": "ampere_plus"})
    assert replace(ampere, compute_capabilities=((12, 0),)).digest == ampere.digest
    same = replace(plain, options={"hardware_compatible": "same_compute_capability"})
    assert replace(same, compute_capabilities=((12, 0),)).digest != same.digest
    two = replace(KEY, compute_capabilities=((8, 9), (12, 0)))
    assert replace(two, compute_capabilities=((12, 0), (8, 9))).digest == two.digest


# -- building and finding


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
def test_a_damaged_entry_is_built_again_and_said(store: EngineStore, damage: Callable[[StoredEngine], object]) -> None:
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
    target = store.adopt(entry, tmp_path / "out")
    assert target == tmp_path / "out/unet.engine"
    assert target.samefile(entry.path)
    assert store.adopt(entry, tmp_path / "out").read_bytes() == PAYLOAD
    (gone,) = store.prune(all=True)
    assert gone.bytes < len(PAYLOAD)  # the file lives on in the output
    assert target.read_bytes() == PAYLOAD
    with pytest.raises(ArtifactError, match="removed in the meantime"):
        store.adopt(entry, tmp_path / "out")


def test_a_copy_where_there_are_no_links(store: EngineStore, tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system")
    entry, _ = store.get_or_build(KEY, builder())
    folder = shared / f"sdcompress-{tmp_path.name}-{time.time_ns()}"
    try:
        target = store.adopt(entry, folder)
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


# -- several processes, and killed ones

WORKER = """
import json, sys, time
from pathlib import Path
from sdcompress_engines.progress import Reporter
from sdcompress_engines.engine_key import EngineKey
from sdcompress_engines.store import EngineStore

root, notes, seconds, key = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), EngineKey(**json.loads(sys.argv[4]))
gate = Path(sys.argv[5]) if len(sys.argv) > 5 else None  # the build ends when this file is there

class Say(Reporter):
    def say(self, text):
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


# -- damage

VALUES: list[Any] = [None, -1, 0.5, "", "x", [], {}, [[]], float("inf"), 10**400, "9" * 50]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(leaf for key, entry in items for leaf in leaves(entry, (*path, key)))]


def changed(raw: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(raw) if isinstance(raw, dict) else list(raw)
    copy[path[0]] = changed(raw[path[0]], path[1:], value)
    return copy


def mutate(entry: StoredEngine, dice: random.Random) -> str:
    """Change one thing of an entry for the worse; says what."""
    manifest = entry.folder / MANIFEST_NAME
    kind = dice.choice(["truncate", "flip", "grow", "delete", "edit", "edit and unseal", "edit and seal again"])
    if not kind.startswith("edit"):
        file = dice.choice([entry.path, manifest])
        data = bytearray(file.read_bytes())
        at = dice.randrange(len(data))
        if kind == "delete":
            file.unlink()
        elif kind == "truncate":
            file.write_bytes(data[:at])
        elif kind == "grow":
            file.write_bytes(data[:at] + bytes([dice.randrange(256)]) * dice.randint(1, 9) + data[at:])
        else:
            data[at] ^= 1 << dice.randrange(8)
            file.write_bytes(data)
        return f"{kind} {file.name} at {at}"
    raw = json.loads(manifest.read_text())
    if kind == "edit and seal again":  # only what the key holds: the rest is nobody's word against another's
        raw = {name: value for name, value in raw.items() if name in ("kind", "config", "files")}
        raw["config"].pop("vae_scale")
        path, value = dice.choice([path for path in leaves(raw["config"]) if path]), dice.choice(VALUES)
        config = changed(raw["config"], path, value)
        sound = read_manifest(entry.folder)
        assert sound is not None
        save_manifest(entry.folder, replace(sound, config=config))
        return f"{kind} {path} {value!r:.20}"
    path, value = dice.choice([path for path in leaves(raw) if path]), dice.choice(VALUES)
    raw = changed(raw, path, value)
    if kind == "edit and unseal":
        raw.pop("seal", None)
    manifest.write_text(json.dumps(raw))
    return f"{kind} {path} {value!r:.20}"


def test_a_hundred_mutations_each_end_in_our_error_or_a_reported_fault(store: EngineStore, tmp_path: Path) -> None:
    dice = random.Random(2305)
    entry, _ = store.get_or_build(KEY, builder())
    sound = json.loads((entry.folder / MANIFEST_NAME).read_text())
    refused = 0
    for _ in range(100):
        told = mutate(entry, dice)
        same = (
            entry.path.is_file()
            and entry.path.read_bytes() == PAYLOAD
            and loaded(entry.folder / MANIFEST_NAME) == sound
        )
        looked = store.entries()
        assert len(looked) == 1, told
        for call in (
            lambda: read_engine(entry.path),
            lambda: engine_faults(entry.folder),
            lambda: faults(entry.folder),
            lambda: obstacle(read_manifest(entry.folder).config),
        ):  # type: ignore[union-attr]
            try:
                call()
            except SdCompressError:
                refused += 1
            except AttributeError:
                assert not (entry.folder / MANIFEST_NAME).exists(), told  # `read_manifest` says None, for no manifest
        assert store.verify().clean == same, told
        assert (store.find(KEY) is not None) == same, told
        again, hit = store.get_or_build(KEY, builder())
        assert hit == same, told
        assert read_engine(again.path)[0] == PAYLOAD
        assert store.verify().clean
    assert refused > 100


def loaded(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def test_an_engine_is_read_only_when_it_is_what_its_manifest_says(store: EngineStore, tmp_path: Path) -> None:
    entry, _ = store.get_or_build(KEY, builder())
    data, manifest = read_engine(entry.path)
    assert data == PAYLOAD
    assert manifest.config["flavour"] == "tensorrt-rtx"
    entry.path.write_bytes(PAYLOAD[:-5])
    with pytest.raises(
        ArtifactError, match=r"truncated: it has 16,379 bytes; expected 16,384 bytes.*sdcompress export MODEL --trt"
    ):
        read_engine(entry.path)
    entry.path.write_bytes(b"x" + PAYLOAD[1:])
    with pytest.raises(ArtifactError, match="altered"):
        read_engine(entry.path)
    with pytest.raises(ArtifactError, match=r"no sdcompress\.json"):
        read_engine(Path(shutil.copy(entry.path, tmp_path / "unet.engine")))
    with pytest.raises(ArtifactError, match="does not name this file"):
        read_engine(Path(shutil.copy(entry.path, entry.folder / "vae.engine")))
    with pytest.raises(UsageError, match="no such file"):
        read_engine(tmp_path / "none.engine")
    raw = json.loads((entry.folder / MANIFEST_NAME).read_text())
    raw["config"]["version"] = "1.8.0.0"
    (entry.folder / MANIFEST_NAME).write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match="edited"):
        read_engine(entry.path)


def test_an_entry_in_the_place_of_another_and_a_stranger_are_reported(store: EngineStore) -> None:
    entry, _ = store.get_or_build(KEY, builder())
    other = replace(KEY, precision="fp32").digest
    shutil.copytree(entry.folder, store.root / other)
    (store.root / "notes").mkdir()
    found = {finding.folder.name: finding.faults for finding in store.verify().findings}
    assert found[KEY.digest] == ()
    assert KEY.digest in found[other][0]
    assert found["notes"] == ("is no engine of this store",)
    store.prune(all=True)
    assert (store.root / "notes").is_dir()  # what is not ours is not removed


# -- pruning


def test_pruning_takes_what_it_is_told_and_no_more(store: EngineStore) -> None:
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


# -- manifests


def test_a_manifest_is_sealed_and_an_edit_shows(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"w")
    write_manifest(
        tmp_path,
        "student",
        config={"steps": 3, "by": {2: "two", 10: "ten"}},
        figures={"loss": float("nan"), "shape": (1, 2)},
    )
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert len(manifest.seal) == 64
    assert faults(tmp_path) == []
    path = tmp_path / MANIFEST_NAME
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text), sort_keys=True))  # another order, the same words
    assert read_manifest(tmp_path) is not None
    path.write_text(text.replace('"steps": 3', '"steps": 4'))
    with pytest.raises(ArtifactError, match="edited"):
        read_manifest(tmp_path)
    path.write_text(text.replace(manifest.seal, manifest.seal[::-1]))
    with pytest.raises(ArtifactError, match="edited"):
        read_manifest(tmp_path)


def test_manifests_of_before_the_seal_are_read_but_engines_need_one(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"w")
    for kind in ("student", "engine"):
        raw = asdict(write_manifest(tmp_path, kind))
        del raw["seal"]
        (tmp_path / MANIFEST_NAME).write_text(json.dumps(raw))
        if kind == "student":
            assert read_manifest(tmp_path) == Manifest(
                **raw | {"files": {"weights": FileEntry(**raw["files"]["weights"])}}
            )
        else:
            with pytest.raises(ArtifactError, match="no seal"):
                read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        "{}",
        "[" * 100_000,
        '{"schema": 1, "kind": "x", "files": {"a": {"sha256": 1, "bytes": "2"}}}',
        '{"schema": 1, "kind": "x", "files": {}, "config": []}',
    ],
)
def test_a_broken_manifest_is_our_error(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(ArtifactError):
        read_manifest(tmp_path)


# -- whether an engine loads here


def config_for(**changes: Any) -> dict[str, Any]:
    version = TENSORRT_RTX.version if TENSORRT_RTX.missing() is None else "1.0"
    return replace(KEY, **{"version": version, "platform": platform_name(), **changes}).config()


def with_card(patch: pytest.MonkeyPatch, card: tuple[int, int]) -> None:
    """A card that this machine lacks, as far as torch tells of it."""
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: card)
    patch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some Card")


@needs_rtx
def test_version_card_platform_and_model_are_four_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch, (12, 0))
    messages = []
    for config in (config_for(version="1.0.0.21"), config_for(), config_for(platform="plan9-mips")):
        with pytest.raises(EngineMismatch) as caught:
            check_fits_here(config, "unet.engine")
        messages.append(str(caught.value))
    with pytest.raises(EngineMismatch) as caught:
        check_model(config_for(), "unet", "b" * 64, "unet.engine")
    messages.append(str(caught.value))
    version, card, system, model = messages
    assert "1.0.0.21" in version
    assert TENSORRT_RTX.version in version
    assert "8.9, and Some Card has 12.0" in card
    assert "--compute-capability 12.0" in card
    assert "plan9-mips" in system
    assert platform_name() in system
    assert "aaaaaaaaaaaa" in model
    assert "bbbbbbbbbbbb" in model
    assert all(
        message.startswith("unet.engine: ") and "expected" in message and "sdcompress export MODEL --trt" in message
        for message in messages
    )
    check_model(config_for(), "unet", "a" * 64, "unet.engine")
    with_card(monkeypatch, (8, 9))
    check_fits_here(config_for(), "unet.engine")
    assert why_not_here(config_for()) is None
    assert why_not_here(config_for(version="1.0.0.21")) is not None


@needs_rtx
def test_the_cards_an_engine_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    several, default = config_for(compute_capabilities=((8, 6), (12, 0))), config_for(compute_capabilities=())
    for card, fits in (
        ((7, 5), (False, False)),
        ((8, 6), (True, True)),
        ((8, 9), (False, True)),
        ((12, 0), (True, True)),
        ((12, 1), (False, True)),
    ):
        with_card(monkeypatch, card)
        assert (obstacle(several) is None, obstacle(default) is None) == fits, card


@needs_rtx
@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what a machine without a GPU says")
def test_no_gpu_is_said_only_of_an_engine_that_would_load_with_one() -> None:
    with pytest.raises(BackendMissing, match="NVIDIA GPU"):
        check_fits_here(config_for(), "unet.engine")
    with pytest.raises(EngineMismatch, match=r"1\.0\.0\.21"):
        check_fits_here(config_for(version="1.0.0.21"), "unet.engine")


@pytest.mark.gpu
@needs_rtx
def test_on_a_real_card_only_engines_for_it_fit() -> None:
    card = torch.cuda.get_device_capability()
    check_fits_here(config_for(compute_capabilities=(card,)), "unet.engine")
    with pytest.raises(EngineMismatch, match=r"3\.5"):
        check_fits_here(config_for(compute_capabilities=((3, 5),)), "unet.engine")


def test_a_flavour_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendMissing, match=r"sdcompress\[trt\]"):
        check_fits_here(config_for(flavour="tensorrt", version="10.14.1"), "unet.engine")
    with pytest.raises(EngineMismatch, match="tensorrt or tensorrt-rtx"):
        check_fits_here(config_for() | {"flavour": "aitemplate"}, "unet.engine")


def test_version_compatible_engines_go_to_later_versions_only() -> None:
    fits = flavour._version_fits
    assert fits("10.14.1.48", "10.14.1.48", False)
    assert not fits("10.14.1.48", "10.14.1.49", False)
    assert fits("10.14.1.48", "10.15.0.1", True)
    assert fits("10.14.1.48", "11.0.0.1", True)
    assert fits("8.6.1", "10.0.0.1", True)
    assert not fits("8.6.1", "11.0.0.1", True)
    assert not fits("10.15.0.1", "10.14.1.48", True)
    assert not fits("11.0.0.1", "10.14.1.48", True)
    assert not fits("10.14.1.48", "ten", True)


@pytest.mark.parametrize(
    "change",
    [
        {"flavour": None},
        {"version": 3},
        {"compute_capabilities": "89"},
        {"compute_capabilities": [[8, 9, 1]]},
        {"platform": ""},
        {"options": 5},
        {"options": {}, "flavour": "tensorrt", "compute_capabilities": []},
    ],
)
def test_a_config_that_does_not_say_what_it_is_for_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="does not say what it was built for"):
        binding(config_for() | change)
    assert why_not_here(config_for() | change) is not None
    with pytest.raises(ArtifactError, match=r"^unet\.engine"):
        check_fits_here(config_for() | change, "unet.engine")


# -- for real


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
    assert read_engine(again.path)[0] == store.adopt(again, tmp_path / "out").read_bytes()
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
