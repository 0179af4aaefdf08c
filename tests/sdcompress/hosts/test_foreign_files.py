"""Installs and uninstalls never touch a file that sdcompress has not written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from sdcompress_engines.errors import ArtifactError, StorageError
from sdcompress_engines.manifest import canonical

from sdcompress.hosts.host import RECORD
from sdcompress.hosts.install import install, uninstall
from sdcompress.hosts.status import read_status

from .trees import snapshot


def test_a_file_that_was_changed_is_kept_and_reported(comfyui: tuple[Any, Path], engine: Path) -> None:
    host, root = comfyui
    before = snapshot(root)
    install(host, root, [engine])
    changed, missing = f"{host.extension}/node.py", f"{host.models}/sd-tiny/pipeline/unet/config.json"
    (root / changed).write_text("my own version\n")
    (root / missing).unlink()
    assert read_status(host, root).changed == {changed: "was changed since it was installed", missing: "is missing"}
    assert read_status(host, root).engines[0].fault == "pipeline/unet/config.json is missing"
    with pytest.raises(ArtifactError, match=r"node\.py: was changed since it was installed"):
        install(host, root, [engine])
    done = uninstall(host, root)
    assert done.kept == {changed: "was changed since it was installed"}
    assert snapshot(root) == before | {host.extension: None, changed: b"my own version\n"}


@pytest.mark.parametrize(
    "what", ["plugin file", "engine file", "engine folder is a file", "foreign link", "link at a file"]
)
def test_a_foreign_file_in_the_way_is_refused_and_nothing_is_written(
    what: str, comfyui: tuple[Any, Path], engine: Path, tmp_path: Path
) -> None:
    host, root = comfyui
    folder = root / host.models / "sd-tiny"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    where = {
        "plugin file": root / host.extension / "node.py",
        "engine folder is a file": folder,
        "foreign link": folder,
    }.get(what, folder / "unet.engine")
    where.parent.mkdir(parents=True, exist_ok=True)
    if what == "foreign link":
        where.symlink_to(foreign)
    elif what == "link at a file":
        where.symlink_to(foreign / "nothing")
    else:
        where.write_text("somebody's")
    before = snapshot(root)
    with pytest.raises((ArtifactError, StorageError), match=r"not installed by sdcompress|is a file"):
        install(host, root, [engine])
    assert snapshot(root) == before
    assert not list(foreign.iterdir())


def test_an_equal_file_that_was_there_before_stays_after_an_uninstall(comfyui: tuple[Any, Path], engine: Path) -> None:
    host, root = comfyui
    folder = root / host.models / "sd-tiny"
    folder.mkdir(parents=True)
    (folder / "unet.engine").write_bytes((engine / "unet.engine").read_bytes())
    before = snapshot(root)
    done = install(host, root, [engine])
    assert "1 files were there already" in done.notes[0]
    uninstall(host, root)
    assert snapshot(root) == before


BROKEN = {
    "cut": lambda text: text[: len(text) // 2],
    "edited": lambda text: text.replace('"version"', '"Version"'),
    "seal": lambda text: text.replace("sd-tiny", "sd-huge"),
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "another schema": lambda text: text.replace('"schema": 1', '"schema": 7'),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_record_is_backed_up_and_never_trusted(
    how: str, comfyui: tuple[Any, Path], engine: Path, tmp_path: Path
) -> None:
    host, root = comfyui
    before = snapshot(root)
    install(host, root, [engine])
    path = root / host.record
    path.write_text(BROKEN[how](path.read_text()))
    broken = path.read_bytes()
    assert read_status(host, root).broken
    with pytest.raises(ArtifactError, match=r"record of what was installed is broken.*sdcompress install comfyui"):
        uninstall(host, root)
    assert path.read_bytes() == broken
    done = install(host, root, [engine])
    assert not any(name for name in done.written if name != host.record)
    assert f"{RECORD}.broken-1" in done.notes[0]
    assert path.with_name(f"{RECORD}.broken-1").read_bytes() == broken
    path.write_bytes(b"again")
    install(host, root, [engine])
    assert path.with_name(f"{RECORD}.broken-1").read_bytes() == broken
    assert path.with_name(f"{RECORD}.broken-2").read_bytes() == b"again"
    path.with_name(f"{RECORD}.broken-1").unlink()
    uninstall(host, root)
    assert snapshot(root) == before


@pytest.mark.parametrize(
    "name",
    ["models/checkpoints/rv4.safetensors", "custom_nodes/comfyui-sdcompress/../another/__init__.py", "/etc/hostname"],
)
def test_a_record_that_names_foreign_files_is_not_trusted(name: str, comfyui: tuple[Any, Path]) -> None:
    host, root = comfyui
    install(host, root)
    raw = json.loads((root / host.record).read_text())
    del raw["seal"]
    content = (root / name).read_bytes()
    raw["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (root / host.record).write_text(json.dumps(raw | {"seal": hashlib.sha256(canonical(raw)).hexdigest()}))
    with pytest.raises(ArtifactError, match=r"names .*, which sdcompress does not install"):
        uninstall(host, root)
    assert (root / name).read_bytes() == content


def test_a_folder_with_a_foreign_file_does_not_become_a_link(comfyui: tuple[Any, Path], engine: Path) -> None:
    host, root = comfyui
    install(host, root, [engine])
    (root / host.models / "sd-tiny/mine.txt").write_text("mine")
    before = snapshot(root)
    with pytest.raises(ArtifactError, match="not installed by sdcompress"):
        install(host, root, [engine], link=True)
    assert snapshot(root) == before
