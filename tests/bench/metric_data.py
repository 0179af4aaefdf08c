"""Pictures and features for the tests of the metrics, and marks for what is not installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from sdcompress_bench.quality import to_pixels

from sdcompress.data.sources import open_source
from sdcompress.models import nano

AGREES = 1e-4
"""The largest difference from a reference program."""
Pairs = tuple[torch.Tensor, torch.Tensor]


def needs(*packages: str) -> Any:
    """Returns a mark that skips a test where a package is not installed."""
    missing = [p for p in packages if find_spec(p) is None]
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}")


def real_pictures(split: str, count: int) -> torch.Tensor:
    """Returns nano's pictures, (count, 3, 128, 128), uint8."""
    return torch.stack(
        [
            (to_pixels(record.picture()) * 255).round().byte()
            for _, record in zip(range(count), open_source(nano.shards(split)), strict=False)
        ]
    )


def spoil(pictures: torch.Tensor, strength: float) -> torch.Tensor:
    """Returns the pictures with noise."""
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    return (pictures + 255 * strength * noise).clamp(0, 255).byte()


def vectors(count: int, size: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Returns random features, (count, size), float32."""
    return scale * torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def package_folder(package: str) -> Path:
    """Returns the folder of an installed package, without importing it."""
    spec = find_spec(package)
    assert spec
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])
