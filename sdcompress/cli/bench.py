"""`sdcompress bench`: how fast, how close, how good."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdcompress.cli._console import ConsoleReporter, card, force_option, json_option, mib

if TYPE_CHECKING:
    from sdcompress_bench.results import Results, Row
    from sdcompress_bench.scenario import Gate, ModelUnderTest, Prompt, Suite, Way
    from sdcompress_bench.suite_file import GateEntry, ModelEntry, SuiteFile

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
QUICK = {
    "rounds": 1,
    "samples": 6,
    "end_to_end_samples": 3,
    "stage_budget_s": 2.0,
    "pictures": 4,
    "probes": 2,
    "sensitivity": 0,
}
NANO_PROMPTS, QUICK_PROMPTS = 200, 40


class _DefaultCommand(click.Group):
    """`bench X` is `bench run X`, unless X is a command of its own."""

    def with_command(self, args: list[str]) -> list[str]:
        """The arguments with the command's name before them."""
        return args if args and args[0] in self.commands else ["run", *args]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self.with_command(args))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return ("" if name == "run" else name), command, rest  # usage lines say `bench`, as people type


@click.group("bench", cls=_DefaultCommand)
def command() -> None:
    """Measure latency and fidelity, and write a report."""


@command.command("run")
@click.argument("targets", metavar="SUITE|MODEL...", nargs=-1)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder to write to.  [default: bench-NAME here, or the next free bench-NAME-2]",
)
@click.option(
    "--backend",
    "backends",
    metavar="NAMES",
    help=(
        "Of torch, compile, aot, onnxruntime (ort), tensorrt (trt), with commas; `aot:bf16` names a precision. "
        " [default: torch,ort, and compile,trt where there is a GPU]"
    ),
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="Of backends that name none.  [default: fp16 on a GPU, fp32 on a CPU]",
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to run.  [default: cuda where there is one]"
)
@click.option(
    "--size", "size_px", metavar="PX[,PX]", help="Side of the pictures.  [default: what the teacher was made for]"
)
@click.option("--batch", metavar="N[,N]", help="Pictures at once; each size is a row.  [default: 1]")
@click.option("--steps", type=click.IntRange(1), help="Sampling steps.  [default: 25]")
@click.option(
    "--guidance",
    "guidance_scale",
    type=float,
    help="Guidance scale; at 1 or less the UNet runs once a step, not twice.  [default: 7.5; nano and its students 4]",
)
@click.option(
    "--prompts", metavar="FILE", help="Captions: txt (one a line), csv, tsv (PartiPrompts), jsonl, or COCO's json."
)
@click.option(
    "--prompt-count",
    "quality_pictures",
    type=click.IntRange(0),
    metavar="N",
    help="How many pictures the quality figures take.  [default: all of FILE; 200 held-out prompts for nano]",
)
@click.option("--reference", metavar="FOLDER", help="Real pictures; FID and KID are taken to them too.")
@click.option(
    "--clip",
    metavar="PATH",
    help="A CLIP (transformers folder) that judges the pictures.  [default: nano-CLIP for nano]",
)
@click.option("--seed", type=click.IntRange(0), help="Of the first picture; the next has the next seed.  [default: 0]")
@click.option(
    "--rounds",
    type=click.IntRange(1),
    help="How often each case is started afresh; 5 tell a change of 5% from chance.  [default: 5]",
)
@click.option(
    "--threads", type=click.IntRange(1), metavar="N", help="CPU threads.  [default: the runtime's own choice]"
)
@click.option("--quick", is_flag=True, help="One round, few samples, few pictures: a look, not a figure to quote.")
@click.option(
    "--strict", is_flag=True, help="A backend that is not installed is an error, and so is a case that fails."
)
@click.option("--dry-run", is_flag=True, help="List what would run and the memory it needs, and measure nothing.")
@click.option("--list", "list_suites", is_flag=True, help="List the suites that come along.")
@force_option
@json_option
def run_command(
    targets: tuple[str, ...],
    output: Path | None,
    backends: str | None,
    quick: bool,
    strict: bool,
    dry_run: bool,
    list_suites: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure latency, memory and quality on every backend, and write a report.

    Give a suite by name or as a YAML file, or MODELs. The first MODEL is the teacher: the others are held against it,
    and PyTorch on it is speed-up 1.0. `NAME=MODEL` names a model in the report. A case a process of its own, never two
    at once; a bench that was stopped goes on where it was when it is typed again.

    \b
      sdcompress bench nano                                                   six minutes on two cores
      sdcompress bench TEACHER small=student/pipeline --backend torch,compile,ort,trt --size 512 --batch 1,4
      sdcompress bench TEACHER student/pipeline --prompts PartiPrompts.tsv --clip ./clip-vit-large-patch14
      sdcompress bench sd15 --dry-run                                         what would run, and the memory it needs
      sdcompress bench compare before/results.json after/results.json         what changed, beyond noise or not
    """
    from sdcompress_bench.suite_file import read_suite, suite_names, suite_path
    from sdcompress_engines.errors import BackendMissing, GateFailed
    from sdcompress_engines.manifest import check_free

    if list_suites:
        return _list(suite_names())
    if not targets:
        raise click.UsageError(
            "a suite or a model is missing; `sdcompress bench --list` names the suites", click.get_current_context()
        )
    if output is not None:
        check_free(output, force)
    overrides: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    overrides |= {name: _numbers(text, name) for name in ("size_px", "batch") if (text := overrides.get(name))}
    if backends is not None:
        overrides |= {"backends": [part for part in backends.split(",") if part.strip()], "gpu_backends": None}
    path = suite_path(targets[0]) if len(targets) == 1 else None
    described = {} if path is None else read_suite(path).model_dump(exclude_unset=True)
    if path is None:
        described = {"models": list(targets)}
    suite, skipped = suite_of(described | (QUICK if quick else {}) | overrides, quick=quick, where=path)
    if strict and skipped:
        raise BackendMissing(
            "; ".join(f"{name}: {reason}" for name, reason in skipped.items()),
            hint="install it, name other backends, or leave out --strict",
        )
    if dry_run:
        return _dry_run(suite, skipped, as_json)

    from sdcompress_bench.report import headline
    from sdcompress_bench.suite import run_suite

    output = output or _free_folder(path.stem if path else suite.models[-1].name)
    results = run_suite(suite, output, ConsoleReporter(), force, skipped=skipped, command=again())
    if as_json:
        click.echo((output / "results.json").read_text())
    else:
        rows = [(f"{row.model} / {row.way}", _line(results, row)) for row in results.rows()]
        card(
            headline(results),
            [
                *rows,
                *_quality_lines(results),
                ("report", output / "report.html"),
                ("raw samples", output / "results.json"),
            ],
            f"open {output / 'report.html'}",
        )
    over = results.failed_gates() + (
        [f"{run.model} on {run.way} failed: {run.failed}" for run in results.latency if run.failed] if strict else []
    )
    if over:
        raise GateFailed(
            "; ".join(over),
            where=output / "report.html",
            expected="every figure within its limit",
            hint=f"open {output / 'report.html'}",
        )


@command.command("compare")
@click.argument("before", type=click.Path(path_type=Path), metavar="A.json")
@click.argument("after", type=click.Path(path_type=Path), metavar="B.json")
@click.option("--fail-on-slower", is_flag=True, help="Exit status 3 where something became slower beyond noise.")
@json_option
def compare_command(before: Path, after: Path, fail_on_slower: bool, as_json: bool) -> None:
    """Say what changed from one results.json to another, beyond noise or not.

    Compared are the scenarios that both have: same model name, backend, precision, size, batch, steps and guidance.
    What is unlike is refused. The evidence is the rounds: fewer than 3 on a side and nothing is said.

    \b
      sdcompress bench compare before/results.json after/results.json
      sdcompress bench compare main/results.json mine/results.json --fail-on-slower
    """
    from sdcompress_bench.compare import compare, render, to_json
    from sdcompress_bench.results import read_results
    from sdcompress_engines.errors import GateFailed

    found = compare(read_results(_results_file(before)), read_results(_results_file(after)), str(before), str(after))
    click.echo(to_json(found) if as_json else render(found))
    slower = [
        f"{line.scenario}, {line.stage}: {line.change.ratio - 1:+.1%}"
        for line in found.lines
        if line.change.verdict == "slower"
    ]
    if fail_on_slower and slower:
        raise GateFailed(f"slower: {'; '.join(slower)}", where=after, expected="nothing slower beyond noise")


def _results_file(path: Path) -> Path:
    """The file itself, or the one in a report's folder."""
    return path / "results.json" if path.is_dir() else path


def suite_of(
    described: dict[str, Any],
    *,
    quick: bool = False,
    where: Path | None = None,
    tested: tuple[ModelUnderTest, ...] | None = None,
) -> tuple[Suite, dict[str, str]]:
    """The suite that settings describe on this machine, and the backends left out with the reason.

    Args:
        tested: in place of `models`, what is known of them already.

    Raises:
        UsageError: settings that cannot be, a model or file that is not there.
    """
    import torch
    from sdcompress_bench.scenario import Suite
    from sdcompress_bench.suite_file import check_suite
    from sdcompress_engines.errors import BackendMissing, UsageError

    from sdcompress.families.registry import family_of

    file = check_suite(described, where or "the options")
    gpu = torch.cuda.is_available()
    if file.device == "cuda" and not gpu:
        near = f"sdcompress bench {where.stem}-cpu, or --device cpu" if where else "--device cpu"
        raise BackendMissing("this is to be measured on an NVIDIA GPU and none is here", where=where, hint=near)
    device = ("cuda" if gpu else "cpu") if file.device == "auto" else file.device
    precision = file.precision or ("fp16" if device == "cuda" else "fp32")
    ways, skipped = _ways((file.gpu_backends if device == "cuda" else None) or file.backends, device, precision)
    models = tested or tuple(_model(entry) for entry in file.models)
    own_size = _own_size(models[0])
    guidance_scale = file.guidance_scale
    if guidance_scale is None:
        guidance_scale = family_of(_configs(models[0])["unet"]).guidance_scale
    prompts, judged = _prompts(models[0], file, quick)
    metric = Path(file.clip) if file.clip else judged.get("metric")
    real = Path(file.reference) if file.reference else judged.get("real")
    for path, what in ((metric, "--clip"), (real, "--reference")):
        if path is not None and not path.exists():
            raise UsageError(f"{what} does not exist", where=path)
    wanted = file.quality_pictures if file.quality_pictures is not None else len(prompts) if metric or real else 0
    return (
        Suite(
            models=models,
            ways=ways,
            name=file.title,
            device=device,
            sizes_px=file.size_px or (own_size,),
            batch=file.batch,
            steps=file.steps,
            guidance_scale=guidance_scale,
            prompts=prompts,
            seed=file.seed,
            rounds=file.rounds,
            samples=file.samples,
            end_to_end_samples=file.end_to_end_samples,
            stage_budget_s=file.stage_budget_s,
            scenario_timeout_s=file.scenario_timeout_s,
            pictures=file.pictures,
            quality_pictures=0 if any(m.random for m in models) else min(wanted, len(prompts)),
            timesteps=file.timesteps,
            probes=file.probes,
            sensitivity=file.sensitivity,
            metric=metric,
            styles=judged.get("styles", ()),
            real=real,
            threads=file.threads,
            gates=tuple(_gate(entry, precision) for entry in file.gates if _can_hold(entry, skipped)),
        ),
        skipped,
    )


def _ways(names: tuple[str, ...] | None, device: str, precision: str) -> tuple[tuple[Way, ...], dict[str, str]]:
    """The ways to measure, and those left out with the reason."""
    from sdcompress_bench.suite_file import read_way

    from sdcompress.backends.registry import find_backend

    gpu = device == "cuda"
    wanted = list(
        dict.fromkeys(
            read_way(name, precision)
            for name in names or (("torch", "compile", "ort", "trt") if gpu else ("torch", "ort"))
        )
    )
    skipped: dict[str, str] = {}
    for way in wanted:
        backend = find_backend(way.backend)
        if reason := backend.missing(device):
            skipped[backend.title] = reason
        elif reason := backend.lacks.get(device, {}).get(way.precision):
            skipped[str(way)] = reason
    measured = tuple(way for way in wanted if not {find_backend(way.backend).title, str(way)} & set(skipped))
    return measured, skipped


def _gate(entry: GateEntry, precision: str) -> Gate:
    from sdcompress_bench.scenario import Gate
    from sdcompress_bench.suite_file import read_way

    return Gate(
        entry.figure,
        entry.model,
        read_way(entry.backend, precision) if entry.backend else None,
        entry.at_least,
        entry.at_most,
    )


def _can_hold(entry: GateEntry, skipped: dict[str, str]) -> bool:
    """Whether a gate's backend is measured here: one on TensorRT says nothing where there is no TensorRT, and the
    report says that it was skipped.
    """
    from sdcompress_bench.scenario import BACKEND_NAMES
    from sdcompress_bench.suite_file import read_way

    return entry.backend is None or BACKEND_NAMES[read_way(entry.backend, "fp32").backend] not in skipped


def _numbers(text: str, name: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(
            f"{text!r} is no list of whole numbers such as 1,4", param_hint="--size" if name == "size_px" else "--batch"
        ) from error


def _model(entry: ModelEntry) -> ModelUnderTest:
    """A model that is there, with its hash, and a training folder's `metrics.jsonl`; or one with random weights, which
    is made later.
    """
    from sdcompress_bench.models import random_folder
    from sdcompress_bench.scenario import ModelUnderTest, Random

    from sdcompress.models.locate import BUILT_IN, display_name, resolve, sha256_of

    if entry.random:
        random = Random(entry.random, entry.plan)
        return ModelUnderTest(
            entry.name or f"{entry.random} {entry.plan or ''}".strip(), random_folder(random), random=random
        )
    folder = resolve(str(entry.path))
    metrics = folder.parent / "metrics.jsonl"
    name = entry.name or (str(entry.path) if entry.path in BUILT_IN else display_name(folder))
    return ModelUnderTest(name, folder, sha256=sha256_of(folder), metrics=metrics if metrics.is_file() else None)


def _configs(model: ModelUnderTest) -> dict[str, Any]:
    """The configs of a model's components, of one with random weights before it is made."""
    from sdcompress.models.locate import component_config, unet_config
    from sdcompress.models.random import family_configs

    if model.random:
        return family_configs(model.random.family, model.random.plan)
    return {"unet": unet_config(model.path), "vae": component_config(model.path, "vae")}


def _own_size(model: ModelUnderTest) -> int:
    """Side in pixels that the model was made for: its UNet's sample_size × its VAE's reduction."""
    configs = _configs(model)
    return int(configs["unet"]["sample_size"]) * 2 ** (len(configs["vae"]["block_out_channels"]) - 1)


def _prompts(teacher: ModelUnderTest, file: SuiteFile, quick: bool) -> tuple[tuple[Prompt, ...], dict[str, Any]]:
    """The prompts, and what judges their pictures: nano brings its metric, styles and real pictures."""
    from sdcompress_bench.prompts import read_prompts
    from sdcompress_bench.scenario import Prompt

    from sdcompress.data import nano_prompts
    from sdcompress.models import nano
    from sdcompress.models.locate import resolve

    if file.prompts is not None:
        return tuple(read_prompts(file.prompts)), {}
    if teacher.random or resolve(teacher.path) != nano.teacher_folder():
        return tuple(Prompt(caption) for caption in _PROMPTS), {}
    count = max(
        file.quality_pictures if file.quality_pictures is not None else QUICK_PROMPTS if quick else NANO_PROMPTS,
        file.pictures,
        1,
    )
    prompts = tuple(
        Prompt(p.caption, p.style) for p in nano_prompts.prompts("heldout", min(count, NANO_PROMPTS), file.seed)
    )
    return prompts, {
        "metric": nano.metric_folder(),
        "styles": tuple(nano.styles().items()),
        "real": nano.shards("heldout")[0],
    }


def _free_folder(name: str) -> Path:
    """`bench-name` here, or with the first number that is free."""
    from sdcompress_bench.scenario import slug

    stem, number = f"bench-{slug(name)}", 1
    while (folder := Path(stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return folder


def _list(names: list[str]) -> None:
    from sdcompress_bench.suite_file import read_suite, suite_path

    for name in names:
        path = suite_path(name)
        if path is not None:
            click.echo(f"{name:<10} {read_suite(path).title}")


def _dry_run(suite: Suite, skipped: dict[str, str], as_json: bool) -> None:
    """What would run: a line a scenario, with the memory its weights and activations need."""
    import json

    from sdcompress_bench.work import count_pipeline

    rows: list[dict[str, Any]] = []
    scenarios = list(suite.scenarios())
    counted: dict[tuple[Any, ...], Any] = {}
    with ConsoleReporter().task("counting", len(scenarios)) as advance:
        for scenario in scenarios:
            case = scenario.model.name, scenario.size_px, scenario.batch, scenario.way.precision
            if case not in counted:
                model: Any = _configs(scenario.model) if scenario.model.random else scenario.model.path
                counted[case] = count_pipeline(
                    model, scenario.size_px, scenario.batch, scenario.guidance_scale > 1, scenario.way.precision
                )
            advance(note=scenario.model.name)
    for scenario in scenarios:
        work = counted[scenario.model.name, scenario.size_px, scenario.batch, scenario.way.precision]
        held = sum(part.held_bytes for part in work.values()) + max(part.peak_bytes for part in work.values())
        rows.append(
            {
                "scenario": scenario.key,
                "model": scenario.model.name,
                "backend": scenario.way.backend,
                "precision": scenario.way.precision,
                "size_px": scenario.size_px,
                "batch": scenario.batch,
                "memory_bytes": held,
                "unet_macs": work["unet"].macs,
            }
        )
    if as_json:
        click.echo(json.dumps({"scenarios": rows, "rounds": suite.rounds, "skipped": skipped}, indent=1))
        return
    for row, scenario in zip(rows, scenarios, strict=True):
        click.echo(
            f"{scenario.model.name:<12} {scenario.way!s:<22} {scenario.size_px:>5} px  batch {scenario.batch:<3}"
            f" {mib(row['memory_bytes']):>14}   UNet step {row['unet_macs'] / 1e9:,.1f} GMACs"
        )
    for name, reason in skipped.items():
        click.echo(f"left out: {name}, {reason}")
    click.echo(
        f"{len(rows)} scenarios × {suite.rounds} rounds, {suite.device}; memory is weights and activations at their"
        " peak, without the runtime's own (0.5 to 1 GiB)"
    )


def _line(results: Results, row: Row) -> str:
    several = len({(r.size_px, r.batch) for r in results.rows()}) > 1
    head = f"{row.size_px} px, batch {row.batch}: " if several else ""
    if row.unet_step is None or row.images_per_s is None:
        return f"{head}failed: {row.failed}"
    speedup = f", {row.speedup:.2f}× the teacher in PyTorch" if row.speedup else ""
    noisy = ", noisy" if row.unet_step.noisy else ""
    return (
        f"{head}UNet step {row.unet_step.median:,.1f} ms, {row.images_per_s:.3g} pictures/s{speedup},"
        f" {row.peak_mib:,.0f} MiB{noisy}"
    )


def _quality_lines(results: Results) -> list[tuple[str, str]]:
    from sdcompress_bench.results import point

    names = {"fid": "FID {:.1f}", "kid": "KID {:.4f}", "lpips": "LPIPS {:.3f}"}
    return [
        (
            f"{name} to {results.teacher}",
            ", ".join(form.format(point(figures[key])) for key, form in names.items() if key in figures),
        )
        for name, figures in results.students.items()
        if names.keys() & figures.keys()
    ]


def again() -> str:
    """The command as it was typed."""
    import shlex
    import sys

    return shlex.join(["sdcompress", *sys.argv[1:]])
