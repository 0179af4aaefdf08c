"""Read and write LoRA files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from sdcompress_engines.errors import ModelError, UsageError, shorten
from sdcompress_engines.ldm_keys import ldm_unet_keys
from sdcompress_engines.output_folders import staged_file

from sdcompress.checkpoints.identify import LORA, identify_weights
from sdcompress.checkpoints.tensor_files import COPY_AGAIN
from sdcompress.checkpoints.weights import Weights, open_weights
from sdcompress.lora.names import clip_modules, find_layer, kohya_prefix, split_key
from sdcompress.lora.settings import find_alpha, read_settings

FAULTS_SHOWN = 3
"""Faulty layers that a message names."""
NAME_SHOWN = 80
"""Longest name of a layer in a message."""


@dataclass(frozen=True)
class LoraLayer:
    """The change of one layer's weight: `up @ down · alpha / rank`.

    Attributes:
        down: (rank, in) or, of a convolution, (rank, in, k, k). up: (out, rank) or (out, rank, 1, 1).
        alpha: scales the change.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The inner dimension of the two matrices."""
        return len(self.down)

    def delta(self, shape: torch.Size) -> torch.Tensor:
        """Returns the change of a weight of this shape, float32."""
        return (self.up.float().flatten(1) @ self.down.float().flatten(1)).view(shape) * (self.alpha / self.rank)

    def fits(self, shape: torch.Size) -> bool:
        """Returns whether this is the change of a weight of this shape; a 1 x 1 convolution is a matrix."""
        return _drop_ones((len(self.up), *self.down.shape[1:])) == _drop_ones(tuple(shape))

    def describe_shape(self) -> str:
        """Returns the shape of the weight that this changes, for a message."""
        return _name_shape((len(self.up), *self.down.shape[1:]))


Layers = dict[tuple[str, str], LoraLayer]
"""(component, module name) → layer."""


def read_lora(path: Path, modules: Iterable[str]) -> Layers:
    """Returns the layers of a LoRA file in either naming.

    Args:
        path: a `.safetensors` file, or a pickle of tensors.
        modules: the layers of the UNet that the file was made for. kohya's names have an underscore for every dot, and
            are matched against these, by the names of diffusers or of the LDM layout.

    Raises:
        UsageError: there is no such file.
        ModelError: the file is no LoRA, is another kind of adapter (LoHa, LoKr, DoRA), was made for another UNet, or
            has layers whose tensors do not fit each other; the message names the first of them.
    """
    if not path.exists():
        raise UsageError("does not exist", where=path, expected="a LoRA, .safetensors")
    weights = open_weights(path)
    parts = _group_by_layer(weights, modules)
    settings = read_settings(weights)
    layers, faults = Layers(), list[str]()
    for place, keys in parts.items():
        layer = _read_layer(weights, keys, partial(find_alpha, settings, *place))
        if isinstance(layer, LoraLayer):
            layers[place] = layer
        else:
            faults.append(f"{shorten(place[1], NAME_SHOWN)} {layer}")
    if faults:
        raise ModelError(
            f"has {describe_faults(faults, len(parts))}",
            where=path,
            expected="two floating-point matrices of one rank and finite numbers a layer",
            hint=COPY_AGAIN,
        )
    return layers


def describe_faults(faults: list[str], total: int) -> str:
    """Returns how many layers are faulty, and what is wrong with the first of them.

    Args:
        faults: name and fault of each faulty layer.
        total: number of all layers.
    """
    more = ", ..." if len(faults) > FAULTS_SHOWN else ""
    return f"{len(faults)} of {total} layers that cannot be used: {', '.join(faults[:FAULTS_SHOWN])}{more}"


def _group_by_layer(weights: Weights, modules: Iterable[str]) -> dict[tuple[str, str], dict[str, str]]:
    """Returns (component, module name) → role → key.

    Raises:
        ModelError: no tensor, or not every one, belongs to a layer of the model.
    """
    known = {"unet": _unet_names(list(modules))}
    known["text_encoder"] = known["text_encoder_2"] = {name.replace(".", "_"): name for name in clip_modules()}
    parts: dict[tuple[str, str], dict[str, str]] = {}
    unknown: list[str] = []
    for key in weights.shapes:
        split = split_key(key)
        layer = find_layer(split[0], known) if split else None
        if split is None or layer is None:
            unknown.append(key)
        elif split[1] in parts.setdefault(layer, {}):
            raise ModelError(
                f"names the layer {shorten(layer[1], NAME_SHOWN)} twice, as {shorten(key, NAME_SHOWN)} and as"
                f" {shorten(parts[layer][split[1]], NAME_SHOWN)}",
                where=weights.path,
                expected="one naming",
            )
        else:
            parts[layer][split[1]] = key
    if not parts:
        kind = identify_weights(weights)
        raise ModelError(
            f"is a LoRA whose layers have names of another kind, such as {shorten(unknown[0], NAME_SHOWN)}"
            if kind == LORA
            else f"is not a LoRA: it holds {kind}"
            if unknown
            else "is empty",
            where=weights.path,
            expected="layers named as diffusers or kohya's scripts name them",
        )
    if unknown:
        raise ModelError(
            f"has {len(unknown)} of {len(weights.shapes)} tensors that belong to no layer here, such as"
            f" {shorten(unknown[0], NAME_SHOWN)}",
            where=weights.path,
            expected="a plain LoRA made for this UNet's family",
        )
    return parts


def _read_layer(weights: Weights, keys: Mapping[str, str], default_alpha: Callable[[int], float]) -> LoraLayer | str:
    """Returns a layer, or what is wrong with it.

    Args:
        weights: the open file.
        keys: role → key of the layer's tensors.
        default_alpha: rank → the alpha of a layer without a tensor for it.
    """
    if not {"down", "up"} <= keys.keys():
        return "has only one half"
    shapes = {role: weights.shapes[key] for role, key in keys.items()}
    if fault := _find_shape_fault(shapes):
        return fault
    tensors = {role: weights.read(key) for role, key in keys.items()}
    for role, tensor in tensors.items():
        if not tensor.is_floating_point() and role != "alpha":
            return f"is of type {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.is_complex() or not tensor.float().isfinite().all():
            return "has numbers that are not finite"
    down, up = tensors["down"], tensors["up"]
    try:
        return LoraLayer(down, up, float(tensors["alpha"]) if "alpha" in tensors else default_alpha(len(down)))
    except ValueError as error:
        return f"has {error}"


def _find_shape_fault(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Returns why the shapes of a layer's tensors, by role, do not fit each other; "" where they do."""
    down, up, alpha = shapes["down"], shapes["up"], shapes.get("alpha", ())
    matrices = f"has matrices of {_name_shape(up)} and {_name_shape(down)}"
    if not {len(down), len(up)} <= {2, 4} or 0 in (*down, *up):
        return matrices
    if down[0] != up[1]:
        return f"{matrices}, of the ranks {up[1]} and {down[0]}"
    if up[2:] not in ((), (1, 1)):
        return f"{matrices}, of which the first is no 1 x 1 convolution"
    return "" if math.prod(alpha) == 1 else f"has an alpha of {math.prod(alpha)} numbers"


