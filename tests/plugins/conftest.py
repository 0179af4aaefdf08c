"""Shared by the plugins' tests: a small Stable Diffusion, students of it, and their graphs for each host."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sdcompress_engines.manifest import read_manifest, save_manifest

from sdcompress.export import export_onnx
from sdcompress.prune.plan import make_plan
from sdcompress.prune.student import build_student

PLUGINS = Path(__file__).parents[2] / "plugins"
WEBUI_PLUGIN = PLUGINS / "sd_webui_sdcompress"
sys.path.insert(0, str(WEBUI_PLUGIN))  # as its script does in the host


@pytest.fixture(scope="session")
def student_unet(random_pipeline: Any) -> Any:
    """A bk-tiny student of `random_pipeline`'s UNet: three levels, one pair each, no middle. Its weights are shaken, so that it is another model than its teacher's remains."""
    torch.manual_seed(11)
    student = build_student(random_pipeline.unet, make_plan(dict(random_pipeline.unet.config), "bk-tiny")).eval().requires_grad_(False)
    for weight in student.parameters():
        weight.add_(0.02 * torch.randn_like(weight))
    return student


@pytest.fixture(scope="session")
def export_unet(random_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(host, unet, name) → the `onnx` folder of a UNet in the host's signature, fp32; each made once a run."""
    made: dict[tuple[str, int, str], Path] = {}

    def export(host: str, unet: Any, name: str) -> Path:
        key = host, id(unet), name
        if key not in made:
            kept, random_pipeline.unet = random_pipeline.unet, unet
            try:
                made[key] = export_onnx(random_pipeline, tmp_path_factory.mktemp("plugins") / name, host=host, source={"pipeline": f"{id(unet):064x}"}, name=name).folder
            finally:
                random_pipeline.unet = kept
        return made[key]

    return export


def change_manifest(folder: Path, **config: Any) -> None:
    """Change entries of a manifest's config, and seal it again."""
    manifest = read_manifest(folder)
    assert manifest is not None
    manifest.config.update(config)
    save_manifest(folder, manifest)
