"""What the WebUI extension adds to a step: a UNet call as the WebUI makes it, through the extension, against the same
runner called directly.

    python bench/studies/webui_overhead.py -o bench/results/webui-overhead-cpu.json --work build/webui-overhead
    python bench/studies/webui_overhead.py -o bench/results/webui-overhead-gpu.json --work build/webui-overhead

Without a GPU it is nano in ONNX Runtime, fp32, 128 px; with one a bk-tiny of SD1.5's size as a TensorRT engine, fp16,
512 px, with CUDA graphs. Weights are as they are, or random: time does not depend on them. The host is the tests'
(`tests/plugins/webui_host.py`), in A1111's order of calls: hooks of the checkpoint's module, the patched forward, the
extension. Both ways use one open runner, in turn and in another order every time, so that a drift of the machine meets
both alike. The overhead is the median of the differences of neighbours, over the median of the runner; aim: at most 3%.
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

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "plugins" / "sd_webui_sdcompress"
AIM = 0.03


def make(work: Path, device: str) -> tuple[Path, Any]:
    """The folder of the engine or graph, made where it is not there, and the UNet in diffusers."""
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


def timed(call: Callable[[], torch.Tensor], device: str) -> tuple[float, torch.Tensor]:
    """Milliseconds from an idle device to an idle device, and the result."""
    started = time.perf_counter()
    out = call()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started), out


def measure(folder: Path, unet: Any, work: Path, device: str, calls: int, rounds: int) -> dict[str, Any]:
    """Samples of both ways, one mapping a round; each round activates the engine anew."""
    from tests.plugins.webui_host import WebUI, running

    root = work / "webui"
    shutil.rmtree(root, ignore_errors=True)
    (root / "models" / "sdcompress").mkdir(parents=True)
    (root / "models" / "sdcompress" / "measured").symlink_to(folder.resolve())
    draw, size, dtype = (
        torch.Generator().manual_seed(0),
        unet.config.sample_size,
        torch.float32 if device == "cpu" else torch.float16,
    )
    x, context = (
        torch.randn(shape, generator=draw).to(device, dtype)
        for shape in ((2, unet.config.in_channels, size, size), (2, 77, unet.config.cross_attention_dim))
    )
    host = WebUI(root, unet)
    host.devices.device = torch.device(device)
    found, order = [], random.Random(0)
    with running(host):
        host.load_extension(PLUGIN)
        title = next(label for label in host.list_unets() if "measured" in label)
        for _ in range(rounds):
            host.apply_unet(title)
            found.append(one_round(host, (x, torch.full((2,), 501.0, device=device), context), device, calls, order))
            host.apply_unet("None")
    return {"label": title, "sample": list(x.shape), "dtype": str(dtype).removeprefix("torch."), "rounds": found}


def one_round(
    host: Any, given: tuple[torch.Tensor, torch.Tensor, torch.Tensor], device: str, calls: int, order: random.Random
) -> dict[str, list[float]]:
    """Way → milliseconds of `calls` calls each, in turn, in an order that is drawn anew for every pair."""
    host.predict(*given)  # opens the engine
    (runner,) = host.sd_unet.current_unet.hosted.engines.runners.values()
    feeds = {spec.name: tensor.to(spec.dtype) for spec, tensor in zip(runner.inputs, given, strict=True)}
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "runner": lambda: runner.infer(feeds)[runner.outputs[0].name],
        "extension": lambda: host.predict(*given),
    }
    for _ in range(max(3, calls // 10)):
        answers = [timed(call, device)[1] for call in ways.values()]
    if not torch.equal(*answers):
        raise SystemExit("the two ways differ")
    samples: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(calls):
        for way in order.sample(list(ways), 2):
            samples[way].append(timed(ways[way], device)[0])
    return samples


def summary(rounds: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Medians of both ways, and the overhead: the median difference of neighbours with its 95% interval, in ms and over
    the runner's median.
    """
    both = {way: [ms for samples in rounds for ms in samples[way]] for way in rounds[0]}
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
    parser.add_argument("--calls", type=int, default=200, help="of each way, a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(PLUGIN)]
    made, unet = make(options.work, options.device)
    found = measure(made, unet, options.work, options.device, options.calls, options.rounds)
    found |= {"summary": summary(found["rounds"]), "environment": environment()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    said = found["summary"]
    print(
        f"{found['label']}, {said['calls']} calls each way: runner {said['runner_ms']:.2f} ms, through the extension"
        f" {said['extension_ms']:.2f} ms, added {said['added_ms']:.3f} ms ({said['added_low_ms']:.3f} to"
        f" {said['added_high_ms']:.3f}), {said['overhead']:.1%} (aim {AIM:.0%})"
    )
    return 0 if said["within"] else 3


if __name__ == "__main__":
    sys.exit(main())
