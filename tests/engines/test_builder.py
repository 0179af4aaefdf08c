"""Engines are built whole or not at all, and an error gives the full reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from sdcompress_engines import build_worker, builder
from sdcompress_engines.build_options import BuildOptions
from sdcompress_engines.builder import build_engine
from sdcompress_engines.errors import BackendMissing, EngineError, StorageError, UsageError
from sdcompress_engines.flavour import FLAVOURS, TENSORRT, TENSORRT_RTX, choose_flavour, obstacle, platform_name
from sdcompress_engines.profiles import Profile
from sdcompress_engines.progress import Reporter
from sdcompress_engines.runners.tensorrt import missing as runner_missing

needs_rtx = pytest.mark.skipif(TENSORRT_RTX.missing() is not None, reason="tensorrt-rtx is not installed")
SUM = Profile({"left": ((1, 8), (2, 8), (4, 8)), "right": ((1, 8), (2, 8), (4, 8))})


def write_graph(path: Path, op: str = "Add") -> Path:
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", 8]) for name in ("left", "right", "total")
    ]
    graph = helper.make_graph(
        [helper.make_node(op, ["left", "right"], ["total"], name="the_node")], "sum", ports[:2], ports[2:]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


class Notes(Reporter):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def task(self, label: str, total: int | None = None) -> Any:
        from contextlib import nullcontext

        return nullcontext(lambda n=1, note="": self.seen.append(note))


@needs_rtx
def test_a_small_engine_is_built_and_reported(tmp_path: Path) -> None:
    notes = Notes()
    result = build_engine(
        write_graph(tmp_path / "sum.onnx"), tmp_path / "out" / "sum.engine", SUM, TENSORRT_RTX, report=notes
    )
    assert (tmp_path / "out" / "sum.engine").stat().st_size == result.bytes > 1000
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["sum.engine"]
    assert result.flavour == "tensorrt-rtx"
    assert result.compute_capabilities == ()  # portable unless requested otherwise
    assert result.peak_mib > 50
    assert any(notes.seen)


@needs_rtx
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"op": "NoSuchOperator"}, "NoSuchOperator"),
        ({"profiles": Profile({"left": SUM.shapes["left"]})}, "differ on right"),
        ({"profiles": Profile({"left": SUM.shapes["left"], "right": ((1, 9), (2, 9), (4, 9))})}, "profile of right"),
        ({"compute_capabilities": [(3, 5)]}, r"compute capability 3\.5.*8\.9"),
    ],
)
def test_a_failed_build_says_why_and_leaves_nothing(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    graph = write_graph(tmp_path / "sum.onnx", change.pop("op", "Add"))
    with pytest.raises(EngineError, match=said):
        build_engine(graph, tmp_path / "out" / "sum.engine", **{"profiles": SUM, "flavour": TENSORRT_RTX, **change})
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@needs_rtx
def test_a_parser_error_names_the_node(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"the_node.*NoSuchOperator"):
        build_engine(write_graph(tmp_path / "sum.onnx", "NoSuchOperator"), tmp_path / "sum.engine", SUM, TENSORRT_RTX)


@needs_rtx
def test_a_process_that_dies_is_an_error_and_leaves_the_old_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = tmp_path / "killer.sh"
    killer.write_text("#!/bin/sh\necho 'native code says goodbye'\nkill -SEGV $$\n")
    killer.chmod(0o755)
    (tmp_path / "sum.engine").write_bytes(b"old")
    monkeypatch.setattr(sys, "executable", str(killer))
    with pytest.raises(EngineError, match=r"SIGSEGV.*goodbye"):
        build_engine(write_graph(tmp_path / "sum.onnx"), tmp_path / "sum.engine", SUM, TENSORRT_RTX)
    assert (tmp_path / "sum.engine").read_bytes() == b"old"


@needs_rtx
def test_a_cancelled_build_leaves_nothing(tmp_path: Path) -> None:
    class Cancel(Notes):
        def task(self, label: str, total: int | None = None) -> Any:
            from contextlib import nullcontext

            def stop(n: int = 1, note: str = "") -> None:
                raise KeyboardInterrupt

            return nullcontext(stop)

    with pytest.raises(KeyboardInterrupt):
        build_engine(
            write_graph(tmp_path / "sum.onnx"), tmp_path / "out" / "sum.engine", SUM, TENSORRT_RTX, report=Cancel()
        )
    assert list((tmp_path / "out").iterdir()) == []


def write_linear(path: Path) -> Path:
    """`y = x · w` with a megabyte of weights."""
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((512, 1024)).astype(np.float16), "w")
    ports = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", 512]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["batch", 1024]),
    ]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "linear", ports[:1], ports[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


LINEAR = [Profile({"x": ((1, 512), (2, 512), (8, 512))}), Profile({"x": ((16, 512), (16, 512), (16, 512))})]


@needs_rtx
def test_options_reach_the_library(tmp_path: Path) -> None:
    graph = write_linear(tmp_path / "linear.onnx")
    built = {
        name: build_engine(graph, tmp_path / f"{name}.engine", LINEAR, TENSORRT_RTX, options=option)
        for name, option in {
            "plain": BuildOptions(),
            "streamed": BuildOptions(weight_streaming=True, workspace_mib=64),
        }.items()
    }
    assert min(result.bytes for result in built.values()) > 2**20
    for option in (BuildOptions(refit="any"), BuildOptions(refit="identical"), BuildOptions(strip_plan=True)):
        if not torch.cuda.is_available():
            with pytest.raises(
                EngineError, match=r"Try: without --(refit|strip-plan), or on a machine with an NVIDIA driver"
            ):
                build_engine(graph, tmp_path / "x.engine", LINEAR, TENSORRT_RTX, options=option)
            continue
        size = build_engine(graph, tmp_path / "x.engine", LINEAR, TENSORRT_RTX, options=option).bytes
        assert (size < 2**20) == option.strip_plan


def test_the_hint_without_a_driver_names_options_as_the_command_line_does() -> None:
    hint = builder.driver_hint("CUDA driver version is insufficient", {"workspace_mib": 64, "strip_plan": True})
    assert hint is not None
    assert "without --workspace --strip-plan," in hint


@needs_rtx
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"optimization_level": 4}, "--optimization-level with tensorrt-rtx"),
        ({"version_compatible": True}, "--version-compatible"),
        ({"hardware_compatible": "ampere_plus"}, "--hardware-compatible"),
    ],
)
def test_options_a_flavour_has_no_use_for_are_refused(tmp_path: Path, option: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build_engine(
            write_linear(tmp_path / "linear.onnx"),
            tmp_path / "x.engine",
            LINEAR,
            TENSORRT_RTX,
            options=BuildOptions(**option),
        )


@pytest.mark.parametrize("option", [{"refit": "all"}, {"optimization_level": 6}, {"hardware_compatible": "turing"}])
def test_unknown_option_values_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected"):
        BuildOptions(**option)


@needs_rtx
def test_the_result_names_the_chosen_cards(tmp_path: Path) -> None:
    result = build_engine(
        write_linear(tmp_path / "linear.onnx"), tmp_path / "x.engine", LINEAR, TENSORRT_RTX, [(12, 0), (8, 9), (8, 9)]
    )
    assert result.compute_capabilities == ((8, 9), (12, 0))


@needs_rtx
def test_a_build_without_the_memory_for_it_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "_MEMORY_BASE", 2**60)
    with pytest.raises(StorageError, match=r"needs about .* GiB of memory"):
        build_engine(write_linear(tmp_path / "linear.onnx"), tmp_path / "x.engine", LINEAR, TENSORRT_RTX)
    assert not (tmp_path / "x.engine").exists()


def test_profiles_with_falling_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="min ≤ opt ≤ max"):
        Profile({"sample": ((2, 4), (1, 4), (3, 4))})
    with pytest.raises(UsageError, match="min ≤ opt ≤ max"):
        Profile({"sample": ((1, 4), (1, 4, 4), (1, 4))})


@needs_rtx
def test_without_a_gpu_the_flavour_is_the_one_that_builds_ahead() -> None:
    assert choose_flavour(None) is TENSORRT_RTX
    assert choose_flavour("tensorrt-rtx", (8, 9)) is TENSORRT_RTX
    if TENSORRT.missing() is not None:
        assert choose_flavour(None, (8, 9)) is TENSORRT_RTX
        with pytest.raises(BackendMissing, match=r"sdcompress\[trt\]"):
            choose_flavour("tensorrt", (8, 9))


@needs_rtx
@pytest.mark.parametrize("card", [(9, 0), (10, 0), (8, 7), (7, 0)])
def test_a_card_that_the_library_does_not_list_is_refused_before_anything_is_built(card: tuple[int, int]) -> None:
    with pytest.raises(
        BackendMissing,
        match=(
            rf"does not support compute capability {card[0]}\.{card[1]}, only 7\.5, 8\.0, "
            r".*Try: .*--compute-capability 8\.9"
        ),
    ):
        choose_flavour("tensorrt-rtx", card)
    assert choose_flavour("tensorrt-rtx", card, [(8, 9)]) is TENSORRT_RTX
    assert (card in (TENSORRT_RTX.supported_cards() or ())) is False


@needs_rtx
def test_an_engine_for_every_card_does_not_fit_a_card_that_the_library_does_not_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = {
        "flavour": "tensorrt-rtx",
        "version": TENSORRT_RTX.version,
        "compute_capabilities": [],
        "platform": platform_name(),
        "options": {},
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
    for card, reason in (
        ((9, 0), "does not support compute capability 9.0"),
        ((8, 9), None),
        ((7, 5), "built for compute capability 8.0"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, card=card: card)
        reason_given = obstacle(made)
        assert (reason_given is None) if reason is None else (reason in str(reason_given))
        missing = runner_missing(TENSORRT_RTX)
        assert (missing is not None) == (card == (9, 0))


def test_neither_flavour_installed_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for flavour in FLAVOURS.values():
        monkeypatch.setitem(sys.modules, flavour.module, None)
    with pytest.raises(BackendMissing, match=r'pip install "sdcompress\[rtx\]"'):
        choose_flavour(None)
    with pytest.raises(UsageError, match="tensorrt or tensorrt-rtx"):
        choose_flavour("trtx")


@needs_rtx
def test_a_build_asks_for_the_memory_of_the_shapes_at_hand() -> None:
    trt = TENSORRT_RTX.load()
    config = trt.Builder(trt.Logger()).create_builder_config()
    feature = trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10
    config.set_preview_feature(feature, False)  # the default of some versions
    build_worker.request_exact_memory(trt, config)
    assert config.get_preview_feature(feature)
    build_worker.request_exact_memory(object(), None)  # a library without such a feature


@needs_rtx
def test_the_installed_library_has_every_name_the_builder_uses() -> None:
    trt = TENSORRT_RTX.load()
    used = [
        *build_worker.USED_API.items(),
        *build_worker.USED_API_AHEAD.items(),
        *build_worker.USED_API_ATTENTION.items(),
        *build_worker.USED_API_STREAM.items(),
        *build_worker.USED_API_MEMORY.items(),
        *build_worker.USED_API_INDIVIDUAL.items(),
    ]
    assert [f"{kind}.{name}" for kind, names in used for name in names if not hasattr(getattr(trt, kind), name)] == []


@needs_rtx
def test_engines_of_text_encoder_and_vae(fp16_small: Any, tmp_path: Path) -> None:
    from sdcompress.export.tensorrt import build_engines

    result = build_engines(fp16_small.folder, tmp_path / "engines")
    manifest = json.loads((tmp_path / "engines" / "sdcompress.json").read_text())
    assert set(result.builds) == {"text_encoder", "vae_decoder"}
    assert manifest["kind"] == "engine"
    assert manifest["config"]["compute_capabilities"] == (
        [list(torch.cuda.get_device_capability())] if manifest["config"]["flavour"] == "tensorrt" else []
    )
    assert manifest["config"]["profiles"]["vae_decoder"] == [
        {"latent_sample": [[1, 4, 8, 8], [1, 4, 16, 16], [4, 4, 24, 24]]}
    ]
    assert all(built.bytes > 1_000_000 for built in result.builds.values())
    assert (tmp_path / "engines" / "pipeline" / "vae" / "config.json").is_file()


@needs_rtx
@pytest.mark.slow
def test_engines_of_the_whole_pipeline(random_pipeline: Any, fp16_small: Any, tmp_path: Path) -> None:
    from sdcompress.export.onnx import export_onnx
    from sdcompress.export.tensorrt import build_engines

    exported = export_onnx(random_pipeline, tmp_path / "onnx", precision="fp16", reuse=fp16_small.folder)
    result = build_engines(exported.folder, tmp_path / "engines")
    assert set(result.builds) == {"unet", "text_encoder", "vae_decoder"}
    assert result.builds["unet"].bytes > 10_000_000
    assert exported.parity["unet"].share_of_limit <= 1


@needs_rtx
def test_an_engine_of_the_unet(fp32_export: Any, tmp_path: Path) -> None:
    from sdcompress.export.tensorrt import build_engines

    result = build_engines(
        fp32_export.folder, tmp_path / "engines", components=("unet",), profiles=("height=64:128:128",)
    )
    assert result.builds["unet"].bytes > 20_000_000  # 6.7 M parameters in fp32
