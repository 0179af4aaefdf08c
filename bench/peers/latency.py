"""What a user would pick instead, on one machine in one run: diffusers as it is, channels last, torch.compile,
optimum-onnx, torch-tensorrt, and ours.

    python bench/peers/latency.py -o bench/results/peers-cpu.json --work build/peers                           nano
    python bench/peers/latency.py -o bench/results/peers-sd15-cpu.json --work build/peers --model bk-tiny      random
    SD1.5 weights, 512 px python bench/peers/latency.py -o bench/results/peers-gpu.json --work build/peers --model sd15
    --device cuda

All run one model folder, one set of UNet inputs, one prompt, one latent and the pipeline's own scheduler and step
count. Timed are a UNet call on two latents, as guidance makes it, and a whole picture, caption to PIL image; both by
the wall clock, the device waited for at both ends. Every way is a process of its own, started afresh each round, in
turn; raw samples are kept. The error is the relative L2 of the UNet's answer to diffusers in fp32, and the PSNR of the
picture to the one that drew.

optimum-onnx and torch-tensorrt get environments of their own under `--work`, as they pin other versions of what we
need; they run their own exporter and their own pipeline class. What does not install or run is a row with the reason.
What was prepared is kept for the next time (`--prepare` stops there), and so are torch.compile's kernels: "first
picture" of the first round has compiling in it only where `compiled_before` is false. This file is also what every
process runs, in whichever environment, so it imports nothing before it is needed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

REFERENCE = "diffusers fp32"
STUDENTS = {"sd15": None, "bk-base": "bk-base", "bk-small": "bk-small", "bk-tiny": "bk-tiny"}
PROMPTS = {"nano": "a 3d render of a red apple"}
PROMPT = "a photo of a lighthouse at dusk"
LIMIT_S = 1800
STEADY = 1.1
"""Warm-up ends when three calls in a row are this near each other, or after 20 (2 of a full-size model on a CPU)."""
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "onnxruntime",
    "onnxruntime-gpu",
    "optimum-onnx",
    "torch-tensorrt",
    "tensorrt",
    "tensorrt-rtx-cu13",
)


@dataclass(frozen=True)
class Way:
    """One way to run the model.

    Attributes:
        kind: `diffusers`, `optimum` or `torch_tensorrt`, or the backend of ours (`compile`, `aot`, `onnxruntime`,
            `tensorrt`).
        install: requirements of the environment it needs for itself; none is ours.
    """

    kind: str
    precision: str
    channels_last: bool = False
    compile: dict[str, Any] | None = None
    install: tuple[str, ...] = ()
    note: str = ""
    runs_on: tuple[str, ...] = field(default=("cpu", "cuda"))


TENSORRT = ("torch-tensorrt", "diffusers", "transformers", "accelerate")
WAYS = {
    "cpu": {
        REFERENCE: Way("diffusers", "fp32"),
        "diffusers fp32 channels_last": Way("diffusers", "fp32", True),
        "diffusers bf16 channels_last": Way("diffusers", "bf16", True),
        "torch.compile fp32": Way("diffusers", "fp32", compile={}),
        "torch.compile bf16 channels_last": Way("diffusers", "bf16", True, {}),
        "optimum-onnx fp32": Way(
            "optimum",
            "fp32",
            install=("optimum-onnx[onnxruntime]", "diffusers"),
            note="ONNX Runtime, its own export and pipeline",
        ),
        "torch-tensorrt fp16": Way(
            "torch_tensorrt", "fp16", compile={"backend": "torch_tensorrt"}, install=TENSORRT, runs_on=("cuda",)
        ),
        "ours: ort fp32": Way("onnxruntime", "fp32", note="`sdcompress export`, `--backend ort`"),
        "ours: aot bf16": Way("aot", "bf16", note="`--backend aot`: the UNet by AOTInductor, the rest in torch"),
    },
    "cuda": {
        REFERENCE: Way("diffusers", "fp32"),
        "diffusers fp16": Way("diffusers", "fp16"),
        "diffusers fp16 channels_last": Way("diffusers", "fp16", True),
        "torch.compile fp16 channels_last": Way("diffusers", "fp16", True, {}),
        "torch.compile fp16 channels_last reduce-overhead": Way(
            "diffusers", "fp16", True, {"mode": "reduce-overhead"}, note="CUDA graphs"
        ),
        "torch.compile fp16 channels_last max-autotune": Way(
            "diffusers", "fp16", True, {"mode": "max-autotune"}, note="CUDA graphs"
        ),
        "optimum-onnx fp16": Way(
            "optimum",
            "fp16",
            install=("optimum-onnx[onnxruntime-gpu]", "diffusers"),
            note="ONNX Runtime CUDA, its own export and pipeline",
        ),
        "torch-tensorrt fp16": Way(
            "torch_tensorrt",
            "fp16",
            compile={"backend": "torch_tensorrt", "dynamic": False, "options": {"truncate_double": True}},
            install=TENSORRT,
            note="CUDA graphs",
        ),
        "ours: ort fp16": Way("onnxruntime", "fp16", note="`sdcompress export --precision fp16`, `--backend ort`"),
        "ours: compile fp16": Way("compile", "fp16", note="`--backend compile`: torch.compile in a CUDA graph"),
        "ours: aot fp16": Way("aot", "fp16", note="`--backend aot`, in a CUDA graph"),
        "ours: trt fp16": Way("tensorrt", "fp16", note="`sdcompress export --trt`, CUDA graphs"),
    },
}


@dataclass(frozen=True)
class Run:
    """What is the same for all ways of one run; sizes are the model's own."""

    model: str
    device: str
    work: Path
    steps: int
    rounds: int
    samples: int
    pictures: int

    @property
    def folder(self) -> Path:
        return self.work / self.model

    def case(self, task: str, name: str = "") -> dict[str, Any]:
        shared = {
            "task": task,
            "way": name,
            "device": self.device,
            "work": str(self.work),
            "folder": str(self.folder),
            "model": self.model,
        }
        return shared | {
            "steps": self.steps,
            "samples": self.samples,
            "pictures": self.pictures,
            "prompt": PROMPTS.get(self.model, PROMPT),
        }


