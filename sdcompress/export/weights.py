"""The weights of a graph, in a file beside it: see `sdcompress_engines.graph_weights`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sdcompress_engines.errors import ExportError
from sdcompress_engines.graph import weights_path
from sdcompress_engines.graph_weights import describe_weights, exchangeable_layers
from sdcompress_engines.ldm_keys import ldm_unet_keys
from sdcompress_engines.safetensors_file import read_header

from sdcompress.export.components import ComponentGraph
from sdcompress.families.registry import family_of
from sdcompress.prune.plan import BlockPlan
from sdcompress.prune.student import meta_unet

_PREFIX = "part."
"""Of a component's parameters in its `ComponentGraph`."""


def unet_origins(config: Mapping[str, Any], plan: BlockPlan | None) -> dict[str, str]:
    """Returns the LDM names that a UNet's parameters have in the whole model, by their own names.

    Args:
        config: of the UNet.
        plan: from the whole model to a student; None where the UNet is whole. Of a student without one they are
            not known, and the result is empty.
    """
    if plan is None and family_of(config).student_of(config) is not None:
        return {}
    own = meta_unet(config).state_dict()
    whole = own if plan is None else meta_unet(plan.teacher).state_dict()
    ldm = ldm_unet_keys(whole)
    named = {name: ldm.get(name if plan is None else plan.teacher_key(name)) for name in own}
    return {name: origin for name, origin in named.items() if origin is not None}


def lora_weights(part: torch.nn.Module) -> list[str]:
    """Returns the names of a component's weights that a LoRA can change: of its linear layers and convolutions."""
    return [f"{name}.weight" for name in exchangeable_layers(part)]


def save_module_weights(graph: ComponentGraph, path: Path, origins: Mapping[str, str]) -> None:
    """Write the weights that a LoRA can change beside a graph, as torch has them.

    Args:
        graph: the component that the graph was made from.
        path: of the graph.
        origins: see `unet_origins`.
    """
    parameters = dict(graph.part.named_parameters())
    layers = lora_weights(graph.part)
    kept = {name: parameters[name].detach().cpu().contiguous() for name in layers}
    _save(kept, path, describe_weights((), layers, {name: origins[name] for name in layers if name in origins}))


def name_weights(model: Any) -> frozenset[str]:
    """Give a traced graph's weights the names of the component's parameters, and store transposed what it transposes.

    The exporter multiplies by the transpose of a linear layer's weight. Left to its optimizer, the transpose would
    become a constant with a number for a name.

    Args:
        model: an `onnx_ir.Model`, not optimized yet.

    Returns:
        The names of the weights that are stored as their transposes.
    """
    graph = model.graph
    for value in list(graph.initializers.values()):
        if value.name.startswith(_PREFIX):
            value.name = value.name.removeprefix(_PREFIX)
    transposed = set()
    for name, value in list(graph.initializers.items()):
        uses = [node for node, _ in value.uses()]
        if uses and len(value.shape) == 2 and all(_swaps_axes(node) for node in uses):
            _store_transposed(graph, value, uses)
            transposed.add(name)
    return frozenset(transposed)


def _swaps_axes(node: Any) -> bool:
    permutation = node.attributes.get("perm")
    return node.op_type == "Transpose" and (permutation is None or list(permutation.as_ints()) == [1, 0])


def _store_transposed(graph: Any, value: Any, uses: Iterable[Any]) -> None:
    """Replace a matrix by its transpose, and remove the nodes that transposed it."""
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import TorchTensor

    held = value.const_value
    matrix = held.raw if isinstance(held.raw, torch.Tensor) else torch.from_numpy(held.numpy())
    name = value.name
    graph.initializers.pop(name)
    tensor = TorchTensor(matrix.t().contiguous(), name=name)
    stored = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(stored)
    for node in uses:
        ir.convenience.replace_all_uses_with(node.outputs[0], stored)
        graph.remove(node, safe=True)


def check_weights(model: Any, part: torch.nn.Module, transposed: Iterable[str]) -> None:
    """Refuse a graph that does not hold every weight that a LoRA can change, in one piece and with its shape.

    Args:
        model: an `onnx_ir.Model`, as it will be written.
        part: the component.
        transposed: see `name_weights`.

    Raises:
        ExportError: names the first weight that is not there.
    """
    shapes = {name: tuple(value.shape) for name, value in part.named_parameters()}
    for name in lora_weights(part):
        value = model.graph.initializers.get(name)
        wanted = shapes[name][::-1] if name in transposed else shapes[name]
        if value is None or tuple(value.shape) != wanted:
            found = "is not in the graph" if value is None else f"is {tuple(value.shape)} in the graph"
            raise ExportError(
                f"the weight {name} {found}, so no LoRA could change it",
                expected=f"one of shape {wanted}",
                hint="another version of torch or onnxscript",
            )


def move_weights_out(
    model: Any, path: Path, part: torch.nn.Module, transposed: Iterable[str], origins: Mapping[str, str]
) -> None:
    """Write a component's parameters to the file beside its graph, and let the graph read them from there.

    Args:
        model: an `onnx_ir.Model`; it is changed.
        path: of the graph.
        part: the component.
        transposed: see `name_weights`.
        origins: see `unet_origins`.

    Raises:
        ExportError: as `check_weights`.
    """
    import onnx_ir as ir

    check_weights(model, part, transposed)
    initializers = {name: model.graph.initializers.get(name) for name, _ in part.named_parameters()}
    values = {name: value for name, value in initializers.items() if value is not None}
    layers = lora_weights(part)
    metadata = describe_weights(
        set(transposed) & set(layers), layers, {name: origins[name] for name in layers if name in origins}
    )
    file = _save({name: _to_torch(value.const_value) for name, value in values.items()}, path, metadata)
    header = read_header(file)
    for name, value in values.items():
        begin, end = header.entries[name]["data_offsets"]
        held = value.const_value
        value.const_value = ir.ExternalTensor(
            file.name, header.start + begin, end - begin, held.dtype, shape=held.shape, name=name, base_dir=path.parent
        )


def _to_torch(held: Any) -> torch.Tensor:
    """Returns the value of an initializer, contiguous and sharing no memory with another one."""
    raw = getattr(held, "raw", None)
    value = raw if isinstance(raw, torch.Tensor) else torch.from_numpy(held.numpy())
    return value.detach().cpu().contiguous()


def _save(tensors: Mapping[str, torch.Tensor], graph: Path, metadata: dict[str, str]) -> Path:
    file = weights_path(graph)
    save_file(dict(tensors), file, metadata=metadata)
    return file
