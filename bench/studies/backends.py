"""What is the fastest way to run a UNet here, with the same weights and inside the accuracy gate? Everything that was
tried, with its figures.

    python bench/studies/backends.py -o bench/results/backends-cpu.json --work build/backends
    python bench/studies/backends.py -o bench/results/backends-gpu.json --work build/backends --device cuda

On a CPU nano and a full-size bk-tiny, batch 1 and 2; on a GPU the whole SD1.5 UNet, bk-base and bk-tiny in fp16 at 512
px, batch 2, with and without CUDA graphs.

Each variant runs in a process of its own, started afresh each round, in turn. Time is that of one UNet call at the
model's own size. The error is the relative L2 to torch in fp32; the gate is 1e-4 in fp32, and in half precision twice
what torch itself is off by. Preparing (export, compiling) is timed apart.
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
from sdcompress_engines.exactness import relative_l2, use_ieee_fp32
from sdcompress_engines.resources import peak_rss_mib

from sdcompress.export.components import DTYPES
from sdcompress.models.random import random_pipeline

VARIANTS = {
    "torch fp32": "PyTorch as it is",
    "torch fp32 channels_last": "",
    "torch bf16": "",
    "torch bf16 channels_last": "",
    "compile bf16": "torch.compile, channels last",
    "aot bf16": "AOTInductor, free shapes",
    "ort fp32": "ONNX Runtime as the runner opens it",
    "ort fp32 no spinning": "threads sleep between operators",
    "ort fp32 opset 20": "attention in its parts",
    "ort fp32 transformers": "its transformer optimiser: fused attention where it finds it",
    "ort int8 dynamic": "weights and activations int8 (quantize_dynamic)",
}
GPU_VARIANTS = {
    "torch fp32": "PyTorch as it is, TF32 off",
    "torch fp16": "what most people run",
    "torch fp16 channels_last": "",
    "torch fp16 graph": "in a CUDA graph",
    "torch fp16 channels_last graph": "",
    "compile fp16": "torch.compile, channels last",
    "compile fp16 graph": "in a CUDA graph",
    "aot fp16": "AOTInductor, free shapes",
    "aot fp16 graph": "in a CUDA graph",
    "ort fp16": "ONNX Runtime CUDA",
    "ort fp16 graph": "with a CUDA graph",
    "ort fp16 nhwc graph": "and channels last",
    "trt fp16": "the engine, static shapes",
    "trt fp16 graph": "with a CUDA graph",
}
MODELS = {
    "cpu": {"nano": None, "SD1.5 bk-tiny": "bk-tiny"},
    "cuda": {"SD1.5 whole": None, "SD1.5 bk-base": "bk-base", "SD1.5 bk-tiny": "bk-tiny"},
}
BATCHES = {"cpu": (1, 2), "cuda": (2,)}
LIMIT_S = 900


def prepare(variant: str, model: Path, work: Path, device: str) -> None:
    """What a variant needs on disk; what an earlier run has made is kept."""
    from sdcompress.export.components import component_graph, example_of, signature_of, silence
    from sdcompress.export.onnx import export_onnx
    from sdcompress.export.tensorrt import build_engines
    from sdcompress.models.load import load_pipeline

    kind, precision = variant.split()[0], precision_of(variant)
    opset = 20 if "opset 20" in variant else 23
    graphs = work / f"onnx-{opset}"
    if kind in ("ort", "trt") and not graphs.is_dir():
        components = ("unet", "vae_decoder") if kind == "trt" else ("unet",)
        export_onnx(load_pipeline(model).pipeline, graphs, precision=precision, components=components, opset=opset)
    if "transformers" in variant:
        from onnxruntime.transformers import optimizer

        made = optimizer.optimize_model(str(graphs / "unet.onnx"), model_type="unet", opt_level=0)
        (work / "transformers").mkdir(exist_ok=True)
        made.save_model_to_file(str(work / "transformers" / "unet.onnx"), use_external_data_format=True)
    if "int8" in variant:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        (work / "int8").mkdir(exist_ok=True)
        quantize_dynamic(
            str(graphs / "unet.onnx"),
            str(work / "int8" / "unet.onnx"),
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )
    if kind == "trt" and not (work / "engine").is_dir():
        build_engines(graphs, work / "engine", profiles=("sd15-512",), components=("unet",))
    if kind == "aot" and not (work / "unet.pt2").is_file():
        from sdcompress_engines.runners import compile_package

        pipeline: Any = load_pipeline(model).pipeline
        dtype = DTYPES[precision]
        wanted = signature_of("unet", pipeline.unet, precision)
        graph = component_graph("unet", pipeline.unet, dtype, stable=False).to(
            device, memory_format=torch.channels_last
        )
        example = example_of(wanted, pipeline.unet.config)
        with silence():
            compile_package(
                graph,
                [value.to(device) for value in example.inputs.values()],
                tuple(example.dynamic_shapes.values()),
                work / "unet.pt2",
                wanted.inputs,
                wanted.outputs,
            )


def precision_of(variant: str) -> Any:
    return next(name for name in ("bf16", "fp16", "fp32") if name in variant or name == "fp32")


def feeds(config: Any, batch: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The same inputs in every process."""
    generator = torch.Generator().manual_seed(0)
    side = int(config["sample_size"])
    sample = torch.randn(batch, config["in_channels"], side, side, generator=generator)
    context = torch.randn(batch, 77, config["cross_attention_dim"], generator=generator)
    return {
        "sample": sample.to(device, dtype),
        "timestep": torch.full((batch,), 501.0, device=device),
        "encoder_hidden_states": context.to(device, dtype),
    }


