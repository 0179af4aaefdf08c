"""The plugin's own files: where they lie in this installation, and what an install puts into a host."""

from __future__ import annotations

from pathlib import Path

import sdcompress_engines
from sdcompress_engines.errors import ArtifactError

from sdcompress.hosts.entry import Entry, Item
from sdcompress.hosts.host import Host


def plugin_folder(plugin: str) -> Path:
    """Returns the folder of a plugin: inside the package in a wheel (`setup.py`), beside it in a checkout.

    Raises:
        ArtifactError: this installation lacks it.
    """
    places = [folder / "plugins" / plugin for folder in Path(__file__).parents[1:3]]
    for place in places:
        if place.is_dir():
            return place
    raise ArtifactError(
        f"this installation has no plugin {plugin}", where=places[0], hint="pip install --force-reinstall sdcompress"
    )


def plugin_items(host: Host, *, link: bool) -> dict[str, Item]:
    """Returns path in the host's folder → what to put there, for the plugin and the engine package inside it.

    Args:
        host: the program.
        link: links instead of copies.

    Raises:
        ArtifactError: this installation lacks the plugin.
    """
    items: dict[str, Item] = {}
    for source, inside in (
        (plugin_folder(host.plugin), host.extension),
        (Path(sdcompress_engines.__file__).parent, f"{host.extension}/sdcompress_engines"),
    ):
        items |= _links(source, inside) if link else _copies(source, inside)
    return items


def _copies(source: Path, inside: str) -> dict[str, Item]:
    """Returns an item for each file of a folder, without hidden files and byte code."""
    paths = [(path, path.relative_to(source)) for path in sorted(source.rglob("*")) if path.is_file()]
    return {
        f"{inside}/{relative.as_posix()}": Item(path, Entry.of(path))
        for path, relative in paths
        if not any(part == "__pycache__" or part.startswith(".") for part in relative.parts)
    }


def _links(source: Path, inside: str) -> dict[str, Item]:
    """Returns one link for a package, and one for each entry of a plugin.

    The plugin's folder itself is an ordinary folder, because the record lies in it.
    """
    if inside.endswith(source.name):
        return {inside: Item(source, Entry(link=str(source)))}
    return {
        f"{inside}/{path.name}": Item(path, Entry(link=str(path)))
        for path in sorted(source.iterdir())
        if path.name != "__pycache__" and not path.name.startswith(".")
    }
