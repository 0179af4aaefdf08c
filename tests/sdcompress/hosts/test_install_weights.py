"""A WebUI's engine can have the weights of its model beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sdcompress_engines.errors import EngineMismatch, UsageError

from sdcompress.checkpoints.read import load_single_file
from sdcompress.checkpoints.write import export_ldm
from sdcompress.hosts.install import install, uninstall
from sdcompress.hosts.weights import WEIGHTS
from sdcompress.models.locate import hash_pipeline

from .trees import make_engine, snapshot


def test_the_model_is_put_beside_its_engine_as_one_file_on_request(
    webui: tuple[Any, Path], random_folder: Path, random_pipeline: Any, tmp_path: Path
) -> None:
    host, root = webui
    before = snapshot(root)
    made = make_engine(tmp_path / "made", inputs={"pipeline": hash_pipeline(random_folder)})
    install(host, root, [made], weights=random_folder)
    stored: Any = load_single_file(root / host.models / "sd-tiny" / WEIGHTS)
    for name, weight in random_pipeline.unet.state_dict().items():
        assert (stored.unet.state_dict()[name] == weight.half().float()).all()
    assert not install(host, root, [made], weights=random_folder).written
    assert install(host, root, [made]).removed == (f"{host.models}/sd-tiny/{WEIGHTS}",), (
        "an install without weights removes them, as they may be of another model"
    )
    uninstall(host, root)
    assert snapshot(root) == before


def test_a_model_that_is_one_file_is_copied_unchanged(
    webui: tuple[Any, Path], random_pipeline: Any, tmp_path: Path
) -> None:
    host, root = webui
    file = export_ldm(random_pipeline, tmp_path / "model.safetensors")
    install(host, root, [make_engine(tmp_path / "made", inputs={"pipeline": hash_pipeline(file)})], weights=file)
    assert (root / host.models / "sd-tiny" / WEIGHTS).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "was exported from another model"),
        ({"pipeline": "0" * 64}, "was exported from another model"),
        ({"pipeline": "", "lora style:0.8": "0" * 64}, "contains a LoRA that this model does not contain"),
    ],
)
def test_weights_of_another_model_are_refused(
    inputs: dict[str, str], words: str, webui: tuple[Any, Path], random_folder: Path, tmp_path: Path
) -> None:
    host, root = webui
    before = snapshot(root)
    given = {name: value or hash_pipeline(random_folder) for name, value in inputs.items()}
    with pytest.raises(EngineMismatch, match=words):
        install(host, root, [make_engine(tmp_path / "made", inputs=given)], weights=random_folder)
    assert snapshot(root) == before


def test_weights_are_refused_for_comfyui_for_links_and_without_an_engine(
    comfyui: tuple[Any, Path], webui: tuple[Any, Path], engine: Path, random_folder: Path
) -> None:
    with pytest.raises(UsageError, match=r"ComfyUI, which loads such a file itself.*--ldm"):
        install(*comfyui, [engine], weights=random_folder)
    with pytest.raises(UsageError, match="--with-weights with --link"):
        install(*webui, [engine], weights=random_folder, link=True)
    with pytest.raises(UsageError, match="--with-weights without an engine"):
        install(*webui, weights=random_folder)
