"""A graph for ONNX Runtime has only operators with a kernel in its CUDA provider, and computes the same values."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import onnxscript.ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from sdcompress_engines.errors import UsageError
from sdcompress_engines.exactness import relative_l2
from sdcompress_engines.runners import open_runner

from sdcompress.export.onnx import export_onnx
from sdcompress.export.onnxruntime_ops import use_onnxruntime_ops

from .conftest import Exports

# Operators that `export` writes and for which onnxruntime-gpu 1.27 to 1.31.1 has CUDA kernels at opset 23, or which it
# runs on the CPU as arithmetic on shapes. Recorded from its own partitioning of these graphs.
KERNELS = {
    "Add",
    "ArgMax",
    "Attention",
    "Cast",
    "Concat",
    "Conv",
    "Cos",
    "Div",
    "Equal",
    "Expand",
    "Gather",
    "GatherND",
    "Gelu",
    "Gemm",
    "LayerNormalization",
    "MatMul",
    "Mul",
    "Range",
    "Reshape",
    "Resize",
    "Shape",
    "Sigmoid",
    "Sin",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
INTEGERS = (TensorProto.INT32, TensorProto.INT64)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


@pytest.mark.parametrize("precision", ["fp32", "fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_every_operator_of_an_export_for_onnxruntime_has_a_cuda_kernel(small_exports: Exports, precision: str) -> None:
    paths = list(small_exports(precision=precision, runtime="onnxruntime").folder.glob("*.onnx"))
    assert len(paths) == 3
    for path in paths:
        model = onnx.load(path)
        assert set(operators(path)) <= KERNELS
        types = {
            value.name: value.type.tensor_type.elem_type
            for value in onnx.shape_inference.infer_shapes(model).graph.value_info
        }
        for node in model.graph.node:
            if node.op_type == "ArgMax":
                assert types[node.input[0]] not in INTEGERS
            if node.op_type == "Resize":
                assert types[node.input[0]] != TensorProto.BFLOAT16


def test_the_export_is_within_its_gate_and_its_manifest_has_the_runtime(small_exports: Exports) -> None:
    result = small_exports(precision="fp16", runtime="onnxruntime")
    assert all(parity is not None and parity.share_of_limit < 1 for parity in result.parity.values())
    assert result.manifest.config["runtime"] == "onnxruntime"


def test_graphs_for_any_runtime_and_for_onnxruntime_compute_the_same(small_exports: Exports) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"sample": (2, 4, 16, 24), "timestep": (2,), "encoder_hidden_states": (2, 77, 96)}
    feeds = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    whole, parts = (small_exports(**options).folder / "unet.onnx" for options in ({}, {"runtime": "onnxruntime"}))
    split = operators(parts)["LayerNormalization"] - operators(whole)["LayerNormalization"]
    assert operators(whole)["GroupNormalization"] == split > 0
    with open_runner(whole) as one, open_runner(parts) as other:
        exact, output = (runner.infer(feeds)["out_sample"] for runner in (one, other))
    assert relative_l2(output, exact) < 1e-5


def test_graphs_written_for_another_runtime_are_not_taken_over(
    small_pipeline: Any, small_exports: Exports, tmp_path: Path
) -> None:
    reuse = small_exports().folder
    result = export_onnx(
        small_pipeline, tmp_path / "out", components=("text_encoder",), runtime="onnxruntime", reuse=reuse
    )
    assert operators(result.folder / "text_encoder.onnx") != operators(reuse / "text_encoder.onnx")


def test_an_unknown_runtime_is_refused(small_pipeline: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="any or onnxruntime"):
        export_onnx(small_pipeline, tmp_path / "out", runtime="openvino")  # type: ignore[arg-type]


def group_norm(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, groups: int) -> onnx.ModelProto:
    """A graph of one group norm whose channels and later axes are known."""
    names = ["batch", x.shape[1], *("height", "width")[: x.ndim - 2]]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, names) for name in ("x", "y")]
    weights = [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in (("scale", scale), ("bias", bias))]
    node = helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=groups, epsilon=1e-5)
    graph = helper.make_graph([node], "g", ports[:1], ports[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def rewrite(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = ir.from_proto(model)
    use_onnxruntime_ops(graph)
    proto: onnx.ModelProto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    return proto


@pytest.mark.parametrize("shape", [(1, 12, 7, 5), (3, 12, 16, 16), (2, 12, 9)])
@pytest.mark.parametrize("groups", [1, 4, 12])
def test_a_group_norm_in_parts_equals_torchs(shape: tuple[int, ...], groups: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    x, scale, bias = (torch.randn(size, generator=generator) for size in (shape, (12,), (12,)))
    model = rewrite(group_norm(x, scale, bias, groups))
    assert "GroupNormalization" not in [node.op_type for node in model.graph.node]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(output), torch.nn.functional.group_norm(x, groups, scale, bias), atol=1e-5)


def test_a_group_norm_in_parts_keeps_the_digits_of_values_far_from_zero() -> None:
    """ONNX Runtime itself loses them: its variance is a difference of two large numbers."""
    generator = torch.Generator().manual_seed(0)
    x, scale, bias = torch.randn(1, 32, 64, 64, generator=generator) + 30, torch.ones(32), torch.zeros(32)
    exact = torch.nn.functional.group_norm(x.double(), 8)
    whole = group_norm(x, scale, bias, 8)
    errors = []
    for model in (whole, rewrite(whole)):
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        errors.append(relative_l2(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), exact))
    assert errors[1] < 2e-5 < errors[0] / 3


@pytest.mark.parametrize("dtype", [TensorProto.INT32, TensorProto.INT64])
def test_the_largest_token_id_is_found_at_the_same_place(dtype: int) -> None:
    ports = [
        helper.make_tensor_value_info(n, t, ["batch", *s])
        for n, t, s in (("x", dtype, [77]), ("y", TensorProto.INT64, []))
    ]
    node = helper.make_node("ArgMax", ["x"], ["y"], axis=-1, keepdims=0)
    model = rewrite(
        helper.make_model(
            helper.make_graph([node], "g", ports[:1], ports[1:]),
            opset_imports=[helper.make_opsetid("", 23)],
            ir_version=10,
        )
    )
    ids = torch.randint(0, 49408, (4, 77), generator=torch.Generator().manual_seed(0))
    ids[:, 50] = 49407
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (places,) = session.run(None, {"x": ids.numpy().astype("int32" if dtype == TensorProto.INT32 else "int64")})
    assert [node.op_type for node in model.graph.node] == ["Cast", "ArgMax"]
    assert places.tolist() == [50] * 4