# Preparing: in our environment, but for what the others install and export.


def write_model(model: str, folder: Path) -> None:
    """The pipeline in fp32, in the layout that both transformers 4 and 5 read; and `inputs.npz`, what every UNet is
    given.
    """
    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file

    from sdcompress.models.load import load_pipeline
    from sdcompress.models.random import random_pipeline
    from sdcompress.support.quiet import quiet

    pipeline: Any = load_pipeline(model).pipeline if model == "nano" else random_pipeline("sd1", STUDENTS[model])
    target = folder / "model.partial"
    shutil.rmtree(target, ignore_errors=True)
    with quiet():
        pipeline.save_pretrained(target)
    weights = target / "text_encoder" / "model.safetensors"
    save_file(
        {
            key if key.startswith("text_model.") else f"text_model.{key}": value
            for key, value in load_file(weights).items()
        },
        weights,
        {"format": "pt"},
    )
    whole = target / "tokenizer" / "tokenizer.json"
    vocabulary = json.loads(whole.read_text(encoding="utf-8"))["model"]
    whole.unlink()
    (whole.parent / "vocab.json").write_text(json.dumps(vocabulary["vocab"]), encoding="utf-8")
    (whole.parent / "merges.txt").write_text(
        "".join(
            [
                "#version: 0.2\n",
                *(f"{' '.join(pair) if isinstance(pair, list) else pair}\n" for pair in vocabulary["merges"]),
            ]
        ),
        encoding="utf-8",
    )

    side, channels = int(pipeline.unet.config.sample_size), pipeline.unet.config.in_channels
    ids = pipeline.tokenizer(
        ["", PROMPTS.get(model, PROMPT)], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        context = pipeline.text_encoder(ids)[0]
    generator = torch.Generator().manual_seed(0)
    np.savez(
        folder / "inputs.npz",
        sample=torch.randn(2, channels, side, side, generator=generator).numpy(),
        context=context.numpy(),
        latents=torch.randn(1, channels, side, side, generator=generator).numpy(),
    )
    target.rename(folder / "model")


def artifact_of(way: Way, folder: Path) -> Path:
    """The folder a way runs from, made by `prepare`; of the ways in torch the model's own."""
    if way.kind in ("diffusers", "torch_tensorrt", "compile"):
        return folder / "model"
    return folder / f"{way.kind}-{way.precision}"


def unet_mib(way: Way, folder: Path) -> float:
    """The UNet's file, with its external data."""
    artifact = artifact_of(way, folder)
    found = [
        path
        for pattern in ("unet/*.safetensors", "unet/*.onnx*", "unet.*")
        for path in artifact.glob(pattern)
        if path.is_file()
    ]
    return sum(path.stat().st_size for path in found) / 2**20


def prepare_ours(way: Way, folder: Path, device: str) -> None:
    """Export, compile or build in this process."""
    from sdcompress.export.aot import compile_unet
    from sdcompress.export.onnx import export_onnx
    from sdcompress.export.tensorrt import build_engines
    from sdcompress.models.load import load_pipeline

    precision: Any = way.precision
    loaded = load_pipeline(folder / "model")
    graphs = folder / f"onnxruntime-{precision}"
    if way.kind == "aot":
        compile_unet(loaded, artifact_of(way, folder), device=device, precision=precision)
    elif not graphs.is_dir():
        export_onnx(loaded.pipeline, graphs, precision=precision)
    if way.kind == "tensorrt":
        profile = () if loaded.pipeline.unet.config.sample_size != 64 else ("sd15-512",)
        build_engines(graphs, artifact_of(way, folder), profiles=profile)


def environment_of(way: Way, work: Path) -> Path:
    """The Python that a way runs on: ours, or one installed for it, with our version of torch so that only the way
    differs.
    """
    if not way.install:
        return Path(sys.executable)
    wanted = [f"torch=={metadata.version('torch').partition('+')[0]}", *way.install]
    folder = work / f"venv-{way.kind}"
    python, ready = folder / "bin" / "python", folder / "installed.json"
    if not ready.is_file() or json.loads(ready.read_text(encoding="utf-8")) != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-I", "-m", "pip", "install", "--quiet", *wanted],
        ):
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=LIMIT_S, check=False
            )
            if done.returncode:
                raise RuntimeError(f"does not install: {last_line(done.stderr)}")
        ready.write_text(json.dumps(wanted), encoding="utf-8")
    return python


