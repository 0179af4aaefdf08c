"""`sdcompress engines`: what it shows of a store and of an exported folder, what it removes, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sdcompress_engines.engine_key import EngineKey
from sdcompress_engines.flavour import TENSORRT_RTX, platform_name
from sdcompress_engines.manifest import MANIFEST_NAME, write_manifest
from sdcompress_engines.store import EngineStore
from sdcompress_engines.store_entries import StoredEngine

from sdcompress.export.engine_facts import format_profiles

from ..hostile_text import write_sealed
from .conftest import Cli, one_line

VERSION = "1.0" if TENSORRT_RTX.missing() else TENSORRT_RTX.version
UNET = EngineKey(
    model="a" * 64,
    component="unet",
    precision="fp16",
    signature="diffusers",
    flavour="tensorrt-rtx",
    version=VERSION,
    compute_capabilities=((8, 6), (8, 9)),
    platform=platform_name(),
    profiles=(
        {
            "sample": ((1, 4, 32, 32), (2, 4, 64, 64), (8, 4, 96, 96)),
            "timestep": ((1,), (2,), (8,)),
            "encoder_hidden_states": ((1, 77, 768), (2, 77, 768), (8, 154, 768)),
        },
    ),
    options={"weight_streaming": True},
)
DECODER = replace(
    UNET, component="vae_decoder", version="1.0.0.21", profiles=({"latent_sample": ((2, 4, 64, 64),) * 3},), options={}
)
INPUTS = {
    "unet": [
        {"name": "sample", "shape": ["batch", 4, "height", "width"], "dtype": "float16"},
        {"name": "timestep", "shape": ["batch"], "dtype": "float32"},
        {"name": "encoder_hidden_states", "shape": ["batch", "tokens", 768], "dtype": "float16"},
    ],
    "vae_decoder": [{"name": "latent_sample", "shape": ["batch", 4, "height", "width"], "dtype": "float16"}],
}


def builder(key: EngineKey) -> Callable[[Path], tuple[dict[str, Any], dict[str, Any]]]:
    def build(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        (folder / f"{key.component}.engine").write_bytes(b"engine" * 2**18)
        return {
            "vae_scale": 8,
            "model_name": "nano",
            "inputs": {key.component: INPUTS[key.component]},
            "outputs": {},
        }, {key.component: {"seconds": 2.5}}

    return build


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineStore:
    """The user's store, with a UNet for this machine and a decoder of another version."""
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path / "cache"))
    store = EngineStore()
    for key in (UNET, DECODER):
        store.get_or_build(key, builder(key))
    return store


@pytest.fixture
def exported(store: EngineStore, tmp_path: Path) -> Path:
    """A folder as `export --trt` writes it: `engine/` holds both components."""
    folder = tmp_path / "out/engine"
    decoder = replace(DECODER, version=UNET.version, options=UNET.options)
    entries = [store.get_or_build(key, builder(key))[0] for key in (UNET, decoder)]
    for entry in entries:
        store.link_or_copy(entry, folder)
    first, second = (entry.manifest.config for entry in entries)
    config = {
        name: {**value, **second[name]} if isinstance(value, dict) and name != "options" else value
        for name, value in first.items()
    }
    write_manifest(folder, "engine", config=config | {"components": ["unet", "vae_decoder"]})
    return folder.parent


def entry_of(store: EngineStore, key: EngineKey) -> StoredEngine:
    entry = store.find(key)
    assert entry is not None
    return entry


def test_an_empty_store_names_the_command_that_fills_it(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path))
    code, out, _ = cli("engines", "list")
    assert code == 0
    assert "no engines in" in out
    assert "sdcompress export MODEL --trt" in out
    assert cli("engines", "list", "--json")[1].strip() == "[]"
    assert cli("engines", "verify")[0] == 0
    assert cli("engines", "prune", "--all")[0] == 0
    assert cli("engines", "path")[1].strip() == str(tmp_path / "engines")
    assert list(tmp_path.iterdir()) == []  # the commands that read make nothing


