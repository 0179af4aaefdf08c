"""A damaged ONNX file is refused in one line, before or by a runtime, and never with a crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sdcompress_engines.errors import ArtifactError, EngineError, UsageError
from sdcompress_engines.flavour import TENSORRT_RTX
from sdcompress_engines.graph import read_graph


def write_graph(folder: Path, external: bool = True) -> Path:
    """`y = gelu(x · a) · b` in fp16, with weights inside or beside the file."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.standard_normal((32, 32)).astype(np.float16), name) for name in "ab"]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], name="first"),
        helper.make_node("Gelu", ["h"], ["g"], name="act"),
        helper.make_node("MatMul", ["g", "b"], ["y"], name="last"),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", 32]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph(nodes, "small", ports[:1], ports[1:], weights),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    path = folder / "small.onnx"
    onnx.save(model, path, save_as_external_data=external, location="small.onnx.data", size_threshold=0)
    return path


def test_a_whole_graph_is_described_without_its_weights(tmp_path: Path) -> None:
    facts = read_graph(write_graph(tmp_path))
    assert (facts.opset, dict(facts.operators)) == (21, {"MatMul": 2, "Gelu": 1})
    assert facts.inputs == {"x": ("batch", 32)}
    assert facts.outputs == {"y": ("batch", 32)}
    assert facts.external == ("small.onnx.data",)
    assert facts.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())


def test_missing_and_cut_weights_are_named(tmp_path: Path) -> None:
    path = write_graph(tmp_path)
    data = tmp_path / "small.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    with pytest.raises(EngineError, match=r"cut: small\.onnx\.data has .* expected"):
        read_graph(path)
    data.unlink()
    with pytest.raises(EngineError, match=r"small\.onnx\.data is not beside it"):
        read_graph(path)
    with pytest.raises(UsageError, match="no such file"):
        read_graph(tmp_path / "other.onnx")


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "", ".", "a/../../b", "C:\\x", "a\\..\\b"])
def test_weights_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    path = write_graph(tmp_path)
    model = onnx.load(path, load_external_data=False)
    next(entry for entry in model.graph.initializer[0].external_data if entry.key == "location").value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="a name inside"):
        read_graph(path)


def place_in_initializer(graph: onnx.GraphProto, tensor: onnx.TensorProto) -> None:
    graph.initializer.append(tensor)


def place_in_subgraph(graph: onnx.GraphProto, tensor: onnx.TensorProto) -> None:
    inner = onnx.helper.make_graph([], "inner", [], [], [tensor])
    graph.node.append(onnx.helper.make_node("If", ["c"], ["o"], then_branch=inner, else_branch=inner))


def place_in_constant(graph: onnx.GraphProto, tensor: onnx.TensorProto) -> None:
    graph.node.append(onnx.helper.make_node("Constant", [], ["o"], value=tensor))


def place_in_sparse(graph: onnx.GraphProto, tensor: onnx.TensorProto) -> None:
    graph.sparse_initializer.append(onnx.SparseTensorProto(values=tensor, dims=[4]))


@pytest.mark.parametrize("place", [place_in_initializer, place_in_subgraph, place_in_constant, place_in_sparse])
@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "link"])
def test_no_weight_of_a_graph_lies_outside_wherever_it_is_stored(
    tmp_path: Path, place: Callable[[onnx.GraphProto, onnx.TensorProto], None], location: str
) -> None:
    path = write_graph(tmp_path)
    (tmp_path / "link").symlink_to("/etc/passwd")
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    model = onnx.load(path, load_external_data=False)
    place(model.graph, tensor)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match=r"a name inside|is a link"):
        read_graph(path)


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes there")
def test_weights_in_a_link_or_a_pipe_are_refused(tmp_path: Path) -> None:
    (tmp_path / "graph").mkdir()
    path = write_graph(tmp_path / "graph")
    data = path.with_name("small.onnx.data")
    data.rename(tmp_path / "outside")
    data.symlink_to(tmp_path / "outside")
    with pytest.raises(EngineError, match="is a link"):
        read_graph(path)
    data.unlink()
    os.mkfifo(data)
    with pytest.raises(ArtifactError, match="is a named pipe"):
        read_graph(path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"not protobuf at all, but text\n" * 20])
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(EngineError, match="not a whole ONNX graph"):
        read_graph(tmp_path / "x.onnx")


_MUTANTS = """
import json, random, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
from sdcompress_engines.builder import build_engine
from sdcompress_engines.errors import SdCompressError
from sdcompress_engines.flavour import TENSORRT_RTX
from sdcompress_engines.profiles import Profile
from sdcompress_engines.runners import open_runner

folder, builds = Path(sys.argv[1]), sys.argv[2] == "build"
files = {name: (folder / name).read_bytes() for name in ("small.onnx", "small.onnx.data")}
profile = Profile({"x": ((1, 32), (2, 32), (4, 32))})
counts = {"refused": 0, "taken": 0}
for seed in range(int(sys.argv[3]), int(sys.argv[4])):
    rng = random.Random(seed)
    victim = "small.onnx" if rng.random() < 0.8 else "small.onnx.data"
    content = bytearray(files[victim])
    kind = rng.choice(["flip", "cut", "insert", "swap", "zero"])
    at = rng.randrange(len(content))
    if kind == "flip":
        for _ in range(rng.choice([1, 4, 32])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[at:]
    elif kind == "insert":
        content[at:at] = rng.randbytes(rng.randrange(1, 64))
    elif kind == "swap":
        other = rng.randrange(len(content))
        content[at:at + 16], content[other:other + 16] = content[other:other + 16], content[at:at + 16]
    else:
        content[at:at + 32] = bytes(min(32, len(content) - at))
    for name, whole in files.items():
        (folder / name).write_bytes(bytes(content) if name == victim else whole)
    try:
        if builds:
            build_engine(folder / "small.onnx", folder / "out" / "small.engine", profile, TENSORRT_RTX)
        else:
            with open_runner(folder / "small.onnx") as runner:
                shapes = {s.name: [2 if isinstance(size, str) else size for size in s.shape] for s in runner.inputs}
                runner.infer({s.name: torch.ones(shapes[s.name], dtype=s.dtype) for s in runner.inputs})
        counts["taken"] += 1
    except SdCompressError as error:
        assert "\\n" not in str(error) and len(str(error)) < 3000, (seed, str(error))
        counts["refused"] += 1
    left = sorted(p.name for p in (folder / "out").glob("*")) if (folder / "out").exists() else []
    assert left in ([], ["small.engine"]), (seed, left)
    (folder / "out" / "small.engine").unlink(missing_ok=True)
print(json.dumps(counts))
"""


def _mutate(folder: Path, what: str, start: int, end: int) -> dict[str, int]:
    write_graph(folder)
    done = subprocess.run(
        [sys.executable, "-c", _MUTANTS, str(folder), what, str(start), str(end)],
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    counts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counts


def test_mutated_graphs_end_in_our_error_or_in_an_answer(tmp_path: Path) -> None:
    counts = _mutate(tmp_path, "run", 0, 100)
    assert counts["refused"] + counts["taken"] == 100
    assert counts["refused"] >= 50


@pytest.mark.slow
@pytest.mark.skipif(TENSORRT_RTX.missing() is not None, reason="tensorrt-rtx is not installed")
def test_mutated_graphs_end_a_build_in_our_error_or_in_an_engine(tmp_path: Path) -> None:
    counts = _mutate(tmp_path, "build", 100, 150)
    assert counts["refused"] + counts["taken"] == 50
    assert counts["refused"] >= 25
