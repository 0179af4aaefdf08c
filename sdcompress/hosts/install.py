"""Install the plugin and engines into a host, and take them away again."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import sdcompress_engines
from sdcompress_engines.errors import (
    ArtifactError,
    EngineMismatch,
    UsageError,
)
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.hosts.engine_folder import WEIGHTS, Engine, engine_of, engines_of, read_engine_folder
from sdcompress.hosts.find import running
from sdcompress.hosts.host import Host
from sdcompress.hosts.record import (
    Entry,
    leftovers,
    prune_folders,
    remove,
    write_record,
)
from sdcompress.hosts.transaction import Done, _apply, _check_folders, _writing, read


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
    from sdcompress.checkpoints.write import export_ldm
    from sdcompress.models.load import load_pipeline
    from sdcompress.models.locate import resolve, sha256_of

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
    written = export_ldm(load_pipeline(path, as_stored=True).pipeline, folder / WEIGHTS)
    return written, Entry.of(written)
