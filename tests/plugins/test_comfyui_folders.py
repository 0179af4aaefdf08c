"""The ComfyUI node lists engine folders, and refuses those that cannot serve."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sdcompress_engines import trust
from sdcompress_engines.engine_key import EngineKey
from sdcompress_engines.errors import ArtifactError, SdCompressError
from sdcompress_engines.flavour import TENSORRT_RTX, platform_name
from sdcompress_engines.manifest import MANIFEST_NAME, write_manifest

from .comfyui_cases import SCHEDULER, SHAPE, UNET, WIDTH, change, profile, read_config, text
from .comfyui_host import REAL
from .places import deny

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning" if REAL else "error")


def test_the_node_lists_linked_and_exported_folders(host: Any, models: Path, node: Any, tmp_path: Path) -> None:
    (models / "no engine").mkdir()
    (models / ".hidden").mkdir()
    shutil.move(models / "tiny", tmp_path / "elsewhere")
    (models / "Ärger mit Leerzeichen").symlink_to(tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "elsewhere", models / "a whole export/onnx")
    assert node.INPUT_TYPES()["required"]["engine"][0] == ["a whole export", "Ärger mit Leerzeichen"]
    assert node.VALIDATE_INPUTS("Ärger mit Leerzeichen") is True
    assert "no engine 'gone'" in node.VALIDATE_INPUTS("gone")
    (patcher,) = node().load("Ärger mit Leerzeichen")
    assert host.sample(patcher, text(77, 1), text(77, 2), SHAPE, 1, 4.0, 7).isfinite().all()


def test_a_folder_without_permission_does_not_hide_the_others(
    host: Any, models: Path, node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (models / "closed").mkdir()
    deny(monkeypatch, "is_file", models / "closed" / MANIFEST_NAME)
    assert node.INPUT_TYPES()["required"]["engine"][0] == ["tiny"]


def test_another_engine_under_the_same_name_is_loaded(host: Any, models: Path, node: Any) -> None:
    before = node.IS_CHANGED("tiny")
    assert node.IS_CHANGED("tiny") == before
    change(models / "tiny", model_name="another")
    assert node.IS_CHANGED("tiny") != before


def alter_graph(folder: Path) -> None:
    content = bytearray((folder / "unet.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "unet.onnx").write_bytes(content)


def cut_graph(folder: Path) -> None:
    (folder / "unet.onnx").write_bytes((folder / "unet.onnx").read_bytes()[:1000])


def edit_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_text((folder / MANIFEST_NAME).read_text().replace('"fp32"', '"fp16"'))


def remove_config(folder: Path) -> None:
    (folder / UNET).unlink()
    change(folder)


def set_in_config(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder, **{name: read_config(folder, name) | values})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_graph, r"is damaged: unet.onnx has 1000 bytes"),
        (lambda folder: (folder / MANIFEST_NAME).unlink(), r"is not an engine's folder"),
        (edit_manifest, r"this manifest was edited"),
        (remove_config, r"config.json: is missing, so the engine's model is unknown"),
        (lambda folder: change(folder, signature="voltaml"), r"the signature 'voltaml'"),
        (lambda folder: change(folder, profiles={"unet": [{}]}), r"have an unexpected value \(KeyError"),
        (set_in_config(UNET, in_channels=9), r"another kind of UNet"),
        (set_in_config(UNET, time_cond_proj_dim=256), r"takes the guidance scale as an input"),
        (set_in_config(SCHEDULER, prediction_type="flow_prediction"), r"with the prediction type flow_prediction"),
        (set_in_config(SCHEDULER, use_flow_sigmas=True), r"with the noise of flow matching"),
        (
            set_in_config(SCHEDULER, prediction_type="v_prediction", timestep_type="continuous"),
            r"with the noise of EDM",
        ),
        (set_in_config("pipeline/vae/config.json", latents_mean=[0.1] * 4), r"with a mean of its latents"),
        (set_in_config(SCHEDULER, beta_schedule="exp"), r"noise schedule 'exp'"),
    ],
)
def test_a_folder_that_cannot_serve_is_refused_in_one_line(
    damage: Callable[[Path], None], words: str, models: Path, parts: Any
) -> None:
    damage(models / "tiny")
    with pytest.raises(SdCompressError, match=words) as raised:
        parts.folders.read_folder("tiny", models / "tiny")
    assert "\n" not in str(raised.value)


def test_an_altered_graph_never_reaches_the_runtime(models: Path, parts: Any) -> None:
    alter_graph(models / "tiny")
    model = parts.model.EngineModel(parts.folders.read_folder("tiny", models / "tiny"))
    with pytest.raises(ArtifactError, match="is not what the manifest says"):
        model(torch.zeros(SHAPE), torch.zeros(2), torch.zeros(2, 77, WIDTH))
    assert not model.is_open


def engine_folder(folder: Path, graph: Path, **changes: Any) -> Path:
    """Create an engine's folder as `export --trt --signature comfyui` writes it. Its plan is a few bytes."""
    folder.mkdir(parents=True)
    (folder / "unet.engine").write_bytes(b"a plan" * 100)
    shutil.copytree(graph / "pipeline", folder / "pipeline")
    shapes = {name: tuple(map(tuple, sizes)) for name, sizes in profile([1, 8], [8, 16], [77, 154]).items()}
    values: dict[str, Any] = {
        "flavour": "tensorrt-rtx",
        "version": "1.0.0",
        "compute_capabilities": ((8, 9),),
        "platform": platform_name(),
    } | changes
    key = EngineKey("0" * 64, "unet", "fp16", "comfyui", profiles=(shapes,), **values)  # type: ignore[arg-type]
    write_manifest(folder, "engine", config=key.config() | {"vae_scale": 8})
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"platform": "linux-s390x"}, "was built for linux-s390x"),
        ({"flavour": "tensorrt-next"}, "'tensorrt-next', which is not known here"),
        ({"version": "0.0.1"}, "not usable" if TENSORRT_RTX.missing() else r"0\.0\.1"),
    ],
)
def test_an_engine_for_another_machine_is_refused_before_anything_runs(
    changes: dict[str, Any], words: str, host: Any, models: Path, node: Any, graph: Path
) -> None:
    engine_folder(models / "trt", graph, **changes)
    assert "trt" in node.INPUT_TYPES()["required"]["engine"][0]
    assert re.search(words, node.VALIDATE_INPUTS("trt"))


def test_precision_size_and_limits_are_known_without_opening_the_engine(models: Path, parts: Any, graph: Path) -> None:
    folder = parts.folders.read_folder("trt", engine_folder(models / "trt", graph))
    assert (folder.dtype, folder.bytes, folder.family) == (torch.float16, 600, "sd1")
    assert folder.limits == (parts.calls.Limits((1, 8), (8, 16), (8, 16), (77, 154)),)


def test_an_engine_that_was_built_elsewhere_is_refused_with_the_command_that_allows_it(
    models: Path, graph: Path, parts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SDCOMPRESS_CONFIG", str(tmp_path / "config"))
    monkeypatch.setattr(parts.folders.flavour, "obstacle", lambda *_: None)  # a stand-in for a machine with a GPU
    folder = engine_folder(models / "foreign", graph)
    read = parts.folders.read_folder("foreign", folder)
    reason = parts.folders.find_obstacle(read)
    assert "was built elsewhere or by an earlier version, and is executable code" in reason
    assert f"sdcompress engines trust {folder / 'unet.engine'}" in reason
    trust.allow(folder / "unet.engine")
    assert parts.folders.find_obstacle(read) is None
