"""Part 8, the longest: bk-tiny's UNet on ONNX Runtime and TensorRT, which may not be installed, and training nano."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import BackendMissing
from sdcompress_engines.runners import available, open_runner

from .child import PartRun
from .models import Models
from .part_training import nano_rows
from .part_unet import BATCHES, failed_captures_raise, measure_runner

STUDENT, BATCH = "bk-tiny", BATCHES[0]


def longer(run: PartRun) -> None:
    """Write a row for each runtime of exported graphs, and for training nano."""
    models = Models(run)
    graphs = run.scratch / "onnx"
    labels = {"model": STUDENT, "batch": BATCH, "cuda_graph": run.is_cuda}
    for backend, open_graph in {"onnxruntime": open_onnx, "tensorrt": open_engine, "tensorrt-rtx": open_engine}.items():
        measure = functools.partial(measure_export, run, models, graphs, backend, open_graph)
        run.measure(f"{STUDENT} b{BATCH} {backend}", measure, **labels, mode=backend)
    nano_rows(run)


def measure_export(run: PartRun, models: Models, graphs: Path, backend: str, open_graph: Any) -> dict[str, Any]:
    """Returns the figures of the exported UNet on a runtime.

    Args:
        run: the part.
        models: has the UNet.
        graphs: folder of the ONNX graph, exported first if it does not exist.
        backend: the runtime's name.
        open_graph: returns an open runner of (run, graphs, backend).

    Raises:
        BackendMissing: the runtime or the exporter is not installed.
    """
    reason = available(run.device.type)[backend]
    if reason is None and importlib.util.find_spec("onnxscript") is None:
        reason = "onnxscript, which exports the graph, is not installed"
    if reason is not None:
        raise BackendMissing(reason)
    if not graphs.is_dir():
        export(run, models, graphs)
    with open_graph(run, graphs, backend) as runner, failed_captures_raise():
        figures = measure_runner(run, models, STUDENT, BATCH, runner)
    return figures


def export(run: PartRun, models: Models, graphs: Path) -> None:
    """Write the ONNX graph of the student's UNet, in fp16 on a GPU and fp32 on a CPU.

    Args:
        run: the part.
        models: has the UNet.
        graphs: the folder.
    """
    from sdcompress.export.onnx import export_onnx

    pipeline = models.pipeline
    teacher = pipeline.unet
    pipeline.unet = models.unet(STUDENT)
    try:
        export_onnx(pipeline, graphs, precision="fp16" if run.is_cuda else "fp32", components=("unet",), name=STUDENT)
    finally:
        pipeline.unet = teacher


def open_onnx(run: PartRun, graphs: Path, _backend: str) -> Any:
    """Returns a runner of the graph on ONNX Runtime.

    Args:
        run: has the device.
        graphs: folder of the graph.
    """
    return open_runner(graphs / "unet.onnx", str(run.device), **({"cuda_graph": True} if run.is_cuda else {}))


def open_engine(run: PartRun, graphs: Path, backend: str) -> Any:
    """Returns a runner of an engine that is built for the measured shape only.

    Args:
        run: has the device.
        graphs: folder of the ONNX graph.
        backend: flavor of TensorRT.
    """
    from sdcompress_engines.profiles import PRESETS

    from sdcompress.export.tensorrt import build_engines

    folder = run.scratch / backend
    profile = next(name for name, preset in PRESETS.items() if name.startswith("sd15") and preset.batch == (BATCH,) * 3)
    build_engines(graphs, folder, profiles=(profile,), flavour=backend, components=("unet",), force=True)
    return open_runner(folder / "unet.engine", str(run.device), cuda_graph=True)
