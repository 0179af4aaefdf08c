"""`sdcompress bench`: how fast, how close, how good."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._console import ConsoleReporter, card, force_option, json_option, output_option

if TYPE_CHECKING:
    from sdcompress_bench.scenario import ModelUnderTest, Prompt

_PROMPTS = (
    "a photo of a lighthouse on a cliff at dusk",
    "portrait photo of an old fisherman, natural light",
    "a bowl of ramen on a wooden table, top view",
    "a red fox in a snowy forest",
    "a quiet street in Lisbon after rain, film photo",
    "a glass bottle with a ship inside, studio light",
    "a watercolour painting of a mountain village",
    "macro photo of a dew-covered dragonfly",
)
"""For models that are not nano, where no --prompts are given."""
QUICK = {"rounds": 1, "samples": 6, "end_to_end_samples": 3, "stage_budget_s": 2.0, "pictures": 4, "probes": 2}


@click.command("bench")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@output_option()
@click.option(
    "--backend", "backends", metavar="NAMES", help="Of torch, onnxruntime (ort), tensorrt (trt), with commas. [default: torch,onnxruntime, and tensorrt where there is a GPU]"
)
@click.option("--size", "size_px", type=click.IntRange(64), metavar="PX", help="Side of the pictures. [default: the teacher's own]")
@click.option("--batch", default="1", show_default=True, metavar="N[,N]", help="Pictures at once; each size is a row.")
@click.option("--steps", type=click.IntRange(1), default=25, show_default=True, help="Sampling steps.")
@click.option("--guidance", type=float, default=None, help="Guidance scale; at 1 or less the UNet runs once a step, not twice.  [default: 7.5; nano and its students 4]")
@click.option("--prompts", "prompts_file", type=click.Path(path_type=Path), metavar="FILE", help="Captions, one a line.")
@click.option("--prompt-count", type=click.IntRange(1), metavar="N", help="How many prompts the quality figures take. [default: all of FILE; 200 held-out ones for nano]")
@click.option("--metric", type=click.Path(path_type=Path), metavar="DIR", help="A CLIP (transformers folder) that judges the pictures. [default: nano-CLIP for nano]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first picture; the next has the next seed.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="How often each model and backend is started afresh.")
@click.option("--quick", is_flag=True, help="One round, few samples, few pictures: a look, not a figure to quote.")
@force_option
@json_option
def command(
    models: tuple[str, ...], output: Path, backends: str | None, size_px: int | None, batch: str, steps: int, guidance: float | None, prompts_file: Path | None, prompt_count: int | None,
    metric: Path | None, seed: int, rounds: int, quick: bool, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure latency, memory and quality of MODELs on every backend, and write a report.

    The first MODEL is the teacher: the others are held against it, and PyTorch on it is speed-up 1.0. `NAME=MODEL` names a model in the report.

    \b
      sdcompress bench nano nano-tiny -o report --quick
      sdcompress bench TEACHER small=student/pipeline -o report --backend torch,ort,trt --rounds 5
    """
    from sdcompress_engines.errors import GateFailed
    from sdcompress_engines.manifest import check_free

    check_free(output, force)
    chosen, skipped = _backends(backends)
    batches = _numbers(batch)

    import torch
    from sdcompress_bench.report import headline
    from sdcompress_bench.scenario import Suite
    from sdcompress_bench.suite import run_suite

    from sdcompress.pipeline import default_guidance_scale

    tested = tuple(_model(text) for text in models)
    prompts, judged = _prompts(models[0], prompts_file, prompt_count or (40 if quick else 200), seed)
    metric = metric or judged.pop("metric", None)
    effort: dict[str, Any] = QUICK if quick else {"rounds": rounds}
    gpu = torch.cuda.is_available()
    suite = Suite(
        models=tested, backends=chosen, precision="fp16" if gpu else "fp32", device="cuda" if gpu else "cpu", size_px=size_px or _own_size(models[0]), batch=batches, steps=steps,
        guidance_scale=default_guidance_scale(_own_size(models[0])) if guidance is None else guidance, prompts=prompts, seed=seed, quality_pictures=min(len(prompts), prompt_count or len(prompts)) if metric else 0, metric=metric, **judged, **effort,
    )  # fmt: skip
    results = run_suite(suite, output, ConsoleReporter(), force, skipped=skipped, command=_again())
    if as_json:
        click.echo((output / "results.json").read_text())
    else:
        rows = [(f"{row.model} / {row.backend}", _line(row)) for row in results.rows()]
        card(headline(results), [*rows, ("report", output / "report.html"), ("raw samples", output / "results.json")], f"open {output / 'report.html'}")
    if over := results.failed_gates():
        raise GateFailed(
            "; ".join(over), where=output / "report.html", expected="a backend within its limit of PyTorch fp32", hint="export the graphs again, and compare with --backend torch"
        )


