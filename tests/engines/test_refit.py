"""An engine's weights are exchanged through TensorRT's refitter: calls on a stand-in of the library are checked."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sdcompress_engines import build_worker
from sdcompress_engines.build_options import BuildOptions
from sdcompress_engines.builder import build_engine
from sdcompress_engines.errors import EngineError
from sdcompress_engines.exactness import relative_l2
from sdcompress_engines.flavour import FLAVOURS, TENSORRT_RTX
from sdcompress_engines.graph import weights_path
from sdcompress_engines.manifest import write_manifest
from sdcompress_engines.profiles import Profile
from sdcompress_engines.runners import TensorRTRunner, refit, tensorrt
from sdcompress_engines.runners.refit import Refit
from sdcompress_engines.runners.tensorrt_library import create_log

from .exchange_cases import NAMES, compute, draw_sample, draw_weights, make_graph
from .fake_cuda import FakeCuda, fake_cuda  # noqa: F401 (a fixture)

needs_rtx = pytest.mark.skipif(TENSORRT_RTX.missing() is not None, reason="tensorrt-rtx is not installed")

CPU = torch.device("cpu")


class FakeWeights:
    """Weights as the library holds them: a type, an address and a number of values."""

    def __init__(self, dtype: str, address: int, count: int) -> None:
        self.dtype, self.address, self.count = dtype, address, count


class FakeRefitter:
    """A refitter whose engine has the weights `a`, `b` and `c`, of which `b` and `c` are fused.

    It reads the values when it refits, as the library does.
    """

    def __init__(self, engine: dict[str, list[float]], log: Any) -> None:
        self.engine, self.given = engine, dict[str, FakeWeights]()
        self.refits = 0

    def set_named_weights(self, name: str, weights: FakeWeights, *location: Any) -> bool:
        self.location = location
        if name in self.engine:
            self.given[name] = weights
        return name in self.engine

    def get_missing_weights(self) -> list[str]:
        fused = {"b": "c", "c": "b"}
        return [fused[name] for name in self.given if name in fused and fused[name] not in self.given]

    def refit_cuda_engine(self) -> bool:
        self.refits += 1
        for name, weights in self.given.items():
            assert weights.dtype == "half"
            self.engine[name] = torch.tensor(read_halves(weights.address, weights.count)).tolist()
        self.given.clear()
        return True


class FakeAsyncRefitter(FakeRefitter):
    """A refitter of a newer library: it takes weights from the card, and works on a stream."""

    def get_weights_location(self, name: str) -> str:
        return "device"

    def refit_cuda_engine_async(self, stream: int) -> bool:
        return FakeRefitter.refit_cuda_engine(self)


def read_halves(address: int, count: int) -> list[float]:
    import ctypes

    raw = bytearray(ctypes.string_at(address, 2 * count))
    values: list[float] = torch.frombuffer(raw, dtype=torch.float16).tolist()
    return values


def library(refitter: type[FakeRefitter]) -> Any:
    return SimpleNamespace(
        Refitter=refitter,
        Weights=FakeWeights,
        DataType=SimpleNamespace(HALF="half"),
        TensorLocation=SimpleNamespace(DEVICE="device"),
    )


LOG = SimpleNamespace(last_errors=lambda: "its reason")
ENGINE = {"a": [1.0, 1.0], "b": [2.0, 2.0], "c": [3.0, 3.0]}


def values(name: str) -> torch.Tensor:
    return torch.tensor([[10.0, 11.0]] if name == "a" else [[20.0, 21.0]] if name == "b" else ENGINE[name]).half()


@pytest.mark.parametrize("refitter", [FakeRefitter, FakeAsyncRefitter])
def test_weights_are_set_by_name_with_those_that_the_library_fused_with_them(
    fake_cuda: FakeCuda,  # noqa: F811
    refitter: type[FakeRefitter],
) -> None:
    engine = {name: list(value) for name, value in ENGINE.items()}
    exchange = Refit(library(refitter), engine, LOG, CPU, "net.engine")
    exchange.exchange(["a", "b"], values)
    assert engine == {"a": [10.0, 11.0], "b": [20.0, 21.0], "c": [3.0, 3.0]}
    assert exchange._refitter.location == (("device",) if refitter is FakeAsyncRefitter else ())


def test_weights_are_stored_as_the_graph_has_them(fake_cuda: FakeCuda) -> None:  # noqa: F811
    engine = {"a": [0.0] * 4}
    transposed = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).half().t()
    Refit(library(FakeAsyncRefitter), engine, LOG, CPU, "net.engine").exchange(["a"], lambda name: transposed)
    assert engine["a"] == [1.0, 3.0, 2.0, 4.0]


def test_many_weights_go_in_parts_that_need_little_memory(
    fake_cuda: FakeCuda,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refit, "PART_BYTES", 8)
    engine = {str(number): [0.0, 0.0] for number in range(5)}
    exchange = Refit(library(FakeAsyncRefitter), engine, LOG, CPU, "net.engine")
    exchange.exchange(list(engine), lambda name: torch.full((2,), float(name)).half())
    assert engine == {str(number): [float(number)] * 2 for number in range(5)}
    assert exchange._refitter.refits == 3


def test_a_weight_that_the_engine_does_not_take_is_named(fake_cuda: FakeCuda) -> None:  # noqa: F811
    exchange = Refit(library(FakeAsyncRefitter), dict(ENGINE), LOG, CPU, "net.engine")
    with pytest.raises(EngineError, match=r"did not take the weight d \(its reason\)"):
        exchange.exchange(["a", "d"], lambda name: torch.ones(2).half())


def test_a_refit_that_fails_is_an_error(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(FakeAsyncRefitter, "refit_cuda_engine_async", lambda self, stream: False)
    exchange = Refit(library(FakeAsyncRefitter), dict(ENGINE), LOG, CPU, "net.engine")
    with pytest.raises(EngineError, match=r"did not take the weights \(its reason\)"):
        exchange.exchange(["a"], values)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"precision": "fp16"}, "takes no LoRA: it was built with --no-lora, or on a machine without its card"),
        ({"precision": "int8"}, "takes no LoRA: its weights are rounded to int8"),
    ],
)
def test_an_engine_that_takes_no_lora_says_why(tmp_path: Path, config: dict[str, str], named: str) -> None:
    write_manifest(tmp_path, "engine", config=config)
    with pytest.raises(EngineError, match=named):
        raise TensorRTRunner(tmp_path / "unet.engine")._fixed_weights()


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_an_engine_takes_new_weights_and_gets_its_own_back(tmp_path: Path, cuda_graph: bool) -> None:
    flavour = next((each for each in FLAVOURS.values() if tensorrt.missing(each) is None), None)
    if flavour is None:
        pytest.skip("no TensorRT runs on this card")
    make_graph(tmp_path).close()
    graph, engine = tmp_path / "net.onnx", tmp_path / "net.engine"
    profile = Profile({"sample": tuple((size, 4, 8, 8) for size in (1, 2, 4))})
    build_engine(graph, engine, profile, flavour, options=BuildOptions(loras=True))
    shutil.copyfile(weights_path(graph), weights_path(engine))
    feeds = {name: value.cuda() for name, value in draw_sample().items()}
    with TensorRTRunner(engine, flavour=flavour, cuda_graph=cuda_graph, kernels="eager") as runner:
        before = runner.infer(feeds)["out"]
        assert relative_l2(before.cpu(), compute({})) < 2e-3  # TF32
        for seed in range(3):
            changes = draw_weights(*NAMES[seed:], seed=seed)
            runner.set_weights(changes)
            assert relative_l2(runner.infer(feeds)["out"].cpu(), compute(changes)) < 2e-3
        runner.set_weights({})
        assert torch.equal(runner.infer(feeds)["out"], before)


@needs_rtx
def test_the_library_finds_every_weight_that_a_lora_changes_in_a_graph(tmp_path: Path) -> None:
    make_graph(tmp_path).close()
    trt = TENSORRT_RTX.load()
    builder = trt.Builder(create_log(trt))
    network = builder.create_network(0)
    assert trt.OnnxParser(network, create_log(trt)).parse_from_file(str(tmp_path / "net.onnx"))
    build_worker.mark_refittable(trt, network, builder.create_builder_config(), NAMES)
    assert all(network.are_weights_marked_refittable(name) for name in NAMES)
    with pytest.raises(EngineError, match="has no weight lost"):
        build_worker.mark_refittable(trt, network, builder.create_builder_config(), ["lost"])
