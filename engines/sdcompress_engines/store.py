"""The store of built engines: one folder a key, found again instead of built again, whole or not there, whoever is
killed when.

<root>/<digest>/           <component>.engine and its manifest, renamed into place when both are complete
<root>/.<digest>.*         a build under way, or what a killed one left
<root>/locks/<digest>.lock held while a key is built or removed; the operating system releases it when the process ends
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from .errors import (
    ArtifactError,
    EngineError,
    EngineMismatch,
    SdCompressError,
    StorageError,
    UsageError,
    storage_errors,
)
from .flavour import binding, obstacle
from .locks import HeldLock, try_lock
from .manifest import MANIFEST_NAME, Manifest, cache_folder, canonical, faults, read_manifest, staged, write_manifest
from .progress import SILENT, Reporter

Profiles = tuple[Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]], ...]
Build = Callable[[Path], tuple[Mapping[str, Any], Mapping[str, Any]]]
"""Writes `<component>.engine` into the folder it is given; returns what the manifest's `config` says besides the key,
and the figures.
"""

SUFFIX = ".engine"
_DIGEST = re.compile(r"[0-9a-f]{20}")
_LEFTOVER = re.compile(r"\.([0-9a-f]{20})\..*\.(partial|old)")
_OURS = ("locks", "timing")
_POLL_S = 0.1
_ELSEWHERE = "set SDCOMPRESS_CACHE to another folder"
_REBUILD = "build it again: sdcompress export MODEL --trt -o DIR"


@dataclass(frozen=True)
class EngineKey:
    """Everything that decides what an engine is; two builds of one key are one build.

    Names and values are those of an engine manifest's config.

    Attributes:
        model: sha256 of the graph.
        version: of the flavour's library, as it is bound: see `flavour.binding`, which `compute_capabilities` and
            `platform` go through too.
        profiles: input → (min, opt, max) shapes, one mapping a profile, in engine order.
        options: of the builder; all enter.
    """

    model: str
    component: str
    precision: str
    signature: str
    flavour: str
    version: str
    compute_capabilities: tuple[tuple[int, int], ...]
    platform: str
    profiles: Profiles
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """20 hex digits: the engine's name in the store."""
        return hashlib.sha256(
            canonical(self._described() | {"compute_capabilities": None} | binding(vars(self)))
        ).hexdigest()[:20]

    def config(self) -> dict[str, Any]:
        """The part of an engine manifest's config that says this key."""
        return self._described() | {"keys": {self.component: self.digest}}

    def _described(self) -> dict[str, Any]:
        texts = ("flavour", "version", "platform", "precision", "signature")
        return {name: getattr(self, name) for name in texts} | {
            "compute_capabilities": [list(card) for card in self.compute_capabilities],
            "components": [self.component],
            "profiles": {
                self.component: [
                    {name: [list(shape) for shape in shapes] for name, shapes in profile.items()}
                    for profile in self.profiles
                ]
            },
            "options": dict(self.options),
            "model": {self.component: self.model},
        }

    @classmethod
    def of(cls, config: Mapping[str, Any], component: str) -> EngineKey:
        """The key of one component's engine, from the config of a manifest.

        Raises:
            ArtifactError: the config does not say it.
        """
        try:
            texts = {name: str(config[name]) for name in ("precision", "signature", "flavour", "version", "platform")}
            cards = tuple((int(major), int(minor)) for major, minor in config["compute_capabilities"])
            profiles = tuple(
                {str(name): _shapes(shapes) for name, shapes in profile.items()}
                for profile in config["profiles"][component]
            )
            return cls(
                str(config["model"][component]),
                component,
                compute_capabilities=cards,
                profiles=profiles,
                options=dict(config["options"]),
                **texts,
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ArtifactError(
                f"the manifest does not say what the {component} engine is ({type(error).__name__}: {error})",
                hint=_REBUILD,
            ) from error


def _shapes(shapes: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    least, best, most = (tuple(int(size) for size in shape) for shape in shapes)
    return least, best, most


@dataclass(frozen=True)
class StoredEngine:
    """An entry whose manifest is sound and whose file has the right size; `EngineStore.verify` and `find` read the
    bytes too.
    """

    folder: Path
    manifest: Manifest
    component: str

    @property
    def digest(self) -> str:
        return self.folder.name

    @property
    def path(self) -> Path:
        """The engine file."""
        return self.folder / f"{self.component}{SUFFIX}"

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.manifest.files.values())

    @property
    def used(self) -> float:
        """When it was last asked for, or built: seconds since the epoch."""
        return _mtime(self.folder / MANIFEST_NAME)


@dataclass(frozen=True)
class BrokenEngine:
    """An entry that no runtime will see: what is wrong with it."""

    folder: Path
    fault: str

    @property
    def digest(self) -> str:
        return self.folder.name

    @property
    def bytes(self) -> int:
        return _size(self.folder)

    @property
    def used(self) -> float:
        return _mtime(self.folder)


Entry = StoredEngine | BrokenEngine


@dataclass(frozen=True)
class Finding:
    """What is wrong with one folder; nothing where it is whole."""

    folder: Path
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Pruned:
    """A folder that was removed, or would be: the bytes that frees (none of a file that an output folder shares), and
    why.
    """

    folder: Path
    bytes: int
    reason: str


@dataclass(frozen=True)
class Verdict:
    """What `EngineStore.verify` found: a finding an entry, and what killed builds had left, which is gone now."""

    findings: tuple[Finding, ...]
    swept: tuple[Pruned, ...]

    @property
    def clean(self) -> bool:
        return not any(finding.faults for finding in self.findings)


class EngineStore:
    """The engines under `root`, by default `engines` in sdcompress's cache folder.

    Any number of processes may share one.
    """

    def __init__(self, root: str | PathLike[str] | None = None) -> None:
        self.root = (cache_folder() / "engines" if root is None else Path(root)).absolute()

    def entries(self) -> list[Entry]:
        """Every entry by digest, broken ones too; the engines' bytes are not read."""
        found = (self._look(folder, contents=False) for folder in self._folders())
        return [entry for entry in found if entry is not None]

    def find(self, key: EngineKey) -> StoredEngine | None:
        """The engine of a key, its sha256 checked; None where there is none, or a damaged one."""
        entry = self._look(self.root / key.digest, contents=True)
        return entry if isinstance(entry, StoredEngine) else None

    def get_or_build(self, key: EngineKey, build: Build, report: Reporter = SILENT) -> tuple[StoredEngine, bool]:
        """The engine of a key, and whether it was there already.

        Where it was not, `build` makes it; a second process that wants it waits for the first.

        Raises:
            StorageError: the store cannot be written. EngineError: `build` wrote no engine, or one of another key.
                Besides, whatever `build` raises.
        """
        target = self.root / key.digest
        entry = self._look(target, contents=True)
        if not isinstance(entry, StoredEngine):
            with self._lock(
                key.digest,
                lambda: report.say(
                    f"waiting for another process that builds this {key.component} engine ({key.digest[:8]})"
                ),
            ):
                entry = self._look(target, contents=True)
                if not isinstance(entry, StoredEngine):
                    if isinstance(entry, BrokenEngine):
                        report.say(
                            f"the stored {key.component} engine {key.digest[:8]} is damaged ({entry.fault}): removed,"
                            " and built again"
                        )
                        self._remove(target)
                    for leftover in self._leftovers(key.digest):
                        self._remove(leftover)
                    self._build(key, build, target)
                    return self._whole(target), False
        with suppress(OSError):  # a store that is read, not written, keeps no account of its use
            os.utime(target / MANIFEST_NAME)
        return entry, True

    def verify(self) -> Verdict:
        """Read every entry whole, and remove what killed builds have left; a running build's folder stays.

        Raises:
            StorageError: a leftover cannot be removed.
        """
        swept = self.sweep()
        looked = {folder: self._look(folder, contents=True) for folder in self._folders()}
        findings = [
            Finding(folder, (entry.fault,) if isinstance(entry, BrokenEngine) else ())
            for folder, entry in looked.items()
            if entry is not None
        ]
        strangers = (
            path
            for path in self._listed()
            if not path.name.startswith(".") and path.name not in _OURS and not _DIGEST.fullmatch(path.name)
        )
        findings += [Finding(path, ("is no engine of this store",)) for path in strangers]
        return Verdict(tuple(findings), tuple(swept))

    def sweep(self, dry_run: bool = False) -> list[Pruned]:
        """Remove what killed builds have left; returns what was removed, or with `dry_run` would be.

        Raises:
            StorageError: it cannot be removed.
        """
        swept = []
        for path in self._leftovers():
            with self._try_lock(path.name[1:].partition(".")[0]) as free:
                size = _size(path, alone=True)
                if free and (dry_run or self._remove(path)):
                    swept.append(Pruned(path, size, "left by a build that was killed"))
        return swept

    def prune(
        self,
        older_than_days: float | None = None,
        unusable: bool = False,
        all: bool = False,
        keys: Iterable[str] = (),
        dry_run: bool = False,
    ) -> list[Pruned]:
        """Remove what killed builds have left and the entries that any of the conditions names, but none that is being
        built.

        Returns what was removed, or with `dry_run` would be.

        Args:
            older_than_days: not built and not asked for since.
            unusable: damaged, or made for another version, card or platform than this machine's. Where there is no
                runtime or no GPU, that does not count: nothing then tells which.
            keys: digests.

        Raises:
            UsageError: no such key. StorageError: an entry cannot be removed.
        """
        chosen = set(keys)
        entries = self.entries()
        if unknown := chosen - {entry.digest for entry in entries}:
            raise UsageError(f"no engine {', '.join(sorted(unknown))}", where=self.root, hint="sdcompress engines list")
        oldest = None if older_than_days is None else time.time() - older_than_days * 86400
        pruned = self.sweep(dry_run)
        for entry in entries:
            reason = "chosen" if all or entry.digest in chosen else None
            if reason is None and oldest is not None and entry.used < oldest:
                reason = f"not used for {(time.time() - entry.used) / 86400:.0f} days"
            if reason is None and unusable:
                reason = _unusable(entry)
            if reason is None:
                continue
            size = _size(entry.folder, alone=True)
            with self._try_lock(entry.digest) as free:
                if free and (dry_run or self._remove(entry.folder)):
                    pruned.append(Pruned(entry.folder, size, reason))
        return pruned

    def adopt(self, entry: StoredEngine, folder: Path) -> Path:
        """Put an entry's engine file into `folder`, sharing the disk space where the file system lets it; returns its
        path there.

        Raises:
            ArtifactError: the entry is gone. StorageError: no space, no permission.
        """
        target = folder / entry.path.name
        with storage_errors(target):
            folder.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                os.link(entry.path, target)
            except OSError:  # another file system, or one without hard links
                try:
                    shutil.copyfile(entry.path, target)
                except FileNotFoundError as error:
                    raise ArtifactError(
                        "the stored engine was removed in the meantime",
                        where=entry.folder,
                        hint="run the same command again",
                    ) from error
        return target

    def _build(self, key: EngineKey, build: Build, target: Path) -> None:
        with self._storage(), staged(target) as folder:
            config, figures = build(folder)
            engine = f"{key.component}{SUFFIX}"
            if not (folder / engine).is_file():
                raise EngineError(f"the build wrote no {engine}", where=folder)
            config = {**key.config(), **config}
            made = EngineKey.of(config, key.component).digest
            if made != key.digest:
                raise EngineMismatch(
                    f"the {key.component} engine that was built is not the one that was asked for: its key is {made}",
                    expected=key.digest,
                )
            write_manifest(folder, "engine", config=config, figures=figures)

    def _whole(self, target: Path) -> StoredEngine:
        entry = self._look(target, contents=False)
        if not isinstance(entry, StoredEngine):
            raise EngineError(
                f"the engine just built is damaged: {entry.fault if entry else 'it is gone'}",
                where=target,
                hint="check the disk",
            )
        return entry

    def _look(self, folder: Path, *, contents: bool) -> Entry | None:
        """What an entry's folder holds; None where there is none."""
        try:
            if not os.path.lexists(folder):
                return None
            if not folder.is_dir():
                return BrokenEngine(folder, "is a file, not a folder")
            found = engine_faults(folder, contents=contents)
            manifest = read_manifest(folder)
            components = [] if manifest is None or found else manifest.config["components"]
        except SdCompressError as error:
            return BrokenEngine(folder, error.what)
        except OSError as error:
            return (
                BrokenEngine(folder, f"cannot be read ({error.strerror or error})") if os.path.lexists(folder) else None
            )
        if manifest is not None and not found:
            if len(components) != 1:
                found = [f"holds {len(components)} engines, not one"]
            elif (key := EngineKey.of(manifest.config, components[0]).digest) != folder.name:
                found = [f"is in the place of {folder.name}, and its key is {key}"]
            else:
                return StoredEngine(folder, manifest, components[0])
        return BrokenEngine(folder, "; ".join(found)) if os.path.lexists(folder) else None

    def _listed(self) -> list[Path]:
        try:
            return sorted(self.root.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(
                f"the store cannot be read ({error.strerror or error})", where=self.root, hint=_ELSEWHERE
            ) from error

    def _folders(self) -> list[Path]:
        return [path for path in self._listed() if _DIGEST.fullmatch(path.name)]

    def _leftovers(self, digest: str | None = None) -> list[Path]:
        """Folders of builds and removals under way or killed: of one key, or of all."""
        return [
            path for path in self._listed() if (match := _LEFTOVER.fullmatch(path.name)) and digest in (None, match[1])
        ]

    def _remove(self, path: Path) -> bool:
        """Out of its place in one step, so that nobody who still writes there is in the way, then deleted; whether it
        was there.
        """
        digest = path.name.strip(".").partition(".")[0]
        aside = self.root / f".{digest}.{time.time_ns()}.old"
        with self._storage():
            try:
                os.replace(path, aside)
            except FileNotFoundError:
                return False
            if aside.is_dir() and not aside.is_symlink():
                shutil.rmtree(aside)
            else:
                aside.unlink()
        return True

    @contextmanager
    def _storage(self) -> Iterator[None]:
        """Whatever the file system says about the store, as a `StorageError` that names the way out of it."""
        try:
            with storage_errors(self.root):
                yield
        except StorageError as error:
            hint = (error.hint or "").replace("choose another -o", _ELSEWHERE)
            raise StorageError(
                error.what, where=error.where or self.root, expected=error.expected, hint=hint or None
            ) from error
        except OSError as error:
            raise StorageError(
                f"the file system failed ({error.strerror or error})",
                where=error.filename or self.root,
                hint=_ELSEWHERE,
            ) from error

    @contextmanager
    def _try_lock(self, digest: str) -> Iterator[bool]:
        lock = self._take(digest)
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()

    @contextmanager
    def _lock(self, digest: str, waiting: Callable[[], None]) -> Iterator[None]:
        lock = self._take(digest)
        if lock is None:
            waiting()
            while (lock := self._take(digest)) is None:
                time.sleep(_POLL_S)
        try:
            yield
        finally:
            lock.release()

    def _take(self, digest: str) -> HeldLock | None:
        folder = self.root / "locks"
        with self._storage():
            folder.mkdir(parents=True, exist_ok=True)
            return try_lock(folder / f"{digest}.lock", hint=f"{_ELSEWHERE} on a local disk")


def read_engine(path: str | PathLike[str]) -> tuple[bytes, Manifest]:
    """An engine file's bytes and the manifest of its folder, which they were held against before anybody sees them.

    Raises:
        UsageError: no such file. ArtifactError: no manifest beside it, an edited one, or a file that is cut or altered.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError("no such file", where=path, hint="make it with: sdcompress export MODEL --trt -o DIR")
    manifest = read_manifest(path.parent)
    if manifest is None:
        raise ArtifactError(
            f"the engine has no {MANIFEST_NAME} beside it, so nothing says what it was built for",
            where=path,
            hint=f"keep both files together, or {_REBUILD}",
        )
    entry = manifest.files.get(path.name)
    if manifest.kind != "engine" or entry is None:
        raise ArtifactError(
            f"the {MANIFEST_NAME} beside it is of kind {manifest.kind!r} and"
            f" {'does not name this file' if entry is None else 'not of an engine'}",
            where=path,
            hint=_REBUILD,
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"the engine cannot be read ({error.strerror or error})", where=path, hint=_REBUILD
        ) from error
    if len(data) != entry.bytes:
        what = "is truncated" if len(data) < entry.bytes else "is longer than it was built"
        raise ArtifactError(
            f"the engine {what}: it has {len(data):,} bytes",
            where=path,
            expected=f"{entry.bytes:,} bytes",
            hint=_REBUILD,
        )
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise ArtifactError(
            "the engine was altered: its sha256 is not the one of its manifest",
            where=path,
            expected=f"{entry.sha256[:12]}...",
            hint=_REBUILD,
        )
    return data, manifest


def engine_faults(folder: Path, *, contents: bool = True) -> list[str]:
    """What is wrong with an engine folder, of the store or of an export: files, manifest, keys; empty where it is
    whole.

    Raises:
        ArtifactError: its manifest cannot be read, was edited, or does not say what the engines are.
    """
    found = faults(folder, "engine", contents=contents)
    manifest = read_manifest(folder)
    if manifest is None or manifest.kind != "engine":
        return found
    components, keys = manifest.config.get("components"), manifest.config.get("keys")
    if not isinstance(components, list) or not components or not isinstance(keys, dict):
        return [*found, "the manifest does not say which engines these are"]
    for component in components:
        if f"{component}{SUFFIX}" not in manifest.files:
            found.append(f"the manifest names no {component}{SUFFIX}")
        if (key := EngineKey.of(manifest.config, component).digest) != keys.get(component):
            found.append(f"the key of {component} is {key}, and the manifest says {keys.get(component)}")
    return found


def _unusable(entry: Entry) -> str | None:
    if isinstance(entry, BrokenEngine):
        return f"damaged: {entry.fault}"
    found = obstacle(entry.manifest.config)
    return found.what if isinstance(found, (EngineMismatch, ArtifactError)) else None


def _size(path: Path, *, alone: bool = False) -> int:
    """Bytes of a file or of all files in a folder; `alone` leaves out those that another folder shares."""
    with suppress(OSError):
        stats = [file.stat() for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
        return sum(stat.st_size for stat in stats if not alone or stat.st_nlink == 1)
    return 0


def _mtime(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return time.time()