def _line(row: Any) -> str:
    if row.unet_step is None or row.images_per_s is None:
        return f"failed: {row.failed}"
    speedup = f", {row.speedup:.2f}× the teacher in PyTorch" if row.speedup else ""
    return f"UNet step {row.unet_step.median:,.1f} ms, {row.images_per_s:.2f} pictures/s{speedup}, {row.peak_mib:,.0f} MiB"


def _backends(text: str | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """The backends to measure, and those left out with the reason."""
    import torch
    from sdcompress_engines.runners import available

    from sdcompress.pipeline import backend_name

    if text is None:
        names = ["torch", "onnxruntime", *(["tensorrt"] if torch.cuda.is_available() else [])]
    else:
        names = list(dict.fromkeys(backend_name(name.strip()) for name in text.split(",") if name.strip()))
    reasons = available()
    reasons["tensorrt"] = reasons["tensorrt"] and reasons["tensorrt-rtx"]  # either serves
    skipped = {name: reason for name in names if (reason := reasons.get(name))}
    return tuple(name for name in names if name not in skipped), skipped


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no list of whole numbers such as 1,4", param_hint="--batch") from error


def _model(text: str) -> ModelUnderTest:
    """From `MODEL` or `NAME=MODEL`; a training folder's `metrics.jsonl` comes along."""
    from sdcompress_bench.scenario import ModelUnderTest

    from sdcompress.teacher import BUILT_IN, display_name, resolve, sha256_of

    given, _, source = text.rpartition("=")
    folder = resolve(source)
    name = given or (source if source in BUILT_IN else display_name(folder))
    metrics = folder.parent / "metrics.jsonl"
    return ModelUnderTest(name, folder, sha256=sha256_of(folder), metrics=metrics if metrics.is_file() else None)


def _own_size(text: str) -> int:
    """Side in pixels that the model was made for: its UNet's sample_size × its VAE's reduction."""
    from sdcompress.teacher import component_config, unet_config

    source = text.rpartition("=")[2]
    vae = component_config(source, "vae")
    return int(unet_config(source)["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)


def _prompts(teacher: str, file: Path | None, count: int, seed: int) -> tuple[tuple[Prompt, ...], dict[str, Any]]:
    """The prompts, and what judges their pictures: nano brings its metric, styles and real pictures."""
    from sdcompress_bench.scenario import Prompt
    from sdcompress_engines.errors import UsageError

    from sdcompress import nano

    if file is not None:
        if not file.is_file():
            raise UsageError("no such file", where=file, expected="captions, one a line")
        captions = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        return tuple(Prompt(caption) for caption in captions), {}
    if teacher.rpartition("=")[2] not in ("nano", str(nano.teacher_folder())):
        return tuple(Prompt(caption) for caption in _PROMPTS), {}
    prompts = tuple(Prompt(p.caption, p.style) for p in nano.prompts("heldout", count, seed))
    return prompts, {"metric": nano.metric_folder(), "styles": tuple(nano.styles().items()), "real": nano.shards("heldout")[0]}


def _again() -> str:
    import shlex
    import sys

    return shlex.join(["sdcompress", *sys.argv[1:]])
