"""What the commands share: the closing card, common options, and the nearest known name for a mistyped one."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Container, Iterable
from typing import Any

import click
from click.core import ParameterSource
from sdcompress_engines.command import command_line
from sdcompress_engines.errors import escape_controls

from sdcompress.cli._types import GUIDANCE, STEPS, FilePath
from sdcompress.support.console import ConsoleReporter, is_first_process

__all__ = [
    "ConsoleReporter",
    "card",
    "echo",
    "force_option",
    "given_parameters",
    "json_option",
    "mib",
    "millions",
    "output_option",
    "print_json",
    "sampling_options",
    "suggest",
    "typed_command",
]


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` where a known name is near, else a list of the known names."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def typed_command() -> str:
    """Returns this process's command line, as a shell takes it."""
    return command_line(["sdcompress", *sys.argv[1:]])


def given_parameters(names: Container[str]) -> list[click.Parameter]:
    """Returns the parameters of the current command that the user typed, in the order of its help.

    Args:
        names: only those among these argument names.
    """
    context = click.get_current_context()
    return [
        parameter
        for parameter in context.command.params
        if parameter.name in names and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]


def echo(text: str = "", *, newline: bool = True) -> None:
    """Print lines on stdout. Control characters are escaped: names and captions may come from anywhere.

    Args:
        text: one line or several.
        newline: end the last line.
    """
    click.echo(re.sub(r"[^\n\t]+", lambda part: escape_controls(part[0]), text), nl=newline)


def print_json(value: Any, indent: int | None = None) -> None:
    """Print a value as JSON on stdout, in ASCII: every encoding of a pipe holds it. NaN and infinity become null."""
    from sdcompress_engines.json_files import format_json

    click.echo(format_json(value, indent))


def card(title: str, rows: Iterable[tuple[str, object]], next_command: str | None = None) -> None:
    """Print the closing card of a stage on stdout: what was made, where, and what to type next.

    Args:
        title: the first line.
        rows: name and value of each line.
        next_command: the last line, or None.
    """
    if not is_first_process():
        return
    rows = [(key, escape_controls(str(value))) for key, value in rows]
    width = max((len(key) for key, _ in rows), default=0)
    lines = [f"{key:<{width}}  {value}" for key, value in rows]
    rule = "─" * min(100, max(len(line) for line in [title, *lines]))
    echo("\n".join(["", title, rule, *lines]))
    if next_command:
        echo(f"{rule}\nnext: {next_command}")


def output_option(help: str = "Folder to write to; must not exist or be empty.") -> Callable[[Any], Any]:
    """Returns the decorator for `-o/--output DIR`, which is required."""
    return click.option("-o", "--output", type=FilePath(), required=True, metavar="DIR", help=help)


def force_option(function: Any) -> Any:
    """Add `--force`, which replaces an earlier output."""
    return click.option(
        "--force", is_flag=True, help="Replace the output folder, if sdcompress wrote all that is in it."
    )(function)


def sampling_options(function: Any) -> Any:
    """Add `--steps` and `--guidance`; each is None where it is not given, which is the model's own."""
    guidance_help = (
        "Scale of classifier-free guidance; 1 turns it off.  [default: 7.5; nano and its students 2.5; few-step models"
        " 1]"
    )
    steps_help = "Denoising steps.  [default: 25; those a few-step model was trained for]"
    function = click.option("--guidance", type=GUIDANCE, default=None, help=guidance_help)(function)
    return click.option("--steps", type=STEPS, default=None, help=steps_help)(function)


def json_option(function: Any) -> Any:
    """Add `--json`, which prints the result as JSON on stdout."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(function)


def mib(size_bytes: float) -> str:
    """Returns a size in MiB, as in `1,024.0 MiB`."""
    return f"{size_bytes / 2**20:,.1f} MiB"


def millions(count: float) -> str:
    """Returns a count in millions, as in `859.52 M`."""
    return f"{count / 1e6:,.2f} M"
