"""A small network as a runner of every backend that exchanges weights here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from sdcompress_engines.graph import weights_path
from sdcompress_engines.graph_weights import describe_weights
from sdcompress_engines.runners import Runner, TensorSpec, TorchRunner, compile_package, open_runner
from sdcompress_engines.safetensors_file import read_header

INPUTS = (TensorSpec("sample", ("batch", 4, 8, 8), torch.float32),)
OUTPUTS = (TensorSpec("out", ("batch", 64, 24), torch.float32),)
NAMES = ("conv.weight", "first.weight", "second.weight")


class Net(torch.nn.Module):
    """A convolution and two linear layers; ONNX holds the weights of the second kind transposed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(4, 16, 3, padding=1)
        self.first, self.second = torch.nn.Linear(16, 32, bias=False), torch.nn.Linear(32, 24, bias=False)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        hidden = self.conv(sample).flatten(2).transpose(1, 2)
        out: torch.Tensor = self.second(torch.relu(self.first(hidden)))
        return out


def draw_sample() -> dict[str, torch.Tensor]:
    return {"sample": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))}


def draw_weights(*names: str, seed: int = 2) -> dict[str, torch.Tensor]:
    """Returns new values of these weights, of all without names."""
    generator, net = torch.Generator().manual_seed(seed), Net()
    return {name: torch.randn(net.get_parameter(name).shape, generator=generator) for name in names or NAMES}


@torch.no_grad()
def compute(changes: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns what the network computes for `draw_sample` with changed weights."""
    net = Net()
    net.load_state_dict(net.state_dict() | changes)
    result: torch.Tensor = net(**draw_sample())
    return result


def make_torch(folder: Path) -> Runner:
    return TorchRunner(Net(), INPUTS, OUTPUTS).open()


def make_package(folder: Path) -> Runner:
    path, net = folder / "net.pt2", Net()
    shapes = ({0: torch.export.Dim("batch")},)
    compile_package(net, tuple(draw_sample().values()), shapes, path, INPUTS, OUTPUTS, exchangeable=True)
    kept = {name: net.get_parameter(name).detach() for name in NAMES}
    save_file(kept, weights_path(path), metadata=describe_weights((), NAMES, {}))
    return open_runner(path)


def make_graph(folder: Path) -> Runner:
    """Returns a runner of an ONNX graph whose linear weights are stored transposed, as torch's exporter does."""
    path, net = folder / "net.onnx", Net()
    linear = NAMES[1:]
    stored = {name: value.detach() for name, value in net.state_dict().items()}
    stored |= {name: stored[name].t().contiguous() for name in linear}
    save_file(stored, weights_path(path), metadata=describe_weights(linear, NAMES, {}))
    shape = helper.make_tensor("shape", TensorProto.INT64, [3], [0, 16, 64])
    nodes = [
        helper.make_node("Conv", ["sample", "conv.weight", "conv.bias"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["c", "shape"], ["r"]),
        helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["t", "first.weight"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "second.weight"], ["out"]),
    ]
    header = read_header(weights_path(path))
    external = []
    for name, value in stored.items():
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=value.shape, data_location=1)
        begin, end = header.entries[name]["data_offsets"]
        place = {"location": weights_path(path).name, "offset": header.start + begin, "length": end - begin}
        for key, each in place.items():
            tensor.external_data.add(key=key, value=str(each))
        external.append(tensor)
    ports = (
        helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["batch", 4, 8, 8]),
        helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 64, 24]),
    )
    graph = helper.make_graph(nodes, "net", [ports[0]], [ports[1]], [*external, shape])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return open_runner(path)


MAKERS: dict[str, Callable[[Path], Runner]] = {
    "torch": make_torch,
    "aot-inductor": make_package,
    "onnxruntime": make_graph,
}
