"""Plugins and engines in a host's folder: put there, told of, and taken away again.

    <host>/<extension>/                     the plugin, `sdcompress_engines` inside it, and the record of what an
    install has written <host>/models/sdcompress/<name>/        an engine: `unet.engine` or `unet.onnx`, its manifest,
    `pipeline/`, and `student.safetensors` where asked for

The record names every file with its sha256. What it does not name is never touched; what was changed since is kept, and
told.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import sdcompress_engines
from sdcompress_engines.errors import (
    ArtifactError,
    EngineMismatch,
    SdCompressError,
    StorageError,
    UsageError,
    storage_error,
)
from sdcompress_engines.flavour import obstacle
from sdcompress_engines.manifest import MANIFEST_NAME, Manifest, faults, read_manifest, require_space
from sdcompress_engines.progress import SILENT, Reporter
from sdcompress_engines.runners.onnxruntime import missing as onnxruntime_missing
from sdcompress_engines.store import engine_faults

from sdcompress.hosts.host import Host, host_packages, running
from sdcompress.hosts.record import (
    Entry,
    Record,
    copy_beside,
    leftovers,
    make_folders,
    prune_folders,
    read_record,
    remove,
    set_aside,
    write_record,
)

WEIGHTS = "student.safetensors"
"""The model itself beside its engine: what a plugin runs in torch where the engine cannot serve."""


@dataclass(frozen=True)
class Engine:
    """An engine folder to install.

    Attributes:
        files: path in the folder → `Entry`; the manifest too.
    """

    name: str
    folder: Path
    manifest: Manifest
    files: Mapping[str, Entry]


@dataclass(frozen=True)
class Done:
    """What an install or uninstall did, by path in the host's folder.

    Attributes:
        written, removed, unchanged: as they say; a replaced file counts as written.
        kept: path → why it was left where it is.
        notes: what else a person should know.
    """

    written: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineStatus:
    """An engine in a host's model folder.

    Attributes:
        ours: whether an install has put it there. fault: what is wrong with its files. why_not: why it does not load on
            this machine.
    """

    name: str
    path: Path
    ours: bool
    facts: Mapping[str, Any]
    fault: str | None
    why_not: str | None


@dataclass(frozen=True)
class Status:
    """What is installed in a host.

    Attributes:
        record: None where nothing is; its `version` is the plugin's.
        broken: what is wrong with the record. changed: path → what happened to a file of ours. leftovers: of an install
            that was stopped.
        packages: of the host's own Python, those an engine needs; None where it was not found.
    """

    host: Host
    root: Path
    record: Record | None
    broken: str | None
    changed: Mapping[str, str]
    engines: tuple[EngineStatus, ...]
    leftovers: tuple[str, ...]
    packages: Mapping[str, str] | None


def install(
    host: Host,
    root: Path,
    engines: Sequence[str | Path] = (),
    *,
    name: str | None = None,
    link: bool = False,
    weights: str | Path | None = None,
    report: Reporter = SILENT,
) -> Done:
    """Put the host's plugin and these engines into its folder; what is there already is not written again.

    Copies lie beside their place before any is renamed into it, so one that fails leaves the host as it was.

    Args:
        engines: folders that `sdcompress export` has written; the one to install is found in `DIR/engine` or `DIR/onnx`
            too.
        name: of a single engine; by default its model's.
        link: links instead of copies.
        weights: the model the engines were made from, to lie beside each as one LDM file.

    Raises:
        UsageError: an option or path that does not fit. ArtifactError: a damaged engine, or a file in the way that is
            not ours or was changed.
        EngineMismatch: an engine with another host's signature, or weights of another model. StorageError: no
            permission, no space.
    """
    if weights is not None and (link or host.name == "comfyui"):
        raise UsageError(
            "--with-weights with --link" if link else "--with-weights for ComfyUI, which loads such a file itself",
            hint=(
                "leave it out" if link else "sdcompress export MODEL --ldm -o FILE.safetensors, into models/checkpoints"
            ),
        )
    found = [read_engine_folder(path, host, name) for path in engines]
    if name is not None and len(found) != 1:
        raise UsageError(f"--name with {len(found)} engines", expected="one")
    if twice := [
        engine.name
        for at, engine in enumerate(found)
        if engine.name.lower() in {each.name.lower() for each in found[:at]}
    ]:
        raise UsageError(f"two engines are called {twice[0]!r}", hint="install one of them with --name NAME")
    _check_folders(host, root)
    wanted: dict[str, tuple[Path, Entry]] = {}
    for source, inside in (
        (plugin_folder(host.plugin), host.extension),
        (Path(sdcompress_engines.__file__).parent, f"{host.extension}/sdcompress_engines"),
    ):
        wanted |= _linked(source, inside) if link else _copied(source, inside)
    for engine in found:
        place = f"{host.models}/{engine.name}"
        wanted |= (
            {place: (engine.folder, Entry(link=str(engine.folder)))}
            if link
            else {f"{place}/{path}": (engine.folder / path, entry) for path, entry in engine.files.items()}
        )
    with ExitStack() as stack, _writing(root, host):
        if weights is not None:
            held = _weights(Path(weights) if Path(weights).exists() else weights, found, stack, report)
            wanted |= {f"{host.models}/{engine.name}/{WEIGHTS}": held for engine in found}
        return _noted(_apply(host, root, wanted, {engine.name for engine in found}, report), host, root)


def uninstall(host: Host, root: Path, names: Sequence[str] = ()) -> Done:
    """Take away what installs have put into the host's folder, and no more: all of it, or the engines of these names.

    Raises:
        UsageError: nothing is installed, or no engine of that name. ArtifactError: the record is broken. StorageError:
            no permission.
    """
    record, broken = read(host, root)
    if broken is not None:
        raise ArtifactError(
            f"the record of what was installed is broken ({broken}), so nothing tells what may go",
            where=root / host.record,
            hint=f"sdcompress install {host.name} {root}, which makes it anew and keeps this one aside",
        )
    if record is None:
        raise UsageError("nothing is installed here by sdcompress", where=root)
    there = engines_of(host, record)
    if unknown := sorted(set(names) - set(there)):
        raise UsageError(f"no engine {unknown[0]!r} was installed here", where=root, expected=", ".join(there) or None)
    chosen = {path: entry for path, entry in record.files.items() if not names or engine_of(host, path) in names}
    left = {path: entry for path, entry in record.files.items() if path not in chosen}
    with _writing(root, host):
        removed, kept = remove(root, chosen)
        if not left:
            for leftover in [*leftovers(root, (host.extension, host.models)), host.record]:
                (root / leftover).unlink(missing_ok=True)
        folders = prune_folders(root, record.folders)
        if left:
            write_record(root / host.record, replace(record, files=left, folders=folders))
    return _noted(Done(removed=tuple(sorted(removed)), kept=kept), host, root)


def status(host: Host, root: Path) -> Status:
    """What is installed in the host's folder, whether it is whole, and whether its engines load on this machine.

    Reads every byte of it, writes nothing.
    """
    record, broken = read(host, root)
    changed = {
        path: "was changed since" if os.path.lexists(root / path) else "is missing"
        for path, entry in (record or Record()).files.items()
        if not entry.is_at(root / path)
    }
    changed |= {
        path: f"is a link to {entry.link}, which is not there"
        for path, entry in (record or Record()).files.items()
        if entry.link and path not in changed and not (root / path).exists()
    }
    ours, place = engines_of(host, record), root / host.models
    folders = (
        sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
        if place.is_dir()
        else []
    )
    engines = tuple(_engine_status(folder.name, _held(folder), folder.name in ours) for folder in folders)
    return Status(
        host,
        root,
        record,
        broken,
        changed,
        engines,
        tuple(leftovers(root, (host.extension, host.models))),
        host_packages(root),
    )


def read(host: Host, root: Path) -> tuple[Record | None, str | None]:
    """The record of what is installed in the host's folder, and what is wrong with it; see `read_record`."""
    return read_record(root / host.record, (host.extension, host.models))


