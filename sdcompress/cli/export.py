"""`sdcompress export`: a model to ONNX graphs, and on to TensorRT engines."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdcompress.cli._console import ConsoleReporter, card, force_option, mib, output_option

if TYPE_CHECKING:
    from sdcompress.export.onnx import ExportResult
    from sdcompress.export.tensorrt import EnginesResult

# As in `sdcompress_engines.signature` and `.profiles`, which load torch; a test holds them equal.
COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "vae_decoder", "vae_encoder")
HOSTS = ("diffusers", "webui", "comfyui")
PRESETS = ("dynamic", "webui", "sd15-512", "sd15-dynamic", "sdxl-1024")
QUANTIZED = ("fp8", "int8")


class _Capability(click.ParamType):
    name = "MAJOR.MINOR"

    def convert(
        self, value: str | tuple[int, int], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"(\d+)\.(\d)", value)
        if found is None:
            self.fail(f"{value!r} is not a compute capability; 8.9 is one", param, ctx)
        return int(found[1]), int(found[2])


def _engine_options(command: Callable[..., Any]) -> Any:
    """The options that say which engines to build."""
    for option in reversed(
        (
            click.option(
                "--flavour",
                type=click.Choice(["tensorrt", "tensorrt-rtx"]),
                default=None,
                help="Library to build with.  [default: tensorrt with a GPU, else tensorrt-rtx]",
            ),
            click.option(
                "--profile",
                "profiles",
                multiple=True,
                metavar="PRESET|RANGES",
                help=(
                    f"Shapes to build for: {', '.join(PRESETS)}, or batch=1:2:8,height=512,...; repeat for more in one"
                    " engine.  [default: dynamic]"
                ),
            ),
            click.option(
                "--batch",
                default=None,
                metavar="MIN:OPT:MAX",
                help="Samples of a UNet call; guidance makes two of a picture.",
            ),
            click.option(
                "--height",
                default=None,
                metavar="MIN:OPT:MAX",
                help="Of the picture, in pixels; one number makes it fixed.",
            ),
            click.option("--width", default=None, metavar="MIN:OPT:MAX", help="Of the picture, in pixels."),
            click.option(
                "--tokens", default=None, metavar="MIN:OPT:MAX", help="Of the prompt: 77, or a multiple for long ones."
            ),
            click.option(
                "--compute-capability",
                "capabilities",
                type=_Capability(),
                multiple=True,
                help=(
                    "Card to build for; repeat for more.  [default: tensorrt the one here, tensorrt-rtx all from"
                    " 8.0 on]"
                ),
            ),
            click.option(
                "--optimization-level",
                type=click.IntRange(0, 5),
                default=None,
                help="How long tensorrt searches.  [default: 3]",
            ),
            click.option(
                "--workspace",
                "workspace_mib",
                type=click.IntRange(1),
                default=None,
                metavar="MIB",
                help="Limit of a layer's scratch memory.",
            ),
            click.option(
                "--refit",
                type=click.Choice(["any", "identical"]),
                default=None,
                help="Let weights be exchanged later; any costs speed.  [default: off]",
            ),
            click.option(
                "--strip-plan",
                is_flag=True,
                help="Engines without weights, which are read from the ONNX graph when they are loaded.",
            ),
            click.option(
                "--weight-streaming", is_flag=True, help="Let weights stay in host memory, for cards they do not fit."
            ),
            click.option(
                "--hardware-compatible",
                type=click.Choice(["ampere_plus", "same_compute_capability"]),
                default=None,
                help="tensorrt: run on other cards too, slower.",
            ),
            click.option(
                "--version-compatible",
                is_flag=True,
                help="tensorrt: run on newer versions of the same major too, slower.",
            ),
        )
    ):
        command = option(command)
    return command


@click.command()
@click.argument("model")
@output_option()
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", *QUANTIZED]),
    default=None,
    help="Of weights, inputs and outputs; fp8 and int8 quantize the UNet.  [default: fp32; fp16 with --trt]",
)
@click.option("--trt", is_flag=True, help="Build TensorRT engines too: DIR/onnx and DIR/engine.")
@click.option(
    "--ldm", is_flag=True, help="One .safetensors in LDM layout, which A1111, Forge and ComfyUI load; -o is that file."
)
@click.option(
    "--signature",
    "host",
    type=click.Choice(HOSTS),
    default="diffusers",
    show_default=True,
    help="Whose names inputs and outputs have; webui and comfyui take the UNet only.",
)
@click.option(
    "--component",
    "components",
    type=click.Choice(COMPONENTS),
    multiple=True,
    help="Only this one; may be repeated.  [default: all that text-to-image needs]",
)
@click.option("--lora", "loras", multiple=True, metavar="FILE[:WEIGHT]", help="LoRA to bake in; repeat for more.")
@click.option(
    "--opset", type=click.IntRange(18), default=None, help="ONNX opset.  [default: 23; 20 for TensorRT before 10.14]"
)
@_engine_options
@click.option(
    "--calibration-prompts",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE",
    help="fp8, int8: prompts to calibrate with, one a line.  [default: built-in ones]",
)
@click.option("--keep-failed", is_flag=True, help="Keep graphs that are too far from torch in DIR.failed.")
@force_option
def command(
    model: str,
    output: Path,
    precision: str | None,
    trt: bool,
    ldm: bool,
    host: str,
    components: tuple[str, ...],
    loras: tuple[str, ...],
    opset: int | None,
    flavour: str | None,
    profiles: tuple[str, ...],
    batch: str | None,
    height: str | None,
    width: str | None,
    tokens: str | None,
    capabilities: tuple[tuple[int, int], ...],
    calibration_prompts: Path | None,
    keep_failed: bool,
    force: bool,
    **build: Any,
) -> None:
    """Write ONNX graphs of MODEL (a name, a pipeline folder or a single file), each checked against torch, and TensorRT
    engines of them.

    \b
    sdcompress export nano -o graphs                                     fp32 ONNX
    sdcompress export student/pipeline -o engines --trt                  fp16 ONNX and engines for 8.0 and newer cards
    sdcompress export rv4.safetensors -o rv4 --trt --profile sd15-512    one size, the fastest
    sdcompress export rv4.safetensors -o rv4 --trt --height 512 --width 512:768:1024 --batch 1:2:8
    sdcompress export student/pipeline -o webui --trt --signature webui --profile webui
    sdcompress export student/pipeline -o styled --trt --lora style.safetensors:0.8
    sdcompress export student/pipeline --ldm -o student.safetensors      a checkpoint for ComfyUI and the WebUIs
    """
    from sdcompress_engines.errors import UsageError
    from sdcompress_engines.manifest import check_free

    shapes = {
        name: value
        for name, value in (("batch", batch), ("height", height), ("width", width), ("tokens", tokens))
        if value is not None
    }
    asked = [
        f"--{name.replace('_', '-')}"
        for name, value in (
            {"flavour": flavour, "profile": profiles, "compute_capability": capabilities} | shapes | build
        ).items()
        if value
    ]
    if ldm:
        if asked or trt or components or calibration_prompts or precision in QUANTIZED:
            raise UsageError(
                f"{(asked or ['graphs and engines'])[0]} with --ldm",
                expected="a checkpoint alone: --precision fp16, bf16 or fp32, and --lora",
            )
        _write_ldm(model, output, precision or "fp16", loras, force)
        return
    if asked and not trt:
        raise UsageError(f"{asked[0]} without --trt", hint="add --trt")
    if trt and precision == "fp32":
        raise UsageError(
            "--precision fp32 with --trt", expected="fp16, bf16, fp8 or int8, in which TensorRT engines are built"
        )
    if calibration_prompts and precision not in QUANTIZED:
        raise UsageError("--calibration-prompts without quantization", hint="add --precision fp8 or int8")
    if shapes and len(profiles) > 1:
        raise UsageError(
            f"--{next(iter(shapes))} with several --profile",
            expected="the sizes in each of them: --profile batch=1,height=512,...",
        )
    check_free(output, force)

    from sdcompress_engines.builder import BuildOptions, check_options, newest_opset, targets
    from sdcompress_engines.flavour import choose_flavour, present_card
    from sdcompress_engines.manifest import staged

    from sdcompress.export.quantize.precisions import supported

    library = choose_flavour(flavour, present_card(), capabilities) if trt else None
    options = BuildOptions(**build)
    if library is not None:  # what cannot be built is said before minutes go into the graphs
        check_options(library, options)
        for capability in targets(library, capabilities) or ((8, 0),):  # the least of those a portable engine is for
            if reason := supported(precision or "fp16", capability):
                raise UsageError(
                    f"--precision {precision} for this card: {reason}",
                    hint="--compute-capability 8.9, or --precision int8",
                )

    from sdcompress.export.onnx import checked_components
    from sdcompress.export.tensorrt import build_engines, shape_ranges
    from sdcompress.lora.files import read_lora
    from sdcompress.lora.fuse import fuse_lora, parse_lora
    from sdcompress.lora.names import unet_modules
    from sdcompress.models.load import load_pipeline
    from sdcompress.models.locate import unet_config

    chosen_profiles = _with_shapes(profiles, shapes)
    if library is not None:
        shape_ranges(chosen_profiles, unet_config(model))
    if components:
        checked_components(components, host)
    parsed = [parse_lora(text) for text in loras]
    report = ConsoleReporter()
    started = time.monotonic()
    loaded = load_pipeline(
        model, as_stored=not loras and precision not in QUANTIZED
    )  # a LoRA is added, and a calibration drawn, in fp32
    pipeline: Any = loaded.pipeline
    source = {"pipeline": loaded.sha256}
    for file, weight in parsed:
        from sdcompress_engines.manifest import sha256_file

        fuse_lora(pipeline, read_lora(file, unet_modules(pipeline.unet)), weight)
        source[f"lora {file.name}:{weight:g}"] = sha256_file(file)
    name, exported = loaded.name, precision or ("fp16" if trt else "fp32")
    settings: dict[str, Any] = {
        "components": components or None,
        "host": host,
        "opset": opset or (newest_opset(library) if library else None),
        "source": source,
        "name": name,
        "keep_failed": keep_failed,
    }
    if calibration_prompts:
        settings["calibration_prompts"] = _prompts(calibration_prompts)
    if library is None:
        result = _export(pipeline, output, exported, force=force, report=report, **settings)
        rows = _graph_rows(result)
    else:
        with staged(output, force) as folder:
            result = _export(pipeline, folder / "onnx", exported, report=report, **settings)
            del loaded, pipeline  # a build needs the memory
            engines = build_engines(
                folder / "onnx",
                folder / "engine",
                profiles=chosen_profiles,
                flavour=library.name,
                compute_capabilities=capabilities or None,
                options=options,
                report=report,
            )
        rows = [*_graph_rows(result, "onnx/"), *_engine_rows(engines)]
    rows.append(("time", f"{time.monotonic() - started:.1f} s"))
    card(f"{name} → {output}", rows, _next(output, trt, host))


def _write_ldm(model: str, output: Path, precision: str, loras: tuple[str, ...], force: bool) -> None:
    from sdcompress.checkpoints.write import export_ldm
    from sdcompress.export.components import DTYPES
    from sdcompress.lora.files import read_lora
    from sdcompress.lora.fuse import fuse_lora, parse_lora
    from sdcompress.lora.names import unet_modules
    from sdcompress.models.load import load_pipeline

    started = time.monotonic()
    loaded = load_pipeline(model)
    pipeline: Any = loaded.pipeline
    for file, weight in map(parse_lora, loras):
        fuse_lora(pipeline, read_lora(file, unet_modules(pipeline.unet)), weight)
    path = export_ldm(
        pipeline, output, DTYPES[precision], metadata={"sdcompress.pipeline_sha256": loaded.sha256}, force=force
    )
    card(
        f"{loaded.name} → {output}",
        [("size", mib(path.stat().st_size)), ("precision", precision), ("time", f"{time.monotonic() - started:.1f} s")],
        f"sdcompress inspect {output}",
    )


def _export(pipeline: Any, output: Path, precision: str, **settings: Any) -> ExportResult:
    from sdcompress.export.onnx import export_onnx

    return export_onnx(pipeline, output, precision=precision, **settings)  # type: ignore[arg-type]


def _prompts(path: Path) -> list[str]:
    from sdcompress_engines.errors import DataError

    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read ({error})", where=path, expected="prompts, one a line") from error
    if not any(lines):
        raise DataError("has no prompts", where=path, expected="prompts, one a line")
    return [line for line in lines if line]


def _with_shapes(profiles: tuple[str, ...], shapes: dict[str, str]) -> list[str]:
    """The profiles as texts; sizes given one by one replace those of the one preset there may be."""
    if not shapes:
        return list(profiles)
    given = ",".join(f"{name}={value}" for name, value in shapes.items())
    return [f"{profiles[0]},{given}" if profiles else given]


def _next(output: Path, trt: bool, host: str) -> str:
    if host != "diffusers":
        return f"sdcompress engines list {output / 'engine'}" if trt else f"sdcompress inspect {output}"
    return f'sdcompress generate {output / "onnx" if trt else output} "PROMPT" --backend ort -o out.png'


def _graph_rows(result: ExportResult, prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for name, parity in result.parity.items():
        size = sum(entry.bytes for file, entry in result.manifest.files.items() if file.startswith(f"{name}.onnx"))
        told = (
            "not checked, onnxruntime is not installed" if parity is None else f"relative L2 {parity.relative_l2:.1e}"
        )
        if parity is not None and parity.torch_relative_l2 is not None:
            told += (
                " (torch"
                f" {'fp16' if 'accuracy' in result.manifest.figures[name] else result.manifest.config['precisions'][name]}"
                f" {parity.torch_relative_l2:.1e})"
            )
        rows.append((f"{prefix}{name}.onnx", f"{mib(size):>12}  {result.seconds[name]:6.1f} s  {told}"))
        if accuracy := result.manifest.figures[name].get("accuracy"):
            rows.append(
                (
                    "",
                    (
                        f"in {accuracy['precision']}: relative L2 {accuracy['mean']:.3f} to fp32 on average,"
                        f" {accuracy['worst']:.3f} at the worst timestep"
                    ),
                )
            )
    return rows


def _engine_rows(result: EnginesResult) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [
        (
            f"engine/{name}.engine",
            f"{mib(built.bytes):>12}  "
            + (
                "from the store"
                if built.reused
                else f"{built.seconds:6.1f} s  {built.peak_mib / 1024:.1f} GiB at its peak"
            ),
        )
        for name, built in result.builds.items()
    ]
    config = result.manifest.config
    cards = ", ".join(f"{a}.{b}" for a, b in config["compute_capabilities"]) or "8.0 and newer"
    rows += [("shapes", str(each)) for each in result.ranges]
    return [*rows, ("built with", f"{config['flavour']} {config['version']} for compute capability {cards}")]
