"""Install the plugin and engines into a host, and uninstall them again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from sdcompress_engines.command import command_line
from sdcompress_engines.engine_files import find_manifest_folder
from sdcompress_engines.errors import ArtifactError, SdCompressError, UsageError, shorten
from sdcompress_engines.few_steps import read_exported_few_steps
from sdcompress_engines.manifest import MANIFEST_NAME, read_manifest
from sdcompress_engines.paths import file_inside, is_link
from sdcompress_engines.progress import SILENT, Reporter
from sdcompress_engines.trust import find_unallowed, trust_command

from sdcompress.hosts.engine_folder import Engine, engine_names, engine_of, read_engine_folder
from sdcompress.hosts.entry import Entry, Item
from sdcompress.hosts.environment import find_process
from sdcompress.hosts.files import find_leftovers, prune_folders, remove_unchanged
from sdcompress.hosts.host import Host
from sdcompress.hosts.plugin_files import plugin_items
from sdcompress.hosts.record import read_host_record, write_record
from sdcompress.hosts.storage import check_writable, host_lock, host_storage_errors
from sdcompress.hosts.transaction import Outcome, put_files
from sdcompress.hosts.weights import WEIGHTS, prepare_weights


def install(
    host: Host,
    root: Path,
    engines: Sequence[str | Path] = (),
    *,
    name: str | None = None,
    link: bool = False,
    weights: str | Path | None = None,
    report: Reporter = SILENT,
) -> Outcome:
    """Put the host's plugin and these engines into its folder. Files that are there already are not written again.

    Args:
        host: the program.
        root: its folder.
        engines: folders that `sdcompress export` has written. The engine may also lie in `DIR/engine` or `DIR/onnx`.
        name: of a single engine, by default its model's.
        link: create links instead of copies.
        weights: the model that the engines were exported from, to be put beside each as one LDM file.
        report: shows the progress.

    Raises:
        UsageError: an option or path that does not fit.
        ArtifactError: a damaged engine, a file in the way that was changed or not installed by sdcompress, or another
            install at work.
        EngineMismatch: an engine with another host's signature, or weights of another model.
        StorageError: no permission, or no space.
    """
    if weights is not None and (link or host.name == "comfyui"):
        raise UsageError(
            "--with-weights with --link" if link else "--with-weights for ComfyUI, which loads such a file itself",
            hint=(
                "leave out --with-weights or --link"
                if link
                else "sdcompress export MODEL --ldm -o FILE.safetensors, into models/checkpoints"
            ),
        )
    opened = _read_engines(engines, host, name)
    check_writable(host, root)
    items = plugin_items(host, link=link)
    for engine in opened:
        items |= _engine_items(engine, root, f"{host.models}/{engine.name}", link=link)
    with host_lock(root), ExitStack() as stack, host_storage_errors(host, root):
        if weights is not None:
            item = prepare_weights(weights, opened, stack, report)
            items |= {f"{host.models}/{engine.name}/{WEIGHTS}": item for engine in opened}
        replaced = _find_replaced(host, root, opened)
        outcome = put_files(host, root, items, {engine.name for engine in opened}, report)
        for file in find_leftovers(host, root):  # of installs that were killed; none is at work, by the lock
            (root / file).unlink(missing_ok=True)
        outcome = replace(outcome, notes=(*outcome.notes, *replaced))
        return _note_running(_note_sampling(_note_foreign(outcome, opened), host, opened), host, root)


def _read_engines(engines: Sequence[str | Path], host: Host, name: str | None) -> list[Engine]:
    opened = [read_engine_folder(path, host, name) for path in engines]
    if name is not None and len(opened) != 1:
        raise UsageError(f"--name with {len(opened)} engines", expected="one")
    seen: set[str] = set()
    for engine in opened:
        if engine.name.lower() in seen:  # some file systems do not distinguish case
            raise UsageError(f"two engines are called {engine.name!r}", hint="install one of them with --name NAME")
        seen.add(engine.name.lower())
    return opened


def _engine_items(engine: Engine, root: Path, place: str, *, link: bool) -> dict[str, Item]:
    if link:
        if engine.folder.is_relative_to((root / place).resolve()) and not is_link(root / place):
            raise UsageError(
                "lies where the link to it would be",
                where=engine.folder,
                expected="the folder that it was installed from",
                hint="leave out --link, or give the engine another name: --name NAME",
            )
        return {place: Item(engine.folder, Entry(link=str(engine.folder)))}
    source = engine.folder / MANIFEST_NAME
    return {
        f"{place}/{path}": Item(file_inside(engine.folder, path, source=source), entry)
        for path, entry in engine.files.items()
    }


def uninstall(host: Host, root: Path, names: Sequence[str] = ()) -> Outcome:
    """Remove what `install` has put into the host's folder, and nothing else.

    Args:
        host: the program.
        root: its folder.
        names: of the engines to remove. If empty, the plugin and all engines are removed.

    Raises:
        UsageError: nothing is installed, or no engine has that name.
        ArtifactError: the record is broken, or another install is at work.
        StorageError: no permission.
    """
    check_writable(host, root)
    with host_lock(root):
        return _uninstall(host, root, names)


def _uninstall(host: Host, root: Path, names: Sequence[str]) -> Outcome:
    record, broken = read_host_record(host, root)
    if broken is not None:
        raise ArtifactError(
            f"the record of what was installed is broken ({broken}), so it is unknown what may be removed",
            where=root / host.record,
            hint=(
                f"{command_line(['sdcompress', 'install', host.name, str(root)])}, which writes a new record and keeps"
                " this one as a backup"
            ),
        )
    if record is None:
        return _remove_begun(host, root)
    installed = engine_names(host, record)
    if unknown := sorted(set(names) - set(installed)):
        raise UsageError(
            f"no engine {unknown[0]!r} was installed here", where=root, expected=", ".join(installed) or None
        )
    chosen = {path: entry for path, entry in record.files.items() if not names or engine_of(host, path) in names}
    left = {path: entry for path, entry in record.files.items() if path not in chosen}
    with host_storage_errors(host, root):
        removed, kept = remove_unchanged(host, root, chosen)
        if not left:
            for file in [*find_leftovers(host, root), host.record]:
                (root / file).unlink(missing_ok=True)
        folders = prune_folders(host, root, record.folders)
        if left:
            write_record(root / host.record, replace(record, files=left, folders=folders))
    return _note_running(Outcome(removed=tuple(sorted(removed)), kept=kept), host, root)


def _remove_begun(host: Host, root: Path) -> Outcome:
    """Remove what an install has left that was stopped before it wrote its record.

    Raises:
        UsageError: there is nothing.
    """
    with host_storage_errors(host, root):
        leftovers = find_leftovers(host, root)
        for file in leftovers:
            (root / file).unlink(missing_ok=True)
        is_begun = (root / host.extension).is_dir() and not prune_folders(host, root, [host.extension])
    if not leftovers and not is_begun:
        raise UsageError("nothing is installed here by sdcompress", where=root)
    return Outcome(removed=(*leftovers, *([host.extension] if is_begun else [])))


def _find_replaced(host: Host, root: Path, engines: Sequence[Engine]) -> list[str]:
    """Returns a note for each engine in whose place an engine of another model is installed."""
    notes = []
    for engine in engines:
        with suppress(SdCompressError, OSError):  # what is damaged there is reported or replaced anyway
            folder = find_manifest_folder(root / host.models / engine.name)
            old = None if folder is None else read_manifest(folder)
            if old is not None and (source := old.inputs.get("pipeline")) != engine.manifest.inputs.get("pipeline"):
                name = shorten(old.config.get("model_name") or "without a name", 100)
                notes.append(
                    f"{engine.name} replaces the engine of another model: {name}, sha256 {(source or 'unknown')[:12]}"
                )
    return notes


def _note_foreign(outcome: Outcome, engines: Sequence[Engine]) -> Outcome:
    """Returns the outcome, with a note for each engine that was built elsewhere and is not allowed to run yet."""
    notes = [
        f"{engine.name} was built elsewhere or by an earlier version, and is executable code, so the host refuses it"
        f" until you allow it: {trust_command(engine.folder)}"
        for engine in engines
        if find_unallowed(engine.manifest)
    ]
    return replace(outcome, notes=(*outcome.notes, *notes))


def _note_sampling(outcome: Outcome, host: Host, engines: Sequence[Engine]) -> Outcome:
    """Returns the outcome, with a note for each few-step engine: what to choose in the host."""
    known = {engine.name: read_exported_few_steps(engine.folder, engine.manifest) for engine in engines}
    notes = [
        f"{name} was trained for {sampling.describe(host.name)}: choose these for it"
        for name, sampling in known.items()
        if sampling is not None
    ]
    return replace(outcome, notes=(*outcome.notes, *notes))


def _note_running(outcome: Outcome, host: Host, root: Path) -> Outcome:
    """Returns the outcome, with a note if files were changed while the host runs."""
    process = find_process(host, root) if outcome.written or outcome.removed else None
    if process is None:
        return outcome
    note = f"{host.title} is running (process {process}): it uses what it has loaded until it is restarted"
    return replace(outcome, notes=(*outcome.notes, note))