def engines_of(host: Host, record: Record | None) -> list[str]:
    """Names of the engines in a record."""
    return sorted({name for path in (record.files if record else ()) if (name := engine_of(host, path)) is not None})


def engine_of(host: Host, path: str) -> str | None:
    """The name of the engine that a recorded path belongs to, or None for the plugin's."""
    return path.removeprefix(f"{host.models}/").split("/")[0] if path.startswith(f"{host.models}/") else None


def read_engine_folder(path: str | Path, host: Host, name: str | None = None) -> Engine:
    """An engine folder that this host's plugin can call, every byte held against its manifest.

    Raises:
        UsageError: no such folder, or a name that is none for a folder. ArtifactError: no engine, or a damaged one.
            EngineMismatch: another signature.
    """
    given = Path(path).expanduser().absolute()
    build = f"sdcompress export MODEL --trt --signature {host.signatures[0]} -o DIR"
    if not given.is_dir():
        raise UsageError("no such folder", where=given, expected="one that `sdcompress export` has written", hint=build)
    folder = _held(given)
    made = read_manifest(folder)
    if made is None or made.kind not in ("engine", "onnx"):
        raise ArtifactError(
            "holds no engine" if made is None else f"is a {made.kind}, not an engine", where=folder, hint=build
        )
    signature, components = made.config.get("signature"), made.config.get("components")
    if signature not in host.signatures or components != ["unet"]:
        told = (
            f"the components {', '.join(map(str, components or []))}"
            if components != ["unet"] and signature in host.signatures
            else f"the signature {signature}"
        )
        raise EngineMismatch(
            f"has {told}, which {host.title} does not call",
            where=folder,
            expected=f"a UNet with the signature {' or '.join(host.signatures)}",
            hint=build,
        )
    if found := engine_faults(folder) if made.kind == "engine" else faults(folder):
        raise ArtifactError(f"is damaged: {'; '.join(found[:3])}", where=folder, hint=f"build it again: {build}")
    chosen = name or str(
        made.config.get("model_name") or (given.parent.name if given.name in ("engine", "onnx") else given.name)
    )
    if not re.fullmatch(r'[^<>:"/\\|?*\x00-\x1f]{1,100}', chosen) or chosen[0] in ". " or chosen[-1] in ". ":
        raise UsageError(f"{chosen!r} is no name for a folder", hint="--name NAME")
    files = {path: Entry(entry.sha256, entry.bytes) for path, entry in made.files.items()} | {
        MANIFEST_NAME: Entry.of(folder / MANIFEST_NAME)
    }
    return Engine(chosen, folder, made, files)


