"""`sdcompress export`: a model to ONNX graphs, TensorRT engines, or a checkpoint in LDM layout."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from sdcompress_engines.command import as_argument, command_line

from sdcompress.cli._console import ConsoleReporter, card, given_parameters, mib
from sdcompress.cli._export_options import QUANTIZED, export_options
from sdcompress.cli._types import NAME

if TYPE_CHECKING:
    from sdcompress.export.components import Precision
    from sdcompress.export.export_model import EngineRequest, ExportRequest, ModelExport
    from sdcompress.export.onnx import ExportResult
    from sdcompress.export.quantize.precisions import Quantized
    from sdcompress.export.tensorrt import EnginesResult

_SHAPES = ("batch", "height", "width", "tokens")


@click.command()
@click.argument("model", type=NAME)
@export_options
def command(
    model: str,
    output: Path,
    precision: Precision | Quantized | None,
    trt: bool,
    ldm: bool,
    host: str,
    components: tuple[str, ...],
    loras: tuple[str, ...],
    decoder: Path | None,
    opset: int | None,
    calibration_prompts: Path | None,
    keep_failed: bool,
    force: bool,
    **engine_options: Any,
) -> None:
    """Write ONNX graphs of MODEL (a name, a pipeline folder or a single file), each checked against torch, and build
    TensorRT engines from them.

    \b
    sdcompress export nano -o graphs                                     fp32 ONNX
    sdcompress export student/pipeline -o engines --trt                  fp16 ONNX and engines for 8.0 and newer cards
    sdcompress export rv4.safetensors -o rv4 --trt --profile sd15-512    one size, the fastest
    sdcompress export rv4.safetensors -o rv4 --trt --height 512 --width 512:768:1024 --batch 1:2:8
    sdcompress export student/pipeline -o webui --trt --signature webui --profile webui
    sdcompress export student/pipeline -o styled --trt --lora style.safetensors:0.8 --decoder small/decoder
    sdcompress export student/pipeline --ldm -o student.safetensors      a checkpoint for ComfyUI and the WebUIs
    """
    given = [parameter.opts[0] for parameter in given_parameters(engine_options)]  # an error names the first
    if ldm:
        others = {
            "--trt": trt,
            "--component": components,
            "--decoder": decoder,
            "--calibration-prompts": calibration_prompts,
            f"--precision {precision}": precision in QUANTIZED,
            "--opset": opset,
            "--signature": host != "diffusers",
            "--keep-failed": keep_failed,
        }
        _refuse_with_ldm([*(name for name, is_given in others.items() if is_given), *given])
        return _write_checkpoint(model, output, cast("Precision", precision or "fp16"), loras, force)
    _check_combination(given, engine_options, trt, precision, calibration_prompts)

    from sdcompress.export.export_model import ExportRequest, export_model

    request = ExportRequest(
        precision=precision,
        host=host,
        components=components,
        loras=loras,
        decoder=decoder,
        opset=opset,
        keep_failed=keep_failed,
        force=force,
        engines=_engine_request(engine_options) if trt else None,
        **_calibration(calibration_prompts),
    )
    result = export_model(model, output, request, ConsoleReporter())
    card(f"{result.name} → {output}", _rows(result, output), next_command(output, request))


def _calibration(prompts: Path | None) -> dict[str, Any]:
    """Returns the fields of `ExportRequest` for a file of calibration prompts, one a line."""
    from sdcompress.data.records import read_prompt_lines

    return {} if prompts is None else {"calibration_prompts": read_prompt_lines(prompts), "files": [prompts]}


def _refuse_with_ldm(given: Sequence[str]) -> None:
    """Refuse the options of graphs and engines with --ldm.

    Raises:
        UsageError: there is one.
    """
    from sdcompress_engines.errors import UsageError

    if given:
        raise UsageError(
            f"{given[0]} with --ldm",
            expected="a checkpoint alone: --precision fp16, bf16 or fp32, and --lora",
        )


def _check_combination(
    given: Sequence[str],
    engine_options: Mapping[str, Any],
    trt: bool,
    precision: str | None,
    calibration_prompts: Path | None,
) -> None:
    """Refuse options that do not go together.

    Args:
        given: the engine options that were given.
        engine_options: their values.
        trt, precision, calibration_prompts: the other options.

    Raises:
        UsageError: names the option and what to type.
    """
    from sdcompress_engines.errors import UsageError

    if given and not trt:
        raise UsageError(f"{given[0]} without --trt", hint="add --trt")
    if trt and precision == "fp32":
        raise UsageError(
            "--precision fp32 with --trt", expected="fp16, bf16, fp8 or int8, in which TensorRT engines are built"
        )
    if calibration_prompts and precision not in QUANTIZED:
        raise UsageError("--calibration-prompts without quantization", hint="add --precision fp8 or int8")
    shapes = [name for name in _SHAPES if engine_options[name] is not None]
    if shapes and len(engine_options["profiles"]) > 1:
        raise UsageError(
            f"--{shapes[0]} with several --profile",
            expected="the sizes in each of them: --profile batch=1,height=512,...",
        )


def _engine_request(engine_options: Mapping[str, Any]) -> EngineRequest:
    from sdcompress_engines.build_options import BuildOptions

    from sdcompress.export.export_model import EngineRequest

    build = dict(engine_options)
    flavour, profiles = build.pop("flavour"), build.pop("profiles")
    capabilities, no_lora = build.pop("compute_capabilities"), build.pop("no_lora")
    shapes = {name: value for name in _SHAPES if (value := build.pop(name)) is not None}
    loras = False if no_lora else None
    return EngineRequest(flavour, _add_shapes(profiles, shapes), capabilities, BuildOptions(**build), loras)


def _add_shapes(profiles: tuple[str, ...], shapes: Mapping[str, str]) -> list[str]:
    """Returns the profiles as texts. `shapes` override the ranges of the only profile, or form one if there is none."""
    if not shapes:
        return list(profiles)
    text = ",".join(f"{name}={value}" for name, value in shapes.items())
    return [f"{profiles[0]},{text}" if profiles else text]


def _write_checkpoint(model: str, output: Path, precision: Precision, loras: tuple[str, ...], force: bool) -> None:
    from sdcompress.checkpoints.ldm_keys import USAGE_HINT
    from sdcompress.checkpoints.weights import open_weights
    from sdcompress.export.export_model import export_checkpoint

    started = time.monotonic()
    name, path = export_checkpoint(model, output, precision, loras, force=force, report=ConsoleReporter())
    rows: list[tuple[str, object]] = [("size", mib(path.stat().st_size)), ("precision", precision)]
    if hint := open_weights(path).metadata.get(USAGE_HINT):
        rows.append(("sampling", hint))
    card(
        f"{name} → {output}",
        [*rows, ("time", f"{time.monotonic() - started:.1f} s")],
        command_line(["sdcompress", "inspect", as_argument(output)]),
    )


def next_command(output: Path, request: ExportRequest) -> str:
    """Returns the command to type after an export: a picture, if a pipeline can draw with the result."""
    is_drawable = request.host == "diffusers" and not request.components and request.precision != "bf16"
    if is_drawable:
        graphs = output / "onnx" if request.engines else output
        return f'sdcompress generate {command_line([as_argument(graphs)])} "PROMPT" --backend ort -o out.png'
    if request.engines:
        return command_line(["sdcompress", "engines", "list", as_argument(output / "engine")])
    return command_line(["sdcompress", "inspect", as_argument(output)])


def _rows(result: ModelExport, output: Path) -> list[tuple[str, object]]:
    from sdcompress_engines.few_steps import read_exported_few_steps

    engines = [] if result.engines is None else _engine_rows(result.engines)
    place = "" if result.engines is None else "onnx/"
    graphs = _graph_rows(result.graphs, place)
    sampling = read_exported_few_steps(output / place, result.graphs.manifest)
    sampled = [] if sampling is None else [("sampling", sampling.describe_in())]
    return [*graphs, *engines, *sampled, ("time", f"{result.seconds:.1f} s")]


def _graph_rows(result: ExportResult, prefix: str) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for name, parity in result.parity.items():
        size = sum(entry.bytes for file, entry in result.manifest.files.items() if file.startswith(f"{name}.onnx"))
        accuracy = result.manifest.figures[name].get("accuracy")
        if parity is None:
            checked = "not checked, onnxruntime is not installed"
        else:
            checked = f"relative L2 {parity.relative_l2:.1e}"
            if parity.torch_relative_l2 is not None:
                precision = "fp16" if accuracy else result.manifest.config["precisions"][name]
                checked += f" (torch {precision} {parity.torch_relative_l2:.1e})"
        rows.append((f"{prefix}{name}.onnx", f"{mib(size):>12}  {result.seconds[name]:6.1f} s  {checked}"))
        if accuracy:
            distance = f"relative L2 {accuracy['mean']:.3f} to fp32 on average"
            worst = f"{accuracy['worst']:.3f} at the worst timestep"
            rows.append(("", f"in {accuracy['precision']}: {distance}, {worst}"))
    return rows


def _engine_rows(result: EnginesResult) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for name, built in result.builds.items():
        origin = f"{built.seconds:6.1f} s  {built.peak_mib / 1024:.1f} GiB at its peak"
        if built.reused:
            origin = "from the store"
        rows.append((f"engine/{name}.engine", f"{mib(built.bytes):>12}  {origin}"))
    rows += [("shapes", str(each)) for each in result.ranges]
    config = result.manifest.config
    cards = ", ".join(f"{major}.{minor}" for major, minor in config["compute_capabilities"]) or "8.0 and newer"
    takes = [name for name in result.builds if f"{name}.engine.safetensors" in result.manifest.files]
    rows.append(
        ("LoRAs", f"go into {', '.join(takes)} without a new build" if takes else "none: bake them in with --lora")
    )
    return [*rows, ("built with", f"{config['flavour']} {config['version']} for compute capability {cards}")]
