"""`sdcompress doctor`"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from sdcompress.cli._console import ConsoleReporter, card, json_option, mib

if TYPE_CHECKING:
    from sdcompress.backends.doctor import BackendResult, Diagnosis


Line = tuple[str, str, str, str, "str | None"]
"""Of a table: mark, word, name, text, and what to type."""


@click.command()
@click.option(
    "--model",
    default="nano",
    show_default=True,
    metavar="MODEL",
    help="Prove the backends on this model, at its own size.",
)
@click.option(
    "--backend", "backends", multiple=True, metavar="NAME", help="Prove only this one, beside torch; repeat for more."
)
@click.option("--full", is_flag=True, help="Compile all of nano's UNet, not a small one like it.")
@click.option(
    "--minutes",
    type=click.FloatRange(0.2),
    default=None,
    metavar="N",
    help="Stop after this time.  [default: 2; with --full or --model, 60]",
)
@json_option
def command(model: str, backends: tuple[str, ...], full: bool, minutes: float | None, as_json: bool) -> None:
    """Check this installation: packages, card, cache, and whether each backend runs and agrees with torch.

    \b
      sdcompress doctor
      sdcompress doctor --model ./realistic-vision-v4.safetensors --backend ort --backend trt

    Each backend runs a UNet in a process of its own. It works if its answer equals that of torch in IEEE fp32 within
    the limit that `export` holds graphs to. For what does not work there is one reason and one command to type. A
    backend that this machine cannot have does not count.

    The exit code is 0 if every backend that this machine can have works, else 1. The text and the JSON hold no user
    name, host name or path, so they can be pasted into an issue.

    The backends are torch, compile, aot (AOTInductor), onnxruntime (ort), tensorrt (trt) and tensorrt-rtx. A model of
    SD1.5's size takes minutes for each on a CPU.
    """
    import json

    examine = _load_examine()
    found = examine(model, backends, full=full, minutes=minutes, report=ConsoleReporter())
    if as_json:
        click.echo(json.dumps(found.to_json(), allow_nan=False))
    else:
        show(found)
    if not found.healthy:
        raise click.exceptions.Exit(1)


def _load_examine() -> Callable[..., Diagnosis]:
    """Returns `examine`.

    Raises:
        BackendMissing: torch, or what this package itself needs, cannot be imported.
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


def show(found: Diagnosis) -> None:
    """Print a diagnosis: the machine, the checks, the backends, and last the verdict with what to type next."""
    machine = found.machine
    packages = ", ".join(f"{name} {version}" for name, version in found.packages.items())
    seen = "; ".join(machine["cards"]) or "none that torch sees"
    rows = [
        ("system", f"{machine['system']}, Python {machine['python']}"),
        ("processor", f"{machine['processor']}, {machine['threads']} threads, {machine['memory_gib']:g} GiB"),
        ("card", f"{seen}, driver {machine['driver']}" if machine["driver"] else seen),
        ("packages", packages),
    ]
    card("this machine", rows)
    lines = [
        (_mark(check.ok), "ok" if check.ok else "fails", check.name, check.text, check.command)
        for check in found.checks
    ]
    _table("installation", lines)
    _table(f"backends, on {found.model}", [_line(result) for result in found.backends])
    click.echo()
    if any(result.subject == "small" for result in found.backends):
        click.echo(
            f"small UNet: two levels with {found.model}'s operators; sdcompress doctor --full compiles all of it"
        )
    if machine["load"] > machine["cores"]:
        busy = f"load {machine['load']:g} on {machine['cores']} cores"
        click.echo(f"busy: other programs ran before this one ({busy}), so times are longer than they need be")
    click.echo(f"{verdict(found)} ({found.seconds:.0f} s)\nnext: {next_command(found)}")


def verdict(found: Diagnosis) -> str:
    """Returns the answer in a sentence."""
    usable = [result for result in found.backends if result.status != "not here"]
    working = [result for result in usable if result.healthy]
    faults = sum(not check.ok for check in found.checks)
    if found.healthy:
        return f"all {len(usable)} backends work" if len(usable) > 1 else f"{usable[0].backend} works"
    broken = f"; {faults} {'fault' if faults == 1 else 'faults'} of the installation" if faults else ""
    return f"{len(working)} of {len(usable)} backends work that this machine can have{broken}"


def next_command(found: Diagnosis) -> str:
    """Returns what to type next: the first thing that mends something, else a picture on the fastest backend."""
    mending = [
        command for command in (*(c.command for c in found.checks), *(r.command for r in found.backends)) if command
    ]
    if mending:
        return mending[0]
    model = found.model if found.model in ("nano", "nano-tiny") else "MODEL"
    return f'sdcompress generate {model} "a flat icon of a cat" --backend auto'


def _line(result: BackendResult) -> Line:
    signs = {"works": True, "builds": True, "fails": False, "unfinished": False, "not here": None}
    mark = _mark(signs[result.status])
    name = result.backend if (result.backend, result.device) != ("onnxruntime", "cuda") else "onnxruntime on CUDA"
    return mark, result.status, name, _text(result), result.command


def _text(result: BackendResult) -> str:
    if result.status == "builds":
        run = f"to run it takes a card of compute capability {result.cards}"
        return (
            f"{result.precision}  an engine of {mib(2**20 * (result.built_mib or 0))} in {result.built_s:.1f} s; {run}"
        )
    parts = [result.precision] if result.status != "not here" else []
    if result.unet_step_ms is not None:
        subject = "a step of the small UNet" if result.subject == "small" else "a UNet step"
        speed = "" if result.backend == "torch" else f", {result.speedup:.2f} times as fast as torch"
        parts.append(f"{result.unet_step_ms:,.1f} ms {subject}{speed}")
    if result.relative_l2 is not None and result.limit is not None and result.reason is None:
        parts.append(f"relative L2 {result.relative_l2:.1e}, limit {result.limit:.1e}")
    return "  ".join([*parts, *([result.reason] if result.reason else [])])


def _mark(ok: bool | None) -> str:
    """A sign, in ASCII where the terminal's encoding has no other."""
    signs = {True: "✓", False: "✗", None: "–"}
    try:
        "".join(signs.values()).encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        signs = {True: "+", False: "x", None: "-"}
    return signs[ok]


def _table(title: str, lines: Sequence[Line]) -> None:
    """Mark, word, name and text a line, and below a fault what to type."""
    words, names = max(len(line[1]) for line in lines), max(len(line[2]) for line in lines)
    click.echo(f"\n{title}")
    colors = {"✓": "green", "+": "green", "✗": "red", "x": "red"}
    for mark, word, name, text, mending in lines:
        click.echo(f"{click.style(mark, fg=colors.get(mark))} {word:<{words}}  {name:<{names}}  {text}")
        if mending:
            click.echo(f"{'':<{words + names + 6}}type: {mending}")