def _held(folder: Path) -> Path:
    """Where the manifest is, in a folder as `export` or `export --trt` writes it."""
    return next(
        (place for place in (folder, folder / "engine", folder / "onnx") if (place / MANIFEST_NAME).is_file()), folder
    )


def plugin_folder(plugin: str) -> Path:
    """Where a plugin lies: in the package, as a wheel has it (`setup.py`), else beside it, as a checkout has it.

    Raises:
        ArtifactError: this installation has none.
    """
    places = [folder / "plugins" / plugin for folder in Path(__file__).parents[1:3]]
    for place in places:
        if place.is_dir():
            return place
    raise ArtifactError(
        f"this installation has no plugin {plugin}", where=places[0], hint="pip install --force-reinstall sdcompress"
    )


def _noted(done: Done, host: Host, root: Path) -> Done:
    """What was done, with a note where the host runs meanwhile."""
    process = running(host, root) if done.written or done.removed else None
    if process is None:
        return done
    return replace(
        done,
        notes=(
            *done.notes,
            f"{host.title} is running (process {process}): it goes on with what it has loaded until it is restarted",
        ),
    )


def _copied(source: Path, inside: str) -> dict[str, tuple[Path, Entry]]:
    """Path in the host → (file, what it is), for the files of a folder of ours; neither hidden ones nor what Python has
    made of them.
    """
    found = {}
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if (
            path.is_file()
            and "__pycache__" not in relative.parts
            and not any(part.startswith(".") for part in relative.parts)
        ):
            found[f"{inside}/{relative.as_posix()}"] = (path, Entry.of(path))
    return found


def _linked(source: Path, inside: str) -> dict[str, tuple[Path, Entry]]:
    """The same by links: one for a package, one for each entry of a plugin, whose folder is the host's and holds the
    record.
    """
    entries = (
        [source]
        if inside.endswith(source.name)
        else [path for path in sorted(source.iterdir()) if path.name != "__pycache__" and not path.name.startswith(".")]
    )
    return {inside if path is source else f"{inside}/{path.name}": (path, Entry(link=str(path))) for path in entries}


def _weights(model: str | Path, engines: Sequence[Engine], stack: ExitStack, report: Reporter) -> tuple[Path, Entry]:
    """The model as one LDM file, for engines that were made from it.

    Raises:
        UsageError: there are no engines. EngineMismatch: they were made from another model, or with a LoRA in it.
    """
    from sdcompress.hosts.ldm import export_ldm
    from sdcompress.teacher import load_teacher, resolve, sha256_of

    if not engines:
        raise UsageError("--with-weights without an engine", expected="the engines that were made from this model")
    path = resolve(model)
    digest = sha256_of(path)
    for engine in engines:
        made_from = engine.manifest.inputs
        if made_from.get("pipeline") != digest or any(source.startswith("lora ") for source in made_from):
            told = (
                "has a LoRA in it that this model has not"
                if made_from.get("pipeline") == digest
                else "was made from another model"
            )
            raise EngineMismatch(
                f"{engine.name} {told}, so its pictures would be others in torch",
                where=path,
                expected="the model it was exported from, unchanged",
            )
    if path.is_file() and path.suffix == ".safetensors":
        return path, Entry.of(path)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sdcompress-")))
    report.say("writing the model as one LDM file")
    written = export_ldm(load_teacher(path, as_stored=True).pipeline, folder / WEIGHTS)
    return written, Entry.of(written)


