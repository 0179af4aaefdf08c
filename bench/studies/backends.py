"""What is the fastest way to run a UNet on this CPU, with the same weights and inside the accuracy gate? Everything that was tried, with its figures.

    python bench/studies/backends.py -o bench/results/backends-cpu.json --work build/backends

Each variant runs in a process of its own, started afresh each round, in turn. Time is that of one UNet call at the model's own size. The error is the
relative L2 to torch in fp32; the gate is 1e-4 in fp32, and in bfloat16 twice what torch itself is off by. Preparing (export, compiling) is timed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from sdcompress_bench.environment import environment

from sdcompress.random_model import random_pipeline

VARIANTS = {
    "torch fp32": "PyTorch as it is",
    "torch fp32 channels_last": "",
    "torch bf16": "",
    "torch bf16 channels_last": "",
    "compile bf16": "torch.compile, channels last",
    "aot bf16": "AOTInductor, free shapes",
    "aot bf16 static": "AOTInductor, this shape only",
    "ort fp32": "ONNX Runtime as the runner opens it",
    "ort fp32 extended": "graph optimization level extended",
    "ort fp32 no spinning": "threads sleep between operators",
    "ort fp32 opset 20": "attention in its parts",
    "ort fp32 transformers": "its transformer optimiser: fused attention where it finds it",
    "ort int8 dynamic": "weights and activations int8 (quantize_dynamic)",
}
BATCHES = (1, 2)
LIMIT_S = 900


def prepare(variant: str, model: Path, work: Path) -> str | None:
    """What a variant needs on disk, made once; returns why it cannot be."""
    from sdcompress.export import export_onnx
    from sdcompress.graphs import component_graph, example_of, signature_of, silence
    from sdcompress.teacher import load_teacher

    pipeline: Any = None
    kind = variant.split()[0]
    if kind == "ort":
        opset = 20 if "opset 20" in variant else 23
        graphs = work / f"onnx-{opset}"
        if not graphs.is_dir():
            pipeline = load_teacher(model).pipeline
            export_onnx(pipeline, graphs, components=("unet",), opset=opset)
        if "transformers" in variant:
            from onnxruntime.transformers import optimizer

            made = optimizer.optimize_model(str(graphs / "unet.onnx"), model_type="unet", opt_level=0)
            (work / "transformers").mkdir(exist_ok=True)
            made.save_model_to_file(str(work / "transformers" / "unet.onnx"), use_external_data_format=True)
        if "int8" in variant:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            (work / "int8").mkdir(exist_ok=True)
            quantize_dynamic(str(graphs / "unet.onnx"), str(work / "int8" / "unet.onnx"), weight_type=QuantType.QInt8, use_external_data_format=True)
    if kind == "aot":
        from sdcompress_engines.runners import compile_package

        pipeline = load_teacher(model).pipeline
        wanted = signature_of("unet", pipeline.unet, "bf16")
        graph = component_graph("unet", pipeline.unet, torch.bfloat16, stable=False).to(memory_format=torch.channels_last)
        example = example_of(wanted, pipeline.unet.config)
        inputs, free = list(example.inputs.values()), tuple(example.dynamic_shapes.values())
        with silence():
            if "static" in variant:
                for batch in BATCHES:
                    inputs = list(feeds(pipeline.unet.config, batch, torch.bfloat16).values())
                    compile_package(graph, inputs, None, work / f"static-{batch}.pt2", wanted.inputs, wanted.outputs)
            else:
                compile_package(graph, inputs, free, work / "unet.pt2", wanted.inputs, wanted.outputs)
    return None


def feeds(config: Any, batch: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same inputs in every process."""
    generator = torch.Generator().manual_seed(0)
    side = int(config["sample_size"])
    sample = torch.randn(batch, config["in_channels"], side, side, generator=generator)
    context = torch.randn(batch, 77, config["cross_attention_dim"], generator=generator)
    return {"sample": sample.to(dtype), "timestep": torch.full((batch,), 501.0), "encoder_hidden_states": context.to(dtype)}


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """One variant in this process."""
    variant, model, work = case["variant"], Path(case["model"]), Path(case["work"])
    kind, dtype = variant.split()[0], torch.bfloat16 if "bf16" in variant else torch.float32
    config = json.loads((model / "unet" / "config.json").read_text())
    if kind in ("torch", "compile"):
        from sdcompress.teacher import load_teacher

        pipeline: Any = load_teacher(model).pipeline
        unet = pipeline.unet.to(dtype)
        if "channels_last" in variant or kind == "compile":
            unet = unet.to(memory_format=torch.channels_last)
        if kind == "compile":
            unet.compile()

        def call(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return unet(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"], return_dict=False)[0]  # type: ignore[no-any-return]
    else:
        from sdcompress_engines.runners import OnnxRuntimeRunner, open_runner

        if kind == "aot":
            path = work / (f"static-{case['batch']}.pt2" if "static" in variant else "unet.pt2")
            runner = open_runner(path)
        else:
            settings = {"session.intra_op.allow_spinning": "0"} if "no spinning" in variant else {}
            folder = "transformers" if "transformers" in variant else "int8" if "int8" in variant else "onnx-20" if "opset 20" in variant else "onnx-23"
            runner = OnnxRuntimeRunner(work / folder / "unet.onnx", config=settings, **({"level": "extended"} if "extended" in variant else {})).open()  # type: ignore[arg-type]

        def call(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return next(iter(runner.infer(inputs).values()))

    inputs, times = feeds(config, case["batch"], dtype), []
    with torch.no_grad():
        for _ in range(1 + case["samples"]):
            started = time.perf_counter()
            out = call(inputs)
            times.append(1000 * (time.perf_counter() - started))
    torch.save(out.float(), case["answer"])
    return {"ms": times[1:], "first_ms": times[0]}


def child(case: dict[str, Any], limit_s: float) -> dict[str, Any]:
    try:
        done = subprocess.run([sys.executable, __file__, "--child", json.dumps(case)], capture_output=True, text=True, errors="replace", timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"did not finish in {limit_s:.0f} s"}
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    return {"failed": next((line.strip()[:200] for line in reversed(done.stderr.splitlines()) if line.strip()), f"status {done.returncode}")}


def study(name: str, model: Path, work: Path, rounds: int, samples: int, chosen: list[str]) -> dict[str, Any]:
    rows: dict[str, Any] = {variant: {"note": VARIANTS[variant], "batch": {}} for variant in chosen}
    for variant in chosen:
        if variant.split()[0] in ("ort", "aot"):
            started = time.monotonic()
            outcome = child({"prepare": variant, "model": str(model), "work": str(work)}, LIMIT_S)
            rows[variant] |= {"prepare_s": round(time.monotonic() - started, 1)} | outcome
            print(f"{name}: prepared {variant} in {rows[variant]['prepare_s']} s {outcome.get('failed', '')}", flush=True)
    for batch in BATCHES:
        times: dict[str, list[float]] = {variant: [] for variant in chosen}
        for _ in range(rounds):
            for variant in chosen:
                if "failed" in rows[variant]:
                    continue
                found = child({"variant": variant, "model": str(model), "work": str(work), "batch": batch, "samples": samples, "answer": str(work / f"{variant}.pt".replace(" ", "-"))}, LIMIT_S)
                if "failed" in found:
                    rows[variant]["failed"] = found["failed"]
                else:
                    times[variant] += found["ms"]
        truth = torch.load(work / "torch-fp32.pt", weights_only=True)

        def error(variant: str, truth: torch.Tensor = truth) -> float:
            found = torch.load(work / f"{variant}.pt".replace(" ", "-"), weights_only=True)
            return float((found.double() - truth.double()).norm() / truth.double().norm())

        for variant in (v for v in chosen if times[v] and "failed" not in rows[v]):
            limit = 2 * error("torch bf16") if "bf16" in variant or "int8" in variant else 1e-4
            off, median = error(variant), statistics.median(times[variant])
            speedup = statistics.median(times["torch fp32"]) / median
            rows[variant]["batch"][str(batch)] = {"samples_ms": times[variant], "median_ms": median, "speedup": speedup, "relative_l2": off, "limit": limit, "inside": off <= limit}
            print(f"{name} batch {batch}: {variant:<28} {median:9.1f} ms  {speedup:5.2f}×  relative L2 {off:.1e}{'' if off <= limit else '  OVER THE GATE'}", flush=True)
    return rows


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--child":
        case = json.loads(sys.argv[2])
        print(json.dumps((prepare(case["prepare"], Path(case["model"]), Path(case["work"])) or {}) if "prepare" in case else measure(case)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--model", action="append", choices=["nano", "SD1.5 bk-tiny"])
    parser.add_argument("--variant", action="append", choices=VARIANTS)
    args = parser.parse_args()
    from sdcompress import nano

    models: dict[str, Any] = json.loads(args.output.read_text())["models"] if args.output.is_file() else {}
    for name in args.model or ["nano", "SD1.5 bk-tiny"]:
        work = args.work / name.replace(" ", "-")
        work.mkdir(parents=True, exist_ok=True)
        model = nano.teacher_folder()
        if name != "nano":
            model = work / "model"
            if not model.is_dir():
                random_pipeline("sd1", "bk-tiny", dtype=torch.float16).save_pretrained(model)
        samples = args.samples if name != "nano" else 10 * args.samples
        chosen = ["torch fp32", "torch bf16", *(v for v in args.variant or VARIANTS if v not in ("torch fp32", "torch bf16"))]
        models[name] = study(name, model, work, args.rounds, samples, chosen)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"models": models, "environment": environment()}, indent=1) + "\n")
        shutil.rmtree(work, ignore_errors=True)
    print(table(models))


def table(models: dict[str, Any]) -> str:
    lines = []
    for name, rows in models.items():
        lines += [f"{name}, one UNet call", "", "| | batch 1 | batch 2 | relative L2 | to prepare |", "|---|---|---|---|---|"]
        for variant, row in rows.items():
            if "failed" in row:
                lines.append(f"| {variant} | {row['failed']} | | | |")
                continue
            cells = [f"{row['batch'][str(b)]['median_ms']:,.0f} ms ({row['batch'][str(b)]['speedup']:.2f}×)" if str(b) in row["batch"] else "" for b in BATCHES]
            worst = max(row["batch"].values(), key=lambda r: r["relative_l2"])
            prepared = f"{row['prepare_s']:.0f} s" if "prepare_s" in row else ""
            lines.append(f"| {variant} | {cells[0]} | {cells[1]} | {worst['relative_l2']:.1e}{'' if worst['inside'] else ', over the gate'} | {prepared} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
