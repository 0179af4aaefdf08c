"""A graph for ONNX Runtime's CUDA provider has only operators with kernels there, and computes what torch computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from sdcompress.export import export_onnx


def test_group_norms_become_operators_that_every_provider_has(random_pipeline: Any, tmp_path: Path) -> None:
    """The export itself compares each graph with torch and fails where it is too far off."""
    operators = {}
    for runtime in ("any", "onnxruntime"):
        components = ("text_encoder", "vae_decoder")
        found = export_onnx(random_pipeline, tmp_path / runtime, components=components, runtime=runtime)  # type: ignore[arg-type]
        graph = onnx.load(found.folder / "vae_decoder.onnx").graph
        operators[runtime] = {node.op_type for node in graph.node}
        assert found.manifest.config["runtime"] == runtime
    assert "GroupNormalization" in operators["any"]
    assert "GroupNormalization" not in operators["onnxruntime"]
    assert "LayerNormalization" in operators["onnxruntime"]
