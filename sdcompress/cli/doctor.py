"""`sdcompress doctor`: what works on this machine, and how to fix the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from sdcompress.cli._console import ConsoleReporter, card, echo, json_option, mib, print_json
from sdcompress.cli._types import MINUTES, NAME

if TYPE_CHECKING:
    from sdcompress.backends.diagnosis import BackendResult, Diagnosis


Line = tuple[str, str, str, str, "str | None"]
"""A line of a table: mark, word, name, text, and the command that fixes a fault."""


@click.command()
@click.option(
    "--model",
    type=NAME,
    default="nano",
    show_default=True,
    metavar="MODEL",
    help="Test the backends on this model, at its own size.",
)
@click.option(
    "--backend",
    "backends",
    type=NAME,
    multiple=True,
    metavar="NAME",
    help="Test only this one, beside torch; repeat for more.",
)
@click.option("--full", is_flag=True, help="Compile all of nano's UNet, not a small UNet with the same operators.")
@click.option(
    "--minutes",
    type=MINUTES,
    default=None,
    metavar="N",
    help="Stop after this time.  [default: 2; with --full or --model, 60]",
)
@json_option
def command(model: str, backends: tuple[str, ...], full: bool, minutes: float | None, as_json: bool) -> None:
    """Check this installation: packages, GPU, cache, and whether each backend runs and agrees with torch.

    \b
      sdcompress doctor
      sdcompress doctor --model ./realistic-vision-v4.safetensors --backend ort --backend trt

    Each backend runs a UNet in a process of its own. It works if its output equals that of torch in IEEE fp32, within
    the limit that `export` uses for graphs. For each fault you get the reason and the command that fixes it. A backend
    that cannot run on this machine does not count.

    The exit code is 0 if every backend that can run on this machine works, else 1. The text and the JSON hold no user
    name, host name or path, so you can paste them into an issue.

    The backends are torch, compile, aot (AOTInductor), onnxruntime (ort), tensorrt (trt) and tensorrt-rtx. A model of
    SD1.5's size takes minutes for each on a CPU.
    """
    examine = _load_examine()
    diagnosis = examine(model, backends, full=full, minutes=minutes, report=ConsoleReporter())
    if as_json:
        print_json(diagnosis.to_json())
    else:
        print_diagnosis(diagnosis)
    if not diagnosis.healthy:
        raise click.exceptions.Exit(1)


def _load_examine() -> Callable[..., Diagnosis]:
    """Returns `sdcompress.backends.doctor.examine`.

    Raises:
        BackendMissing: torch, or another package that sdcompress itself needs, cannot be imported.
    """
    from sdcompress_engines.errors import BackendMissing

    from sdcompress.backends.anonymous import anonymize

    try:
        from sdcompress.backends.doctor import examine
    except (ImportError, OSError) as error:
        package = (getattr(error, "name", None) or "torch").partition(".")[0]
        what = f"{package} cannot be imported ({anonymize(str(error).splitlines()[0])})"
        raise BackendMissing(what, hint=f"pip install --force-reinstall {package}") from error
    return examine


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """Print a diagnosis: the machine, the checks, the backends, and last the verdict and the command to type next."""
    machine = diagnosis.machine
    packages = ", ".join(f"{name} {version}" for name, version in diagnosis.packages.items())
    seen = "; ".join(machine["cards"]) or "none that torch sees"
    rows = [
        ("system", f"{machine['system']}, Python {machine['python']}"),
        ("processor", f"{machine['processor']}, {machine['threads']} threads, {machine['memory_gib']:g} GiB"),
        ("card", f"{seen}, driver {machine['driver']}" if machine["driver"] else seen),
        ("packages", packages),
    ]
    card("this machine", rows)
    lines = [
        (_choose_mark(check.ok), "ok" if check.ok else "fails", check.name, check.text, check.command)
        for check in diagnosis.checks
    ]
    _print_table("installation", lines)
    _print_table(f"backends, on {diagnosis.model}", [_backend_line(result) for result in diagnosis.backends])
    echo()
    if any(result.subject == "small" for result in diagnosis.backends):
        echo(f"small UNet: two levels with {diagnosis.model}'s operators; sdcompress doctor --full compiles all of it")
    if machine["load"] > machine["cores"]:
        busy = f"load {machine['load']:g} on {machine['cores']} cores"
        echo(f"busy: other programs were running ({busy}), so the times are longer than on an idle machine")
    echo(f"{verdict(diagnosis)} ({diagnosis.seconds:.0f} s)\nnext: {next_command(diagnosis)}")


def verdict(diagnosis: Diagnosis) -> str:
    """Returns the result in one sentence."""
    usable = [result for result in diagnosis.backends if result.status != "not here"]
    working = [result for result in usable if result.healthy]
    faults = sum(not check.ok for check in diagnosis.checks)
    if diagnosis.healthy:
        return f"all {len(usable)} backends work" if len(usable) > 1 else f"{usable[0].backend} works"
    broken = f"; {faults} {'fault' if faults == 1 else 'faults'} in the installation" if faults else ""
    return f"{len(working)} of the {len(usable)} backends that can run on this machine work{broken}"


def next_command(diagnosis: Diagnosis) -> str:
    """Returns the command to type next: the first that fixes a fault, else one that draws on the fastest backend."""
    from sdcompress.models.nano import BUILT_IN

    fixes = [*(check.command for check in diagnosis.checks), *(result.command for result in diagnosis.backends)]
    if first := next(filter(None, fixes), None):
        return first
    model = diagnosis.model if diagnosis.model in BUILT_IN else "MODEL"
    return f'sdcompress generate {model} "a flat icon of a cat" --backend auto'


def _backend_line(result: BackendResult) -> Line:
    signs = {"works": True, "builds": True, "fails": False, "unfinished": False, "not here": None}
    mark = _choose_mark(signs[result.status])
    name = result.backend if (result.backend, result.device) != ("onnxruntime", "cuda") else "onnxruntime on CUDA"
    return mark, result.status, name, _backend_text(result), result.command


def _backend_text(result: BackendResult) -> str:
    if result.status == "builds":
        size = mib(2**20 * (result.built_mib or 0))
        return (
            f"{result.precision}  built an engine of {size} in {result.built_s:.1f} s;"
            f" it runs on a GPU of compute capability {result.cards}"
        )
    parts = [result.precision] if result.status != "not here" else []
    if result.unet_step_ms is not None:
        subject = "a step of the small UNet" if result.subject == "small" else "a UNet step"
        without_speed = result.backend == "torch" or result.speedup is None
        speed = "" if without_speed else f", {result.speedup:.2f} times as fast as torch"
        parts.append(f"{result.unet_step_ms:,.1f} ms {subject}{speed}")
    if result.relative_l2 is not None and result.limit is not None and result.reason is None:
        parts.append(f"relative L2 {result.relative_l2:.1e}, limit {result.limit:.1e}")
    return "  ".join([*parts, *([result.reason] if result.reason else [])])


def _choose_mark(ok: bool | None) -> str:
    return {True: "✓", False: "✗", None: "–"}[ok]


def _print_table(title: str, lines: Sequence[Line]) -> None:
    """Print a table, and below each fault the command that fixes it."""
    words, names = max(len(line[1]) for line in lines), max(len(line[2]) for line in lines)
    echo(f"\n{title}")
    colors = {"✓": "green", "✗": "red"}
    for mark, word, name, text, fix in lines:
        click.secho(mark, fg=colors.get(mark), nl=False)
        echo(f" {word:<{words}}  {name:<{names}}  {text}")
        if fix:
            echo(f"{'':<{words + names + 6}}fix: {fix}")
