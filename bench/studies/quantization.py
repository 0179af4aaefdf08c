"""What do int8 and fp8 cost a UNet? Nano's UNet, quantized by nvidia-modelopt, against fp32.

    python bench/studies/quantization.py -o bench/results/quantization-nano.json --work build/quantization

Measured are the error at every timestep, whole pictures, which layers matter, and speed on a CPU. The graphs are
calibrated on 64 rows of the trajectories of 8 training captions. They are judged on 168 rows of 4 held-out captions (8
of each timestep, 16 of the one that PNDM asks for twice), all in ONNX Runtime on the CPU. Pictures: 8 held-out
captions, 20 steps, same seeds, PSNR against fp32's. TensorRT-RTX, if it is installed, then builds the quantized fp16
graphs for compute capability 8.9; the engines are not run. Speed: one UNet call of batch 2, fp32 and quantized in turn,
one thread, without the first 5 rounds.
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
from sdcompress_engines.progress import Reporter
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
    "the default": KEPT,
    "also the layers that depend only on the timestep": ("first and last", "shortcut"),
    "also the first and last convolution": ("timestep only", "shortcut"),
    "also the shortcuts": ("timestep only", "first and last"),
    "everything with weights": (),
}
PROFILE = Profile(
    {
        "sample": ((1, 4, 16, 16), (2, 4, 16, 16), (2, 4, 16, 16)),
        "timestep": ((1,), (2,), (2,)),
        "encoder_hidden_states": ((1, 77, 96), (2, 77, 96), (2, 77, 96)),
    }
)


class UNetAmongFp32(EngineUNet):
    """A graph in any precision whose pipeline computes the latents and all other parts in fp32."""

    dtype = torch.float32


class Study:
    """Nano's UNet, its graphs, and the rows that quantization is calibrated and judged on.

    Args:
        work: folder for the graphs.
        pictures: how many are drawn.
        report: shows progress.
    """

    def __init__(self, work: Path, pictures: int, report: Reporter) -> None:
        self.work, self.report = work, report
        self.loaded = load_pipeline("nano")
        self.pipeline: Any = self.loaded.pipeline
        self.config = dict(self.pipeline.unet.config)
        for precision in ("fp32", "fp16"):
            folder = work / precision
            export_onnx(self.pipeline, folder, precision=precision, components=("unet",), report=report)
        self.graphs = {precision: work / precision / "unet.onnx" for precision in ("fp32", "fp16")}
        prompts, held_out = default_prompts(self.pipeline)
        self.calibration = collect_calibration(self.pipeline, prompts, report=report)
        self.feeds = collect_calibration(self.pipeline, held_out, samples=168, seed=1000, report=report)
        self.captions = [prompt.caption for prompt in nano_prompts.draw_prompts("heldout", pictures, seed=1)]
        self.originals = self.draw(self.graphs["fp32"])

    def draw(self, graph: Path) -> list[Any]:
        """Returns the pictures of a graph."""
        with OnnxRuntimeRunner(graph) as runner:
            self.pipeline.unet = UNetAmongFp32(runner, self.config)
            return generate(self.pipeline, self.captions, seeds=list(range(len(self.captions))), steps=20)

    def compare_pictures(self, graph: Path) -> list[dict[str, Any]]:
        """Returns the distances of a graph's pictures from those of fp32."""
        return [asdict(error) for error in compare_pictures(self.draw(graph), self.originals)]

    def measure_precision(self, precision: Any, high_precision: Any) -> dict[str, Any]:
        """Returns the row of a quantized graph: accuracy, and pictures (fp32) or an engine (fp16).

        Args:
            precision: of the quantized layers.
            high_precision: of the other layers.
        """
        target = self.work / f"{precision}-{high_precision}.onnx"
        quantized = quantize_graph(
            self.graphs[high_precision],
            target,
            precision,
            self.calibration,
            high_precision=high_precision,
            report=self.report,
        )
        row = {"precision": precision, "high_precision": high_precision} | asdict(quantized)
        row["accuracy"] = asdict(check_quantized(target, self.graphs["fp32"], self.feeds, report=self.report))
        if high_precision == "fp32":
            row["pictures"] = self.compare_pictures(target)
        elif TENSORRT_RTX.missing() is None:
            path = self.work / f"{precision}.engine"
            built = build_engine(target, path, PROFILE, TENSORRT_RTX, [(8, 9)], report=self.report)
            fields = ("flavour", "version", "compute_capabilities", "seconds", "bytes")
            row["engine"] = {name: getattr(built, name) for name in fields}
        return row

    def measure_placement(self, precision: Any, name: str) -> dict[str, Any]:
        """Returns the row of a placement: which nodes are quantized, and the accuracy."""
        target = self.work / "placement.onnx"
        quantized = quantize_graph(
            self.graphs["fp32"],
            target,
            precision,
            self.calibration,
            high_precision="fp32",
            keep=PLACEMENTS[name],
            report=self.report,
        )
        row = {"precision": precision, "quantized": name, "keep": PLACEMENTS[name], "nodes": quantized.nodes}
        return row | asdict(check_quantized(target, self.graphs["fp32"], self.feeds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="emptied first")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=200, help="of the speed comparison")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    torch.set_num_threads(1)
    study = Study(args.work, args.pictures, ConsoleReporter())
    rows = [study.measure_precision(precision, other) for other in ("fp32", "fp16") for precision in PRECISIONS]
    placements = [study.measure_placement(precision, name) for precision in PRECISIONS for name in PLACEMENTS]
    timed = {"fp32": study.graphs["fp32"]} | {name: args.work / f"{name}-fp32.onnx" for name in PRECISIONS}
    result = {
        "model": "nano",
        "model_sha256": study.loaded.sha256,
        "source_bytes": {name: path.stat().st_size for name, path in study.graphs.items()},
        "calibration_rows": len(study.calibration["timestep"]),
        "limits": {name: asdict(limit) for name, limit in LIMITS.items()},
        "rows": rows,
        "placements": placements,
        "fp16_pictures": study.compare_pictures(study.graphs["fp16"]),
        "cpu_ms": measure_speed(timed, study.feeds, args.rounds),
        "environment": environment(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    text = format_table(result)
    args.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def measure_speed(graphs: dict[str, Path], feeds: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Returns graph → milliseconds of one call of batch 2; the graphs run in turn.

    Args:
        graphs: name → file.
        feeds: inputs of the UNet as arrays; the first two rows are used.
        rounds: timed calls of each graph.
    """
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


def format_table(result: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    lines = [
        "Nano's UNet quantized, against fp32",
        "",
        (
            "| precision | other layers in | relative L2, mean | at timestep 951 | 501 | 101 | 1 | PSNR of pictures,"
            " mean (least) | file | quantized in | engine for 8.9 |"
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
    speeds = ", ".join(
        f"{name} {value:.1f} ms ({medians['fp32'] / value:.2f} times fp32's speed)" for name, value in medians.items()
    )
    return (
        "\n".join(
            [
                *lines,
                "",
                (
                    f"One call of batch 2 in ONNX Runtime on one core, medians of {len(result['cpu_ms']['fp32'])} in"
                    f" turn: {speeds}."
                ),
            ]
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
