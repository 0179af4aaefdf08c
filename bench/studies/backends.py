"""Which backend runs a UNet fastest here, with the same weights and within the accuracy gate? All variants tried.

    python bench/studies/backends.py -o bench/results/backends-cpu.json --work build/backends
    python bench/studies/backends.py -o bench/results/backends-gpu.json --work build/backends --device cuda

On a CPU nano and a full-size bk-tiny, batch 1 and 2; on a GPU the whole SD1.5 UNet, bk-base and bk-tiny in fp16 at 512
px, batch 2, with and without CUDA graphs.

Each variant runs in its own process, started again each round, in turn. Timed is one UNet call at the model's own size.
The error is the relative L2 to torch in fp32. The gate is 1e-4 in fp32, and in half precision twice the error of torch
itself. Preparing (export, compiling) is timed separately.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sdcompress_bench.environment import environment
from sdcompress_engines.exactness import relative_l2, use_ieee_fp32
from sdcompress_engines.resources import peak_rss_mib
from sdcompress_engines.signature import context_width

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
    "ort fp32 transformers": "its transformer optimizer, which fuses attention where it recognizes it",
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
MODELS = {"nano": None, "SD1.5 whole": None, "SD1.5 bk-base": "bk-base", "SD1.5 bk-tiny": "bk-tiny"}
DEFAULT_MODELS = {"cpu": ("nano", "SD1.5 bk-tiny"), "cuda": ("SD1.5 whole", "SD1.5 bk-base", "SD1.5 bk-tiny")}
BATCHES = {"cpu": (1, 2), "cuda": (2,)}
LIMIT_S = 900


def prepare(variant: str, model: Path, work: Path, device: str) -> None:
    """Write what a variant needs on disk; files of an earlier run are kept.

    Args:
        variant: a key of `VARIANTS` or `GPU_VARIANTS`.
        model: a pipeline folder.
        work: folder for the files.
        device: `cpu` or `cuda`.
    """
    from sdcompress.export.aot import compile_unet
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

        optimized = optimizer.optimize_model(str(graphs / "unet.onnx"), model_type="unet", opt_level=0)
        (work / "transformers").mkdir(exist_ok=True)
        optimized.save_model_to_file(str(work / "transformers" / "unet.onnx"), use_external_data_format=True)
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
    if kind == "aot" and not (work / "aot").is_dir():
        compile_unet(load_pipeline(model), work / "aot", device=device, precision=precision)


def precision_of(variant: str) -> Any:
    """Returns the precision in a variant's name."""
    return next(name for name in ("bf16", "fp16", "fp32") if name in variant or name == "fp32")


