"""`sdcompress uninstall`: what `install` has put into a WebUI or ComfyUI, away again."""

from __future__ import annotations

from pathlib import Path

import click

from sdcompress.cli._console import card
from sdcompress.cli.install import host_argument, path_argument, rows_of


@click.command()
@host_argument
@path_argument
@click.argument("names", nargs=-1, metavar="[ENGINE]...")
def command(host: str, path: Path, names: tuple[str, ...]) -> None:
    """Take away what `install` has put into the program's folder PATH: all of it, or the engines of these names.

    A file that was changed since is kept, and said.

    \b
    sdcompress uninstall webui ~/stable-diffusion-webui
    sdcompress uninstall comfyui ~/ComfyUI sd-tiny
    """
    from sdcompress.hosts.find import find_host
    from sdcompress.hosts.install import uninstall

    found, root = find_host(host, path)
    done = uninstall(found, root, names)
    card(f"{found.title} in {root}", [*rows_of(found, root, done), ("1", f"restart {found.title}")])
