"""The UNet that is compiled ahead of time draws what torch draws, and is compiled once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sdcompress_engines.errors import EngineMismatch
from sdcompress_engines.manifest import write_manifest

from sdcompress.backends.assemble import close_pipeline, open_pipeline
from sdcompress.export.aot import package_folder
from sdcompress.models.load import load_pipeline
from sdcompress.sampling import generate


@pytest.mark.slow
def test_a_compiled_unet_draws_as_torch_and_is_kept(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path / "cache"))
    package = package_folder(load_pipeline(small_folder).sha256, "cpu", "fp32") / "unet.pt2"
    pictures, compiled = {}, []
    for backend in ("torch", "aot", "aot"):
        pipeline = open_pipeline(small_folder, backend)
        drawn = generate(pipeline, ["a cat", "two dogs"], seeds=[1, 2], steps=2)
        pictures[backend] = [np.asarray(picture, dtype=np.int16) for picture in drawn]
        close_pipeline(pipeline)
        if backend == "aot":
            compiled.append(package.stat().st_mtime_ns)
    assert compiled[0] == compiled[1]
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(pictures["torch"], pictures["aot"], strict=True))


def test_a_package_of_another_model_is_refused(small_folder: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path, "package", inputs={"pipeline": "0" * 64})
    with pytest.raises(EngineMismatch, match=r"was made from another model \(000000000000\)"):
        open_pipeline(small_folder, "aot", tmp_path, device="cpu")
