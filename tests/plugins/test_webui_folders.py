"""A WebUI lists every engine folder, and says why one cannot serve."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
from sdcompress_engines.errors import ArtifactError, EngineMismatch, UsageError
from sdcompress_engines.manifest import MANIFEST_NAME, write_manifest
from sdcompress_webui.engine_folders import Artifact, Unreadable, find_artifacts
from sdcompress_webui.menu import PREFIX, group_models
from sdcompress_webui.panel import build_command
from sdcompress_webui.traits import Traits
from sdcompress_webui.unet import HostedUNet

from .comfyui_cases import SCHEDULER, change, read_config
from .places import WEBUI_PLUGIN, deny
from .webui_cases import (
    NO_GPU,
    NO_RUNTIME,
    TITLE,
    PlainHost,
    break_graph,
    call_unet,
    change_manifest,
    host_unet,
    make_engine,
    read_only_artifact,
)
from .webui_host import WebUI, running


def set_scheduler(folder: Path, **values: Any) -> None:
    change(folder, **{SCHEDULER: read_config(folder, SCHEDULER) | values})


def edit_manifest(folder: Path) -> None:
    text = (folder / MANIFEST_NAME).read_text()
    (folder / MANIFEST_NAME).write_text(text.replace('"fp32"', '"fp16"', 1))


def test_an_altered_graph_is_refused_before_a_runtime_sees_it(tiny: Artifact) -> None:
    break_graph(tiny.folder)
    with pytest.raises(ArtifactError, match="sha256 differs"):
        host_unet(tiny).activate()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "unet.onnx").unlink(), "unet.onnx is missing"),
        (lambda folder: (folder / "unet.onnx").write_bytes(b"cut"), "has 3 bytes"),
        (edit_manifest, "was edited"),
        (lambda folder: (folder / MANIFEST_NAME).write_text("{"), "is not JSON"),
        (lambda folder: (folder / MANIFEST_NAME).write_bytes(b"\xff\xfe"), "is not JSON"),
        (lambda folder: (folder / MANIFEST_NAME).unlink(), "unknown what it was built for"),
        (lambda folder: change_manifest(folder, signature="diffusers"), "signature 'diffusers'; expected webui"),
        (lambda folder: change_manifest(folder, components=["vae_decoder"]), "holds no UNet"),
        (lambda folder: (folder / "pipeline/unet/config.json").unlink(), "config.json is missing"),
        (lambda folder: write_manifest(folder, "student"), "is of kind 'student'"),
        (
            lambda folder: set_scheduler(folder, beta_end=0.02),
            "a noise schedule of its own, which a WebUI does not know",
        ),
        (lambda folder: set_scheduler(folder, use_flow_sigmas=True), "the noise of flow matching"),
    ],
)
def test_a_folder_that_cannot_serve_is_listed_with_the_reason(
    installed: Path, whole_graph: Path, random_pipeline: Any, damage: Callable[[Path], Any], reason: str
) -> None:
    root = installed / "models" / "sdcompress"
    shutil.copytree(whole_graph, root / "sound")
    damage(root / "tiny")
    found = {each.folder.name: each for each in find_artifacts(root)}
    assert isinstance(found["sound"], Artifact)
    assert isinstance(found["tiny"], Unreadable)
    with running(WebUI(installed, random_pipeline.unet)) as host:
        host.load_extension(WEBUI_PLUGIN)
        entry = next(label for label in host.list_unets() if " – cannot run: " in label)
        host.opts.sd_unet = str(entry)
        with pytest.raises(EngineMismatch, match=reason):
            host.apply_unet()
        with pytest.raises(EngineMismatch, match=reason), host.job():  # A1111 keeps a UNet whose activation failed
            host.predict(torch.randn(2, 4, 16, 16), torch.ones(2), torch.randn(2, 77, 96))
        assert escape(reason) in host.tab()


@pytest.mark.parametrize(
    ("differing", "reason"),
    [
        ({"platform": "plan9-mips"}, "was built for plan9-mips"),
        ({"version": "0.1.0"}, NO_RUNTIME or "built with tensorrt-rtx 0.1.0"),
        pytest.param({"compute_capabilities": ((1, 0),)}, NO_RUNTIME or NO_GPU or "compute capability 1.0", id="card"),
    ],
)
def test_an_engine_for_another_machine_is_listed_with_the_reason_and_the_command(
    tmp_path: Path, tiny_graph: Path, differing: dict[str, Any], reason: str
) -> None:
    make_engine(tmp_path / "built", tiny_graph, **differing)
    (entry,) = group_models(find_artifacts(tmp_path))
    assert entry.title == f"{PREFIX}tiny (tensorrt-rtx fp32)"
    with pytest.raises(EngineMismatch, match=reason):
        HostedUNet(entry, PlainHost()).activate()
    (artifact,) = find_artifacts(tmp_path)
    assert (
        "--flavour tensorrt-rtx --profile batch=1:2:4,height=128:128:256,width=128:128:256,tokens=77:77:154 --signature"
        " webui" in build_command(artifact.manifest)
    )


def test_a_read_only_or_linked_folder_of_engines_is_read(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    os.symlink(installed / "models" / "sdcompress" / "tiny", tmp_path / "linked" / "tiny", target_is_directory=True)
    (tmp_path / "linked").chmod(0o555)
    assert call_unet(host_unet(read_only_artifact(tmp_path / "linked"))).shape == (2, 4, 16, 16)


def test_a_file_or_a_missing_folder_holds_no_engine(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert find_artifacts(tmp_path / "file") == []
    assert find_artifacts(tmp_path / "nowhere") == []


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may list every folder")
def test_a_folder_without_permission_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0)
    with pytest.raises(UsageError, match="cannot be listed"):
        find_artifacts(tmp_path)


def test_a_subfolder_without_permission_does_not_hide_the_others(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = installed / "models" / "sdcompress"
    (root / "closed" / "inner").mkdir(parents=True)
    deny(monkeypatch, "iterdir", root / "closed")
    (root / "half").mkdir()
    deny(monkeypatch, "is_file", root / "half" / MANIFEST_NAME)
    found = {each.folder.name: each for each in find_artifacts(root)}
    assert isinstance(found["tiny"], Artifact)
    for name, reason in (("closed", "cannot be listed"), ("half", "cannot be read")):
        artifact = found[name]
        assert isinstance(artifact, Unreadable)
        assert reason in artifact.fault


def test_a_damaged_folder_keeps_its_entry_and_an_intact_copy_serves(installed: Path) -> None:
    root = installed / "models" / "sdcompress"
    break_length = (root / "tiny" / "unet.onnx").write_bytes
    shutil.copytree(root / "tiny", root / "copy")
    break_length(b"cut")
    (entry,) = group_models(find_artifacts(root), TITLE)
    assert (entry.title, [artifact.folder.name for artifact in entry.usable]) == (TITLE, ["copy"])
    shutil.rmtree(root / "copy")
    (entry,) = group_models(find_artifacts(root), TITLE)
    assert entry.title == TITLE
    with pytest.raises(EngineMismatch, match="has 3 bytes"):
        HostedUNet(entry, PlainHost()).activate()


def test_the_manifest_alone_describes_the_engine(tiny: Artifact) -> None:
    assert json.loads((tiny.folder / MANIFEST_NAME).read_text())["config"]["signature"] == "webui"
    assert (tiny.name, tiny.backend, tiny.whole, tiny.multiple) == ("tiny", "onnxruntime", False, 4)
    assert tiny.traits == Traits(96, 0, 4, "epsilon")
    assert math.prod(tiny.profiles[0]["sample"][1][1:]) == 4 * 64 * 64
