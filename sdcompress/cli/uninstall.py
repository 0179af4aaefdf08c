"""`sdcompress uninstall`: remove what `install` has put into a WebUI or ComfyUI."""

from __future__ import annotations

from pathlib import Path

import click

from sdcompress.cli._console import card
from sdcompress.cli._types import NAME
from sdcompress.cli.install import host_argument, outcome_rows, path_argument


@click.command()
@host_argument
@path_argument
@click.argument("names", type=NAME, nargs=-1, metavar="[ENGINE]...")
def command(host: str, path: Path, names: tuple[str, ...]) -> None:
    """Remove what `install` has put into the program's folder PATH: everything, or only the named engines.

    A file that was changed after the install is kept and reported.

    \b
    sdcompress uninstall webui ~/stable-diffusion-webui
    sdcompress uninstall comfyui ~/ComfyUI sd-tiny
    """
    from sdcompress.hosts.find import find_host
    from sdcompress.hosts.install import uninstall

    program, root = find_host(host, path)
    outcome = uninstall(program, root, names)
    card(f"{program.title} in {root}", [*outcome_rows(program, root, outcome), ("1", f"restart {program.title}")])
