"""LPIPS, the perceptual distance of two pictures, as a measure."""

from __future__ import annotations

import torch

from sdcompress.support.lpips import LpipsNetwork

from .pictures import exact_convolutions, find_device, measure_pairs


class Lpips:
    """LPIPS of pairs of pictures; see `sdcompress.support.lpips.LpipsNetwork`.

    Args:
        net: `alex` (at least 31 px), which the authors advise for measuring, or `vgg` (at least 16 px).
        device: `cpu` or a CUDA device.

    Raises:
        UsageError: there is no such net.
        BackendMissing: the package with the weights is not installed, or there is no such device.
    """

    def __init__(self, net: str = "alex", device: str | torch.device = "cpu") -> None:
        self.device = find_device(device)
        self.network = LpipsNetwork(net).to(self.device)

    @torch.inference_mode()
    def __call__(self, pictures: torch.Tensor, references: torch.Tensor, batch: int = 4) -> torch.Tensor:
        """Returns the distance of each pair: (B,), float32, on the CPU.

        Args:
            pictures, references: (B, 3, H, W), uint8 or float in [0, 1].
            batch: pairs at once.
        """
        with exact_convolutions():
            return measure_pairs(self._distance, pictures, references, batch, self.network.least_px)

    def _distance(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        distance: torch.Tensor = self.network(x.to(self.device), y.to(self.device))
        return distance.cpu()