def draw_inputs(config: Any, batch: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Returns the UNet's inputs, which are the same in every process.

    Args:
        config: of the UNet.
        batch: number of rows.
        dtype: of `sample`, (B, 4, H/8, W/8), and `encoder_hidden_states`, (B, 77, D).
        device: of the tensors.
    """
    generator = torch.Generator().manual_seed(0)
    side = int(config["sample_size"])
    sample = torch.randn(batch, config["in_channels"], side, side, generator=generator)
    context = torch.randn(batch, 77, context_width(config), generator=generator)
    return {
        "sample": sample.to(device, dtype),
        "timestep": torch.full((batch,), 501.0, device=device),
        "encoder_hidden_states": context.to(device, dtype),
    }


def open_torch_runner(variant: str, model: Path, device: str) -> Any:
    """Returns an open runner of the UNet in torch.

    Args:
        variant: a key of `VARIANTS` or `GPU_VARIANTS`.
        model: a pipeline folder.
        device: `cpu` or `cuda`.
    """
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


def open_exported_runner(variant: str, work: Path, device: str) -> Any:
    """Returns an open runner of the UNet's package, graph or engine.

    Args:
        variant: a key of `VARIANTS` or `GPU_VARIANTS`.
        work: folder of the files that `prepare` wrote.
        device: `cpu` or `cuda`.
    """
    from sdcompress_engines.runners import open_runner

    kind = variant.split()[0]
    options: dict[str, Any] = {"cuda_graph": True} if "graph" in variant.split() else {}
    if kind == "ort" and "nhwc" in variant:
        options["prefer_nhwc"] = True
    if "no spinning" in variant:
        options["config"] = {"session.intra_op.allow_spinning": "0"}
    if kind == "trt":
        options["kernels"] = "eager"
    folders = {"transformers": "transformers", "int8": "int8", "opset 20": "onnx-20"}
    graphs = next((folder for mark, folder in folders.items() if mark in variant), "onnx-23")
    files = {"aot": "aot/unet.pt2", "ort": f"{graphs}/unet.onnx", "trt": "engine/unet.engine"}
    return open_runner(work / files[kind], device=device, **options)


def measure_variant(case: dict[str, Any]) -> dict[str, Any]:
    """Time one variant in this process; returns its samples and memory."""
    variant, model, device = case["variant"], Path(case["model"]), case["device"]
    cuda = device == "cuda"
    config = json.loads((model / "unet" / "config.json").read_text(encoding="utf-8"))
    use_ieee_fp32()
    if variant.split()[0] in ("torch", "compile"):
        runner = open_torch_runner(variant, model, device)
    else:
        runner = open_exported_runner(variant, Path(case["work"]), device)
    inputs, times = draw_inputs(config, case["batch"], DTYPES[precision_of(variant)], device), []
    free = torch.cuda.mem_get_info()[0] if cuda else 0
    with torch.no_grad():
        for _ in range(case["warm_up"] + case["samples"]):
            if cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            output = next(iter(runner.infer(inputs).values()))
            if cuda:
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - started))
    torch.save(output.float().cpu(), case["answer"])
    memory = {}
    if cuda:
        now, total = torch.cuda.mem_get_info()
        memory = {"device_mib": (total - now) / 2**20, "grown_mib": (free - now) / 2**20}
    return {"ms": times[case["warm_up"] :], "first_ms": times[0], "peak_rss_mib": peak_rss_mib(), **memory}


def run_child(case: dict[str, Any]) -> dict[str, Any]:
    """Returns the result of a case in a new process, or `{"failed": reason}`."""
    command = [sys.executable, __file__, "--child", json.dumps(case)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"did not finish in {LIMIT_S} s"}
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    lines = (line.strip() for line in reversed(done.stderr.splitlines()) if line.strip())
    return {"failed": next(lines, f"status {done.returncode}").replace(f"{case['work']}/", "")[:200]}


@dataclass(frozen=True)
class Study:
    """The variants of one model on one device.

    Attributes:
        name: of the model, for people.
        model: a pipeline folder.
        work: folder for the files.
        rounds: new processes of each variant.
        samples: timed calls in a round.
        variants: name → note.
        device: `cpu` or `cuda`.
    """

    name: str
    model: Path
    work: Path
    rounds: int
    samples: int
    variants: dict[str, str]
    device: str

    def run(self) -> dict[str, Any]:
        """Returns a row for each variant: time to prepare, and by batch the samples, the speed-up and the error."""
        rows: dict[str, Any] = {variant: {"note": note, "batch": {}} for variant, note in self.variants.items()}
        self._prepare(rows)
        for batch in BATCHES[self.device]:
            self._compare(rows, batch, self._measure(rows, batch))
        return rows

    def _case(self) -> dict[str, Any]:
        return {"model": str(self.model), "work": str(self.work), "device": self.device}

    def _prepare(self, rows: dict[str, Any]) -> None:
        for variant in (v for v in self.variants if v.split()[0] in ("ort", "aot", "trt")):
            started = time.monotonic()
            outcome = run_child({"prepare": variant, **self._case()})
            rows[variant] |= {"prepare_s": round(time.monotonic() - started, 1)} | outcome
            reason = outcome.get("failed", "")
            print(f"{self.name}: prepared {variant} in {rows[variant]['prepare_s']} s {reason}", flush=True)

    def _measure(self, rows: dict[str, Any], batch: int) -> dict[str, list[dict[str, Any]]]:
        """Returns variant → outcomes of its rounds; the reason of a failed one goes to its row."""
        outcomes: dict[str, list[dict[str, Any]]] = {variant: [] for variant in self.variants}
        shared = {"batch": batch, "samples": self.samples, "warm_up": 10 if self.device == "cuda" else 1}
        for _ in range(self.rounds):
            for variant in (v for v in self.variants if "failed" not in rows[v]):
                case = {"variant": variant, **self._case(), **shared, "answer": str(output_of(self.work, variant))}
                outcome = run_child(case)
                if "failed" in outcome:
                    rows[variant]["failed"] = outcome["failed"]
                    print(f"{self.name} batch {batch}: {variant:<26} {outcome['failed']}", flush=True)
                else:
                    outcomes[variant].append(outcome)
        return outcomes

    def _compare(self, rows: dict[str, Any], batch: int, outcomes: dict[str, list[dict[str, Any]]]) -> None:
        """Add speed-ups over torch fp32 and errors to the rows."""
        outputs = {v: torch.load(output_of(self.work, v), weights_only=True) for v in self.variants if outcomes[v]}
        reference = torch.load(output_of(self.work, "torch fp32"), weights_only=True)
        errors = {variant: relative_l2(output, reference) for variant, output in outputs.items()}
        medians = {v: statistics.median(ms for outcome in outcomes[v] for ms in outcome["ms"]) for v in errors}
        floor = "torch fp16" if self.device == "cuda" else "torch bf16"
        for variant in (v for v in errors if "failed" not in rows[v]):
            exact = precision_of(variant) == "fp32" and "int8" not in variant
            limit = 1e-4 if exact else 2 * errors[floor]
            row = {
                "rounds": outcomes[variant],
                "median_ms": medians[variant],
                "speedup": medians["torch fp32"] / medians[variant],
                "relative_l2": errors[variant],
                "limit": limit,
                "inside": errors[variant] <= limit,
            }
            rows[variant]["batch"][str(batch)] = row
            print(
                f"{self.name} batch {batch}: {variant:<26} {row['median_ms']:9.1f} ms  {row['speedup']:5.2f}×"
                f"  relative L2 {row['relative_l2']:.1e}{'' if row['inside'] else '  OVER THE GATE'}",
                flush=True,
            )


def output_of(work: Path, variant: str) -> Path:
    """Returns the file of a variant's output."""
    return work / f"{variant.replace(' ', '-')}.pt"


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--child":
        case = json.loads(sys.argv[2])
        if "prepare" in case:
            prepare(case["prepare"], Path(case["model"]), Path(case["work"]), case["device"])
        print(json.dumps({} if "prepare" in case else measure_variant(case)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", choices=DEFAULT_MODELS, default="cpu")
    parser.add_argument("--rounds", type=int, default=2)
    help_text = "timed calls in a round; by default 3 of a full-size model on a CPU, 30 of nano, 50 on a GPU"
    parser.add_argument("--samples", type=int, help=help_text)
    parser.add_argument("--model", action="append", choices=list(MODELS))
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
    for name in args.model or DEFAULT_MODELS[args.device]:
        work = args.work / name.replace(" ", "-")
        work.mkdir(parents=True, exist_ok=True)
        model = nano.teacher_folder()
        if name != "nano":
            model = work / "model"
            if not model.is_dir():
                random_pipeline("sd1", MODELS[name], dtype=torch.float16).save_pretrained(model)
        samples = args.samples or (50 if args.device == "cuda" else 30 if name == "nano" else 3)
        models[name] = Study(name, model, work, args.rounds, samples, variants, args.device).run()
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(
            json.dumps({"models": models, "environment": environment()}, indent=1) + "\n", encoding="utf-8"
        )
        shutil.rmtree(work, ignore_errors=True)
    print(format_table(models))


def format_table(models: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
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
