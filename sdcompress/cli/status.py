"""`sdcompress status`: check what is installed in a WebUI or ComfyUI."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from sdcompress_engines.command import as_argument, command_line

from sdcompress.cli._console import card, json_option, mib, print_json
from sdcompress.cli.install import host_argument, path_argument

if TYPE_CHECKING:
    from sdcompress.hosts.status import EngineStatus, Status


@click.command()
@host_argument
@path_argument
@json_option
def command(host: str, path: Path, as_json: bool) -> None:
    """Show what is installed in the program's folder PATH, whether its files are intact, and which engines load on
    this machine, or why not. Whether an engine loads is checked with the libraries of sdcompress's own Python.

    \b
    sdcompress status webui ~/stable-diffusion-webui
    sdcompress status comfyui ~/ComfyUI --json
    """
    from sdcompress.hosts.find import find_host
    from sdcompress.hosts.status import read_status

    program, root = find_host(host, path)
    state = read_status(program, root)
    if as_json:
        print_json(_to_json(state))
        return
    rows = [("plugin", _describe_plugin(state)), ("engines", str(root / program.models))]
    rows += [("", _describe_engine(engine)) for engine in state.engines]
    rows += [("changed", f"{root / name}: {what}") for name, what in state.changed.items()]
    rows += [
        ("left over", f"{root / name}: of an interrupted install; the next install or uninstall removes it")
        for name in state.leftovers
    ]
    card(
        f"{program.title} in {root}",
        [*rows, ("host's Python", _describe_packages(state))],
        None if state.record else f"sdcompress install {host} {command_line([as_argument(path)])} ENGINE",
    )


def _describe_packages(state: Status) -> str:
    if state.packages is None:
        return "not found"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(state.packages.items()))
    return versions or "has neither torch nor a runtime"


def _describe_plugin(state: Status) -> str:
    if state.broken:
        return f"the record of what was installed is broken: {state.broken}"
    if state.record is None:
        return "not installed"
    return f"{state.root / state.host.extension}, of sdcompress {state.record.version}, {state.record.created}"


def _describe_engine(engine: EngineStatus) -> str:
    verdict = "loads here"
    if engine.fault:
        verdict = f"damaged: {engine.fault}"
    elif engine.why_not:
        verdict = f"does not load here: {engine.why_not}"
    facts, details = engine.facts, "unknown"
    if facts:
        details = f"{facts['runtime']}, {facts['precision']}, {facts['signature']}, {mib(facts['bytes'])}"
        details += f"; {facts['sampling']}" if facts["sampling"] else ""
    return f"{engine.name}  ({details}{'' if engine.is_recorded else '; not installed by sdcompress'})  {verdict}"


def _to_json(state: Status) -> dict[str, Any]:
    engines = [
        {
            "name": engine.name,
            "path": str(engine.path),
            "ours": engine.is_recorded,
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