def test_list_shows_what_each_engine_is_and_whether_it_loads_here(cli: Cli, store: EngineStore) -> None:
    code, out, _ = cli("engines", "list")
    assert code == 0
    rows = {line.split()[1]: line for line in out.splitlines()[1:-1]}
    for text in (
        UNET.digest[:8],
        "nano aaaaaaaa",
        "fp16",
        f"tensorrt-rtx {VERSION}",
        "8.6, 8.9",
        "256:512:768 px, batch 1:2:8, tokens 77:77:154",
        "1.5 MiB",
    ):
        assert text in rows["unet"]
    assert "512 px, batch 2" in rows["vae_decoder"]
    if not TENSORRT_RTX.missing():
        assert "no: the engine was built with tensorrt-rtx 1.0.0.21" in rows["vae_decoder"]
        if not torch.cuda.is_available():
            assert "NVIDIA GPU" in rows["unet"]
    assert out.splitlines()[-1] == f"2 engines, 3.0 MiB in {store.root}"


def test_list_as_json_holds_the_same_facts(cli: Cli, store: EngineStore) -> None:
    facts = {fact["component"]: fact for fact in json.loads(cli("engines", "list", "--json")[1])}
    unet = facts["unet"]
    assert unet["key"] == UNET.digest
    assert unet["bytes"] == 6 * 2**18
    assert unet["compute_capabilities"] == [[8, 6], [8, 9]]
    assert unet["profiles"][0]["timestep"] == [[1], [2], [8]]
    assert unet["path"] == str(entry_of(store, UNET).path)
    assert 0 <= unet["age_s"] < 600
    assert unet["fault"] is None
    assert not facts["vae_decoder"]["loads_here"]
    assert facts["vae_decoder"]["why_not"]


def test_a_damaged_entry_is_listed_with_its_fault(cli: Cli, store: EngineStore) -> None:
    entry_of(store, UNET).path.write_bytes(b"cut")
    code, out, _ = cli("engines", "list")
    assert code == 0
    assert "no: damaged: unet.engine has 3 bytes" in out
    (broken,) = [fact for fact in json.loads(cli("engines", "list", "--json")[1]) if fact["fault"]]
    assert broken["key"] == UNET.digest
    assert cli("engines", "show", UNET.digest[:6])[0] == 0
    code, _, err = cli("engines", "path", UNET.digest[:6])
    assert code == 1
    assert "damaged" in one_line(err)


def test_show_takes_the_beginning_of_a_key_or_a_path(cli: Cli, store: EngineStore, exported: Path) -> None:
    code, out, _ = cli("engines", "show", UNET.digest[:6].upper())
    assert code == 0
    shown = dict(line.split("  ", 1) for line in out.splitlines()[3:])
    assert shown["key"].strip() == UNET.digest
    assert shown["model"].strip() == UNET.model
    assert "weight_streaming yes" in shown["options"]
    assert "sample float16 (batch, 4, height, width)" in shown["inputs"]
    assert "sample 1x4x32x32:2x4x64x64:8x4x96x96" in shown["profiles"]
    for path in (exported, exported / "engine", exported / "engine/unet.engine", entry_of(store, UNET).path):
        facts = json.loads(cli("engines", "show", path, "--json")[1])
        assert facts[0]["key"] == UNET.digest
        assert len(facts) == (2 if path.is_dir() else 1)


def test_a_key_that_fits_no_engine_or_two_is_refused(cli: Cli, store: EngineStore) -> None:
    for arguments in (("show", "zz"), ("path", "zz"), ("prune", "zz"), ("show", "")):
        code, _, err = cli("engines", *arguments)
        assert code == 2, arguments
        one_line(err)
    keys = [replace(UNET, options={"number": number}) for number in range(40)]
    for key in keys:
        store.get_or_build(key, builder(key))
    first = next(letter for letter in "0123456789abcdef" if sum(key.digest.startswith(letter) for key in keys) > 1)
    code, _, err = cli("engines", "path", first)
    assert code == 2
    assert f"begin with {first!r}" in one_line(err)


