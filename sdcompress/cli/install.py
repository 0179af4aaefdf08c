"""`sdcompress install`: a plugin and engines into a WebUI or ComfyUI."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sdcompress.cli._console import ConsoleReporter, card, mib
from sdcompress.hosts.find import hosts

if TYPE_CHECKING:
    from sdcompress.hosts.host import Host
    from sdcompress.hosts.transaction import Done

host_argument = click.argument("host", type=click.Choice(list(hosts())))
path_argument = click.argument("path", type=click.Path(path_type=Path))


@click.command()
@host_argument
@path_argument
@click.argument("engines", nargs=-1, type=click.Path(path_type=Path), metavar="[ENGINE]...")
@click.option("--name", default=None, help="Of the engine in the program's list.  [default: its model's]")
@click.option("--link", is_flag=True, help="Links to the files where they are, instead of copies.")
@click.option(
    "--with-weights",
    "weights",
    default=None,
    metavar="MODEL",
    help=(
        "webui, forge: put the model the engine was made from beside it, as one file; what the engine cannot run is"
        " then run in torch."
    ),
)
def command(
    host: str, path: Path, engines: tuple[Path, ...], name: str | None, link: bool, weights: str | None
) -> None:
    """Put the plugin for HOST, and each ENGINE, into the program's folder PATH.

    What is there and not ours is never touched; doing it twice changes nothing.

    \b
    sdcompress install webui ~/stable-diffusion-webui engines     what `export --trt --signature webui` wrote
    sdcompress install webui ~/stable-diffusion-webui engines --with-weights student/pipeline
    sdcompress install comfyui ~/ComfyUI engines --name "portraits, small"
    sdcompress status comfyui ~/ComfyUI
    sdcompress uninstall comfyui ~/ComfyUI
    """
    from sdcompress.hosts.find import find_host
    from sdcompress.hosts.install import install

    found, root = find_host(host, path)
    done = install(found, root, engines, name=name, link=link, weights=weights, report=ConsoleReporter())
    title = f"{found.title} in {root}" + ("" if done.written or done.removed else ": all of it was there already")
    card(
        title,
        [*rows_of(found, root, done), *((str(number), step) for number, step in enumerate(found.steps, 1))],
        f"sdcompress status {host} {_typed(path)}",
    )


def rows_of(host: Host, root: Path, done: Done) -> list[tuple[str, str]]:
    """What was done, a row for the plugin and one an engine, and what to know of it."""
    from sdcompress.hosts.engine_folder import engine_of

    rows = []
    for label, name in [
        ("plugin", None),
        *sorted(
            ("engine", name)
            for name in {engine_of(host, path) for path in (*done.written, *done.removed, *done.unchanged)} - {None}
        ),
    ]:
        groups = {
            what: [path for path in paths if engine_of(host, path) == name]
            for what, paths in (("written", done.written), ("removed", done.removed), ("there already", done.unchanged))
        }
        place = root / (host.extension if name is None else f"{host.models}/{name}")
        size = sum((root / path).lstat().st_size for path in groups["written"])
        counts = [
            f"{len(paths)} {'file' if len(paths) == 1 else 'files'} {what}"
            + (f" ({mib(size)})" if what == "written" else "")
            for what, paths in groups.items()
            if paths
        ]
        if counts:
            rows.append((label, f"{place}: {', '.join(counts)}"))
    return [
        *rows,
        *(("kept", f"{root / path}: {why}") for path, why in done.kept.items()),
        *(("note", note) for note in done.notes),
    ]


def _typed(path: Path) -> str:
    text = str(path)
    return f'"{text}"' if any(letter.isspace() for letter in text) else text
