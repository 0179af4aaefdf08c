"""An engine's runner picks the profile, shares memory and keeps kernels by rules that hold without a GPU; with one, it
computes what the graph says.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from sdcompress_engines.errors import ArtifactError, EngineError, EngineMismatch, UsageError
from sdcompress_engines.exactness import relative_l2
from sdcompress_engines.flavour import FLAVOURS, TENSORRT, TENSORRT_RTX, platform_name
from sdcompress_engines.manifest import write_manifest
from sdcompress_engines.profiles import Profile
from sdcompress_engines.runners import OnnxRuntimeRunner, SharedMemory, TensorRTRunner, TensorSpec, tensorrt_library
from sdcompress_engines.runners.shapes import Ranges, axis_names, choose_profile, make_shape_error
from sdcompress_engines.sealed_files import read_sealed, write_sealed

needs_rtx = pytest.mark.skipif(TENSORRT_RTX.missing() is not None, reason="tensorrt-rtx is not installed")


def ranges(*batches: tuple[int, int, int], height: tuple[int, int, int] = (32, 64, 128)) -> list[Ranges]:
    """Profiles of a UNet in latent pixels, of equal height and width."""
    shapes = [
        {
            "sample": tuple((b, 4, h, h) for b, h in zip(batch, height, strict=True)),
            "context": tuple((b, t, 96) for b, t in zip(batch, (77, 77, 154), strict=True)),
        }
        for batch in batches
    ]
    return shapes  # type: ignore[return-value]


def call(batch: int, height: int = 64, width: int = 64, tokens: int = 77) -> dict[str, tuple[int, ...]]:
    return {"sample": (batch, 4, height, width), "context": (batch, tokens, 96)}


INPUTS = (
    TensorSpec("sample", ("batch", 4, "height", "width"), torch.float16),
    TensorSpec("context", ("batch", "tokens", 96), torch.float16),
)


@pytest.mark.parametrize(
    ("batches", "batch", "chosen"),
    [
        ([(1, 2, 8)], 3, 0),
        ([(1, 2, 8), (1, 2, 4)], 3, 1),  # the tighter
        ([(1, 2, 4), (1, 2, 8)], 3, 0),
        ([(1, 2, 8), (1, 3, 4)], 2, 0),  # tuned for it, though wider
        ([(1, 1, 8), (1, 2, 4)], 1, 0),
        ([(1, 2, 4), (1, 2, 4)], 3, 0),  # the first of equals
        ([(1, 1, 1), (2, 2, 2), (1, 2, 8)], 1, 0),
        ([(1, 1, 1), (2, 2, 2), (1, 2, 8)], 4, 2),
        ([(1, 1, 2), (4, 4, 8)], 3, None),
        ([(1, 1, 2)], 3, None),
    ],
)
def test_the_tightest_profile_that_fits_is_chosen_and_a_tuned_one_before_it(
    batches: list[tuple[int, int, int]], batch: int, chosen: int | None
) -> None:
    assert choose_profile(ranges(*batches, height=(64, 64, 64)), call(batch)) == chosen


def test_a_chosen_profile_contains_the_shapes_and_is_none_only_where_no_profile_does() -> None:
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(400):
        profiles = ranges(*(tuple(sorted(random.integers(1, 9, 3).tolist())) for _ in range(3)), height=(32, 48, 96))
        shapes = call(int(random.integers(1, 9)), int(random.integers(3, 14)) * 8, 64, 77)
        fitting = [
            i
            for i, profile in enumerate(profiles)
            if all(
                low <= size <= high
                for name, shape in shapes.items()
                for low, size, high in zip(profile[name][0], shape, profile[name][2], strict=True)
            )
        ]
        chosen = choose_profile(profiles, shapes)
        assert chosen in fitting or (chosen is None and not fitting)
        seen.add(chosen)
    assert seen == {None, 0, 1, 2}


@pytest.mark.parametrize(
    ("batches", "shapes", "said"),
    [
        (
            [(1, 2, 8)],
            call(9),
            (
                "batch 9, height 512 px, width 512 px, tokens 77 is outside the engine's profile; expected batch 1 to"
                " 8, height 256 to 1024 px, width 256 to 1024 px, tokens 77 to 154. Try: build it with --batch 1:2:9"
            ),
        ),
        ([(1, 2, 8)], call(2, 64, 152, 231), "--width 256:512:1216 --tokens 77:77:231"),
        (
            [(1, 1, 1), (4, 4, 8)],
            call(3),
            (
                "outside each of the engine's 2 profiles; expected batch 4 to 8, height 256 to 1024 px, width 256 to"
                " 1024 px, tokens 77 to 154, as in the nearest. Try: build it with --batch 3:4:8"
            ),
        ),
        ([(1, 1, 1), (4, 4, 8)], call(2, 24), "--batch 1:1:2 --height 192:512:1024"),
    ],
)
def test_a_shape_outside_every_profile_names_the_nearest_and_the_flags_to_type(
    batches: list[tuple[int, int, int]], shapes: dict[str, Any], said: str
) -> None:
    error = make_shape_error(ranges(*batches), shapes, INPUTS, "unet", 8, "unet.engine")
    assert isinstance(error, EngineMismatch)
    assert said in str(error)
    assert "\n" not in str(error)


def test_the_flags_for_a_vae_count_calls_of_the_unet_and_pixels_as_they_are() -> None:
    profile = {"sample": ((1, 3, 256, 256), (1, 3, 512, 512), (4, 3, 768, 768))}
    inputs = (TensorSpec("sample", ("batch", 3, "image_height", "image_width"), torch.float16),)
    said = str(make_shape_error([profile], {"sample": (5, 3, 1024, 512)}, inputs, "vae_encoder", 8, None))
    assert "batch 5, height 1024 px" in said
    assert said.endswith("--batch 2:2:10 --height 256:512:1024")


def test_axes_without_a_name_are_reported_by_tensor_and_index() -> None:
    profile = {"x": ((1, 2), (1, 2), (1, 8))}
    said = str(
        make_shape_error([profile], {"x": (1, 9)}, (TensorSpec("x", (1, "x.1"), torch.float32),), "sum", 8, None)
    )
    assert "x.1 9" in said
    assert "wider profile" in said


def test_free_sizes_take_the_names_of_the_manifest_where_it_fits() -> None:
    assert axis_names("sample", (-1, 4, -1, -1), ["batch", 4, "height", "width"]) == ("batch", 4, "height", "width")
    assert axis_names("sample", (2, 4, -1, -1), ["batch", 4, "height", "width"]) == (2, 4, "height", "width")
    for unusable in (None, ["batch", 4], "batch", [1, 4, 8, 8]):
        assert axis_names("sample", (-1, 4, -1, -1), unusable) == ("sample.0", 4, "sample.2", "sample.3")


def test_shared_memory_grows_to_the_largest_need_and_moves_only_then() -> None:
    memory = SharedMemory("cpu")
    assert memory.block == memory.reserve(0) == (0, 0)
    first = memory.reserve(1000)
    assert first[0] != 0
    assert first[1] == 1000
    assert memory.reserve(10) == memory.reserve(1000) == first
    grown = memory.reserve(5000)
    assert grown == memory.block == memory.reserve(1000)
    assert grown[1] == 5000


def test_memory_that_is_not_there_is_an_error_that_says_how_much() -> None:
    with pytest.raises(EngineError, match="1,099,511,627,776 MiB of activations"):
        SharedMemory("cpu").reserve(2**60)


def test_kept_kernels_come_back_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "runtime" / "kernels"
    assert read_sealed(file) is None
    write_sealed(file, b"kernels" * 100)
    assert read_sealed(file) == b"kernels" * 100
    assert [p.name for p in file.parent.iterdir()] == ["kernels"]
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole[:20], whole[:40] + b"x" + whole[41:]):
        file.write_bytes(damaged)
        assert read_sealed(file) is None
    write_sealed(file, b"newer")
    assert read_sealed(file) == b"newer"


@pytest.mark.skipif(os.name == "nt", reason="POSIX's /dev/null stands for a disk that refuses")
def test_kernels_that_cannot_be_kept_are_a_warning_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "runtime").write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match="not kept"):
        write_sealed(tmp_path / "runtime" / "kernels", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["runtime"]


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lazy or eager or none"):
        TensorRTRunner(tmp_path / "unet.engine", kernels="fast")


@needs_rtx
def test_the_installed_library_has_every_name_the_runner_uses() -> None:
    trt = TENSORRT_RTX.load()
    used = [
        *tensorrt_library.USED_API.items(),
        *tensorrt_library.USED_API_RTX.items(),
        *tensorrt_library.USED_API_REFIT.items(),
        *tensorrt_library.USED_API_EXCHANGE.items(),
    ]
    assert [f"{kind}.{name}" for kind, names in used for name in names if not hasattr(getattr(trt, kind), name)] == []


@needs_rtx
def test_the_runtime_judges_damaged_headers_before_engines_are_loaded(tmp_path: Path) -> None:
    trt = TENSORRT_RTX.load()
    runtime = trt.Runtime(tensorrt_library.create_log(trt))
    whole = build(tmp_path, TENSORRT_RTX).read_bytes()
    random = np.random.default_rng(0)
    for content in (random.bytes(1000), b"\0" * 64 + whole[64:], whole[:63], b"x", b""):
        assert tensorrt_library.explain_invalid(trt, runtime, content) == "malformed engine"
    assert "malformed" not in str(tensorrt_library.explain_invalid(trt, runtime, whole))


# What follows runs engines.

SUM = ((1, 2, 4), (6, 8, 8))


def write_graph(path: Path) -> Path:
    """`total = softmax(left · right) · right`, (batch, 32, 32) float16: enough to need activation memory."""
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", 32, 32])
        for name in ("left", "right", "total")
    ]
    nodes = [
        helper.make_node("MatMul", ["left", "right"], ["product"]),
        helper.make_node("Softmax", ["product"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "right"], ["total"]),
    ]
    graph = helper.make_graph(nodes, "attend", ports[:2], ports[2:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def build(folder: Path, flavour: Any) -> Path:
    """`unet.engine` with two profiles, batches 1 to 4 and 6 to 8, and no manifest."""
    from sdcompress_engines.builder import build_engine

    folder.mkdir(parents=True, exist_ok=True)
    profiles = [Profile({name: tuple((size, 32, 32) for size in sizes) for name in ("left", "right")}) for sizes in SUM]
    build_engine(write_graph(folder / "unet.onnx"), folder / "unet.engine", profiles, flavour)
    return folder / "unet.engine"


def feeds(batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(batch, 32, 32, generator=generator).half() for name in ("left", "right")}


def on_gpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in tensors.items()}


def close_to(found: torch.Tensor, truth: torch.Tensor) -> bool:
    return relative_l2(found.cpu(), truth) < 5e-3


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flavour = next((f for f in (TENSORRT, TENSORRT_RTX) if f.missing() is None), None)
    if flavour is None:
        pytest.skip("no TensorRT is installed")
    path = build(tmp_path_factory.mktemp("engine"), flavour)
    try:
        TensorRTRunner(path).open().close()
    except EngineMismatch as error:
        pytest.skip(f"{flavour.name} does not run on this card: {error}")
    return path


@pytest.fixture(scope="module")
def truth(engine: Path) -> dict[int, torch.Tensor]:
    with OnnxRuntimeRunner(engine.with_suffix(".onnx")) as runner:
        return {batch: runner.infer(feeds(batch))["total"] for batch in (1, 2, 4, 6, 8)}


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_an_engine_agrees_with_onnxruntime_on_every_profile(
    engine: Path, truth: dict[int, torch.Tensor], cuda_graph: bool
) -> None:
    with TensorRTRunner(engine, cuda_graph=cuda_graph, kernels="eager") as runner:
        for batch in (2, 8, 1, 2, 6, 4, 8, 2, 1):  # five shapes, one more than graphs are kept
            found = runner.infer(on_gpu(feeds(batch)))["total"]
            assert found.dtype == torch.float16
            assert close_to(found, truth[batch]), batch


@pytest.mark.gpu
def test_a_replayed_graph_gives_what_a_plain_run_gives_and_outputs_stay_the_callers(engine: Path) -> None:
    with (
        TensorRTRunner(engine, kernels="eager") as plain,
        TensorRTRunner(engine, cuda_graph=True, kernels="eager") as graphed,
    ):
        held = []
        for seed in range(4):
            given = on_gpu(feeds(2, seed))
            held.append((plain.infer(given)["total"], graphed.infer(given)["total"]))
        assert all(torch.equal(a, b) for a, b in held)
        assert not torch.equal(held[0][1], held[1][1])


@pytest.mark.gpu
def test_runners_share_one_block_of_memory_and_stay_right_while_it_grows(
    engine: Path, truth: dict[int, torch.Tensor]
) -> None:
    memory = SharedMemory("cuda")
    with (
        TensorRTRunner(engine, memory=memory, cuda_graph=True, kernels="eager") as first,
        TensorRTRunner(engine, memory=memory, kernels="eager") as second,
    ):
        for runner, batch in ((first, 1), (second, 2), (first, 1), (second, 8), (first, 1), (first, 2), (second, 2)):
            assert close_to(runner.infer(on_gpu(feeds(batch)))["total"], truth[batch])
        largest = memory.block
        assert close_to(first.infer(on_gpu(feeds(8)))["total"], truth[8])
        assert memory.block == largest


@pytest.mark.gpu
@pytest.mark.parametrize("own_stream", [False, True])
def test_runs_are_in_order_with_torch_on_whatever_stream(engine: Path, own_stream: bool) -> None:
    stream = torch.cuda.Stream() if own_stream else torch.cuda.default_stream()
    with TensorRTRunner(engine, kernels="eager") as runner, torch.cuda.stream(stream):
        given = on_gpu(feeds(2))
        want = runner.infer(given)["total"].clone()
        slow = torch.randn(3000, 3000, device="cuda")
        for _ in range(5):
            late = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
            for _ in range(20):  # the inputs arrive only after all this
                slow = slow @ slow / 55
            for name, tensor in given.items():
                late[name].copy_(tensor)
            found = runner.infer(late)["total"]
            del late
            junk = [torch.full((2, 32, 32), 9.0, device="cuda", dtype=torch.float16) for _ in range(8)]
            assert torch.equal(found, want)
            del junk


@pytest.mark.gpu
def test_a_shape_outside_the_profiles_is_refused_with_the_flags(engine: Path, tmp_path: Path) -> None:
    with (
        TensorRTRunner(engine) as runner,
        pytest.raises(EngineMismatch, match=r"5 is outside each of the engine's 2 profiles"),
    ):
        runner.infer(on_gpu(feeds(5)))


@pytest.mark.gpu
def test_names_come_from_the_manifest_and_damage_is_found_before_the_runtime_looks(
    engine: Path, tmp_path: Path
) -> None:
    made = TensorRTRunner(engine).open()
    flavour = FLAVOURS[made.backend]
    made.close()
    (tmp_path / "unet.engine").write_bytes(engine.read_bytes())
    shape = ["batch", 32, 32]
    entries = [{"name": name, "shape": shape, "dtype": "float16"} for name in ("left", "right")]
    config = {
        "flavour": flavour.name,
        "version": flavour.version,
        "compute_capabilities": [list(torch.cuda.get_device_capability())],
        "platform": platform_name(),
        "precision": "fp16",
        "signature": "diffusers",
        "components": ["unet"],
        "vae_scale": 8,
        "inputs": {"unet": entries},
        "outputs": {"unet": [{"name": "total", "shape": shape, "dtype": "float16"}]},
        "options": {},
    }
    write_manifest(tmp_path, "engine", config=config)
    with TensorRTRunner(tmp_path / "unet.engine") as runner:
        assert runner.inputs[0] == TensorSpec("left", ("batch", 32, 32), torch.float16)
        with pytest.raises(EngineMismatch, match=r"batch 5 is outside.*--batch 5:8:8"):
            runner.infer(on_gpu(feeds(5)))
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "unet.engine").write_bytes(content)
    with pytest.raises(ArtifactError, match="altered"):
        TensorRTRunner(tmp_path / "unet.engine").open()


@pytest.mark.gpu
def test_compiled_kernels_are_kept_for_the_next_time(
    engine: Path, truth: dict[int, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path))
    with TensorRTRunner(engine, kernels="eager") as runner:
        compiles = runner.backend == "tensorrt-rtx"
        runner.infer(on_gpu(feeds(2)))
    kept = list((tmp_path / "runtime").glob("*")) if compiles else []
    assert len(kept) == compiles
    for file in kept:
        file.write_bytes(file.read_bytes()[:-7])  # a damaged one is not believed
    with TensorRTRunner(engine, kernels="eager") as runner:
        assert close_to(runner.infer(on_gpu(feeds(2)))["total"], truth[2])
    assert all(read_sealed(file) is not None for file in kept)
