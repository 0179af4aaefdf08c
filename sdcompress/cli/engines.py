"""`sdcompress engines`"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdcompress.cli._console import card, json_option, mib

if TYPE_CHECKING:
    from sdcompress_engines.manifest import Manifest
    from sdcompress_engines.store import EngineStore
    from sdcompress_engines.store_entries import Entry

BUILD = "sdcompress export MODEL --trt -o DIR"
store_option = click.option(
    "--store",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Another store than the one of this user.",
)


@click.group()
def command() -> None:
    """The store of built engines: what `export --trt` has built is kept, and found again instead of built again.

    \b
      sdcompress engines list                 what is there, and whether it loads here
      sdcompress engines show 3fa2
      sdcompress engines verify               exit code 3 where a file is damaged
      sdcompress engines prune --unusable
    """


@command.command("list", short_help="What is there, and whether it loads here.")
@click.argument("folder", required=False, metavar="[FOLDER]", type=click.Path(path_type=Path))
@store_option
@json_option
def list_engines(folder: Path | None, store: Path | None, as_json: bool) -> None:
    """The engines of the store, or of a FOLDER that `export --trt` has written.

    \b
      sdcompress engines list
      sdcompress engines list engines/engine --json
    """
    import json

    from sdcompress_engines.store import EngineStore

    opened = EngineStore(store)
    facts = _folder_facts(folder) if folder else [_entry_facts(entry) for entry in opened.entries()]
    if as_json:
        click.echo(json.dumps(facts))
        return
    if not facts:
        click.echo(f"no engines in {folder or opened.root}\nnext: {BUILD}")
        return
    rows = [
        ("key", "component", "model", "precision", "built with", "cards", "profile", "size", "age", "loads here"),
        *(_row(fact) for fact in facts),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    click.echo(
        f"{len(facts)} {'engine' if len(facts) == 1 else 'engines'}, {mib(sum(fact['bytes'] for fact in facts))} in"
        f" {folder or opened.root}"
    )


@command.command(short_help="All that is known of one engine.")
@click.argument("engine", metavar="KEY|PATH")
@store_option
@json_option
def show(engine: str, store: Path | None, as_json: bool) -> None:
    """All that is known of one engine: by the beginning of its key, or by the path of a file or folder.

    \b
      sdcompress engines show 3fa2
      sdcompress engines show engines/engine/unet.engine
    """
    import json

    from sdcompress_engines.errors import UsageError
    from sdcompress_engines.store import EngineStore

    path = Path(engine)
    if path.exists():
        facts = [
            fact
            for fact in _folder_facts(path if path.is_dir() else path.parent, contents=True)
            if path.is_dir() or Path(fact["path"]).name == path.name
        ]
        if not facts:
            raise UsageError(
                "is no engine that its folder's manifest names",
                where=path,
                expected="a file or folder that `sdcompress export --trt` has written",
            )
    else:
        facts = [_entry_facts(_resolved(EngineStore(store), engine), contents=True)]
    if as_json:
        click.echo(json.dumps(facts))
        return
    for fact in facts:
        card(
            fact["component"] or fact["path"],
            [
                (name.removesuffix("_s").replace("_", " "), _shown(name, value))
                for name, value in fact.items()
                if value not in (None, "", {}, [])
            ],
        )


@command.command(short_help="Read every engine and hold it against its manifest.")
@click.argument("folder", required=False, metavar="[FOLDER]", type=click.Path(path_type=Path))
@store_option
@json_option
def verify(folder: Path | None, store: Path | None, as_json: bool) -> None:
    """Read every engine and hold it against its manifest; the exit code is 3 where one is damaged.

    Clears away what killed builds have left.

    \b
      sdcompress engines verify
      sdcompress engines verify engines/engine
    """
    import json

    from sdcompress_engines.errors import GateFailed
    from sdcompress_engines.store import EngineStore
    from sdcompress_engines.store_entries import Finding, Verdict

    opened = EngineStore(store)
    place = _engine_folder(folder) if folder else opened.root
    verdict = Verdict((Finding(place, tuple(_faults(place))),), ()) if folder else opened.verify()
    damaged = [finding for finding in verdict.findings if finding.faults]
    if as_json:
        found = [{"path": str(finding.folder), "faults": list(finding.faults)} for finding in verdict.findings]
        click.echo(json.dumps({"findings": found, "swept": [str(swept.folder) for swept in verdict.swept]}))
    else:
        for finding in verdict.findings:
            click.echo(f"{finding.folder.name:<20}  {'; '.join(finding.faults) or 'whole'}")
        for swept in verdict.swept:
            click.echo(f"removed {swept.folder.name} ({mib(swept.bytes)}), {swept.reason}")
        click.echo(f"{len(verdict.findings) - len(damaged)} of {len(verdict.findings)} whole in {place}")
    if damaged:
        hint = "build it again: " + BUILD if folder else "sdcompress engines prune --unusable, then export again"
        raise GateFailed(
            f"{len(damaged)} damaged: {', '.join(finding.folder.name for finding in damaged)}", where=place, hint=hint
        )


@command.command(short_help="Remove engines from the store.")
@click.argument("keys", nargs=-1, metavar="[KEY]...")
@click.option(
    "--older-than", type=click.FloatRange(0), metavar="DAYS", help="Those not built and not used for so long."
)
@click.option(
    "--unusable",
    is_flag=True,
    help="Those that are damaged, or made for another version, card or platform than this machine's.",
)
@click.option("--all", "everything", is_flag=True, help="All of them.")
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@store_option
def prune(
    keys: tuple[str, ...], older_than: float | None, unusable: bool, everything: bool, dry_run: bool, store: Path | None
) -> None:
    """Remove engines from the store: by the beginning of their keys, or by a condition.

    Folders they were exported to keep theirs.

    \b
      sdcompress engines prune 3fa2 77c0
      sdcompress engines prune --older-than 30 --unusable --dry-run
    """
    from sdcompress_engines.errors import UsageError
    from sdcompress_engines.store import EngineStore

    if not (keys or unusable or everything or older_than is not None):
        raise UsageError("nothing says which engines", expected="keys, --older-than DAYS, --unusable or --all")
    opened = EngineStore(store)
    chosen = [_resolved(opened, key).digest for key in keys]
    pruned = opened.prune(older_than, unusable, everything, chosen, dry_run)
    for gone in pruned:
        click.echo(f"{gone.folder.name}  {mib(gone.bytes):>12}  {gone.reason}")
    left = sum(entry.bytes for entry in opened.entries())
    click.echo(
        f"{'would free' if dry_run else 'freed'} {mib(sum(gone.bytes for gone in pruned))} in {len(pruned)}"
        f" {'folder' if len(pruned) == 1 else 'folders'}; {mib(left)} in {opened.root}"
    )


@command.command(short_help="Where the store is, or one engine's file.")
@click.argument("key", required=False, metavar="[KEY]")
@store_option
def path(key: str | None, store: Path | None) -> None:
    """Where the store is, or the file of one engine.

    \b
      sdcompress engines path
      ls -l "$(sdcompress engines path 3fa2)"
    """
    from sdcompress_engines.errors import ArtifactError
    from sdcompress_engines.store import EngineStore
    from sdcompress_engines.store_entries import BrokenEngine

    opened = EngineStore(store)
    if key is None:
        click.echo(str(opened.root))
        return
    entry = _resolved(opened, key)
    if isinstance(entry, BrokenEngine):
        raise ArtifactError(
            f"the engine is damaged: {entry.fault}",
            where=entry.folder,
            hint="sdcompress engines prune --unusable, then export again",
        )
    click.echo(str(entry.path))


def _resolved(store: EngineStore, prefix: str) -> Entry:
    """The one entry whose key begins so.

    Raises:
        UsageError: there is none, or more than one.
    """
    from sdcompress_engines.errors import UsageError

    found = [entry for entry in store.entries() if prefix and entry.digest.startswith(prefix.lower())]
    if len(found) > 1:
        raise UsageError(
            f"{len(found)} engines begin with {prefix!r}",
            expected="one of " + ", ".join(entry.digest for entry in found),
        )
    if not found:
        raise UsageError(f"no engine {prefix!r}", where=store.root, hint="sdcompress engines list")
    return found[0]


def _engine_folder(folder: Path) -> Path:
    """The folder with the engines: the one given, or `engine` in it, as `export --trt` lays them out.

    Raises:
        UsageError: there is no such folder. ArtifactError: it holds no engines.
    """
    from sdcompress_engines.errors import ArtifactError, UsageError
    from sdcompress_engines.manifest import read_manifest

    if not folder.is_dir():
        raise UsageError(
            "no such folder",
            where=folder,
            expected="one that `sdcompress export --trt` has written",
            hint="sdcompress engines list, for the store",
        )
    for place in (folder, folder / "engine"):
        try:
            manifest = read_manifest(place)
        except ArtifactError:  # a damaged manifest is for the caller to tell of
            return place
        if manifest is not None and manifest.kind == "engine":
            return place
    raise ArtifactError(
        "holds no engines", where=folder, expected="a folder that `sdcompress export --trt` has written", hint=BUILD
    )


def _faults(folder: Path) -> list[str]:
    from sdcompress_engines.errors import ArtifactError
    from sdcompress_engines.engine_files import engine_faults

    try:
        return engine_faults(folder)
    except ArtifactError as error:
        return [error.what]


def _folder_facts(folder: Path, contents: bool = False) -> list[dict[str, Any]]:
    """One a component of an engine folder."""
    from sdcompress_engines.manifest import read_manifest
    from sdcompress_engines.engine_files import SUFFIX, engine_faults

    place = _engine_folder(folder)
    found = engine_faults(place, contents=contents)
    manifest = read_manifest(place)
    assert manifest is not None
    components = [str(component) for component in manifest.config.get("components", [])]
    return [
        _facts(manifest, component, place / f"{component}{SUFFIX}", "; ".join(found) or None)
        for component in components
    ]


def _entry_facts(entry: Entry, contents: bool = False) -> dict[str, Any]:
    from sdcompress_engines.engine_files import engine_faults
    from sdcompress_engines.store_entries import BrokenEngine

    if isinstance(entry, BrokenEngine):
        blank = dict.fromkeys(
            ("component", "model", "model_name", "precision", "signature", "flavour", "version", "platform", "created")
        )
        lists: dict[str, Any] = {"compute_capabilities": [], "profiles": [], "profile": ""}
        return (
            {"key": entry.digest}
            | blank
            | lists
            | {
                "path": str(entry.folder),
                "bytes": entry.bytes,
                "age_s": _age(entry.used),
                "fault": entry.fault,
                "loads_here": False,
                "why_not": f"damaged: {entry.fault}",
            }
        )
    fault = "; ".join(engine_faults(entry.folder)) if contents else None
    return _facts(entry.manifest, entry.component, entry.path, fault or None) | {"unused_s": _age(entry.used)}


def _facts(manifest: Manifest, component: str, path: Path, fault: str | None) -> dict[str, Any]:
    from datetime import datetime, timezone

    from sdcompress_engines.flavour import obstacle
    from sdcompress_engines.engine_key import EngineKey

    config, file = manifest.config, manifest.files.get(path.name)
    key = EngineKey.of(config, component)
    hindrance = obstacle(config)
    try:
        made = datetime.fromisoformat(manifest.created)
        age = _age((made if made.tzinfo else made.replace(tzinfo=timezone.utc)).timestamp())
    except (TypeError, ValueError):
        age = None
    return {
        "key": key.digest,
        "component": component,
        "model": key.model,
        "model_name": config.get("model_name"),
        "precision": key.precision,
        "signature": key.signature,
        "flavour": key.flavour,
        "version": key.version,
        "compute_capabilities": [list(capability) for capability in key.compute_capabilities],
        "platform": key.platform,
        "profile": profile_text(config, component),
        "profiles": [{name: list(shapes) for name, shapes in profile.items()} for profile in key.profiles],
        "inputs": config.get("inputs", {}).get(component, []),
        "outputs": config.get("outputs", {}).get(component, []),
        "options": dict(key.options),
        "figures": manifest.figures,
        "path": str(path),
        "bytes": file.bytes if file else 0,
        "sha256": file.sha256 if file else None,
        "created": manifest.created,
        "age_s": age,
        "fault": fault,
        "loads_here": hindrance is None and fault is None,
        "why_not": f"damaged: {fault}" if fault else hindrance.what if hindrance else None,
        "hint": hindrance.hint if hindrance else None,
    }


def profile_text(config: Mapping[str, Any], component: str) -> str:
    """Each profile of a component as `512:768:1024 px, batch 1:2:8` (min:opt:max; one number where they are equal), `+`
    between them.

    Where the manifest does not name the axes: the shapes of each input.
    """
    named = config.get("inputs", {}).get(component, [])
    axes = {
        spec["name"]: spec["shape"]
        for spec in named
        if isinstance(spec, dict) and isinstance(spec.get("shape"), list) and "name" in spec
    }
    scale = config.get("vae_scale", 8)
    texts = []
    for profile in config["profiles"][component]:
        sizes: dict[str, str] = {}
        for name, shapes in profile.items():
            for at, axis in enumerate(axes.get(name, ())):
                if isinstance(axis, str) and all(at < len(shape) for shape in shapes):
                    unit = scale if axis in ("height", "width") else 1
                    sizes.setdefault(axis.removeprefix("image_"), _range([shape[at] * unit for shape in shapes]))
        height, width = sizes.pop("height", ""), sizes.pop("width", "")
        parts = [f"{height} px" if height == width else f"height {height} width {width} px"] if height or width else []
        parts += [f"{axis} {size}" for axis, size in sizes.items() if size]
        texts.append(
            ", ".join(parts)
            or ", ".join(
                f"{name} {_range(['x'.join(map(str, shape)) for shape in shapes])}" for name, shapes in profile.items()
            )
        )
    return " + ".join(texts)


def _range(sizes: Sequence[object]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else ":".join(map(str, sizes))


def _row(fact: Mapping[str, Any]) -> tuple[str, ...]:
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
        _shown("age_s", fact["age_s"]),
        loads,
    )
    return tuple(str(cell or "-") for cell in cells)


def _shown(name: str, value: Any) -> str:
    if name == "bytes":
        return mib(value)
    if name in ("age_s", "unused_s"):
        return (
            "-"
            if value is None
            else next(
                f"{value / unit:.0f} {text}"
                for unit, text in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
                if value >= unit or unit == 1
            )
        )
    if name == "compute_capabilities":
        return ", ".join(f"{major}.{minor}" for major, minor in value)
    if name in ("inputs", "outputs"):
        return "; ".join(
            f"{spec.get('name')} {spec.get('dtype')} ({', '.join(map(str, spec.get('shape', ())))})" for spec in value
        )
    if name == "profiles":
        return " + ".join(
            "; ".join(
                f"{tensor} {_range(['x'.join(map(str, shape)) for shape in shapes])}"
                for tensor, shapes in profile.items()
            )
            for profile in value
        )
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown('', entry)}" for key, entry in value.items())
    return "yes" if value is True else "no" if value is False else str(value)


def _age(since: float) -> float:
    return round(max(0.0, time.time() - since), 1)
