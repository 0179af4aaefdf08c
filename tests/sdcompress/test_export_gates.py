"""What an export keeps, refuses and prints: graphs that fail a gate, outputs that are not finite, the next command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sdcompress_engines.command import command_line
from sdcompress_engines.errors import ExportError, GateFailed
from sdcompress_engines.flavour import TENSORRT_RTX

from sdcompress.cli.export import next_command
from sdcompress.export import onnx as onnx_export
from sdcompress.export import onnx_file, parity
from sdcompress.export.components import component_graph, signature_of
from sdcompress.export.export_model import EngineRequest, ExportRequest, export_model
from sdcompress.export.parity import check_parity, compare_onnx, grid

from .conftest import Exports


def test_an_output_that_overflows_in_the_graph_and_in_torch_fails(
    small_pipeline: Any, small_exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The errors are stand-ins: two cases in torch fp16, then the same two in the graph."""
    graph = small_exports(precision="fp16").folder / "text_encoder.onnx"
    part = small_pipeline.text_encoder
    cases = grid(signature_of("text_encoder", part, "fp16", "diffusers"), [1, 2], [(0, 0)], [77])
    errors = iter([1e-3, float("inf"), 1e-3, float("inf")])
    monkeypatch.setattr(parity, "largest_relative_l2", lambda *_: next(errors))
    found = compare_onnx("text_encoder", part, "fp16", graph, cases=cases)
    assert found.share_of_limit == float("inf")
    with pytest.raises(GateFailed, match="does not match torch fp32"):
        check_parity({"text_encoder": found}, {"text_encoder": "fp16"})


@pytest.mark.skipif(TENSORRT_RTX.missing() is not None, reason="tensorrt-rtx is not installed")
def test_failed_graphs_of_an_export_with_engines_are_kept_where_the_error_says(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise GateFailed("the exported graph does not match")

    monkeypatch.setattr(onnx_export, "_check_gates", fail)
    request = ExportRequest(
        components=("text_encoder",), keep_failed=True, engines=EngineRequest(flavour="tensorrt-rtx")
    )
    with pytest.raises(GateFailed) as caught:
        export_model(str(small_folder), tmp_path / "out", request)
    assert caught.value.hint == f"the graphs are kept in {tmp_path / 'out.failed'}"
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed"]
    assert (tmp_path / "out.failed" / "text_encoder.onnx").is_file()


@pytest.mark.parametrize(("opset", "hint"), [(23, "another torch version"), (20, "--opset 23, or another torch")])
def test_another_opset_is_proposed_only_if_it_has_not_failed(
    small_pipeline: Any, opset: int, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no translation")

    monkeypatch.setattr(onnx_file.torch.onnx, "export", fail)
    part = small_pipeline.text_encoder
    graph = component_graph("text_encoder", part, onnx_file.torch.float32)
    with pytest.raises(ExportError) as caught:
        onnx_file.trace_graph(graph, signature_of("text_encoder", part, "fp32", "diffusers"), opset)
    assert str(caught.value.hint).startswith(hint)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (ExportRequest(), ["generate", "{out}"]),
        (ExportRequest(engines=EngineRequest()), ["generate", "{out}/onnx"]),
        (ExportRequest(components=("unet",)), ["inspect", "{out}"]),
        (ExportRequest(precision="bf16"), ["inspect", "{out}"]),
        (ExportRequest(precision="bf16", engines=EngineRequest()), ["engines", "list", "{out}/engine"]),
        (ExportRequest(host="webui", engines=EngineRequest()), ["engines", "list", "{out}/engine"]),
    ],
)
def test_the_next_command_runs_with_what_was_exported(request_: ExportRequest, words: list[str]) -> None:
    out = Path("my graphs")
    typed = command_line(["sdcompress", *(str(Path(word.replace("{out}", str(out)))) for word in words)])
    assert next_command(out, request_).startswith(typed)
