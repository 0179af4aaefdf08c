"""The CLIP with a ResNet is kept and read like any other, and judges pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from sdcompress_bench.quality import ClipMetric
from sdcompress_bench.resnet_clip import ResNetClip, load_clip

from sdcompress.models import nano


def test_nanos_judge_is_read_in_float32_and_gives_unit_vectors() -> None:
    metric = ClipMetric(nano.metric_folder())
    assert isinstance(metric.model, ResNetClip)
    assert metric.model.dtype == torch.float32
    noise = torch.randint(256, (3, 128, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures = [Image.fromarray(each.numpy()) for each in noise]
    for features in (metric.image_features(pictures), metric.text_features(["a cat", "a dog", "a key"])):
        assert features.shape == (3, metric.model.config.projection_dim)
        assert features.norm(dim=-1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)


def test_a_clip_with_a_resnet_is_the_same_after_saving(tmp_path: Path) -> None:
    judge = load_clip(nano.metric_folder()).eval()
    judge.save_pretrained(tmp_path)
    again = load_clip(tmp_path).eval()
    pixels = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (model.get_image_features(pixel_values=pixels).pooler_output for model in (judge, again))
    assert torch.equal(first, second)


def test_a_transformers_clip_is_read_as_one(clip_folder: Path) -> None:
    assert not isinstance(load_clip(clip_folder), ResNetClip)