def prepare(name: str, way: Way, run: Run) -> tuple[str | None, float | None]:
    """Make what a way needs, unless it is there: why that failed, or None; and the seconds of exporting, compiling or
    building, now or then, without installing.
    """
    if run.device not in way.runs_on:
        return f"runs on {' or '.join(way.runs_on)} only", None
    try:
        python = environment_of(way, run.work)
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        return clean(str(error), run.work), None
    target, note = artifact_of(way, run.folder), run.folder / "prepared.json"
    known: dict[str, float] = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    if target.is_dir():
        return None, known.get(name)
    started = time.monotonic()
    outcome = (
        export_theirs(python, way, run) if way.kind == "optimum" else child(python, run.case("prepare", name), run.work)
    )
    if "failed" in outcome:
        return str(outcome["failed"]), None
    known[name] = round(time.monotonic() - started, 1)
    note.write_text(json.dumps(known), encoding="utf-8")
    return None, known[name]


def export_theirs(python: Path, way: Way, run: Run) -> dict[str, Any]:
    """optimum-onnx by its own command line."""
    target = artifact_of(way, run.folder)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    options = ["--dtype", "fp16", "--device", "cuda"] if way.precision == "fp16" else []
    command = [
        str(python),
        "-I",
        "-m",
        "optimum.commands.optimum_cli",
        "export",
        "onnx",
        "--model",
        str(run.folder / "model"),
        "--task",
        "text-to-image",
        *options,
        str(partial),
    ]
    outcome = process(command, run.work)
    if "failed" not in outcome:
        partial.rename(target)
    return outcome


# Measuring: one way in this process.


