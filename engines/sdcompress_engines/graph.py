"""ONNX graphs, read without their weights, so that a damaged one is found before a runtime loads it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from .errors import EngineError, UsageError, shorten
from .files import check_regular
from .manifest import canonical, sha256_file
from .paths import file_inside

AGAIN = "export it again: sdcompress export MODEL -o DIR"


@dataclass(frozen=True)
class GraphFacts:
    """What is known of an ONNX graph without its weights.

    Attributes:
        opset: of the standard operators.
        operators: name → number of nodes.
        inputs, outputs: name → sizes; an int is fixed, a name is free.
        bytes: of the graph and its external data.
        external: files beside the graph that hold weights.
    """

    opset: int
    operators: Mapping[str, int]
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, tuple[int | str, ...]]
    bytes: int
    external: tuple[str, ...]


def read_graph(path: str | PathLike[str]) -> GraphFacts:
    """Returns the facts of an ONNX file.

    Raises:
        UsageError: no such file. EngineError: the file is no whole graph, its external data is missing or cut, or it
            names files outside its folder, or links.
    """
    from google.protobuf.message import DecodeError

    path = Path(path)
    model = load_structure(path)
    try:
        external = _read_external(model, path)
        facts = GraphFacts(
            opset=next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0),
            operators=Counter(node.op_type for node in model.graph.node),
            inputs={value.name: _sizes(value) for value in model.graph.input},
            outputs={value.name: _sizes(value) for value in model.graph.output},
            bytes=path.stat().st_size + sum(external.values()),
            external=tuple(sorted(external)),
        )
    except (ValueError, TypeError, AttributeError, DecodeError) as error:  # text that is not UTF-8 comes as bytes
        raise EngineError(f"not a whole ONNX graph ({shorten(error)})", where=path, hint=AGAIN) from error
    if not facts.opset or not facts.operators or not facts.outputs:
        raise EngineError("not a whole ONNX graph: it has no opset, no nodes or no outputs", where=path, hint=AGAIN)
    for name, needed in external.items():
        data = file_inside(path.parent, name, source=path)
        if not data.exists():
            raise EngineError(
                f"its weights are missing: {name} is not beside it",
                where=path,
                hint=f"copy {name} here too, or {AGAIN}",
            )
        check_regular(data)
        if data.stat().st_size < needed:
            raise EngineError(
                f"its weights are cut: {name} has {data.stat().st_size:,} bytes",
                where=path,
                expected=f"{needed:,}",
                hint=AGAIN,
            )
    return facts


def weights_path(graph: str | PathLike[str]) -> Path:
    """Returns where the weights of a graph lie, whether they are there or not."""
    graph = Path(graph)
    return graph.with_name(f"{graph.name}.safetensors")


def _read_external(model: Any, path: Path) -> dict[str, int]:
    """Returns name → needed bytes of the files beside a graph that hold its weights.

    Raises:
        EngineError: a weight names a file outside the folder, or a link. ValueError: a place is no number.
    """
    needed: dict[str, int] = {}
    for tensor in _model_tensors(model):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        name = entry.get("location", "")
        file_inside(path.parent, name, source=path, error=EngineError)
        start, length = int(entry.get("offset", 0)), int(entry.get("length", 0))
        if start < 0 or length < 0:
            raise ValueError(f"the weight {shorten(tensor.name, 60)!r} begins at {start} and has {length} bytes")
        needed[name] = max(needed.get(name, 0), start + length)
    return needed


def sha256_graph(path: Path) -> str:
    """Returns the sha256 of a graph, as engine keys hold it: of its file, or of all its files where it has several.

    Raises:
        EngineError: one of them is a link.
    """
    names = sorted(file.name for file in path.parent.iterdir() if file.name.startswith(path.name))
    files = {name: file_inside(path.parent, name, source=path, error=EngineError) for name in names}
    return sha256_files({name: sha256_file(file) for name, file in files.items() if file.is_file()})


def sha256_files(files: Mapping[str, str]) -> str:
    """Returns what `sha256_graph` returns, from name → sha256 of the graph's files, as a manifest has them."""
    return next(iter(files.values())) if len(files) == 1 else hashlib.sha256(canonical(dict(files))).hexdigest()


def load_structure(path: Path) -> Any:
    """Returns the `onnx.ModelProto` of a file, without external data.

    Raises:
        UsageError: no such file. EngineError: it is not ONNX.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.exists():
        raise UsageError("no such file", where=path, hint="make it with: sdcompress export MODEL -o DIR")
    check_regular(path, EngineError)
    try:
        return onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError, RuntimeError, UnicodeDecodeError) as error:
        raise EngineError(
            f"not a whole ONNX graph ({' '.join(str(error).split())[:200]})", where=path, hint=AGAIN
        ) from error


def tensors(graph: Any) -> Iterator[Any]:
    """Yields every stored tensor of a graph and of the graphs in it: initializers and the constants of its nodes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for sparse in (*attribute.sparse_tensors, *([attribute.sparse_tensor] * attribute.HasField("sparse_tensor"))):
            yield from (sparse.values, sparse.indices)
        for graph in (*attribute.graphs, *([attribute.g] * attribute.HasField("g"))):
            yield from tensors(graph)


def _model_tensors(model: Any) -> Iterator[Any]:
    """Yields every stored tensor of a model, also of its functions and of a training that it describes."""
    graphs = (graph for info in model.training_info for graph in (info.initialization, info.algorithm))
    for graph in (model.graph, *graphs):
        yield from tensors(graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _sizes(value: Any) -> tuple[int | str, ...]:
    return tuple(
        size.dim_value if size.HasField("dim_value") else size.dim_param or "?"
        for size in value.type.tensor_type.shape.dim
    )
