"""Runs the authors' LPIPS: python original_lpips.py WEIGHTS IN.npz OUT.npz.

The original imports torchvision for two stacks of layers, which are rebuilt here from torchvision's documentation.
"""

from __future__ import annotations

import pickle
import sys
import types
from typing import Any

import numpy as np
import torch
from torch import nn

ALEXNET: list[Any] = [
    (3, 64, 11, 4, 2),
    "M",
    (64, 192, 5, 1, 2),
    "M",
    (192, 384, 3, 1, 1),
    (384, 256, 3, 1, 1),
    (256, 256, 3, 1, 1),
    "M",
]
VGG16: list[Any] = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]


def stack(layers: list[nn.Module], arrays: Any) -> Any:
    """Returns the layers with the weights of arrays in JAX's order."""
    count = 0
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            array = arrays[f"Conv_{count}"]
            layer.weight.data = torch.tensor(array["kernel"].transpose(3, 2, 0, 1).copy())
            layer.bias.data = torch.tensor(array["bias"])
            count += 1
    assert count == len(arrays)
    return types.SimpleNamespace(features=nn.Sequential(*layers))


def load(name: str) -> Any:
    with open(f"{sys.argv[1]}/{name}.ckpt", "rb") as file:
        return next(part for key, part in pickle.load(file).items() if "Lin" not in key)


def alexnet(pretrained: bool) -> Any:
    layers: list[nn.Module] = []
    for part in ALEXNET:
        layers += [nn.MaxPool2d(3, 2)] if part == "M" else [nn.Conv2d(*part), nn.ReLU()]
    return stack(layers, load("alexnet"))


def vgg16(pretrained: bool) -> Any:
    layers: list[nn.Module] = []
    last = 3
    for width in VGG16:
        layers += [nn.MaxPool2d(2, 2)] if width == "M" else [nn.Conv2d(last, width, 3, padding=1), nn.ReLU()]
        last = last if width == "M" else width
    return stack(layers, load("vgg16"))


def main() -> None:
    models: Any = types.ModuleType("torchvision.models")
    models.alexnet, models.vgg16 = alexnet, vgg16
    torchvision: Any = types.ModuleType("torchvision")
    torchvision.models = models
    sys.modules["torchvision"], sys.modules["torchvision.models"] = torchvision, models
    import lpips

    x, y = (torch.from_numpy(array) for array in np.load(sys.argv[2]).values())
    with torch.no_grad():
        nets = {net: lpips.LPIPS(net=net, verbose=False) for net in ("alex", "vgg")}
        np.savez(sys.argv[3], **{name: net(x, y, normalize=True).flatten().numpy() for name, net in nets.items()})


if __name__ == "__main__":
    main()