def open_pipeline(way: Way, folder: Path, device: str) -> Any:
    """A pipeline as the documentation of each says to make it."""
    artifact = artifact_of(way, folder)
    if way.kind == "optimum":
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        return ORTStableDiffusionPipeline.from_pretrained(
            artifact, provider="CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
        )
    if way.kind in ("diffusers", "torch_tensorrt"):
        import torch
        from diffusers import StableDiffusionPipeline

        if way.kind == "torch_tensorrt":
            import torch_tensorrt  # registers its backend

            torch_tensorrt.runtime.set_cudagraphs_mode(True)
        if way.precision == "fp32":  # IEEE fp32: torch computes convolutions in TF32 unless told otherwise
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[way.precision]
        pipeline = StableDiffusionPipeline.from_pretrained(artifact, torch_dtype=dtype).to(device)
        if way.channels_last:
            pipeline.unet.to(memory_format=torch.channels_last)
        if way.compile is not None:
            pipeline.unet.compile(**way.compile)
        return pipeline
    from sdcompress.backends.assemble import open_pipeline

    precision: Any = way.precision
    if way.kind in ("aot", "compile"):
        return open_pipeline(
            folder / "model", way.kind, None if way.kind == "compile" else artifact, device=device, precision=precision
        )
    return open_pipeline(artifact, way.kind, device=device, steady=True)


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Samples of one way, its answer written beside the model."""
    import numpy as np
    import torch

    folder, device = Path(case["folder"]), case["device"]
    way = WAYS[device][case["way"]]
    cuda = device == "cuda"
    free = torch.cuda.mem_get_info()[0] if cuda else 0
    given = np.load(folder / "inputs.npz")

    def timed(call: Any) -> tuple[float, Any]:
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        result = call()
        if cuda:
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - started), result

    load_ms, pipeline = timed(lambda: open_pipeline(way, folder, device))
    pipeline.set_progress_bar_config(disable=True)
    # What a runtime takes by numpy has no bfloat16, and optimum's pipelines take fp32 whatever their graphs are in.
    dtype = (
        torch.float32
        if way.kind == "optimum" and way.precision == "fp32"
        else {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[way.precision]
    )
    sample, context, latents = (
        torch.from_numpy(given[name]).to(device, dtype) for name in ("sample", "context", "latents")
    )
    moment = torch.tensor(501, device=device)
    guidance = 4.0 if case["model"] == "nano" else 7.5

    def picture() -> Any:
        return pipeline(
            case["prompt"], latents=latents.clone(), num_inference_steps=case["steps"], guidance_scale=guidance
        ).images[0]

    def step() -> Any:
        # Every argument as the pipeline gives it: a compiled UNet compiles again for others.
        return pipeline.unet(
            sample,
            moment,
            encoder_hidden_states=context,
            timestep_cond=None,
            cross_attention_kwargs=None,
            added_cond_kwargs=None,
            return_dict=False,
        )[0]

    first_ms, _ = timed(picture)
    with torch.no_grad():
        warm: list[float] = []
        while len(warm) < (2 if case["samples"] < 3 else 20) and not (
            len(warm) > 2 and max(warm[-3:]) <= STEADY * min(warm[-3:])
        ):
            warm.append(timed(step)[0])
        steps = [timed(step) for _ in range(case["samples"])]
    pictures = [timed(picture) for _ in range(case["pictures"])]
    answer = torch.as_tensor(steps[-1][1]).float().cpu().numpy()
    drawn = np.asarray(pictures[-1][1])
    if not np.isfinite(answer).all():
        raise RuntimeError("its UNet's answer is not finite")
    np.savez(answer_of(case["way"], folder), unet=answer, picture=drawn)
    return {
        "load_ms": load_ms,
        "first_picture_ms": first_ms,
        "unet_step_ms": [ms for ms, _ in steps],
        "picture_ms": [ms for ms, _ in pictures],
        "size_px": drawn.shape[0],
        "peak_rss_mib": peak_rss_mib(),
        "device_mib": (free - torch.cuda.mem_get_info()[0]) / 2**20 if cuda else None,
        "versions": versions(),
    }


def answer_of(name: str, folder: Path) -> Path:
    return folder / f"{''.join(c if c.isalnum() or c in '.-' else '_' for c in name)}.npz"


def peak_rss_mib() -> float:
    """Of this process; Linux's getrusage would carry the parent's across exec.

    `sdcompress_engines.resources` for a Python without our packages.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return next(
            int(line.split()[1]) / 1024
            for line in status.read_text(encoding="utf-8").splitlines()
            if line.startswith("VmHWM:")
        )
    if sys.platform == "win32":
        try:
            import psutil
        except ImportError:
            return 0.0
        return float(psutil.Process().memory_info().peak_wset) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


# Running: the parent.


