"""`sdcompress export`: a model to ONNX graphs, and on to TensorRT engines."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ._console import ConsoleReporter, card, force_option, mib, output_option

if TYPE_CHECKING:
    from sdcompress.export import EnginesResult, ExportResult

COMPONENTS = ("unet", "text_encoder", "vae_decoder")  # as in `sdcompress.export`, which loads torch; a test holds them equal


class _Capability(click.ParamType):
    name = "MAJOR.MINOR"

    def convert(self, value: str | tuple[int, int], param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"(\d+)\.(\d)", value)
        if found is None:
            self.fail(f"{value!r} is not a compute capability; 8.9 is one", param, ctx)
        return int(found[1]), int(found[2])


@click.command()
@click.argument("model")
@output_option()
@click.option("--precision", type=click.Choice(["fp32", "fp16"]), default=None, help="Of weights, inputs and outputs.  [default: fp32; fp16 with --trt]")
@click.option("--trt", is_flag=True, help="Build TensorRT engines too: DIR/onnx (fp16) and DIR/engine.")
@click.option("--compute-capability", type=_Capability(), default=None, help="Card to build for.  [default: the one here, else 8.9]")
@click.option("--component", "components", type=click.Choice(COMPONENTS), multiple=True, help="Only this one; may be repeated.")
@click.option("--opset", type=click.IntRange(18), default=None, help="ONNX opset.  [default: 23]")
@force_option
def command(model: str, output: Path, precision: str | None, trt: bool, compute_capability: tuple[int, int] | None, components: tuple[str, ...], opset: int | None, force: bool) -> None:
    """Write ONNX graphs of MODEL (a name, a pipeline folder or a single file), each checked against torch.

    \b
    sdcompress export nano -o graphs                       fp32 ONNX
    sdcompress export student/pipeline -o engines --trt    fp16 ONNX and TensorRT engines
    sdcompress export nano -o engines --trt --compute-capability 12.0
    """
    from sdcompress_engines.errors import UsageError
    from sdcompress_engines.manifest import check_free

    if trt and precision == "fp32":
        raise UsageError("--precision fp32 with --trt", expected="fp16, in which TensorRT engines are built")
    if compute_capability and not trt:
        raise UsageError("--compute-capability without --trt", hint="add --trt")
    check_free(output, force)

    import torch
    from sdcompress_engines.flavour import choose_flavour
    from sdcompress_engines.manifest import staged

    flavour = choose_flavour(None, torch.cuda.is_available()) if trt else None

    from sdcompress.export import build_engines, export_onnx
    from sdcompress.teacher import load_teacher

    report = ConsoleReporter()
    started = time.monotonic()
    loaded = load_teacher(model)
    chosen = components or COMPONENTS
    source = {"pipeline": loaded.sha256}
    if flavour is None:
        result = export_onnx(loaded.pipeline, output, precision=precision or "fp32", components=chosen, opset=opset, source=source, force=force, report=report)  # type: ignore[arg-type]
        rows = _graph_rows(result)
    else:
        with staged(output, force) as folder:
            result = export_onnx(loaded.pipeline, folder / "onnx", precision="fp16", components=chosen, opset=opset, source=source, report=report)
            engines = build_engines(folder / "onnx", folder / "engine", flavour=flavour.name, compute_capability=compute_capability, report=report)
        rows = [*_graph_rows(result, "onnx/"), *_engine_rows(engines)]
    rows.append(("time", f"{time.monotonic() - started:.1f} s"))
    card(f"{loaded.name} → {output}", rows, f'sdcompress generate {output / "onnx" if trt else output} "PROMPT" --backend ort -o out.png')


def _graph_rows(result: ExportResult, prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for name, parity in result.parity.items():
        size = sum(entry.bytes for file, entry in result.manifest.files.items() if file.startswith(f"{name}.onnx"))
        told = "not checked, onnxruntime is not installed" if parity is None else f"relative L2 {parity.relative_l2:.1e}"
        if parity is not None and parity.torch_relative_l2 is not None:
            told += f" (torch fp16 {parity.torch_relative_l2:.1e})"
        rows.append((f"{prefix}{name}.onnx", f"{mib(size):>12}  {result.seconds[name]:6.1f} s  {told}"))
    return rows


def _engine_rows(result: EnginesResult) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [(f"engine/{name}.engine", f"{mib(built.bytes):>12}  {built.seconds:6.1f} s") for name, built in result.builds.items()]
    built = next(iter(result.builds.values()))
    return [*rows, ("built with", f"{built.flavour} {built.version} for compute capability {', '.join(f'{a}.{b}' for a, b in built.compute_capabilities)}")]
