"""Facts about built engines, as plain values: those of the store, and those of a folder that an export has written."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sdcompress_engines.engine_files import SUFFIX, engine_faults, find_manifest_folder, folder_faults
from sdcompress_engines.engine_key import EngineKey
from sdcompress_engines.errors import ArtifactError, UsageError
from sdcompress_engines.export_folder import check_names
from sdcompress_engines.flavour import obstacle
from sdcompress_engines.manifest import MANIFEST_NAME, Manifest, read_manifest
from sdcompress_engines.store import EngineStore
from sdcompress_engines.store_entries import BrokenEngine, Entry
from sdcompress_engines.trust import code_files, find_consent

from sdcompress.support.faults import faults_of

BUILD = "sdcompress export MODEL --trt -o DIR"
"""The command that builds engines, for hints."""


class _Tensor(BaseModel):
    """An input or output of an engine, as its manifest has it."""

    name: str
    shape: list[int | str]
    dtype: str = ""


class _ShownConfig(BaseModel):
    """What is shown of the config of an engine manifest, besides its key."""

    model_config = ConfigDict(strict=True)
    components: list[str]
    model_name: str | None = None
    vae_scale: Annotated[int, Field(ge=1, le=1024)] = 8
    inputs: dict[str, list[_Tensor]] = {}
    outputs: dict[str, list[_Tensor]] = {}


def find_entry(store: EngineStore, prefix: str) -> Entry:
    """Returns the one entry whose key begins with `prefix`.

    Args:
        store: the store to search.
        prefix: the first hex digits of a key, in either case.

    Raises:
        UsageError: there is no such entry, or more than one.
    """
    entries = [entry for entry in store.entries() if prefix and entry.digest.startswith(prefix.lower())]
    if len(entries) > 1:
        raise UsageError(
            f"{len(entries)} engines begin with {prefix!r}",
            expected="one of " + ", ".join(entry.digest for entry in entries),
        )
    if not entries:
        raise UsageError(f"no engine {prefix!r}", where=store.root, hint="sdcompress engines list")
    return entries[0]


def find_engine_folder(folder: Path, kinds: Collection[str] = ("engine",)) -> Path:
    """Returns the folder that holds the engines: `folder`, or the `engine` folder in it.

    A folder whose manifest is damaged is returned too, so that the caller can report the damage.

    Args:
        folder: what `sdcompress export --trt` has written.
        kinds: of the manifests to look for.

    Raises:
        UsageError: there is no such folder. ArtifactError: it holds no engines.
    """
    if not folder.is_dir():
        raise UsageError(
            "no such folder",
            where=folder,
            expected="one that `sdcompress export --trt` has written",
            hint="sdcompress engines list, for the store",
        )
    place = find_manifest_folder(folder)
    if place is not None:
        try:
            manifest = read_manifest(place)
        except ArtifactError:
            return place
        if manifest is not None and manifest.kind in kinds:
            return place
    raise ArtifactError(
        "holds no engines", where=folder, expected="a folder that `sdcompress export --trt` has written", hint=BUILD
    )


def list_faults(folder: Path) -> list[str]:
    """Returns what is wrong with a folder of engines, packages or graphs; nothing if all is well.

    Every byte is read. A damaged manifest is a fault, too.
    """
    try:
        manifest = read_manifest(folder)
        found = folder_faults(folder, "engine" if manifest is None else manifest.kind)
        if manifest is not None and not found:
            check_names(folder, manifest)
        return found
    except ArtifactError as error:
        return [error.what]


def describe_code(folder: Path) -> list[dict[str, Any]]:
    """Returns file, sha256 and consent of each engine and package that a folder's manifest names.

    The consent is a text such as `built here on 2026-11-29`; None where the file was built elsewhere and is not allowed
    to run. No byte of the files is read.

    Args:
        folder: that holds the manifest.

    Raises:
        ArtifactError: the manifest cannot be read, or was edited.
    """
    manifest = read_manifest(folder)
    code = {} if manifest is None else code_files(manifest)
    consents = {name: find_consent(sha256) for name, sha256 in code.items()}
    return [
        {"file": name, "sha256": code[name], "consent": None if consent is None else str(consent)}
        for name, consent in consents.items()
    ]


def describe_folder(folder: Path, *, contents: bool = False) -> list[dict[str, Any]]:
    """Returns the facts of each engine in a folder.

    Args:
        folder: as for `find_engine_folder`.
        contents: read the files' bytes and compare them with the manifest, not only their sizes.

    Raises:
        UsageError: there is no such folder. ArtifactError: it holds no engines, or its manifest is damaged.
    """
    place = find_engine_folder(folder)
    fault = "; ".join(engine_faults(place, contents=contents)) or None
    manifest = read_manifest(place)
    if manifest is None:
        return []
    components = _read_config(manifest, place).components
    return [_describe(manifest, component, place / f"{component}{SUFFIX}", fault) for component in components]


def _read_config(manifest: Manifest, folder: Path) -> _ShownConfig:
    """Returns what is shown of a manifest's config.

    Raises:
        ArtifactError: it holds values of other kinds.
    """
    try:
        return _ShownConfig.model_validate(manifest.config)
    except ValidationError as error:
        raise ArtifactError(
            f"does not describe its engines: {faults_of(error, noun='entry')}",
            where=folder / MANIFEST_NAME,
            hint=f"build them again: {BUILD}",
        ) from error


def describe_path(path: Path) -> list[dict[str, Any]]:
    """Returns the facts of each engine in a folder, or of one engine file. The files' bytes are checked.

    Args:
        path: an engine file, or a folder as for `find_engine_folder`.

    Raises:
        UsageError: the manifest names no such engine. ArtifactError: as `describe_folder`.
    """
    if path.is_dir():
        facts = describe_folder(path, contents=True)
    else:
        facts = [fact for fact in describe_folder(path.parent, contents=True) if Path(fact["path"]).name == path.name]
    if not facts:
        raise UsageError(
            "is not an engine that the manifest of its folder names",
            where=path,
            expected="a file or folder that `sdcompress export --trt` has written",
        )
    return facts


def describe_entry(entry: Entry, *, contents: bool = False) -> dict[str, Any]:
    """Returns the facts of an engine of the store.

    Args:
        entry: of the store.
        contents: read the file's bytes and compare them with the manifest, not only its size.
    """
    if isinstance(entry, BrokenEngine):
        return _describe_broken(entry)
    try:
        _read_config(entry.manifest, entry.folder)
    except ArtifactError as error:
        return _describe_broken(BrokenEngine(entry.folder, error.what))
    fault = "; ".join(engine_faults(entry.folder)) if contents else None
    facts = _describe(entry.manifest, entry.component, entry.path, fault or None)
    return facts | {"unused_s": _seconds_since(entry.used)}


def _describe_broken(entry: BrokenEngine) -> dict[str, Any]:
    unknown = (
        "component",
        "model",
        "model_name",
        "precision",
        "signature",
        "flavour",
        "version",
        "platform",
        "created",
    )
    return (
        {"key": entry.digest}
        | dict.fromkeys(unknown)
        | {
            "compute_capabilities": [],
            "profiles": [],
            "profile": "",
            "path": str(entry.folder),
            "bytes": entry.bytes,
            "age_s": _seconds_since(entry.used),
            "fault": entry.fault,
            "loads_here": False,
            "why_not": f"damaged: {entry.fault}",
        }
    )


def _describe(manifest: Manifest, component: str, path: Path, fault: str | None) -> dict[str, Any]:
    config, file = manifest.config, manifest.files.get(path.name)
    key = EngineKey.of(config, component)
    mismatch = obstacle(config)
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
        "profile": format_profiles(config, component),
        "profiles": [{name: list(shapes) for name, shapes in profile.items()} for profile in key.profiles],
        "inputs": config.get("inputs", {}).get(component, []),
        "outputs": config.get("outputs", {}).get(component, []),
        "options": dict(key.options),
        "figures": manifest.figures,
        "path": str(path),
        "bytes": file.bytes if file else 0,
        "sha256": file.sha256 if file else None,
        "created": manifest.created,
        "age_s": _read_age_s(manifest.created),
        "fault": fault,
        "loads_here": mismatch is None and fault is None,
        "why_not": f"damaged: {fault}" if fault else mismatch.what if mismatch else None,
        "hint": mismatch.hint if mismatch else None,
    }


def format_profiles(config: Mapping[str, Any], component: str) -> str:
    """Returns a component's profiles as the export's options take them, with `+` between them.

    An example is `512:768:1024 px, batch 1:2:8`: min, opt and max, or one number where they are equal. Where the
    manifest does not name the axes, the text has the shapes of each input.

    Args:
        config: of an engine manifest.
        component: one of its components.
    """
    axes = {
        spec["name"]: spec["shape"]
        for spec in config.get("inputs", {}).get(component, [])
        if isinstance(spec, dict) and isinstance(spec.get("shape"), list) and "name" in spec
    }
    scale = config.get("vae_scale", 8)
    return " + ".join(_format_profile(profile, axes, scale) for profile in config["profiles"][component])


def _format_profile(profile: Mapping[str, Any], axes: Mapping[str, Sequence[Any]], scale: int) -> str:
    """Returns one profile as a text.

    Args:
        profile: input → its min, opt and max shapes.
        axes: input → the names or sizes of its axes.
        scale: pixels in a latent pixel.
    """
    sizes: dict[str, str] = {}
    for name, shapes in profile.items():
        for at, axis in enumerate(axes.get(name, ())):
            if isinstance(axis, str) and all(at < len(shape) for shape in shapes):
                unit = scale if axis in ("height", "width") else 1
                sizes.setdefault(axis.removeprefix("image_"), format_range([shape[at] * unit for shape in shapes]))
    height, width = sizes.pop("height", ""), sizes.pop("width", "")
    parts = [f"{height} px" if height == width else f"height {height} width {width} px"] if height or width else []
    parts += [f"{axis} {size}" for axis, size in sizes.items() if size]
    return ", ".join(parts or [f"{name} {format_shapes(shapes)}" for name, shapes in profile.items()])


def format_shapes(shapes: Sequence[Sequence[int]]) -> str:
    """Returns min, opt and max shapes as `1x4x64x64:2x4x64x64:8x4x64x64`, or one of them where they are equal."""
    return format_range(["x".join(map(str, shape)) for shape in shapes])


def format_range(sizes: Sequence[object]) -> str:
    """Returns min, opt and max as `1:2:8`, or one of them where they are equal."""
    return str(sizes[0]) if len(set(sizes)) == 1 else ":".join(map(str, sizes))


def _read_age_s(created: str) -> float | None:
    """Returns the seconds since a manifest's time, or None where it cannot be read."""
    try:
        built = datetime.fromisoformat(created)
        return _seconds_since((built if built.tzinfo else built.replace(tzinfo=timezone.utc)).timestamp())
    except (TypeError, ValueError):
        return None


def _seconds_since(timestamp_s: float) -> float:
    return round(max(0.0, time.time() - timestamp_s), 1)
