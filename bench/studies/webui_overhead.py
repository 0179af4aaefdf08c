"""How much time does the WebUI extension add to a step? A UNet call through the extension against the runner alone.

    python bench/studies/webui_overhead.py -o bench/results/webui-overhead-cpu.json --work build/webui-overhead
    python bench/studies/webui_overhead.py -o bench/results/webui-overhead-gpu.json --work build/webui-overhead

Without a GPU the model is nano in ONNX Runtime, fp32, 128 px. With a GPU it is a bk-tiny of SD1.5's size with random
weights, as a TensorRT engine, fp16, 512 px, with CUDA graphs. The host is that of the tests
(`tests/plugins/webui_host.py`), with A1111's order of calls: hooks of the checkpoint's module, the patched forward, the
extension. Both kinds of calls use one open runner. They take turns, in a new random order for every pair, so that drift
of the machine affects both alike. The overhead is the median of the differences of pairs, over the median of the
runner; the aim is at most 3%.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sdcompress_bench.environment import environment
from sdcompress_bench.stats import median_interval
from sdcompress_engines.signature import context_width

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "plugins" / "sd_webui_sdcompress"
AIM = 0.03


def prepare(work: Path, device: str) -> tuple[Path, Any]:
    """Returns the folder of the engine or graph, built first if it does not exist, and the UNet in diffusers."""
    from sdcompress.export.onnx import export_onnx
    from sdcompress.export.tensorrt import build_engines
    from sdcompress.models.load import load_pipeline
    from sdcompress.models.random import random_pipeline

    pipeline: Any = load_pipeline("nano").pipeline if device == "cpu" else random_pipeline("sd1", "bk-tiny")
    graphs, engine = work / device / "onnx", work / device / "engine"
    if not graphs.is_dir():
        export_onnx(pipeline, graphs, precision="fp32" if device == "cpu" else "fp16", host="webui", name="measured")
    if device != "cpu" and not engine.is_dir():
        build_engines(graphs, engine, profiles=("sd15-512",), components=("unet",))
    return (graphs if device == "cpu" else engine), pipeline.unet


def time_call(call: Callable[[], torch.Tensor], device: str) -> tuple[float, torch.Tensor]:
    """Returns the milliseconds of a call, with an idle device at both ends, and its result."""
    started = time.perf_counter()
    output = call()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started), output


def measure(folder: Path, unet: Any, work: Path, device: str, calls: int, rounds: int) -> dict[str, Any]:
    """Returns the samples of both kinds of calls, one mapping a round; each round activates the engine again.

    Args:
        folder: of the engine or graph.
        unet: in diffusers, for the host.
        work: folder for the host.
        device: `cpu` or `cuda`.
        calls: of each kind in a round.
        rounds: how many.
    """
    from tests.plugins.webui_host import WebUI, running

    root = work / "webui"
    shutil.rmtree(root, ignore_errors=True)
    (root / "models" / "sdcompress").mkdir(parents=True)
    (root / "models" / "sdcompress" / "measured").symlink_to(folder.resolve())
    generator, dtype = torch.Generator().manual_seed(0), torch.float32 if device == "cpu" else torch.float16
    side, channels, width = unet.config.sample_size, unet.config.in_channels, context_width(unet.config)
    sample = torch.randn(2, channels, side, side, generator=generator).to(device, dtype)
    context = torch.randn(2, 77, width, generator=generator).to(device, dtype)
    inputs = (sample, torch.full((2,), 501.0, device=device), context)
    host = WebUI(root, unet)
    host.devices.device = torch.device(device)
    samples, order = [], random.Random(0)
    with running(host):
        host.load_extension(PLUGIN)
        title = next(label for label in host.list_unets() if "measured" in label)
        for _ in range(rounds):
            host.apply_unet(title)
            samples.append(measure_round(host, inputs, device, calls, order))
            host.apply_unet("None")
    return {"label": title, "sample": list(sample.shape), "dtype": str(dtype).removeprefix("torch."), "rounds": samples}


def measure_round(
    host: Any, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], device: str, calls: int, order: random.Random
) -> dict[str, list[float]]:
    """Returns `runner` and `extension` → milliseconds of their calls, in a new random order for every pair.

    Args:
        host: the running WebUI.
        inputs: sample, (2, C, H/8, W/8), timesteps, (2,), and context, (2, 77, D), on the device.
        device: `cpu` or `cuda`.
        calls: of each kind.
        order: draws the order of each pair.
    """
    host.predict(*inputs)  # opens the engine
    (runner,) = host.sd_unet.current_unet.hosted.engines.runners.values()
    feeds = {spec.name: tensor.to(spec.dtype) for spec, tensor in zip(runner.inputs, inputs, strict=True)}
    kinds: dict[str, Callable[[], torch.Tensor]] = {
        "runner": lambda: runner.infer(feeds)[runner.outputs[0].name],
        "extension": lambda: host.predict(*inputs),
    }
    for _ in range(max(3, calls // 10)):
        outputs = [time_call(call, device)[1] for call in kinds.values()]
    if not torch.equal(*outputs):
        raise SystemExit("the outputs of the runner and the extension differ")
    samples: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(calls):
        for kind in order.sample(list(kinds), 2):
            samples[kind].append(time_call(kinds[kind], device)[0])
    return samples


def summarize(rounds: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Returns the medians of both kinds of calls, and the overhead.

    The overhead is the median difference of pairs with its 95% interval, in ms and over the runner's median.
    """
    both = {kind: [ms for samples in rounds for ms in samples[kind]] for kind in rounds[0]}
    differences = [after - before for before, after in zip(both["runner"], both["extension"], strict=True)]
    runner_ms, added_ms = statistics.median(both["runner"]), statistics.median(differences)
    low, high = median_interval(differences)
    return {
        "runner_ms": runner_ms,
        "extension_ms": statistics.median(both["extension"]),
        "added_ms": added_ms,
        "added_low_ms": low,
        "added_high_ms": high,
        "overhead": added_ms / runner_ms,
        "overhead_high": high / runner_ms,
        "aim": AIM,
        "within": added_ms / runner_ms <= AIM,
        "calls": len(differences),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/webui-overhead"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calls", type=int, default=200, help="of each kind in a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(PLUGIN)]
    folder, unet = prepare(options.work, options.device)
    result = measure(folder, unet, options.work, options.device, options.calls, options.rounds)
    result |= {"summary": summarize(result["rounds"]), "environment": environment()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    figures = result["summary"]
    calls = f"{result['label']}, {figures['calls']} calls of each kind"
    times = f"runner {figures['runner_ms']:.2f} ms, through the extension {figures['extension_ms']:.2f} ms"
    added = f"added {figures['added_ms']:.3f} ms ({figures['added_low_ms']:.3f} to {figures['added_high_ms']:.3f})"
    print(f"{calls}: {times}, {added}, {figures['overhead']:.1%} (aim {AIM:.0%})")
    return 0 if figures["within"] else 3


if __name__ == "__main__":
    sys.exit(main())
