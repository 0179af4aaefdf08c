"""A figure with its interval, and the mean of one figure a picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sdcompress_engines.errors import DataError


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval.

    Attributes:
        low, high: bounds of the interval.
        count: number of pictures; of two sets, the smaller number.
        warning: what a reader must know before trusting the figure; may be empty.
    """

    value: float
    low: float
    high: float
    count: int
    warning: str = ""


@dataclass(frozen=True, kw_only=True)
class KernelDistance(Estimate):
    """KID: the mean over `subsets` draws of `subset_size` pictures of each set.

    Attributes:
        subset_std: standard deviation over the draws, as papers print it. It is not the error of the mean, because the
            draws overlap.
    """

    subset_std: float
    subsets: int
    subset_size: int


def mean_of(values: torch.Tensor, seed: int = 0, resamples: int = 2000) -> Estimate:
    """Returns the mean of one figure a picture with its percentile bootstrap interval (Efron 1979).

    This does not call `scipy.stats.bootstrap`: it draws other resamples, so intervals in committed results would
    change.

    Args:
        values: (N,).
        seed: of the resamples; the same values and seed give the same interval.
        resamples: how many are drawn.

    Raises:
        DataError: there are no values, or one is not finite.
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
