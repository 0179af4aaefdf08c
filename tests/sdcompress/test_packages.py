"""The UNet compiled ahead of time draws what torch draws, and is compiled once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from sdcompress.backends.assemble import close_pipeline, open_pipeline
from sdcompress.export.aot import package_folder
from sdcompress.models.load import load_pipeline
from sdcompress.sampling import generate


@pytest.mark.slow
def test_a_compiled_unet_draws_as_torch_and_is_kept(
    random_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    type(random_pipeline)(
        **(random_pipeline.components | {"unet": unet.eval(), "requires_safety_checker": False})
    ).save_pretrained(tmp_path / "model")
    pictures, compiled = {}, []
    for backend in ("torch", "aot", "aot"):
        pipeline = open_pipeline(tmp_path / "model", backend)
        pictures[backend] = [
            np.asarray(picture, dtype=np.int16)
            for picture in generate(pipeline, ["a cat", "two dogs"], seeds=[1, 2], steps=2)
        ]
        close_pipeline(pipeline)
        if backend == "aot":
            compiled.append(
                (package_folder(load_pipeline(tmp_path / "model").sha256, "cpu", "fp32") / "unet.pt2")
                .stat()
                .st_mtime_ns
            )
    assert compiled[0] == compiled[1]
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(pictures["torch"], pictures["aot"], strict=True))