def _drop_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape


def _name_shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape[:6])) or "one number"


def _unet_names(modules: list[str]) -> dict[str, str]:
    """Returns a UNet layer's name in kohya's files → its module name.

    kohya's scripts take the names of SD1's and SD2's layers from diffusers, and those of SDXL's from the LDM layout.

    Args:
        modules: all of the UNet's layers.
    """
    ldm = ldm_unet_keys(f"{name}.weight" for name in modules)
    names = {key.removesuffix(".weight"): name.removesuffix(".weight") for name, key in ldm.items() if key is not None}
    return {key.replace(".", "_"): name for key, name in names.items()} | {m.replace(".", "_"): m for m in modules}


def write_lora(layers: Layers, path: Path, naming: str, metadata: Mapping[str, str] | None = None) -> None:
    """Write a LoRA file; it appears by one rename.

    Args:
        layers: of the LoRA.
        path: of the file.
        naming: `diffusers` or `kohya`. diffusers' has no alpha, so it is multiplied into the `up` matrix.
        metadata: further entries for the file; values are text.

    Raises:
        StorageError: there is no space or no permission.
    """
    tensors: dict[str, torch.Tensor] = {}
    components = {component for component, _ in layers}
    for (component, name), layer in layers.items():
        if naming == "kohya":
            prefix = kohya_prefix(component, components) + name.replace(".", "_")
            tensors |= {
                f"{prefix}.lora_down.weight": layer.down,
                f"{prefix}.lora_up.weight": layer.up,
                f"{prefix}.alpha": torch.tensor(layer.alpha),
            }
        else:
            tensors |= {
                f"{component}.{name}.lora_A.weight": layer.down,
                f"{component}.{name}.lora_B.weight": layer.up * (layer.alpha / layer.rank),
            }
    entries = {"format": "pt"} | dict(metadata or {})
    with staged_file(path) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata=entries)
