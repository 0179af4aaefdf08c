"""Every backend exchanges weights: the result is torch's with these weights, and the original ones come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from sdcompress_engines.errors import ArtifactError, EngineError, EngineMismatch
from sdcompress_engines.exactness import FP32_LIMIT, relative_l2
from sdcompress_engines.graph import weights_path
from sdcompress_engines.manifest import write_manifest
from sdcompress_engines.resources import peak_rss_mib
from sdcompress_engines.runners import Runner, onnxruntime, open_runner

from .exchange_cases import MAKERS, NAMES, compute, draw_sample, draw_weights, make_graph

SWAPS = 50


@pytest.fixture(scope="module", params=list(MAKERS))
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = MAKERS[request.param](tmp_path_factory.mktemp("exchange"))
    yield runner
    runner.close()


@pytest.fixture
def runner(opened: Runner) -> Runner:
    """Returns a runner of each backend in turn, with its original weights."""
    opened.set_weights({})
    return opened


def infer(runner: Runner) -> torch.Tensor:
    return runner.infer(draw_sample())["out"]


def test_a_runner_names_the_weights_that_can_be_exchanged(runner: Runner) -> None:
    assert sorted(runner.weights) == sorted(NAMES)
    assert {name: spec.shape for name, spec in runner.weights.items()} == {
        name: tuple(value.shape) for name, value in draw_weights().items()
    }


def test_the_result_is_torchs_with_the_changed_weights(runner: Runner) -> None:
    changes = draw_weights()
    runner.set_weights(changes)
    assert relative_l2(infer(runner), compute(changes)) < FP32_LIMIT
    assert relative_l2(infer(runner), compute({})) > 0.1


def test_no_changes_bring_the_original_weights_back_bit_equal(runner: Runner) -> None:
    before = infer(runner)
    originals = {name: runner.read_weight(name).clone() for name in NAMES}
    runner.set_weights(draw_weights())
    assert all(torch.equal(runner.read_weight(name), value) for name, value in originals.items())
    runner.set_weights({})
    assert torch.equal(infer(runner), before)


def test_weights_that_are_not_named_again_are_the_original_ones(runner: Runner) -> None:
    runner.set_weights(draw_weights("conv.weight", "first.weight"))
    changes = draw_weights("second.weight", seed=3)
    runner.set_weights(changes)
    assert relative_l2(infer(runner), compute(changes)) < FP32_LIMIT


class Unread(Mapping[str, torch.Tensor]):
    """Changes whose values are not to be asked for."""

    def __getitem__(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was asked for")

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


def test_equal_changes_are_not_computed_again(runner: Runner) -> None:
    runner.set_weights(draw_weights(), key="one")
    runner.set_weights(Unread(), key="one")
    assert runner.weights_key == "one"
    assert relative_l2(infer(runner), compute(draw_weights())) < FP32_LIMIT


def not_finite() -> dict[str, torch.Tensor]:
    return draw_weights("first.weight") | {"second.weight": torch.full((24, 32), torch.inf)}


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (lambda: {"third.weight": torch.ones(2)}, EngineMismatch, "has no weight third.weight"),
        (lambda: {f"w{i}": torch.ones(2) for i in range(10_000)}, EngineMismatch, "w0, w1, w10 and 9997 more"),
        (lambda: {"first.weight": torch.ones(16, 32)}, EngineMismatch, r"the shape \(16, 32\); expected \(32, 16\)"),
        (not_finite, EngineError, "second.weight has numbers that are not finite"),
    ],
    ids=["name", "names", "shape", "numbers"],
)
def test_after_a_refusal_the_weights_are_the_original_ones(
    runner: Runner, make: Callable[[], dict[str, torch.Tensor]], error: type[Exception], named: str
) -> None:
    before = infer(runner)
    runner.set_weights(draw_weights())
    with pytest.raises(error, match=named):
        runner.set_weights(make())
    assert torch.equal(infer(runner), before)


def test_many_swaps_take_no_more_memory(runner: Runner) -> None:
    for number in range(5):
        runner.set_weights(draw_weights(seed=number))
    before = peak_rss_mib()
    for number in range(SWAPS):
        runner.set_weights(draw_weights(seed=number))
        infer(runner)
    assert peak_rss_mib() - before < 8


def test_a_closed_runner_takes_no_weights_and_an_opened_one_has_its_own(tmp_path: Path) -> None:
    runner = make_graph(tmp_path)
    before = infer(runner)
    runner.set_weights(draw_weights(), key="one")
    runner.close()
    with pytest.raises(EngineError, match="not open"):
        runner.set_weights({})
    with runner.open():
        assert torch.equal(infer(runner), before)
        runner.set_weights(draw_weights(), key="one")
        assert relative_l2(infer(runner), compute(draw_weights())) < FP32_LIMIT


def test_onnx_runtime_keeps_the_sessions_of_the_last_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, started = make_graph(tmp_path), []
    start = onnxruntime.create_session
    monkeypatch.setattr(onnxruntime, "create_session", lambda *a, **k: started.append(k["weights"]) or start(*a, **k))
    for key in ("one", "two", "one", "two"):
        runner.set_weights(draw_weights(seed=len(key) if key == "one" else 9), key=key)
    assert len(started) == 2
    runner.set_weights({})
    assert len(started) == 3  # the session of the original weights was the oldest
    assert len(runner._sessions) == onnxruntime.MAX_SESSIONS


def test_an_older_onnx_runtime_takes_weights_through_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as library

    if hasattr(library.OrtValue, "from_dlpack"):
        monkeypatch.delattr(library.OrtValue, "from_dlpack")
    with make_graph(tmp_path) as runner:
        changes = draw_weights()
        runner.set_weights(changes)
        del changes
        assert relative_l2(infer(runner), compute(draw_weights())) < FP32_LIMIT


def test_a_graph_without_its_weights_beside_it_says_so(tmp_path: Path) -> None:
    runner = make_graph(tmp_path)
    runner.close()
    import onnx

    model = onnx.load(tmp_path / "net.onnx")
    weights_path(tmp_path / "net.onnx").unlink()
    onnx.save(model, tmp_path / "net.onnx")
    with open_runner(tmp_path / "net.onnx") as fixed:
        assert not fixed.weights
        with pytest.raises(EngineError, match="takes no LoRA: it has no file with its weights beside it"):
            fixed.set_weights(draw_weights())
        write_manifest(tmp_path, "onnx", config={"precision": "int8"})
        with pytest.raises(EngineError, match="takes no LoRA: its weights are rounded to int8"):
            fixed.set_weights(draw_weights())
        fixed.set_weights({})


def cut(content: bytes) -> bytes:
    return content[:-100]


def forget(content: bytes) -> bytes:
    return content.replace(b"sdcompress_weights", b"sdcompress_unknown")


@pytest.mark.parametrize(
    ("damage", "named"), [(cut, "is not a readable safetensors"), (forget, "does not describe its weights")]
)
def test_a_damaged_weights_file_is_one_line(tmp_path: Path, damage: Callable[[bytes], bytes], named: str) -> None:
    runner = make_graph(tmp_path)
    runner.close()
    file = weights_path(tmp_path / "net.onnx")
    content = file.read_bytes()
    runner.open()
    file.unlink()  # the session has mapped the old one
    file.write_bytes(damage(content))
    with pytest.raises(ArtifactError, match=named):
        runner.set_weights(draw_weights())
