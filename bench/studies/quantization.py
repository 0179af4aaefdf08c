"""What do int8 and fp8 cost a UNet? Nano's, by nvidia-modelopt, against fp32: every timestep, whole pictures, which
layers matter, and speed on a CPU.

    python bench/studies/quantization.py -o bench/results/quantization-nano.json --work build/quantization

Calibrated on 64 rows of the trajectories of 8 training captions; judged on 168 rows of 4 held-out captions (8 of each
timestep, 16 of the one that PNDM asks for twice), all in ONNX Runtime on the CPU. Pictures: 8 held-out captions, 20
steps, same seeds, PSNR against fp32's. The fp16 graphs, quantized, are then built by TensorRT-RTX for compute
capability 8.9, where it is installed; nothing here runs them. Speed: one UNet call of batch 2, fp32 and quantized in
turn, one thread, the first 5 rounds dropped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sdcompress_bench.environment import environment
from sdcompress_bench.fidelity import compare_pictures
from sdcompress_engines.builder import build_engine
from sdcompress_engines.flavour import TENSORRT_RTX
from sdcompress_engines.profiles import Profile
from sdcompress_engines.runners import OnnxRuntimeRunner
from sdcompress_engines.unet import EngineUNet

from sdcompress.data import nano_prompts
from sdcompress.export.onnx import export_onnx
from sdcompress.export.quantize.calibrate import collect_calibration, default_prompts
from sdcompress.export.quantize.check import LIMITS, check_quantized
from sdcompress.export.quantize.nodes import KEPT
from sdcompress.export.quantize.precisions import PRECISIONS
from sdcompress.export.quantize.quantize_graph import quantize_graph
from sdcompress.models.load import load_pipeline
from sdcompress.sampling import generate
from sdcompress.support.console import ConsoleReporter

PLACEMENTS: dict[str, tuple[str, ...]] = {
    "as it is done": KEPT,
    "layers that see only the timestep too": ("first and last", "shortcut"),
    "first and last convolution too": ("timestep only", "shortcut"),
    "shortcuts too": ("timestep only", "first and last"),
    "everything with weights": (),
}
PROFILE = Profile(
    {
        "sample": ((1, 4, 16, 16), (2, 4, 16, 16), (2, 4, 16, 16)),
        "timestep": ((1,), (2,), (2,)),
        "encoder_hidden_states": ((1, 77, 96), (2, 77, 96), (2, 77, 96)),
    }
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="emptied first")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=200, help="of the speed comparison")
    args = parser.parse_args()
    report = ConsoleReporter()
    shutil.rmtree(args.work, ignore_errors=True)
    torch.set_num_threads(1)
    loaded = load_pipeline("nano")
    pipeline: Any = loaded.pipeline
    config = dict(pipeline.unet.config)
    for precision in ("fp32", "fp16"):
        export_onnx(pipeline, args.work / precision, precision=precision, components=("unet",), report=report)
    graphs = {precision: args.work / precision / "unet.onnx" for precision in ("fp32", "fp16")}
    prompts, held_out = default_prompts(pipeline)
    calibration = collect_calibration(pipeline, prompts, report=report)
    feeds = collect_calibration(pipeline, held_out, samples=168, seed=1000, report=report)
    captions = [prompt.caption for prompt in nano_prompts.draw_prompts("heldout", args.pictures, seed=1)]

    def draw(graph: Path) -> list[Any]:
        with OnnxRuntimeRunner(graph) as runner:
            pipeline.unet = EngineUNet(runner, config)
            return generate(pipeline, captions, seeds=list(range(len(captions))), steps=20)

    originals = draw(graphs["fp32"])
    rows: list[dict[str, Any]] = []
    for around in ("fp32", "fp16"):
        for precision in PRECISIONS:
            target = args.work / f"{precision}-{around}.onnx"
            made = quantize_graph(graphs[around], target, precision, calibration, high_precision=around, report=report)
            row = (
                {"precision": precision, "high_precision": around}
                | asdict(made)
                | {"accuracy": asdict(check_quantized(target, graphs["fp32"], feeds, report=report))}
            )
            if around == "fp32":
                row["pictures"] = [asdict(error) for error in compare_pictures(draw(target), originals)]
            elif TENSORRT_RTX.missing() is None:
                built = build_engine(
                    target, args.work / f"{precision}.engine", PROFILE, TENSORRT_RTX, [(8, 9)], report=report
                )
                row["engine"] = {
                    "flavour": built.flavour,
                    "version": built.version,
                    "compute_capabilities": built.compute_capabilities,
                    "seconds": built.seconds,
                    "bytes": built.bytes,
                }
            rows.append(row)
    placements: list[dict[str, Any]] = []
    for precision in PRECISIONS:
        for name, keep in PLACEMENTS.items():
            made = quantize_graph(
                graphs["fp32"],
                args.work / "placement.onnx",
                precision,
                calibration,
                high_precision="fp32",
                keep=keep,
                report=report,
            )
            placements.append(
                {"precision": precision, "quantized": name, "keep": keep, "nodes": made.nodes}
                | asdict(check_quantized(args.work / "placement.onnx", graphs["fp32"], feeds))
            )
    half = [asdict(error) for error in compare_pictures(draw(graphs["fp16"]), originals)]
    result = {
        "model": "nano",
        "model_sha256": loaded.sha256,
        "source_bytes": {name: path.stat().st_size for name, path in graphs.items()},
        "calibration_rows": len(calibration["timestep"]),
        "limits": {name: asdict(limit) for name, limit in LIMITS.items()},
        "rows": rows,
        "placements": placements,
        "fp16_pictures": half,
        "cpu_ms": speed(
            {"fp32": graphs["fp32"]} | {name: args.work / f"{name}-fp32.onnx" for name in PRECISIONS},
            feeds,
            args.rounds,
        ),
        "environment": environment(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    text = table(result)
    args.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def speed(graphs: dict[str, Path], feeds: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of one call of batch 2, the graphs in turn."""
    runners = {name: OnnxRuntimeRunner(path, threads=1).open() for name, path in graphs.items()}
    call = {name: torch.from_numpy(value[:2]) for name, value in feeds.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(rounds + 5):
        for name, runner in runners.items():
            started = time.perf_counter()
            runner.infer(call)
            if number >= 5:
                times[name].append(1000 * (time.perf_counter() - started))
    for runner in runners.values():
        runner.close()
    return times


def table(result: dict[str, Any]) -> str:
    lines = [
        "Nano's UNet quantized, against fp32",
        "",
        (
            "| precision | rest in | relative L2, mean | at timestep 951 | 501 | 101 | 1 | PSNR of pictures, mean"
            " (least) | file | quantized in | engine for 8.9 |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        accuracy = row["accuracy"]
        moments = " | ".join(f"{accuracy['relative_l2'][time]:.4f}" for time in (951.0, 501.0, 101.0, 1.0))
        values = [each["psnr_db"] for each in row.get("pictures", [])]
        pictures = f"{statistics.mean(values):.1f} dB ({min(values):.1f})" if values else ""
        engine = (
            f"{row['engine']['bytes'] / 2**20:.1f} MiB, {row['engine']['seconds']:.0f} s" if "engine" in row else ""
        )
        lines.append(
            f"| {row['precision']} | {row['high_precision']} | {accuracy['mean']:.4f} | {moments} | {pictures} |"
            f" {row['bytes'] / 2**20:.1f} MiB | {row['seconds']:.0f} s | {engine} |"
        )
    values = [each["psnr_db"] for each in result["fp16_pictures"]]
    sizes = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in result["source_bytes"].items())
    lines += ["", f"Not quantized: {sizes}; pictures of fp16 {statistics.mean(values):.1f} dB ({min(values):.1f})."]
    lines += ["", "| quantized | int8: mean, worst timestep | fp8: mean, worst timestep |", "|---|---|---|"]
    for name in PLACEMENTS:
        cells = [
            f"{row['mean']:.4f}, {row['worst']:.4f}"
            for precision in PRECISIONS
            for row in result["placements"]
            if (row["quantized"], row["precision"]) == (name, precision)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    medians = {name: statistics.median(values) for name, values in result["cpu_ms"].items()}
    told = ", ".join(
        f"{name} {value:.1f} ms ({medians['fp32'] / value:.2f} times fp32's speed)" for name, value in medians.items()
    )
    return (
        "\n".join(
            [
                *lines,
                "",
                (
                    f"One call of batch 2 in ONNX Runtime on one core, medians of {len(result['cpu_ms']['fp32'])} in"
                    f" turn: {told}."
                ),
            ]
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
