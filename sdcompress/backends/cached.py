"""Graphs and engines of a model in the cache folder, exported and built once."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from sdcompress_engines.graph import weights_path
from sdcompress_engines.manifest import cache_folder
from sdcompress_engines.output_folders import unless_present
from sdcompress_engines.profiles import ShapeRanges
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.backends.backend import Backend
from sdcompress.backends.registry import find_backend
from sdcompress.export.components import Precision, Runtime


def cached_artifacts(
    model: str | Path,
    backend: str,
    precision: Precision,
    report: Reporter = SILENT,
    profiles: Sequence[str | ShapeRanges] = (),
    decoder: Path | None = None,
    loras: bool = False,
) -> Path:
    """Returns the folder of a model's graphs or engines in the cache. It is written now if it is not there.

    Args:
        model: a name, a path or a hub id.
        backend: one that runs graphs or engines, by its full name.
        precision: of the graphs.
        report: gets the progress.
        profiles: the shapes to build engines for; by default the preset of the model. Each set of
            profiles has a folder of its own.
        decoder: folder of a small decoder in the place of the VAE. Equal graphs are copied from those of the model.
        loras: whether LoRAs are to be put into them. Graphs of an earlier version, which take none, are written anew.

    Raises:
        UsageError, ModelError: the model. ExportError, GateFailed, StorageError: as `export_onnx` and `build_engines`.
    """
    from sdcompress.export.onnx import export_onnx
    from sdcompress.export.tensorrt import build_engines
    from sdcompress.models.decoder import hash_decoder
    from sdcompress.models.load import load_pipeline
    from sdcompress.models.locate import hash_pipeline, locate_pipeline

    sha256, entry = hash_pipeline(locate_pipeline(model)), find_backend(backend)
    runtime = graph_runtime(entry, "cuda" if torch.cuda.is_available() else "cpu")
    own = cached_graphs(sha256, precision, runtime)
    graphs = own if decoder is None else cached_graphs(sha256, precision, runtime, hash_decoder(decoder))
    if loras:
        _remove_without_weights(graphs)
    if not graphs.is_dir():
        loaded = load_pipeline(model, decoder=decoder)
        report.show_line(f"no graphs given: exporting {loaded.name} once to {graphs}")
        with unless_present(graphs):
            export_onnx(
                loaded.pipeline,
                graphs,
                precision=precision,
                runtime=runtime,
                source=loaded.inputs,
                name=loaded.name,
                plan=loaded.plan,
                reuse=own if decoder is not None and own.is_dir() else None,
                report=report,
            )
    if entry.artifact == "onnx":
        return graphs
    engines = graphs.with_name(f"{graphs.name.replace('onnx', 'engine', 1)}{_profile_suffix(profiles)}")
    if loras:
        _remove_without_weights(engines)
    if not engines.is_dir():
        with unless_present(engines):
            build_engines(graphs, engines, profiles=profiles, report=report)
    return engines


def _remove_without_weights(folder: Path) -> None:
    """Remove a folder of the cache whose graphs or engines take no LoRA."""
    if folder.is_dir() and not any(weights_path(file).is_file() for file in folder.glob("unet.*")):
        shutil.rmtree(folder, ignore_errors=True)


def graph_runtime(backend: Backend, device: str) -> Runtime:
    """Returns the runtime that a backend's graphs are written for on a kind of device, `cpu` or `cuda`."""
    return backend.graph_runtimes.get(device, "any")


def cached_graphs(
    sha256: str, precision: Precision, runtime: Runtime = "any", decoder_sha256: str | None = None
) -> Path:
    """Returns the folder in the cache for a model's graphs, whether it is there or not.

    Args:
        sha256: of the model.
        precision: of the graphs.
        runtime: see `graph_runtime`.
        decoder_sha256: of the small decoder in the place of its VAE, if there is one.
    """
    suffix = "" if runtime == "any" else f"-{runtime}"
    if decoder_sha256 is not None:
        suffix += f"-decoder-{decoder_sha256[:12]}"
    return cache_folder() / "models" / sha256[:16] / f"onnx-{precision}{suffix}"


def _profile_suffix(profiles: Sequence[str | ShapeRanges]) -> str:
    """Returns the end of a folder's name that depends on the profiles; empty for the default ones."""
    text = "; ".join(map(str, profiles))
    return f"-{hashlib.sha256(text.encode()).hexdigest()[:12]}" if text else ""
