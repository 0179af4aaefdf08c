"""A damaged or altered entry is reported, never loaded, and built again."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sdcompress_engines.engine_files import engine_faults, read_engine
from sdcompress_engines.errors import (
    ArtifactError,
    SdCompressError,
    UsageError,
)
from sdcompress_engines.flavour import (
    obstacle,
)
from sdcompress_engines.manifest import (
    MANIFEST_NAME,
    faults,
    read_manifest,
    save_manifest,
)
from sdcompress_engines.store import EngineStore
from sdcompress_engines.store_entries import StoredEngine

from .stored_engines import KEY, PAYLOAD, builder

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
        change = mutate(entry, dice)
        same = (
            entry.path.is_file()
            and entry.path.read_bytes() == PAYLOAD
            and loaded(entry.folder / MANIFEST_NAME) == sound
        )
        looked = store.entries()
        assert len(looked) == 1, change
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
                assert not (entry.folder / MANIFEST_NAME).exists(), change  # `read_manifest` says None, for no manifest
        assert store.verify().clean == same, change
        assert (store.find(KEY) is not None) == same, change
        again, hit = store.get_or_build(KEY, builder())
        assert hit == same, change
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
