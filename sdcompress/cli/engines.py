"""`sdcompress engines`: the store of built engines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sdcompress.cli._console import card, echo, json_option, mib, print_json
from sdcompress.cli._trust import SEAL, allow_all
from sdcompress.cli._types import DAYS, NAME, FilePath

NOT_ALLOWED = "built elsewhere, not allowed to run"

store_option = click.option(
    "--store",
    type=FilePath(exists=True, file_okay=False),
    metavar="DIR",
    help="Folder of the store.  [default: the user's own]",
)


@click.group()
def command() -> None:
    """The store of built engines. `export --trt` keeps each engine here and builds none twice.

    \b
      sdcompress engines list                 the engines, and whether each loads here
      sdcompress engines show 3fa2
      sdcompress engines verify               exit code 3 if a file is damaged
      sdcompress engines verify DOWNLOADED    the same for a folder, and whether its code was built here
      sdcompress engines trust DOWNLOADED     allow that code to run
      sdcompress engines prune --unusable
    """


@command.command("list", short_help="The engines, and whether each loads here.")
@click.argument("folder", required=False, metavar="[FOLDER]", type=FilePath())
@store_option
@json_option
def list_engines(folder: Path | None, store: Path | None, as_json: bool) -> None:
    """List the engines of the store, or of a FOLDER that `export --trt` has written.

    \b
      sdcompress engines list
      sdcompress engines list engines/engine --json
    """
    from sdcompress_engines.store import EngineStore

    from sdcompress.export.engine_facts import BUILD, describe_entry, describe_folder

    _refuse_both(folder, store)
    opened = EngineStore(store)
    facts = describe_folder(folder) if folder else [describe_entry(entry) for entry in opened.entries()]
    if as_json:
        print_json(facts)
        return
    if not facts:
        echo(f"no engines in {folder or opened.root}\nnext: {BUILD}")
        return
    rows = [
        ("key", "component", "model", "precision", "built with", "cards", "profile", "size", "age", "loads here"),
        *(_table_row(fact) for fact in facts),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    echo(
        f"{len(facts)} {'engine' if len(facts) == 1 else 'engines'}, {mib(sum(fact['bytes'] for fact in facts))} in"
        f" {folder or opened.root}"
    )


@command.command(short_help="All facts about one engine.")
@click.argument("engine", type=NAME, metavar="KEY|PATH")
@store_option
@json_option
def show(engine: str, store: Path | None, as_json: bool) -> None:
    """Show all facts about an engine, given by the beginning of its key or by the path of a file or folder.

    \b
      sdcompress engines show 3fa2
      sdcompress engines show engines/engine/unet.engine
    """
    from sdcompress_engines.store import EngineStore

    from sdcompress.export.engine_facts import describe_entry, describe_path, find_entry

    if store is None and Path(engine).exists():
        facts = describe_path(Path(engine))
    else:
        facts = [describe_entry(find_entry(EngineStore(store), engine), contents=True)]
    if as_json:
        print_json(facts)
        return
    for fact in facts:
        card(
            fact["component"] or fact["path"],
            [
                (name.removesuffix("_s").replace("_", " "), _format_value(name, value))
                for name, value in fact.items()
                if value not in (None, "", {}, [])
            ],
        )


@command.command(short_help="Read every engine and compare it with its manifest.")
@click.argument("folder", required=False, metavar="[FOLDER]", type=FilePath())
@store_option
@json_option
def verify(folder: Path | None, store: Path | None, as_json: bool) -> None:
    """Read every engine and compare it with its manifest. The exit code is 3 if one is damaged.

    It shows the sha256 of each engine and package (.pt2), and whether it was built here or allowed: those that were
    built elsewhere run only after `sdcompress engines trust`. Nothing is opened. In the store it also removes the files
    that interrupted builds left.

    \b
      sdcompress engines verify
      sdcompress engines verify engines/engine
    """
    from sdcompress_engines.errors import GateFailed
    from sdcompress_engines.store import EngineStore
    from sdcompress_engines.store_entries import Finding, Verdict

    from sdcompress.export.engine_facts import BUILD, describe_code, find_engine_folder, list_faults

    _refuse_both(folder, store)
    opened = EngineStore(store)
    place = find_engine_folder(folder, ("engine", "package", "onnx")) if folder else opened.root
    verdict = Verdict((Finding(place, tuple(list_faults(place))),), ()) if folder else opened.verify()
    damaged = [finding for finding in verdict.findings if finding.faults]
    code = {finding.folder: describe_code(finding.folder) for finding in verdict.findings if not finding.faults}
    if as_json:
        findings = [
            {"path": str(finding.folder), "faults": list(finding.faults), "code": code.get(finding.folder, [])}
            for finding in verdict.findings
        ]
        print_json({"findings": findings, "swept": [str(swept.folder) for swept in verdict.swept]})
    else:
        for finding in verdict.findings:
            echo(f"{finding.folder.name:<20}  {'; '.join(finding.faults) or 'intact'}")
            for file in code.get(finding.folder, []):
                echo(f"  {file['file']:<18}  sha256 {file['sha256']}  {file['consent'] or NOT_ALLOWED}")
        for swept in verdict.swept:
            echo(f"removed {swept.folder.name} ({mib(swept.bytes)}), {swept.reason}")
        echo(f"{len(verdict.findings) - len(damaged)} of {len(verdict.findings)} intact in {place}")
        if any(not file["consent"] for files in code.values() for file in files):
            echo(SEAL)
    if damaged:
        hint = "build it again: " + BUILD if folder else "sdcompress engines prune --unusable, then export again"
        names = ", ".join(finding.folder.name for finding in damaged)
        raise GateFailed(f"{len(damaged)} damaged: {names}", where=place, hint=hint)


@command.command(short_help="Allow engines that were built elsewhere to run.")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", type=FilePath())
@click.option("--withdraw", is_flag=True, help="Take the consent back instead.")
def trust(paths: tuple[Path, ...], withdraw: bool) -> None:
    """Allow the engines and packages (.pt2) in each PATH to run on this machine, also in a WebUI or ComfyUI.

    They are executable code, and can do whatever you can do. What this machine has built needs no consent. The consent
    is kept for the sha256 of each file, for this user.

    \b
      sdcompress engines verify downloaded    what it is, and its sha256: compare it with the author's
      sdcompress engines trust downloaded
    """
    from sdcompress_engines.errors import UsageError
    from sdcompress_engines.trust import find_code
    from sdcompress_engines.trust import withdraw as take_back

    if lacking := [path for path in paths if not find_code(path)]:
        raise UsageError("holds no engine and no package", where=lacking[0], hint="sdcompress engines verify")
    if not withdraw:
        allow_all(paths)
        return
    for file in (file for path in paths for file in find_code(path)):
        echo(f"{file}: {'consent withdrawn' if take_back(file) else 'had no consent'}")


@command.command(short_help="Remove engines from the store.")
@click.argument("keys", type=NAME, nargs=-1, metavar="[KEY]...")
@click.option(
    "--older-than",
    type=DAYS,
    metavar="DAYS",
    help="Remove engines that were neither built nor used in the last DAYS days.",
)
@click.option(
    "--unusable",
    is_flag=True,
    help="Remove engines that are damaged, or built for another version, GPU or platform than this machine's.",
)
@click.option("--all", "everything", is_flag=True, help="Remove all engines.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed, and remove nothing.")
@store_option
def prune(
    keys: tuple[str, ...], older_than: float | None, unusable: bool, everything: bool, dry_run: bool, store: Path | None
) -> None:
    """Remove engines from the store: those named by the beginning of their keys, those that meet one of the conditions,
    or all.

    The folders that they were exported to stay as they are.

    \b
      sdcompress engines prune 3fa2 77c0
      sdcompress engines prune --older-than 30 --unusable --dry-run
    """
    from sdcompress_engines.errors import UsageError
    from sdcompress_engines.store import EngineStore

    from sdcompress.export.engine_facts import find_entry

    if not (keys or unusable or everything or older_than is not None):
        raise UsageError("no engines were named", expected="keys, --older-than DAYS, --unusable or --all")
    if sum((bool(keys), unusable or older_than is not None, everything)) > 1:
        expected = "either keys, or conditions (--older-than DAYS, --unusable), or --all"
        raise UsageError("more than one choice of engines", expected=expected)
    opened = EngineStore(store)
    chosen = [find_entry(opened, key).digest for key in keys]
    pruned = opened.prune(older_than, unusable, everything, chosen, dry_run)
    for gone in pruned:
        echo(f"{gone.folder.name}  {mib(gone.bytes):>12}  {gone.reason}")
    left = sum(entry.bytes for entry in opened.entries())
    echo(
        f"{'would free' if dry_run else 'freed'} {mib(sum(gone.bytes for gone in pruned))} in {len(pruned)}"
        f" {'folder' if len(pruned) == 1 else 'folders'}; {mib(left)} in {opened.root}"
    )


@command.command(short_help="The path of the store, or of one engine.")
@click.argument("key", type=NAME, required=False, metavar="[KEY]")
@store_option
def path(key: str | None, store: Path | None) -> None:
    """Print the path of the store, or of one engine file.

    \b
      sdcompress engines path
      ls -l "$(sdcompress engines path 3fa2)"
    """
    from sdcompress_engines.errors import ArtifactError
    from sdcompress_engines.store import EngineStore
    from sdcompress_engines.store_entries import BrokenEngine

    from sdcompress.export.engine_facts import find_entry

    opened = EngineStore(store)
    if key is None:
        echo(str(opened.root))
        return
    entry = find_entry(opened, key)
    if isinstance(entry, BrokenEngine):
        raise ArtifactError(
            f"the engine is damaged: {entry.fault}",
            where=entry.folder,
            hint="sdcompress engines prune --unusable, then export again",
        )
    echo(str(entry.path))


def _refuse_both(folder: Path | None, store: Path | None) -> None:
    if folder is not None and store is not None:
        raise click.UsageError("a FOLDER and --store: give one of them")


def _table_row(fact: Mapping[str, Any]) -> tuple[str, ...]:
    model = " ".join(filter(None, (fact["model_name"], (fact["model"] or "")[:8])))
    cards = ", ".join(f"{major}.{minor}" for major, minor in fact["compute_capabilities"]) or "8.0+"
    built = " ".join(filter(None, (fact["flavour"], fact["version"])))
    loads = "yes" if fact["loads_here"] else f"no: {fact['why_not']}"
    cells = (
        fact["key"][:8],
        fact["component"],
        model,
        fact["precision"],
        built,
        cards,
        fact["profile"],
        mib(fact["bytes"]),
        _format_value("age_s", fact["age_s"]),
        loads,
    )
    return tuple(str(cell or "-") for cell in cells)


def _format_value(name: str, value: Any) -> str:
    from sdcompress.export.engine_facts import format_shapes

    if name == "bytes":
        return mib(value)
    if name in ("age_s", "unused_s"):
        return _format_age(value)
    if name == "compute_capabilities":
        return ", ".join(f"{major}.{minor}" for major, minor in value)
    if name in ("inputs", "outputs"):
        return "; ".join(
            f"{spec.get('name')} {spec.get('dtype')} ({', '.join(map(str, spec.get('shape', ())))})" for spec in value
        )
    if name == "profiles":
        return " + ".join(
            "; ".join(f"{tensor} {format_shapes(shapes)}" for tensor, shapes in profile.items()) for profile in value
        )
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_format_value('', entry)}" for key, entry in value.items())
    return "yes" if value is True else "no" if value is False else str(value)


def _format_age(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    size, unit = next((size, unit) for size, unit in units if seconds >= size or size == 1)
    return f"{seconds / size:.0f} {unit}"