def torch_runner(variant: str, model: Path, device: str) -> Any:
    """Returns an open runner of the UNet in torch."""
    from sdcompress_engines.runners import TorchRunner

    from sdcompress.backends.torch_unet import PositionalUNet
    from sdcompress.export.components import signature_of
    from sdcompress.models.load import load_pipeline

    pipeline: Any = load_pipeline(model).pipeline
    precision = precision_of(variant)
    unet = pipeline.unet.to(device, DTYPES[precision])
    wanted = signature_of("unet", unet, precision)
    mode = "compile" if variant.startswith("compile") else "channels_last" if "channels_last" in variant else "eager"
    return TorchRunner(
        PositionalUNet(unet), wanted.inputs, wanted.outputs, mode, cuda_graph="graph" in variant.split()
    ).open()


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """One variant in this process."""
    variant, model, work, device = case["variant"], Path(case["model"]), Path(case["work"]), case["device"]
    kind, dtype = variant.split()[0], DTYPES[precision_of(variant)]
    config = json.loads((model / "unet" / "config.json").read_text(encoding="utf-8"))
    use_ieee_fp32()
    if kind in ("torch", "compile"):
        runner = torch_runner(variant, model, device)
    else:
        from sdcompress_engines.runners import open_runner

        options: dict[str, Any] = {"cuda_graph": True} if "graph" in variant.split() else {}
        if kind == "ort" and "nhwc" in variant:
            options["prefer_nhwc"] = True
        if "no spinning" in variant:
            options["config"] = {"session.intra_op.allow_spinning": "0"}
        if kind == "trt":
            options["kernels"] = "eager"
        graphs = (
            "transformers"
            if "transformers" in variant
            else "int8"
            if "int8" in variant
            else "onnx-20"
            if "opset 20" in variant
            else "onnx-23"
        )
        runner = open_runner(
            {"aot": work / "unet.pt2", "ort": work / graphs / "unet.onnx", "trt": work / "engine" / "unet.engine"}[
                kind
            ],
            device=device,
            **options,
        )

    def call(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return next(iter(runner.infer(inputs).values()))

    inputs, times = feeds(config, case["batch"], dtype, device), []
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 0
    with torch.no_grad():
        for _ in range(case["warm_up"] + case["samples"]):
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            out = call(inputs)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - started))
    torch.save(out.float().cpu(), case["answer"])
    memory = (
        {
            "device_mib": (torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]) / 2**20,
            "grown_mib": (free - torch.cuda.mem_get_info()[0]) / 2**20,
        }
        if device == "cuda"
        else {}
    )
    return {"ms": times[case["warm_up"] :], "first_ms": times[0], "peak_rss_mib": peak_rss_mib(), **memory}


def child(case: dict[str, Any], limit_s: float) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--child", json.dumps(case)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"did not finish in {limit_s:.0f} s"}
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    said = next(
        (line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), f"status {done.returncode}"
    )
    return {"failed": said.replace(f"{case['work']}/", "")[:200]}


