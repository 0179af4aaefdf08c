"""`sdcompress bench`: how fast a model is on each backend, how close to torch, and how good its pictures are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from sdcompress_engines.command import command_line

from sdcompress.cli._console import (
    ConsoleReporter,
    card,
    echo,
    force_option,
    json_option,
    mib,
    print_json,
    typed_command,
)
from sdcompress.cli._trust import allow_all, trust_option
from sdcompress.cli._types import (
    BATCH,
    GUIDANCE,
    NAME,
    SEED,
    SIZE_PX,
    STEPS,
    THREADS,
    FilePath,
    Several,
    Whole,
)
from sdcompress.support.bounds import MOST_PICTURES

if TYPE_CHECKING:
    from sdcompress_bench.results import Results, Row
    from sdcompress_bench.scenario import Suite


class _DefaultCommandGroup(click.Group):
    """Reads `bench X` as `bench run X`, unless X is a command of the group."""

    def with_command(self, args: list[str]) -> list[str]:
        """Returns the arguments with the command's name before them."""
        return args if args and args[0] in self.commands else ["run", *args]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self.with_command(args))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return ("" if name == "run" else name), command, rest  # so usage lines read `bench`, as people type it


@click.group("bench", cls=_DefaultCommandGroup)
def command() -> None:
    """Measure latency and fidelity, and write a report."""