def _apply(host: Host, root: Path, wanted: Mapping[str, tuple[Path, Entry]], names: set[str], report: Reporter) -> Done:
    """Bring the plugin and the engines `names` from what the record says to what is wanted: path in the host → (source,
    what it is).
    """
    record, broken = read(host, root)
    before = record or Record()
    known = dict(before.files)
    stale = {
        path: entry for path, entry in known.items() if path not in wanted and engine_of(host, path) in {None, *names}
    }
    todo: list[Any] = []
    unchanged: list[Any] = []
    foreign: list[Any] = []
    for path, (_, entry) in wanted.items():
        state = _lies_there(host, root, path, entry, known, stale)
        if state == "same":
            (unchanged if path in known or broken else foreign).append(path)
        else:
            todo.append(path)
    if changed := [
        path for path, entry in stale.items() if os.path.lexists(root / path) and not entry.is_at(root / path)
    ]:
        raise ArtifactError(
            "was changed since it was installed, and is not in what is installed now",
            where=root / changed[0],
            hint=_AWAY,
        )
    mine = {path: wanted[path][1] for path in wanted if path not in foreign}
    after = {path: entry for path, entry in known.items() if path not in stale} | mine
    version, created = _version(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    notes = (
        [f"{len(foreign)} files were there already, the same, and are not ours: an uninstall leaves them"]
        if foreign
        else []
    )
    if not todo and not stale and record is not None and (record.files, record.version) == (after, version):
        return Done(unchanged=tuple(unchanged), notes=tuple(notes))
    require_space(_existing(root / host.models), sum(wanted[path][1].bytes for path in todo), "the install")
    if broken is not None:
        backup = set_aside(root / host.record)
        after[backup.relative_to(root).as_posix()] = Entry.of(backup)
        notes.append(
            f"the record of earlier installs was broken ({broken}); it is kept as {backup.name}, and what was there and"
            " the same counts as ours again"
        )
    links = {path: entry for path, entry in stale.items() if entry.link}
    removed, _ = remove(root, links)  # before folders are made, which would be made behind them
    folders, ready = list(before.folders), list[tuple[Path, Path]]()
    if (
        broken is not None
    ):  # which of them were there before us is not known any more; ours in name, they go when they are empty
        folders += {
            str(above)
            for path in after
            for above in PurePosixPath(path).parents
            if str(above).startswith((host.extension, host.models))
        }
    try:
        for path in [host.record, *todo]:
            folders += make_folders(root, str(PurePosixPath(path).parent))
        # Of the old and the new, so that an uninstall finds every file of ours whatever happens from here on.
        write_record(root / host.record, Record({**known, **after}, tuple(folders), version, created))
        with report.task(
            f"copying to {host.title}", total=sum(wanted[path][1].bytes for path in todo) >> 20
        ) as advance:
            for path in (path for path in todo if not wanted[path][1].link):
                ready.append((copy_beside(*wanted[path], root / path), root / path))
                advance(wanted[path][1].bytes >> 20, note=PurePosixPath(path).name)
        for temporary, target in sorted(
            ready, key=lambda pair: pair[1].name in (MANIFEST_NAME, "__init__.py")
        ):  # what makes a host look comes last
            os.replace(temporary, target)
    except BaseException:
        _take_back(host, root, [temporary for temporary, _ in ready], {**known, **after}, folders, version, created)
        raise
    gone, _ = remove(root, {path: entry for path, entry in stale.items() if path not in links})
    folders = list(prune_folders(root, folders))
    for path in (path for path in todo if wanted[path][1].link):
        folders += make_folders(root, str(PurePosixPath(path).parent))
        (root / path).unlink(missing_ok=True)
        os.symlink(wanted[path][1].link, root / path, target_is_directory=wanted[path][0].is_dir())
    write_record(root / host.record, Record(after, tuple(folders), version, created))
    return Done(tuple(todo), tuple(sorted([*removed, *gone])), tuple(unchanged), notes=tuple(notes))


_AWAY = "move it away, then install again"


def _lies_there(
    host: Host, root: Path, path: str, entry: Entry, known: Mapping[str, Entry], stale: Mapping[str, Entry]
) -> str:
    """`same`, `ours` (to be replaced) or `nothing`.

    Raises:
        ArtifactError: something that is not ours, or that was changed.
    """
    place, ours = root / path, (host.extension, host.models)
    for above in map(str, PurePosixPath(path).parents):
        if (root / above).is_symlink() and (
            above == host.extension or any(above.startswith(f"{folder}/") for folder in ours)
        ):
            if above in stale and stale[above].is_at(root / above):
                return "nothing"
            raise ArtifactError(
                "is a link that is not ours, and files would be written behind it", where=root / above, hint=_AWAY
            )
        if os.path.lexists(root / above) and not (root / above).is_dir():
            raise ArtifactError("is a file that is not ours, and a folder goes here", where=root / above, hint=_AWAY)
    if entry.is_at(place):
        return "same"
    if not os.path.lexists(place):
        return "nothing"
    if path in known and known[path].is_at(place):
        return "ours"
    inside = (
        {
            found.relative_to(root).as_posix()
            for found in place.rglob("*")
            if not found.is_dir() and found.parent.name != "__pycache__"
        }
        if place.is_dir() and not place.is_symlink()
        else set()
    )
    if inside and inside <= stale.keys():
        return "ours"
    what = "was changed since it was installed" if path in known else "is there already and is not ours"
    raise ArtifactError(
        what,
        where=place,
        hint=_AWAY + (", or give the engine another name: --name NAME" if engine_of(host, path) else ""),
    )


def _take_back(
    host: Host,
    root: Path,
    copies: Sequence[Path],
    files: Mapping[str, Entry],
    folders: Sequence[str],
    version: str,
    created: str,
) -> None:
    """After a failure: no copies, and a record of what is there, or nothing of ours at all."""
    with suppress(OSError):
        for copy in copies:
            copy.unlink(missing_ok=True)
        there = {path: entry for path, entry in files.items() if os.path.lexists(root / path)}
        if not there:
            (root / host.record).unlink(missing_ok=True)
        left = prune_folders(root, folders)
        if there:
            write_record(root / host.record, Record(there, left, version, created))


def _check_folders(host: Host, root: Path) -> None:
    """Refuse places that cannot be written to before anything is.

    Raises:
        StorageError: a link to nowhere, a file where a folder goes, or no permission.
    """
    for place in (root / host.extension, root / host.models):
        existing = _existing(place)
        if dangling := [path for path in (place, *place.parents) if path.is_symlink() and not path.exists()]:
            raise StorageError(
                f"is a link to {os.readlink(dangling[0])}, which is not there",
                where=dangling[0],
                hint="mount or make that folder, or remove the link",
            )
        if not existing.is_dir():
            raise StorageError("is a file, and a folder goes here", where=existing, hint="move it away")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise StorageError(
                "no permission to write here", where=existing, hint=f"run this as the user who runs {host.title}"
            )


def _existing(place: Path) -> Path:
    return next(path for path in (place, *place.parents) if path.exists())


def _version() -> str:
    try:
        return metadata.version("sdcompress")
    except metadata.PackageNotFoundError:
        return "a checkout"


@contextmanager
def _writing(root: Path, host: Host) -> Iterator[None]:
    """What the file system says, as a `StorageError` with a way out that fits an install."""
    try:
        yield
    except OSError as error:
        known = storage_error(error, error.filename or root)
        what = known.what if known else f"the file system failed ({error.strerror or error})"
        no_links = known is not None and getattr(error, "winerror", None) == 1314
        hint = (
            known.hint if known and no_links else f"close {host.title} if it runs, and run this as the user who runs it"
        )
        raise StorageError(what, where=error.filename or root, hint=hint) from error


def _engine_status(name: str, folder: Path, ours: bool) -> EngineStatus:
    try:
        made = read_manifest(folder)
        if made is None:
            return EngineStatus(name, folder, ours, {}, f"has no {MANIFEST_NAME}", None)
        found = engine_faults(folder) if made.kind == "engine" else faults(folder)
        config, size = made.config, sum(entry.bytes for entry in made.files.values())
        runtime = f"{config.get('flavour')} {config.get('version')}" if made.kind == "engine" else "onnxruntime"
        facts = {
            name: config.get(name)
            for name in ("model_name", "precision", "signature", "compute_capabilities", "platform")
        } | {"runtime": runtime, "created": made.created, "bytes": size}
        hindrance = obstacle(config, folder) if made.kind == "engine" else None
        why_not = hindrance.what if hindrance else onnxruntime_missing() if made.kind == "onnx" else None
        return EngineStatus(name, folder, ours, facts, "; ".join(found) or None, why_not)
    except SdCompressError as error:
        return EngineStatus(name, folder, ours, {}, error.what, None)
