"""`--trust`: the consent to run engines and packages that were built elsewhere, for the commands that open some."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdcompress.cli._console import ConsoleReporter

if TYPE_CHECKING:
    from sdcompress_engines.trust import Consent

SEAL = (
    "The seal and the sha256 of a manifest show damage and edits. They do not show who made the folder: compare the\n"
    "sha256 above with the one that the author publishes. An engine or a .pt2 is executable code."
)


def trust_option(function: Any) -> Any:
    """Add `--trust`, which allows engines and packages that were built elsewhere."""
    return click.option(
        "--trust",
        is_flag=True,
        help="Allow the engines and packages given here to run, though they were built elsewhere: they are executable"
        " code. The consent is stored for the sha256 of each file.",
    )(function)


def allow_all(paths: Iterable[Path | None]) -> list[tuple[Path, Consent]]:
    """Store the consent for every engine and package at these paths, and print a line for each on stderr.

    Args:
        paths: files, and folders as `export` writes them. What does not exist, such as a hub id, is left out.

    Returns:
        The files with their consents.

    Raises:
        ArtifactError: a file is not the one of its manifest. StorageError: a consent cannot be stored.
    """
    from sdcompress_engines.trust import allow, find_code

    files = [file for path in paths if path is not None and path.exists() for file in find_code(path)]
    allowed = [(file, allow(file)) for file in files]
    for file, consent in allowed:
        ConsoleReporter().show_line(f"{file}: sha256 {consent.sha256}, {consent}")
    return allowed
