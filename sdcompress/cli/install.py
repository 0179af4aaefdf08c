"""`sdcompress install`: put a plugin and engines into a WebUI or ComfyUI."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from sdcompress_engines.command import as_argument, command_line

from sdcompress.cli._console import ConsoleReporter, card, mib
from sdcompress.cli._trust import allow_all, trust_option
from sdcompress.cli._types import NAME, FilePath
from sdcompress.hosts.definitions import hosts

if TYPE_CHECKING:
    from sdcompress.hosts.host import Host
    from sdcompress.hosts.transaction import Outcome

host_argument = click.argument("host", type=click.Choice(list(hosts())))
path_argument = click.argument("path", type=FilePath())


@click.command()
@host_argument
@path_argument
@click.argument("engines", nargs=-1, type=FilePath(), metavar="[ENGINE]...")
@click.option(
    "--name", type=NAME, default=None, help="Name of the engine in the program's list.  [default: its model's]"
)
@click.option("--link", is_flag=True, help="Create links to the files instead of copies.")
@click.option(
    "--with-weights",
    "weights",
    type=NAME,
    default=None,
    metavar="MODEL",
    help=(
        "webui, forge: put the model that the engine was exported from beside it, as one file. Torch can then run what"
        " the engine cannot."
    ),
)
@trust_option
def command(
    host: str, path: Path, engines: tuple[Path, ...], name: str | None, link: bool, weights: str | None, trust: bool
) -> None:
    """Put the plugin for HOST, and each ENGINE, into the program's folder PATH.

    Files that sdcompress has not installed are never touched. Installing the same files again changes nothing.

    \b
    sdcompress install webui ~/stable-diffusion-webui engines     what `export --trt --signature webui` wrote
    sdcompress install webui ~/stable-diffusion-webui engines --with-weights student/pipeline
    sdcompress install comfyui ~/ComfyUI engines --name "portraits, small"
    sdcompress status comfyui ~/ComfyUI
    sdcompress uninstall comfyui ~/ComfyUI
    """
    from sdcompress.hosts.find import find_host
    from sdcompress.hosts.install import install

    program, root = find_host(host, path)
    if trust:
        allow_all(engines)
    outcome = install(program, root, engines, name=name, link=link, weights=weights, report=ConsoleReporter())
    is_new = outcome.written or outcome.removed
    card(
        f"{program.title} in {root}" + ("" if is_new else ": everything was there already"),
        [
            *outcome_rows(program, root, outcome),
            *((str(number), step) for number, step in enumerate(program.steps, 1)),
        ],
        f"sdcompress status {host} {command_line([as_argument(path)])}",
    )


def outcome_rows(host: Host, root: Path, outcome: Outcome) -> list[tuple[str, str]]:
    """Returns (label, text) rows: one for the plugin, one for each engine, then kept files and notes.

    Args:
        host: the program.
        root: its folder.
        outcome: of an install or uninstall.
    """
    from sdcompress.hosts.engine_folder import engine_of

    groups = {"written": outcome.written, "removed": outcome.removed, "there already": outcome.unchanged}
    owners = {engine_of(host, path) for paths in groups.values() for path in paths}
    rows = []
    for name in (None, *sorted(name for name in owners if name is not None)):
        counts = []
        for what, paths in groups.items():
            own = [path for path in paths if engine_of(host, path) == name]
            size = f" ({mib(sum((root / path).lstat().st_size for path in own))})" if what == "written" else ""
            if own:
                counts.append(f"{len(own)} {'file' if len(own) == 1 else 'files'} {what}{size}")
        place = root / (host.extension if name is None else f"{host.models}/{name}")
        if counts:
            rows.append(("plugin" if name is None else "engine", f"{place}: {', '.join(counts)}"))
    return [
        *rows,
        *(("kept", f"{root / path}: {reason}") for path, reason in outcome.kept.items()),
        *(("note", note) for note in outcome.notes),
    ]
