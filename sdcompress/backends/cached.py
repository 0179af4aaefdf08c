"""Graphs and engines of a model in the cache folder, made once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from sdcompress_engines.profiles import ShapeRanges
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.export.components import Precision, Runtime


def cached_artifacts(
    model: str | Path,
    backend: str,
    precision: Precision,
    report: Reporter = SILENT,
    profiles: Sequence[str | ShapeRanges] = (),
) -> Path:
    """Returns the folder of a model's graphs (`onnxruntime`) or engines (`tensorrt`) in the cache, made now where it is
    not there.

    Args:
        profiles: the shapes to build engines for; by default the `dynamic` preset. Each set of profiles has a folder of
            its own.
    """
    from sdcompress.export.onnx import export_onnx
    from sdcompress.export.tensorrt import build_engines
    from sdcompress.models.load import load_pipeline
    from sdcompress.models.locate import hash_pipeline, locate_pipeline

    sha256 = hash_pipeline(locate_pipeline(model))
    runtime = graph_runtime(backend, "cuda" if torch.cuda.is_available() else "cpu")
    graphs = cached_graphs(sha256, precision, runtime)
    if not graphs.is_dir():
        loaded = load_pipeline(model)
        report.say(f"no graphs given: exporting {loaded.name} once to {graphs}")
        export_onnx(
            loaded.pipeline,
            graphs,
            precision=precision,
            runtime=runtime,
            source={"pipeline": sha256},
            name=loaded.name,
            report=report,
        )
    if backend == "onnxruntime":
        return graphs
    engines = graphs.parent / f"engine-{precision}{_profile_suffix(profiles)}"
    if not engines.is_dir():
        build_engines(graphs, engines, profiles=profiles, report=report)
    return engines


def graph_runtime(backend: str, device_type: str) -> Runtime:
    """Returns whose kernels a backend's graphs are written for: on CUDA, ONNX Runtime has none for group norms."""
    return "onnxruntime" if (backend, device_type) == ("onnxruntime", "cuda") else "any"


def cached_graphs(sha256: str, precision: Precision, runtime: Runtime = "any") -> Path:
    """Returns the folder in the cache for a model's graphs, whether it is there or not.

    Args:
        sha256: of the model. runtime: see `graph_runtime`.
    """
    from sdcompress_engines.manifest import cache_folder

    suffix = "" if runtime == "any" else f"-{runtime}"
    return cache_folder() / "models" / sha256[:16] / f"onnx-{precision}{suffix}"


def _profile_suffix(profiles: Sequence[str | ShapeRanges]) -> str:
    """Returns what tells the folders of different profiles apart; empty for the default ones."""
    text = "; ".join(map(str, profiles))
    return f"-{hashlib.sha256(text.encode()).hexdigest()[:12]}" if text else ""