def test_an_exported_folder_is_listed_and_verified(cli: Cli, exported: Path) -> None:
    facts = json.loads(cli("engines", "list", exported, "--json")[1])
    assert [fact["component"] for fact in facts] == ["unet", "vae_decoder"]
    assert [fact["profile"] for fact in facts] == ["256:512:768 px, batch 1:2:8, tokens 77:77:154", "512 px, batch 2"]
    code, out, _ = cli("engines", "verify", exported)
    assert code == 0
    assert "1 of 1 intact" in out
    manifest = exported / "engine" / MANIFEST_NAME
    text = manifest.read_text()
    manifest.write_text(text.replace('"fp16"', '"fp32"'))
    code, _, err = cli("engines", "list", exported)
    assert code == 1
    assert "edited" in one_line(err)
    code, out, err = cli("engines", "verify", exported)
    assert code == 3
    assert "edited" in out
    manifest.write_text(text)
    engine = exported / "engine/unet.engine"
    data = engine.read_bytes()
    engine.unlink()
    engine.write_bytes(data[:-1] + b"!")
    code, out, err = cli("engines", "verify", exported)
    assert code == 3
    assert "unet.engine is not what the manifest says" in out
    assert "sdcompress export" in one_line(err)


def test_a_folder_without_engines_is_refused(cli: Cli, store: EngineStore, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, code in (("empty", 1), ("nowhere", 2)):
        for verb in ("list", "verify"):
            exit_code, _, err = cli("engines", verb, tmp_path / name)
            assert exit_code == code
            assert "sdcompress export --trt" in one_line(err)
    assert cli("engines", "list", "--store", tmp_path / "nowhere")[0] == 2


def test_a_folder_and_a_store_are_not_given_both(cli: Cli, store: EngineStore, exported: Path) -> None:
    for verb in ("list", "verify"):
        assert cli("engines", verb, exported, "--store", store.root)[0] == 2
    assert cli("engines", "show", exported, "--store", store.root)[0] == 2


def test_verify_exits_with_3_and_names_each_fault(cli: Cli, store: EngineStore) -> None:
    code, out, _ = cli("engines", "verify")
    assert code == 0
    assert out.count("intact") == 3
    path = entry_of(store, UNET).path
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    leftover = store.root / f".{UNET.digest}.abcd.partial"
    leftover.mkdir()
    code, out, err = cli("engines", "verify")
    assert code == 3
    assert "unet.engine is not what the manifest says (sha256 differs)" in out
    assert f"removed {leftover.name}" in out
    assert UNET.digest in one_line(err)
    code, out, _ = cli("engines", "verify", "--json", "--store", store.root)
    assert code == 3
    faults = {Path(finding["path"]).name: finding["faults"] for finding in json.loads(out)["findings"]}
    assert faults[DECODER.digest] == []
    assert len(faults[UNET.digest]) == 1


def test_prune_needs_a_choice_and_prints_what_it_frees(cli: Cli, store: EngineStore) -> None:
    code, _, err = cli("engines", "prune")
    assert code == 2
    assert "--older-than DAYS" in one_line(err)
    month = time.time() - 30 * 86400
    os.utime(entry_of(store, UNET).folder / MANIFEST_NAME, (month, month))
    code, out, _ = cli("engines", "prune", "--older-than", 7, "--dry-run")
    assert code == 0
    assert "would free 1.5 MiB in 1 folder; 3.0 MiB in" in out
    assert len(store.entries()) == 2
    code, out, _ = cli("engines", "prune", "--older-than", 7)
    assert "not used for 30 days" in out
    assert "freed 1.5 MiB in 1 folder; 1.5 MiB in" in out
    assert [entry.digest for entry in store.entries()] == [DECODER.digest]
    assert cli("engines", "prune", DECODER.digest[:5])[0] == 0
    assert store.entries() == []


@pytest.mark.parametrize(
    "choices",
    [("--all", "--older-than", 30), ("--all", "--unusable"), (UNET.digest, "--all"), (UNET.digest, "--unusable")],
)
def test_prune_removes_nothing_where_the_choices_contradict(
    cli: Cli, store: EngineStore, choices: tuple[object, ...]
) -> None:
    code, _, err = cli("engines", "prune", *choices)
    assert code == 2
    assert "either keys, or conditions" in one_line(err)
    assert len(store.entries()) == 2


@pytest.mark.skipif(TENSORRT_RTX.missing() is not None, reason="tensorrt-rtx is not installed")
def test_prune_unusable_keeps_an_engine_that_only_lacks_a_gpu(cli: Cli, store: EngineStore) -> None:
    key = replace(UNET, compute_capabilities=())
    store.get_or_build(key, builder(key))
    code, out, _ = cli("engines", "prune", "--unusable")
    assert code == 0
    assert DECODER.digest in out
    assert key.digest in {entry.digest for entry in store.entries()}


def test_path_prints_only_the_path(cli: Cli, store: EngineStore) -> None:
    assert cli("engines", "path")[1] == f"{store.root}\n"
    assert cli("engines", "path", UNET.digest[:7])[1] == f"{entry_of(store, UNET).path}\n"
    other = shutil.copytree(store.root, store.root.parent / "other")
    assert cli("engines", "path", UNET.digest, "--store", other)[1].startswith(str(other))


def test_a_profile_is_formatted_as_the_options_take_it() -> None:
    def text(profiles: Any, component: str = "unet", **config: Any) -> str:
        return format_profiles(
            {"profiles": {component: profiles}, "inputs": INPUTS, "vae_scale": 8, **config}, component
        )

    square = {"sample": [[2, 4, 64, 64]] * 3}
    wide = {"sample": [[1, 4, 64, 64], [1, 4, 64, 96], [1, 4, 64, 128]]}
    assert text([square]) == "512 px, batch 2"
    assert text([square, wide]) == "512 px, batch 2 + height 512 width 512:768:1024 px, batch 1"
    assert (
        text(
            [{"sample": [[2, 3, 512, 512]] * 3}],
            "vae_encoder",
            inputs={"vae_encoder": [{"name": "sample", "shape": ["batch", 3, "image_height", "image_width"]}]},
        )
        == "512 px, batch 2"
    )
    assert text([{"left": [[1, 8], [2, 8], [4, 8]]}]) == "left 1x8:2x8:4x8"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("vae_scale",), "ab"),
        (("vae_scale",), 10**4200),
        (("model_name",), 7),
        (("components",), 7),
        (("inputs",), []),
        (("inputs", "unet"), 7),
        (("inputs", "unet", 0), "sample"),
        (("inputs", "unet", 0, "name"), []),
        (("inputs", "unet", 0, "shape"), 7),
        (("outputs",), {"unet": [7]}),
        (("profiles", "unet", 0, "sample"), [[1, 4, 3 * 10**9, 8]] * 3),
        (("profiles", "unet", 0, "sample"), ["1488"] * 3),
    ],
    ids=range(12),
)
def test_what_a_strange_manifest_says_of_an_engine_is_one_line(
    cli: Cli, store: EngineStore, exported: Path, place: tuple[str | int, ...], value: Any
) -> None:
    folders = {exported / "engine": exported, entry_of(store, UNET).folder: None}
    for folder, argument in folders.items():
        raw = json.loads((folder / MANIFEST_NAME).read_text())
        del raw["seal"]
        inner = raw["config"]
        for step in place[:-1]:
            inner = inner[step]
        inner[place[-1]] = value
        write_sealed(folder / MANIFEST_NAME, raw)
        code, out, err = cli("engines", "list", *([argument] if argument else []))
        if argument:
            assert code == 1
            assert "describe its engines" in one_line(err) or "does not say what the unet engine is" in one_line(err)
        else:
            assert code == 0
            assert "no: damaged: " in out
