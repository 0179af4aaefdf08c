"""Pictures depend on their own seed alone, and the CLIP figures are right where the answer is known."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sdcompress_bench.quality import ClipMetric, judge, read_shard, to_pixels
from sdcompress_bench.scenario import Prompt
from sdcompress_engines.errors import DataError, ModelError

from sdcompress.sampling import generate

STYLES = {"flat": "a flat icon of", "line": "a black line drawing of", "3d": "a 3d render of"}


class ReadsTheAnswer(ClipMetric):
    """A CLIP that reads a caption's index in `answers` from a picture's red channel, so that its scores are known."""

    answers: Sequence[str] = ()

    def image_features(self, images: Sequence[Image.Image], batch: int = 64) -> torch.Tensor:
        return self.text_features([self.answers[image.getpixel((0, 0))[0]] for image in images])


@pytest.fixture(scope="module")
def metric(clip_folder: Path) -> ReadsTheAnswer:
    return ReadsTheAnswer(clip_folder)


def numbered(*numbers: int) -> list[Image.Image]:
    return [Image.new("RGB", (32, 32), (number, 0, 0)) for number in numbers]


def test_batch_size_changes_no_picture(pipeline_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    capfd.readouterr()
    captions, seeds = ["a cat", "a dog", "a tree"], [5, 6, 7]
    alone, together = (
        [to_pixels(i) for i in generate(pipeline, captions, seeds=seeds, steps=2, batch_size=batch, size_px=64)]
        for batch in (1, 3)
    )
    for one, other in zip(alone, together, strict=True):
        assert (one - other).abs().max() <= 1 / 255 + 1e-6  # rounding to bytes may tip over
    assert not torch.equal(alone[0], alone[1])
    assert capfd.readouterr().err == ""
    with pytest.raises(DataError, match="3 prompts and 1 seeds"):
        generate(pipeline, captions, seeds=[1], steps=1)


def test_style_is_right_only_if_the_picture_shows_it(metric: ReadsTheAnswer) -> None:
    metric.answers = ["a flat icon of a cat", "a 3d render of a cat"]
    prompts = [Prompt("a flat icon of a cat", "flat"), Prompt("a 3d render of a cat", "3d")]
    assert metric.style_accuracy(numbered(0, 1), prompts, STYLES).share == 1.0
    assert metric.style_accuracy(numbered(1, 1), prompts, STYLES).share == 0.5
    with pytest.raises(DataError, match="of style 'oil'"):
        metric.style_accuracy(numbered(0), [Prompt("an oil painting of a cat", "oil")], STYLES)


def test_retrieval_counts_first_and_among_k(metric: ReadsTheAnswer) -> None:
    metric.answers = captions = ["a cat", "seven blue dogs", "the old lighthouse", "tree"]
    right = metric.retrieval(numbered(0, 1, 2, 3), captions, k=2)
    assert right["top1"].share == right["top2"].share == 1.0
    wrong = metric.retrieval(numbered(0, 1, 2, 2), captions, k=4)
    assert wrong["top1"].share == 0.75
    assert wrong["top4"].share == 1.0
    assert metric.clip_score(numbered(0, 1, 2, 3), captions) == pytest.approx(100, abs=1e-3)


def test_any_clip_has_all_figures(clip_folder: Path) -> None:
    prompts = [Prompt("a flat icon of a cat", "flat"), Prompt("a black line drawing of a dog", "line")]
    figures = judge(ClipMetric(clip_folder), [Image.new("RGB", (64, 64), c) for c in ("red", "blue")], prompts, STYLES)
    assert set(figures) == {"clip_score", "top1", "top5", "style"}
    assert -100 <= figures["clip_score"] <= 100
    assert figures["top5"].share == 1.0


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a CLIP model"):
        ClipMetric(tmp_path)


def shard(path: Path, samples: dict[str, tuple[str, dict[str, Any]]]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for number, (stem, (caption, meta)) in enumerate(samples.items()):
            buffer = io.BytesIO()
            Image.new("RGB", (16, 16), (number, 0, 0)).save(buffer, "PNG")
            for ending, payload in (
                ("png", buffer.getvalue()),
                ("txt", caption.encode()),
                ("json", json.dumps(meta).encode()),
            ):
                member = tarfile.TarInfo(f"{stem}.{ending}")
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))
    return path


def test_a_shard_gives_its_pictures_in_order(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "real.tar.gz",
        {"1-a": ("a cat", {"style": "flat"}), "2-b": ("a dog", {}), "3-c": ("a tree", {"style": "3d"})},
    )
    images, prompts = read_shard(path)
    assert [image.getpixel((0, 0))[0] for image in images] == [0, 1, 2]
    assert prompts == [Prompt("a cat", "flat"), Prompt("a dog", ""), Prompt("a tree", "3d")]
    with pytest.raises(DataError, match="no picture"):
        read_shard(shard(tmp_path / "empty.tar.gz", {}))