@command.command("run")
@click.argument("targets", type=NAME, metavar="SUITE|MODEL...", nargs=-1)
@click.option(
    "-o",
    "--output",
    type=FilePath(),
    metavar="DIR",
    help="Folder to write to.  [default: bench-NAME in this folder, or the next free bench-NAME-2]",
)
@click.option(
    "--backend",
    "backends",
    type=Several(NAME, "backends, such as torch,ort"),
    metavar="NAMES",
    help=(
        "One or more of torch, compile, aot, onnxruntime (ort), tensorrt (trt), with commas; `aot:bf16` adds a"
        " precision.  [default: torch,ort, and compile,trt where there is a GPU]"
    ),
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="For backends that name none.  [default: fp16 on a GPU, fp32 on a CPU]",
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to run.  [default: cuda if there is a GPU]"
)
@click.option(
    "--size",
    "size_px",
    type=Several(SIZE_PX, "whole numbers, such as 256,512"),
    metavar="PX[,PX]",
    help="Side of the pictures.  [default: the size the teacher was trained on]",
)
@click.option(
    "--batch",
    type=Several(BATCH, "whole numbers, such as 1,4"),
    metavar="N[,N]",
    help="Pictures in one batch; each size is a row.  [default: 1]",
)
@click.option(
    "--steps",
    type=STEPS,
    help="Sampling steps of every model.  [default: 25, or those that a model was trained for]",
)
@click.option(
    "--guidance",
    "guidance_scale",
    type=GUIDANCE,
    help=(
        "Guidance scale of every model; at 1 or less the UNet runs once a step, not twice."
        "  [default: 7.5; nano and its students 2.5; none for a model that was trained to draw without]"
    ),
)
@click.option(
    "--prompts",
    type=NAME,
    metavar="FILE",
    help="Captions: txt (one a line), csv, tsv (PartiPrompts), jsonl, or COCO's json.",
)
@click.option(
    "--prompt-count",
    "quality_pictures",
    type=Whole(0, MOST_PICTURES),
    metavar="N",
    help="Number of pictures for the quality figures.  [default: all of FILE; 200 held-out prompts for nano]",
)
@click.option(
    "--reference", type=NAME, metavar="FOLDER", help="Real pictures; FID and KID are measured against them too."
)
@click.option(
    "--clip",
    type=NAME,
    metavar="PATH",
    help="A CLIP (transformers folder) that judges the pictures.  [default: nano-CLIP for nano]",
)
@click.option(
    "--decoder",
    type=NAME,
    metavar="DIR",
    help="A small decoder, from `distill-decoder`, or `nano`: the last MODEL is also measured with it for its VAE.",
)
@click.option("--seed", type=SEED, help="Of the first picture; the next has the next seed.  [default: 0]")
@click.option(
    "--rounds",
    type=Whole(1, 1000),
    help="How often each case is started afresh; 5 rounds show whether a change of 5% is noise.  [default: 5]",
)
@click.option("--threads", type=THREADS, metavar="N", help="CPU threads.  [default: the runtime's own choice]")
@click.option("--quick", is_flag=True, help="One round, few samples, few pictures: a first look, not for publication.")
@click.option(
    "--strict", is_flag=True, help="A backend that is not installed is an error, and so is a case that fails."
)
@trust_option
@click.option("--dry-run", is_flag=True, help="List what would run and the memory it needs, and measure nothing.")
@click.option("--list", "list_suites", is_flag=True, help="List the built-in suites.")
@force_option
@json_option
def run_command(
    targets: tuple[str, ...],
    output: Path | None,
    backends: tuple[str, ...] | None,
    quick: bool,
    strict: bool,
    trust: bool,
    dry_run: bool,
    list_suites: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure latency, memory and quality on every backend, and write a report.

    Give the name of a suite or its YAML file, or MODELs. The first MODEL is the teacher: the others are compared with
    it, and its speed in PyTorch is 1.0. `NAME=MODEL` names a model in the report. Each case runs in a process of its
    own, one at a time. If a bench is interrupted, the same command continues it.

    \b
      sdcompress bench nano                                                   six minutes on two cores
      sdcompress bench TEACHER small=student/pipeline --backend torch,compile,ort,trt --size 512 --batch 1,4
      sdcompress bench TEACHER student/pipeline --prompts PartiPrompts.tsv --clip ./clip-vit-large-patch14
      sdcompress bench sd15 --dry-run                                         what would run, and the memory it needs
      sdcompress bench compare before/results.json after/results.json         what changed, beyond noise or not
    """
    from sdcompress_bench.suite_file import suite_path
    from sdcompress_engines.output_folders import check_free

    if list_suites:
        return _list_suites(as_json)
    if not targets:
        raise click.UsageError(
            "a suite or a model is missing; `sdcompress bench --list` names the suites", click.get_current_context()
        )
    if output is not None:
        check_free(output, force)
    options = {name: value for name, value in options.items() if value is not None}
    if backends is not None:
        options |= {"backends": backends, "gpu_backends": None}
    path = suite_path(targets[0]) if len(targets) == 1 else None
    suite, skipped = _read_suite(path, targets, options, quick, strict)
    if dry_run:
        return _print_dry_run(suite, skipped, as_json)
    if trust:
        from sdcompress.models.locate import local_path

        paths = [local_path(model.path) for model in suite.models if model.random is None]
        allow_all([*paths, *(model.engine for model in suite.models)])
    output = output or _free_folder(path.stem if path else suite.models[-1].name)
    _run(suite, skipped, output, files=[] if path is None else [path], force=force, strict=strict, as_json=as_json)


def _read_suite(
    path: Path | None, models: tuple[str, ...], options: dict[str, Any], quick: bool, strict: bool
) -> tuple[Suite, dict[str, str]]:
    """Returns the suite in a file, or of these models, changed by the options; and the backends that are left out."""
    from sdcompress_bench.build_suite import QUICK, build_suite
    from sdcompress_bench.suite_file import read_suite
    from sdcompress_engines.errors import BackendMissing

    settings = {"models": list(models)} if path is None else read_suite(path).model_dump(exclude_unset=True)
    suite, skipped = build_suite(settings | (QUICK if quick else {}) | options, quick=quick, where=path)
    if strict and skipped:
        raise BackendMissing(
            "; ".join(f"{name}: {reason}" for name, reason in skipped.items()),
            hint="install the missing backends, name others with --backend, or leave out --strict",
        )
    return suite, skipped


def _run(
    suite: Suite,
    skipped: dict[str, str],
    output: Path,
    *,
    files: list[Path],
    force: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Measure a suite, print the result, and fail where a gate or, with `strict`, a case failed."""
    import json

    from sdcompress_bench.suite import run_suite
    from sdcompress_engines.errors import GateFailed

    command = typed_command()
    results = run_suite(suite, output, ConsoleReporter(), force, skipped=skipped, command=command, files=files)
    if as_json:
        print_json(json.loads((output / "results.json").read_bytes()), indent=1)
    else:
        _print_card(results, output)
    failures = results.failed_gates()
    if strict:
        failures += [f"{run.model} on {run.setup} failed: {run.failed}" for run in results.latency if run.failed]
    if failures:
        raise GateFailed(
            "; ".join(failures),
            where=output / "report.html",
            expected="every figure within its limit",
            hint=command_line(["open", str(output / "report.html")]),
        )


@command.command("compare")
@click.argument("before", type=FilePath(), metavar="BEFORE")
@click.argument("after", type=FilePath(), metavar="AFTER")
@click.option("--fail-on-slower", is_flag=True, help="Exit code 3 if something became slower beyond noise.")
@json_option
def compare_command(before: Path, after: Path, fail_on_slower: bool, as_json: bool) -> None:
    """Show what changed from one results.json to another, and whether the change is beyond noise.

    BEFORE and AFTER are results.json files, or the folders that hold them. The scenarios that are in both files are
    compared: those with the same model name, backend, precision, size and batch. Files that draw a model in other steps
    or with another guidance are refused. The evidence is the rounds: with fewer than 3 on a side there is no verdict.

    \b
      sdcompress bench compare before/results.json after/results.json
      sdcompress bench compare main/results.json mine/results.json --fail-on-slower
    """
    from sdcompress_bench.compare import compare, render, to_json
    from sdcompress_bench.results import read_results
    from sdcompress_engines.errors import GateFailed

    before_file, after_file = (path / "results.json" if path.is_dir() else path for path in (before, after))
    comparison = compare(read_results(before_file), read_results(after_file), str(before), str(after))
    echo(to_json(comparison) if as_json else render(comparison))
    slower = [
        f"{line.scenario}, {line.stage}: {line.change.ratio - 1:+.1%}"
        for line in comparison.lines
        if line.change.verdict == "slower"
    ]
    if fail_on_slower and slower:
        raise GateFailed(f"slower: {'; '.join(slower)}", where=after, expected="nothing slower beyond noise")


def _free_folder(name: str) -> Path:
    """Returns `bench-name` in this folder, or with the first number that is free."""
    from sdcompress_bench.scenario import slug

    stem, number = f"bench-{slug(name)}", 1
    while (folder := Path(stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return folder


def _list_suites(as_json: bool) -> None:
    from sdcompress_bench.suite_file import read_suite, suite_names, suite_path

    titles = {name: read_suite(path).title for name in suite_names() if (path := suite_path(name)) is not None}
    if as_json:
        print_json([{"name": name, "title": title} for name, title in titles.items()])
        return
    width = max(map(len, titles))
    for name, title in titles.items():
        echo(f"{name:<{width}}  {title}")


def _print_dry_run(suite: Suite, skipped: dict[str, str], as_json: bool) -> None:
    """Print what would run: a line for each scenario, with the memory for its weights and activations."""
    from sdcompress_bench.dry_run import list_scenarios

    rows = list_scenarios(suite, ConsoleReporter())
    if as_json:
        print_json({"scenarios": rows, "rounds": suite.rounds, "skipped": skipped}, indent=1)
        return
    width = max(len(model.name) for model in suite.models)
    for row, scenario in zip(rows, suite.scenarios(), strict=True):
        echo(
            f"{scenario.model.name:<{width}}  {scenario.setup!s:<22} {scenario.size_px:>5} px"
            f"  batch {scenario.batch:<3} {mib(row['memory_bytes']):>14}   {scenario.model.sampling},"
            f" {row['unet_macs'] / 1e9:,.1f} GMACs a UNet step"
        )
    for name, reason in skipped.items():
        echo(f"left out: {name}, {reason}")
    echo(
        f"{len(rows)} scenarios × {suite.rounds} rounds, {suite.device}; memory is weights and activations at their"
        " peak, without the runtime's own (0.5 to 1 GiB)"
    )


def _print_card(results: Results, output: Path) -> None:
    from sdcompress_bench.report import headline

    rows: list[tuple[str, object]] = [
        (f"{row.model} / {row.setup}", _speed_text(results, row)) for row in results.rows()
    ]
    rows += _quality_rows(results)
    rows += [("report", output / "report.html"), ("raw samples", output / "results.json")]
    card(headline(results), rows, command_line(["open", str(output / "report.html")]))


def _speed_text(results: Results, row: Row) -> str:
    from sdcompress_bench.report import format_seconds

    several = len({(each.size_px, each.batch) for each in results.rows()}) > 1
    head = f"{row.size_px} px, batch {row.batch}: " if several else ""
    if row.unet_step is None or row.images_per_s is None:
        return f"{head}failed: {row.failed}"
    speedup = f", {row.speedup:.2f}× the teacher in PyTorch" if row.speedup else ""
    noisy = ", noisy" if row.unet_step.noisy else ""
    swap = "" if row.lora_swap_ms is None else f", LoRAs in and out {row.lora_swap_ms:,.1f} ms"
    return (
        f"{head}{row.sampling}: {format_seconds(1 / row.images_per_s)} s a picture, {row.images_per_s:.3g} pictures/s"
        f"{speedup}; one UNet step {row.unet_step.median:,.1f} ms, {row.peak_mib:,.0f} MiB{noisy}{swap}"
    )


def _quality_rows(results: Results) -> list[tuple[str, str]]:
    from sdcompress_bench.results import point

    formats = {"fid": "FID {:.1f}", "kid": "KID {:.4f}", "lpips": "LPIPS {:.3f}"}
    return [
        (
            f"{name} to {results.teacher}",
            ", ".join(text.format(point(figures[key])) for key, text in formats.items() if key in figures),
        )
        for name, figures in results.students.items()
        if formats.keys() & figures.keys()
    ]
