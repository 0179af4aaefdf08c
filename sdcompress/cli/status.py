"""`sdcompress status`: what is installed in a WebUI or ComfyUI, and whether it works there."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdcompress.cli._console import card, json_option, mib
from sdcompress.cli.install import host_argument, path_argument

if TYPE_CHECKING:
    from sdcompress.hosts.status import EngineStatus, Status


@click.command()
@host_argument
@path_argument
@json_option
def command(host: str, path: Path, as_json: bool) -> None:
    """Say what is installed in the program's folder PATH, whether its files are whole, and which engines load on this
    machine, or why not.

    \b
    sdcompress status webui ~/stable-diffusion-webui
    sdcompress status comfyui ~/ComfyUI --json
    """
    import json

    from sdcompress.hosts.find import find_host
    from sdcompress.hosts.status import status

    found, root = find_host(host, path)
    state = status(found, root)
    if as_json:
        click.echo(json.dumps(_facts(state), ensure_ascii=False))
        return
    packages = (
        "not found: what an engine needs is checked in this Python"
        if state.packages is None
        else ", ".join(f"{name} {version}" for name, version in sorted(state.packages.items()))
        or "has neither torch nor a runtime"
    )
    rows = [
        ("plugin", _plugin(state)),
        ("engines", str(root / found.models)),
        *(("", _line(engine)) for engine in state.engines),
    ]
    rows += [("changed", f"{root / name}: {what}") for name, what in state.changed.items()]
    rows += [
        ("left over", f"{root / name}: of an install that was stopped; an install or uninstall clears it away")
        for name in state.leftovers
    ]
    card(
        f"{found.title} in {root}",
        [*rows, ("its Python", packages)],
        None if state.record else f"sdcompress install {host} {path} ENGINE",
    )


def _plugin(state: Status) -> str:
    if state.broken:
        return f"the record of what was installed is broken: {state.broken}"
    if state.record is None:
        return "not installed"
    return f"{state.root / state.host.extension}, of sdcompress {state.record.version}, {state.record.created}"


def _line(engine: EngineStatus) -> str:
    loads = (
        f"damaged: {engine.fault}"
        if engine.fault
        else f"does not load here: {engine.why_not}"
        if engine.why_not
        else "loads here"
    )
    facts = engine.facts
    told = (
        f"{facts['runtime']}, {facts['precision']}, {facts['signature']}, {mib(facts['bytes'])}" if facts else "unknown"
    )
    return f"{engine.name}  ({told}{'' if engine.ours else '; not installed by sdcompress'})  {loads}"


def _facts(state: Status) -> dict[str, Any]:
    engines = [
        {
            "name": engine.name,
            "path": str(engine.path),
            "ours": engine.ours,
            "fault": engine.fault,
            "loads_here": not (engine.fault or engine.why_not),
            "why_not": engine.fault or engine.why_not,
            **engine.facts,
        }
        for engine in state.engines
    ]
    record = asdict(state.record) if state.record else None
    return {
        "host": state.host.name,
        "path": str(state.root),
        "installed": record is not None,
        "version": record and record["version"],
        "created": record and record["created"],
        "broken": state.broken,
        "changed": dict(state.changed),
        "leftovers": list(state.leftovers),
        "engines": engines,
        "packages": state.packages,
        "files": len(record["files"]) if record else 0,
    }