def child(python: str | Path, case: dict[str, Any], work: Path) -> dict[str, Any]:
    """This file in another process: its last line, or `{"failed": reason}`."""
    isolated = [] if str(python) == sys.executable else ["-I"]  # nothing of our environment reaches theirs
    return process([str(python), *isolated, __file__, "--child", json.dumps(case)], work)


def process(command: list[str], work: Path) -> dict[str, Any]:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
    }
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=LIMIT_S, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"did not finish in {LIMIT_S} s"}
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return {"failed": f"ended by {name}" + ("; out of memory is the usual cause" if name == "SIGKILL" else "")}
    if done.returncode:
        return {"failed": clean(last_line(done.stderr), work)}
    try:
        return dict(json.loads(last_line(done.stdout)))
    except ValueError:
        return {}


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


def clean(text: str, work: Path) -> str:
    """A reason without this machine's paths, at most 200 characters."""
    for path in (work, Path(sys.prefix), Path.home()):
        text = text.replace(f"{path}/", "").replace(str(path), path.name)
    return text[:200]


def measure_all(run: Run, rows: dict[str, Any]) -> None:
    """Rounds of every way that was prepared, into its row."""
    for number in range(run.rounds):
        for name in (n for n, row in rows.items() if "failed" not in row):
            outcome = child(environment_of(WAYS[run.device][name], run.work), run.case("measure", name), run.work)
            if "failed" in outcome:
                rows[name] |= outcome
            else:
                rows[name].setdefault("rounds", []).append(outcome)
            print(
                f"round {number + 1}: {name:<46}"
                f" {outcome.get('failed') or '{:.1f} ms a step'.format(sorted(outcome['unet_step_ms'])[len(outcome['unet_step_ms']) // 2])}",
                file=sys.stderr,
                flush=True,
            )


def summarize_rows(run: Run, rows: dict[str, Any]) -> None:
    """Medians with their intervals, and errors to the reference, into the rows."""
    import numpy as np
    from sdcompress_bench.stats import summarize_rounds

    truth = np.load(answer_of(REFERENCE, run.folder)) if "failed" not in rows[REFERENCE] else None
    for name, row in rows.items():
        if "failed" in row:
            row.pop("rounds", None)
            continue
        rounds = row["rounds"]
        for figure in ("unet_step_ms", "picture_ms"):
            found = summarize_rounds([r[figure] for r in rounds])
            fastest = min(
                float(np.median(r[figure])) for r in rounds
            )  # others on the machine only ever slow a round down
            row[figure] = {
                "median": found.median,
                "low": found.low,
                "high": found.high,
                "noisy": found.noisy,
                "fastest_round": fastest,
            }
        row["first_picture_s"] = (rounds[0]["load_ms"] + rounds[0]["first_picture_ms"]) / 1000
        row["peak_mib"] = max(r["device_mib"] if run.device == "cuda" else r["peak_rss_mib"] for r in rounds)
        row["unet_file_mib"] = unet_mib(WAYS[run.device][name], run.folder)
        if truth is None:
            continue
        answer = np.load(answer_of(name, run.folder))
        wanted = truth["unet"].astype(np.float64)
        row["relative_l2"] = float(np.linalg.norm(answer["unet"] - wanted) / np.linalg.norm(wanted))
        error = float(np.mean((answer["picture"].astype(np.float64) - truth["picture"]) ** 2))
        row["picture_psnr_db"] = None if error == 0 else 10 * math.log10(255**2 / error)


