"""The weights of a graph that can be exchanged while it runs, in a safetensors file beside it.

`unet.onnx` has `unet.onnx.safetensors`, `unet.engine` has `unet.engine.safetensors`, and so on. The file holds the
weights as the graph does: for most linear layers that is the transpose. Its header says which those are, and which
layer of the whole model each one is. A WebUI matches a LoRA to that model, also where the graph is a student's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch

from .errors import ArtifactError, shorten
from .safetensors_file import read_header, read_tensors

WEIGHTS_ENTRY = "sdcompress_weights"
"""The entry of the file's metadata that describes the layers, as JSON."""
_EXPORT_AGAIN = "export it again: sdcompress export MODEL -o DIR"


@dataclass(frozen=True)
class WeightSpec:
    """One weight that can be exchanged.

    Attributes:
        shape: as torch's layer has it, such as (out, in) or (out, in, 3, 3).
        dtype: of the graph's weight.
        transposed: whether the graph holds the transpose of it.
        origin: the LDM name of the same weight in the whole model, without `model.diffusion_model.`; empty where the
            component has no such names.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False
    origin: str = ""


def exchangeable_layers(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Returns the layers of a module whose weights a LoRA can change, by name: linear layers and convolutions.

    Args:
        module: may be on the meta device.
    """
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, kinds)}


def describe_weights(transposed: Iterable[str], layers: Iterable[str], origins: Mapping[str, str]) -> dict[str, str]:
    """Returns the metadata of a weights file: one entry, so that equal weights give equal files.

    Args:
        transposed: names of the weights that the file holds transposed.
        layers: names of all weights that can be exchanged.
        origins: weight → its LDM name in the whole model.
    """
    entry = {"layers": sorted(layers), "transposed": sorted(transposed), "origins": dict(sorted(origins.items()))}
    return {WEIGHTS_ENTRY: json.dumps(entry, separators=(",", ":"))}


class GraphWeights:
    """The file of a graph's weights.

    Args:
        path: of the file.

    Attributes:
        specs: the weights that can be exchanged, by the names of their parameters in torch.

    Raises:
        ArtifactError: the file is damaged, or does not describe its weights.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        text = read_header(self.path).metadata.get(WEIGHTS_ENTRY)
        self._tensors = read_tensors(self.path)
        try:
            entry = json.loads(text or "")
            transposed, origins = frozenset(entry["transposed"]), dict(entry["origins"])
            self.specs = {name: self._spec(name, name in transposed, origins) for name in entry["layers"]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"does not describe its weights ({shorten(error, 120)})", where=self.path, hint=_EXPORT_AGAIN
            ) from error

    def _spec(self, name: str, transposed: bool, origins: Mapping[str, str]) -> WeightSpec:
        tensor = self._tensors[name]
        if transposed and tensor.ndim != 2:
            raise ValueError(f"{name} has {tensor.ndim} axes and is transposed")
        shape = tuple(tensor.t().shape if transposed else tensor.shape)
        return WeightSpec(shape, tensor.dtype, transposed, str(origins.get(name, "")))

    def read(self, name: str) -> torch.Tensor:
        """Returns the original value of a weight as torch has it, on the CPU. Do not write to it."""
        tensor = self._tensors[name]
        return tensor.t() if self.specs[name].transposed else tensor