def study(
    name: str, model: Path, work: Path, rounds: int, samples: int, variants: dict[str, str], device: str
) -> dict[str, Any]:
    """Every variant's row: what it took to prepare, and by batch its samples, speed-up over torch fp32 and error."""
    rows: dict[str, Any] = {variant: {"note": note, "batch": {}} for variant, note in variants.items()}
    common = {"model": str(model), "work": str(work), "device": device}
    floor = "torch fp16" if device == "cuda" else "torch bf16"
    for variant in (v for v in variants if v.split()[0] in ("ort", "aot", "trt")):
        started = time.monotonic()
        outcome = child({"prepare": variant, **common}, LIMIT_S)
        rows[variant] |= {"prepare_s": round(time.monotonic() - started, 1)} | outcome
        print(f"{name}: prepared {variant} in {rows[variant]['prepare_s']} s {outcome.get('failed', '')}", flush=True)
    for batch in BATCHES[device]:
        found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
        for _ in range(rounds):
            for variant in (v for v in variants if "failed" not in rows[v]):
                outcome = child(
                    {
                        "variant": variant,
                        **common,
                        "batch": batch,
                        "samples": samples,
                        "warm_up": 10 if device == "cuda" else 1,
                        "answer": str(answer(work, variant)),
                    },
                    LIMIT_S,
                )
                if "failed" in outcome:
                    rows[variant]["failed"] = outcome["failed"]
                    print(f"{name} batch {batch}: {variant:<26} {outcome['failed']}", flush=True)
                else:
                    found[variant].append(outcome)
        truth = torch.load(answer(work, "torch fp32"), weights_only=True)
        errors = {
            v: relative_l2(torch.load(answer(work, v), weights_only=True), truth) for v in variants if found[v]
        }
        medians = {v: statistics.median(ms for outcome in found[v] for ms in outcome["ms"]) for v in errors}
        for variant in (v for v in errors if "failed" not in rows[v]):
            limit = 1e-4 if precision_of(variant) == "fp32" and "int8" not in variant else 2 * errors[floor]
            row = {
                "rounds": found[variant],
                "median_ms": medians[variant],
                "speedup": medians["torch fp32"] / medians[variant],
                "relative_l2": errors[variant],
                "limit": limit,
                "inside": errors[variant] <= limit,
            }
            rows[variant]["batch"][str(batch)] = row
            print(
                f"{name} batch {batch}: {variant:<26} {row['median_ms']:9.1f} ms  {row['speedup']:5.2f}×  relative L2"
                f" {row['relative_l2']:.1e}{'' if row['inside'] else '  OVER THE GATE'}",
                flush=True,
            )
    return rows


def answer(work: Path, variant: str) -> Path:
    return work / f"{variant.replace(' ', '-')}.pt"


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--child":
        case = json.loads(sys.argv[2])
        if "prepare" in case:
            prepare(case["prepare"], Path(case["model"]), Path(case["work"]), case["device"])
        print(json.dumps({} if "prepare" in case else measure(case)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", choices=MODELS, default="cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--samples",
        type=int,
        default=None,
        help="a round; by default 3 of a full-size model on a CPU, 30 of nano, 50 on a GPU",
    )
    parser.add_argument("--model", action="append", choices=sorted({*MODELS["cpu"], *MODELS["cuda"]}))
    parser.add_argument(
        "--variant", action="append", choices=sorted({*VARIANTS, *GPU_VARIANTS}), help="only this one, beside torch"
    )
    args = parser.parse_args()
    from sdcompress.models import nano

    every = GPU_VARIANTS if args.device == "cuda" else VARIANTS
    variants = {
        name: note
        for name, note in every.items()
        if not args.variant or name in args.variant or name in ("torch fp32", "torch bf16", "torch fp16")
    }
    models: dict[str, Any] = (
        json.loads(args.output.read_text(encoding="utf-8"))["models"] if args.output.is_file() else {}
    )
    for name in args.model or MODELS[args.device]:
        work = args.work / name.replace(" ", "-")
        work.mkdir(parents=True, exist_ok=True)
        model = nano.teacher_folder()
        if name != "nano":
            model = work / "model"
            if not model.is_dir():
                random_pipeline("sd1", MODELS[args.device][name], dtype=torch.float16).save_pretrained(model)
        samples = args.samples or (50 if args.device == "cuda" else 30 if name == "nano" else 3)
        models[name] = study(name, model, work, args.rounds, samples, variants, args.device)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(
            json.dumps({"models": models, "environment": environment()}, indent=1) + "\n", encoding="utf-8"
        )
        shutil.rmtree(work, ignore_errors=True)
    print(table(models))


def table(models: dict[str, Any]) -> str:
    lines = []
    for name, rows in models.items():
        batches = sorted({batch for row in rows.values() for batch in row["batch"]})
        lines += [
            f"{name}, one UNet call",
            "",
            f"| | {' | '.join(f'batch {batch}' for batch in batches)} | relative L2 | to prepare |",
            "|---" * (3 + len(batches)) + "|",
        ]
        for variant, row in rows.items():
            if "failed" in row or not row["batch"]:
                lines.append(f"| {variant} | {row.get('failed', 'not run')} |" + " |" * (1 + len(batches)))
                continue
            cells = [
                (
                    f"{row['batch'][b]['median_ms']:,.1f} ms ({row['batch'][b]['speedup']:.2f}×)"
                    if b in row["batch"]
                    else ""
                )
                for b in batches
            ]
            worst = max(row["batch"].values(), key=lambda r: r["relative_l2"])
            prepared = f"{row['prepare_s']:.0f} s" if "prepare_s" in row else ""
            lines.append(
                f"| {variant} | {' | '.join(cells)} |"
                f" {worst['relative_l2']:.1e}{'' if worst['inside'] else ', over the gate'} | {prepared} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