def table(rows: dict[str, Any]) -> str:
    """One table, the reference first; where a way has no figures its reason."""
    reference = rows[REFERENCE]
    lines = [
        (
            "| | UNet step, ms | | its fastest round | whole picture, ms | | its fastest round | first picture, s |"
            " peak memory, MiB | UNet file, MiB | relative L2 | picture, dB |"
        ),
        "|---|" + "---|" * 11,
    ]
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"| {name} | {row['failed']} |" + " |" * 10)
            continue
        cells = []
        for figure in ("unet_step_ms", "picture_ms"):
            found = row[figure]
            times = f"{reference[figure]['median'] / found['median']:.2f}×" if figure in reference else "–"
            cells += [
                (
                    f"{found['median']:,.1f} ({found['low']:,.1f} to"
                    f" {found['high']:,.1f}){', noisy' if found['noisy'] else ''}"
                ),
                times,
                f"{found['fastest_round']:,.1f}",
            ]
        psnr = row.get("picture_psnr_db")
        cells += [f"{row['first_picture_s']:.1f}", f"{row['peak_mib']:,.0f}", f"{row['unet_file_mib']:,.1f}"]
        cells += (
            ["–", "–"]
            if "relative_l2" not in row
            else [f"{row['relative_l2']:.1e}", "the same" if psnr is None else f"{psnr:.1f}"]
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--child":
        case = json.loads(sys.argv[2])
        folder, way = Path(case["folder"]), WAYS[case["device"]].get(case["way"])
        if case["task"] == "model":
            write_model(case["model"], folder)
        elif case["task"] == "prepare" and way:
            prepare_ours(way, folder, case["device"])
        print(json.dumps(measure(case) if case["task"] == "measure" else {}))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for environments, exports and answers; kept")
    parser.add_argument(
        "--model",
        choices=["nano", *STUDENTS],
        default="nano",
        help="nano, or random weights in the shape of SD1.5 or a student of it",
    )
    parser.add_argument("--device", choices=list(WAYS), default="cpu")
    parser.add_argument("--steps", type=int, help="of a picture; by default 25, and 4 for a full-size model on a CPU")
    parser.add_argument("--rounds", type=int, help="by default 3, and 1 for a full-size model on a CPU")
    parser.add_argument("--way", action="append", help="only this one, beside the reference")
    parser.add_argument("--prepare", action="store_true", help="install, export and compile only")
    args = parser.parse_args()
    ways = {name: way for name, way in WAYS[args.device].items() if not args.way or name in (REFERENCE, *args.way)}
    if unknown := set(args.way or ()) - set(WAYS[args.device]):
        parser.error(f"no way {', '.join(sorted(unknown))}; there are: {', '.join(WAYS[args.device])}")
    slow = args.device == "cpu" and args.model != "nano"
    samples, pictures = (2, 1) if slow else (20, 2) if args.device == "cpu" else (50, 5)
    run = Run(
        args.model,
        args.device,
        args.work.resolve(),
        args.steps or (4 if slow else 25),
        args.rounds or (1 if slow else 3),
        samples,
        pictures,
    )

    run.folder.mkdir(parents=True, exist_ok=True)
    compiled_before = any(
        answer_of(name, run.folder).is_file() for name, way in ways.items() if way.compile is not None
    )
    if not (run.folder / "model").is_dir() and (
        reason := child(sys.executable, run.case("model"), run.work).get("failed")
    ):
        sys.exit(f"the model could not be written: {reason}")
    rows: dict[str, Any] = {}
    for name, way in ways.items():
        reason, seconds = prepare(name, way, run)
        rows[name] = (
            {"note": way.note} | ({"prepare_s": seconds} if seconds else {}) | ({"failed": reason} if reason else {})
        )
        print(
            f"{name}: {reason or (f'prepared in {seconds} s' if seconds else 'nothing to prepare')}",
            file=sys.stderr,
            flush=True,
        )
    if args.prepare:
        return
    from sdcompress_bench.environment import environment

    machine = environment()
    measure_all(run, rows)
    summarize_rows(run, rows)
    size = next((r["size_px"] for row in rows.values() for r in row.get("rounds", [])), None)
    settings = {
        "model": run.model,
        "device": run.device,
        "size_px": size,
        "unet_batch": 2,
        "steps": run.steps,
        "rounds": run.rounds,
        "samples": run.samples,
        "pictures": run.pictures,
        "compiled_before": compiled_before,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(
        json.dumps({"settings": settings, "ways": rows, "environment": machine}, indent=1) + "\n", encoding="utf-8"
    )
    print(table(rows))
    measured = {n: r for n, r in rows.items() if "failed" not in r}
    print(
        json.dumps(
            {
                "settings": settings,
                "unet_step_ms": {n: r["unet_step_ms"]["median"] for n, r in measured.items()},
                "picture_ms": {n: r["picture_ms"]["median"] for n, r in measured.items()},
                "failed": {n: r["failed"] for n, r in rows.items() if "failed" in r},
            }
        )
    )
    if all("failed" in row for row in rows.values()):
        sys.exit("no way ran")


if __name__ == "__main__":
    main()
