"""The layers of the whole model that an engine's UNet was made from: LoRAs are made for these.

A student lacks some of them, and has the others under numbers of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from .folders import EngineFolder
from .layout import parameter_shapes
from .library import errors, graph_weights, manifest, paths

_AGAIN = "export the model again, from its folder: sdcompress export MODEL --trt --signature comfyui -o DIR"


@dataclass(frozen=True)
class WholeModel:
    """The parameters of the whole model's UNet, by their LDM names without a prefix.

    Attributes:
        shapes: name → shape of each parameter.
        places: name → name of the same weight in the engine, for those that can be exchanged.
        obstacle: why no weight can be exchanged, as the end of a sentence about the engine; "" if some can.
    """

    shapes: Mapping[str, tuple[int, ...]]
    places: Mapping[str, str]
    obstacle: str = ""

    def is_fixed(self, name: str) -> bool:
        """Returns whether the engine has a parameter and cannot exchange it, such as a bias or a norm.

        Args:
            name: of a parameter.
        """
        return name not in self.places and _module_around(name) in self._modules

    def is_removed(self, name: str) -> bool:
        """Returns whether the engine has no such parameter, because its block was removed."""
        return name not in self.places and _module_around(name) not in self._modules

    @cached_property
    def _modules(self) -> frozenset[str]:
        """The modules that hold a weight of the engine, at any depth."""
        parts = (name.split(".") for name in self.places)
        return frozenset(".".join(each[:depth]) for each in parts for depth in range(1, len(each)))


def _module_around(name: str) -> str:
    """Returns the module around the layer that a parameter is of: `out` for `out.0.bias`."""
    return name.rsplit(".", 2)[0]


def read_whole_model(folder: EngineFolder) -> WholeModel:
    """Returns the layers of the whole model, and where the engine has them. The engine itself is not read.

    Args:
        folder: the engine.

    Raises:
        ArtifactError: the file of weights beside the engine is damaged, or a link.
    """
    shapes = parameter_shapes(folder.whole)
    if folder.weights is None:
        rounded = folder.precision in ("int8", "fp8")
        reason = f"its weights are rounded to {folder.precision}" if rounded else "it has no file of weights beside it"
        return WholeModel(shapes, {}, reason)
    place = folder.graph.parent
    file = paths.file_inside(place, folder.weights.name, source=place / manifest.MANIFEST_NAME)
    specs = graph_weights.GraphWeights(file).specs
    places = {spec.origin: name for name, spec in specs.items() if spec.origin}
    if len(places) < sum(bool(spec.origin) for spec in specs.values()):
        raise errors.ArtifactError("names one layer of the whole model twice", where=file, hint=_AGAIN)
    known = {spec.origin: spec.shape for spec in specs.values() if spec.origin}
    if odd := next((name for name, shape in known.items() if shapes.get(name) != shape), None):
        raise errors.ArtifactError(
            f"has the weight {errors.shorten(odd, 120)} of shape {known[odd]}",
            where=file,
            expected=f"{shapes[odd]}, as in the whole model" if odd in shapes else "weights of the whole model",
            hint=_AGAIN,
        )
    unknown = "it is of a student, and it is not known which blocks of the whole model it has"
    return WholeModel(shapes, places, "" if places else unknown)
