"""Read and write LoRA files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from sdcompress_engines.errors import ModelError, UsageError, shorten
from sdcompress_engines.output_folders import staged_file

from sdcompress.checkpoints.identify import LORA, identify_weights
from sdcompress.checkpoints.tensor_files import COPY_AGAIN
from sdcompress.checkpoints.weights import Weights, open_weights
from sdcompress.lora.adapters import ALPHA, Adapter, DoRA, Layers, LowRank
from sdcompress.lora.build import build_adapter, find_shape_fault
from sdcompress.lora.names import MAGNITUDE, count_unsupported, find_layer, known_layers, kohya_prefix, split_key
from sdcompress.lora.settings import find_alpha, read_settings

FAULTS_SHOWN = 3
"""Faulty layers that a message names."""
NAME_SHOWN = 80
"""Longest name of a layer in a message."""
_KEY_SHOWN = 100
SUPPORTED = "LoRA, LoCon, LoHa, LoKr or DoRA"


def read_lora(path: Path, modules: Iterable[str]) -> Layers:
    """Returns the layers of a LoRA file in any naming.

    Args:
        path: a `.safetensors` file, or a pickle of tensors.
        modules: the layers of the UNet that the file was made for. kohya's names have an underscore for every dot, and
            are matched against these, by the names of diffusers or of the LDM layout.

    Raises:
        UsageError: there is no such file.
        ModelError: the file is no LoRA, holds a kind of adapter that is not supported (OFT, IA3, GLoRA), was made for
            another UNet, or has layers whose tensors do not fit each other; the message names the first of them.
    """
    if not path.exists():
        raise UsageError("does not exist", where=path, expected="a LoRA, .safetensors")
    weights = open_weights(path)
    _refuse_unsupported(weights)
    parts = _group_by_layer(weights, modules)
    settings = read_settings(weights)
    layers, faults = Layers(), list[str]()
    for place, keys in parts.items():
        layer = _read_layer(weights, keys, partial(find_alpha, settings, *place))
        if isinstance(layer, Adapter):
            layers[place] = layer
        else:
            faults.append(f"{shorten(place[1], NAME_SHOWN)} {layer}")
    if faults:
        raise ModelError(
            f"has {describe_faults(faults, len(parts))}",
            where=path,
            expected="floating-point matrices that fit each other and finite numbers in every layer",
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


def _refuse_unsupported(weights: Weights) -> None:
    """Refuse a file with adapters of a kind that is not supported.

    Raises:
        ModelError: names the kinds, and how many layers there are of each.
    """
    if counts := count_unsupported(weights.shapes):
        kinds = " and ".join(f"{count} {kind}" for kind, count in counts.items())
        raise ModelError(f"holds {kinds} layers, which are not supported", where=weights.path, expected=SUPPORTED)


def _group_by_layer(weights: Weights, modules: Iterable[str]) -> dict[tuple[str, str], dict[str, str]]:
    """Returns (component, module name) → role → key.

    Raises:
        ModelError: no tensor, or not every one, belongs to a layer of the model.
    """
    known = known_layers(modules)
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
            expected="layers named as diffusers, PEFT, kohya's scripts or LyCORIS name them",
        )
    if unknown:
        shown = ", ".join(shorten(key, _KEY_SHOWN) for key in unknown[:FAULTS_SHOWN])
        raise ModelError(
            f"has {len(unknown)} of {len(weights.shapes)} tensors that belong to no layer here, such as {shown}",
            where=weights.path,
            expected=f"a {SUPPORTED} made for this UNet's family",
        )
    return parts


def _read_layer(weights: Weights, keys: Mapping[str, str], default_alpha: Callable[[int], float]) -> Adapter | str:
    """Returns a layer, or what is wrong with it.

    Args:
        weights: the open file.
        keys: role → key of the layer's tensors.
        default_alpha: rank → the alpha of a layer without a tensor for it.
    """
    if fault := find_shape_fault({role: weights.shapes[key] for role, key in keys.items()}):
        return fault
    tensors = {role: weights.read(key) for role, key in keys.items()}
    for role, tensor in tensors.items():
        if not tensor.is_floating_point() and role != ALPHA:
            return f"is of type {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.is_complex() or not tensor.float().isfinite().all():
            return "has numbers that are not finite"
    try:
        return build_adapter(tensors, default_alpha)
    except ValueError as error:
        return f"has {error}"


def write_lora(layers: Layers, path: Path, naming: str, metadata: Mapping[str, str] | None = None) -> None:
    """Write a LoRA file; it appears by one rename.

    Args:
        layers: of the LoRA.
        path: of the file.
        naming: `diffusers` or `kohya`. diffusers' has no alpha, so it is multiplied into the `up` matrix.
        metadata: further entries for the file; values are text.

    Raises:
        UsageError: diffusers' naming has no keys for one of the layers.
        StorageError: there is no space or no permission.
    """
    tensors: dict[str, torch.Tensor] = {}
    components = {component for component, _ in layers}
    for (component, name), layer in layers.items():
        if naming == "kohya":
            prefix, ends = kohya_prefix(component, components) + name.replace(".", "_"), layer.tensors()
        else:
            prefix, ends = f"{component}.{name}", _diffusers_tensors(layer, path)
        tensors |= {f"{prefix}.{end}": tensor for end, tensor in ends.items()}
    entries = {"format": "pt"} | dict(metadata or {})
    with staged_file(path) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata=entries)


def _diffusers_tensors(layer: Adapter, path: Path) -> dict[str, torch.Tensor]:
    """Returns end of the key → tensor in diffusers' naming.

    Args:
        layer: a LoRA, or a DoRA of one with norms of the output channels.
        path: of the file, for the message.

    Raises:
        UsageError: it is another kind.
    """
    inner = layer.inner if isinstance(layer, DoRA) else layer
    if not isinstance(inner, LowRank) or inner.mid is not None or (isinstance(layer, DoRA) and not layer.per_output):
        raise UsageError(
            f"diffusers' naming has no {layer.kind} layers of this form", where=path, hint="--naming kohya"
        )
    scaled = inner.up.float() * inner.scale
    rounded = scaled.to(inner.up.dtype)
    tensors = {
        "lora_A.weight": inner.down,
        "lora_B.weight": rounded if torch.equal(rounded.float(), scaled) else scaled,
    }
    if isinstance(layer, DoRA):
        is_kernel = len(layer.shape) == 4
        tensors[MAGNITUDE] = layer.magnitudes.reshape((1, -1, 1, 1) if is_kernel else (-1,))
    return tensors
