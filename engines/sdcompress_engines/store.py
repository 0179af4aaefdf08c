"""The store of built engines: one folder for each key, so that an engine is built once and used again.

An entry is whole or absent, whichever process is killed at whichever moment.

<root>/<digest>/           <component>.engine and its manifest, renamed into place when both are complete
<root>/.<digest>.*         a build that is under way, or the remains of a killed one
<root>/locks/<digest>.lock held while a key is built or removed; the operating system releases it when the process ends
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any

from .engine_files import SUFFIX, engine_faults
from .engine_key import EngineKey
from .errors import (
    ArtifactError,
    EngineError,
    EngineMismatch,
    SdCompressError,
    StorageError,
    UsageError,
    storage_errors,
)
from .files import link_or_copy, replace_file
from .flavour import obstacle
from .graph import weights_path
from .locks import HeldLock, try_lock
from .manifest import MANIFEST_NAME, cache_folder, read_manifest, write_manifest
from .output_folders import staged
from .progress import SILENT, Reporter
from .store_entries import BrokenEngine, Entry, Finding, Pruned, StoredEngine, Verdict, size_of

Build = Callable[[Path], tuple[Mapping[str, Any], Mapping[str, Any]]]
"""Writes `<component>.engine` into the given folder. Returns what the manifest's `config` holds besides the key, and
the figures.
"""

_DIGEST = re.compile(r"[0-9a-f]{20}")
_LEFTOVER = re.compile(r"\.([0-9a-f]{20})\..*\.(partial|old)")
_OTHER_FOLDERS = ("locks", "timing")
_POLL_S = 0.1
_OTHER_ROOT = "set SDCOMPRESS_CACHE to another folder"


class EngineStore:
    """The engines under `root`, by default `engines` in sdcompress's cache folder.

    Any number of processes may share one.
    """

    def __init__(self, root: str | PathLike[str] | None = None) -> None:
        self.root = (cache_folder() / "engines" if root is None else Path(root)).absolute()

    def entries(self) -> list[Entry]:
        """Returns every entry by digest, broken ones too. The engines' bytes are not read.

        Raises:
            StorageError: the store cannot be read.
        """
        found = (self._read_entry(folder, contents=False) for folder in self._folders())
        return [entry for entry in found if entry is not None]

    def find(self, key: EngineKey) -> StoredEngine | None:
        """Returns the engine of a key, its sha256 checked; None where there is none, or a damaged one."""
        entry = self._read_entry(self.root / key.digest, contents=True)
        return entry if isinstance(entry, StoredEngine) else None

    def get_or_build(self, key: EngineKey, build: Build, report: Reporter = SILENT) -> tuple[StoredEngine, bool]:
        """Returns the engine of a key, and whether it was stored already.

        Where it was not, `build` makes it. A second process that needs the same engine waits for the first.

        Args:
            key: of the engine.
            build: writes the engine file, see `Build`.
            report: gets a line before a wait, and one about a damaged entry.

        Raises:
            StorageError: the store cannot be written. EngineError: `build` wrote no engine. EngineMismatch: it wrote
                one with another key. Whatever `build` raises passes through.
        """
        target = self.root / key.digest
        entry = self._read_entry(target, contents=True)
        if not isinstance(entry, StoredEngine):

            def report_wait() -> None:
                report.show_line(
                    f"waiting for another process that builds this {key.component} engine ({key.digest[:8]})"
                )

            with self._lock(key.digest, report_wait):
                entry = self._read_entry(target, contents=True)
                if not isinstance(entry, StoredEngine):
                    self._clear(key, entry, report)
                    self._build(key, build, target)
                    return self._built(target), False
        with suppress(OSError):  # a store that can only be read keeps no account of its use
            os.utime(target / MANIFEST_NAME)
        return entry, True

    def verify(self) -> Verdict:
        """Read every entry whole, and remove what killed builds have left. The folder of a running build stays.

        Raises:
            StorageError: a leftover cannot be removed, or the store cannot be read.
        """
        swept = self.sweep()
        entries = {folder: self._read_entry(folder, contents=True) for folder in self._folders()}
        findings = [
            Finding(folder, (entry.fault,) if isinstance(entry, BrokenEngine) else ())
            for folder, entry in entries.items()
            if entry is not None
        ]
        strangers = (
            path
            for path in self._listed()
            if not path.name.startswith(".") and path.name not in _OTHER_FOLDERS and not _DIGEST.fullmatch(path.name)
        )
        findings += [Finding(path, ("is no engine of this store",)) for path in strangers]
        return Verdict(tuple(findings), tuple(swept))

    def sweep(self, dry_run: bool = False) -> list[Pruned]:
        """Remove what killed builds have left. Returns what was removed, or with `dry_run` would be.

        Raises:
            StorageError: it cannot be removed.
        """
        swept = []
        for path in self._leftovers():
            with self._try_lock(path.name[1:].partition(".")[0]) as free:
                size = size_of(path, unshared=True)
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
        """Remove what killed builds have left, and the entries that any of the conditions selects.

        An entry that is being built stays. Returns what was removed, or with `dry_run` would be.

        Args:
            older_than_days: entries that were neither built nor asked for in this time.
            unusable: entries that are damaged, or were built for another version, card or platform than this machine's.
                Without a runtime or a GPU it is not known which those are, and only damaged ones count.
            all: every entry.
            keys: entries by digest.
            dry_run: remove nothing.

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
                reason = _why_unusable(entry)
            if reason is None:
                continue
            size = size_of(entry.folder, unshared=True)
            with self._try_lock(entry.digest) as free:
                if free and (dry_run or self._remove(entry.folder)):
                    pruned.append(Pruned(entry.folder, size, reason))
        return pruned

    def link_or_copy(self, entry: StoredEngine, folder: Path) -> Path:
        """Put an entry's engine file into `folder`, and the file with its weights if it has one.

        Both folders share the disk space where the file system has hard links.

        Returns:
            The engine's path in `folder`.

        Raises:
            ArtifactError: the entry is gone. StorageError: no space, no permission.
        """
        target = folder / entry.path.name
        with storage_errors(target):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                link_or_copy(entry.path, target)
                if (weights := weights_path(entry.path)).name in entry.manifest.files:
                    link_or_copy(weights, weights_path(target))
            except FileNotFoundError as error:
                raise ArtifactError(
                    "the stored engine was removed in the meantime",
                    where=entry.folder,
                    hint="run the same command again",
                ) from error
        return target

    def _clear(self, key: EngineKey, entry: Entry | None, report: Reporter) -> None:
        """Remove a damaged entry of a key, and what killed builds of it have left."""
        if isinstance(entry, BrokenEngine):
            report.show_line(
                f"the stored {key.component} engine {key.digest[:8]} is damaged ({entry.fault}): removed, and built"
                " again"
            )
            self._remove(entry.folder)
        for leftover in self._leftovers(key.digest):
            self._remove(leftover)

    def _build(self, key: EngineKey, build: Build, target: Path) -> None:
        with self._storage(), staged(target) as folder:
            config, figures = build(folder)
            engine = f"{key.component}{SUFFIX}"
            if not (folder / engine).is_file():
                raise EngineError(f"the build wrote no {engine}", where=folder)
            config = {**key.config(), **config}
            digest = EngineKey.of(config, key.component).digest
            if digest != key.digest:
                raise EngineMismatch(
                    f"the build made another {key.component} engine than the one requested: its key is {digest}",
                    expected=key.digest,
                )
            write_manifest(folder, "engine", config=config, figures=figures)

    def _built(self, target: Path) -> StoredEngine:
        entry = self._read_entry(target, contents=False)
        if not isinstance(entry, StoredEngine):
            raise EngineError(
                f"the engine just built is damaged: {entry.fault if entry else 'it is gone'}",
                where=target,
                hint="check the disk",
            )
        return entry

    def _read_entry(self, folder: Path, *, contents: bool) -> Entry | None:
        """Returns the entry in a folder; None where there is none. With `contents` its files' bytes are checked."""
        try:
            if not os.path.lexists(folder):
                return None
            if not folder.is_dir():
                return BrokenEngine(folder, "is a file, not a folder")
            faults = engine_faults(folder, contents=contents)
            manifest = read_manifest(folder)
            components = [] if manifest is None or faults else manifest.config["components"]
        except SdCompressError as error:
            return BrokenEngine(folder, error.what)
        except OSError as error:
            return (
                BrokenEngine(folder, f"cannot be read ({error.strerror or error})") if os.path.lexists(folder) else None
            )
        if manifest is not None and not faults:
            if len(components) != 1:
                faults = [f"holds {len(components)} engines, not one"]
            elif (key := EngineKey.of(manifest.config, components[0]).digest) != folder.name:
                faults = [f"is in the place of {folder.name}, and its key is {key}"]
            else:
                return StoredEngine(folder, manifest, components[0])
        return BrokenEngine(folder, "; ".join(faults)) if os.path.lexists(folder) else None

    def _listed(self) -> list[Path]:
        try:
            return sorted(self.root.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(
                f"the store cannot be read ({error.strerror or error})", where=self.root, hint=_OTHER_ROOT
            ) from error

    def _folders(self) -> list[Path]:
        return [path for path in self._listed() if _DIGEST.fullmatch(path.name)]

    def _leftovers(self, digest: str | None = None) -> list[Path]:
        """Returns the folders of builds and removals that are under way or were killed: of one key, or of all."""
        return [
            path for path in self._listed() if (match := _LEFTOVER.fullmatch(path.name)) and digest in (None, match[1])
        ]

    def _remove(self, path: Path) -> bool:
        """Rename a folder out of its place in one step and delete it. Returns whether it was there.

        So a process that still writes into it is not in the way of the next build.
        """
        digest = path.name.strip(".").partition(".")[0]
        aside = self.root / f".{digest}.{time.time_ns()}.old"
        with self._storage():
            try:
                replace_file(path, aside)
            except FileNotFoundError:
                return False
            if aside.is_dir() and not aside.is_symlink():
                shutil.rmtree(aside)
            else:
                aside.unlink()
        return True

    @contextmanager
    def _storage(self) -> Iterator[None]:
        """Turn every error of the file system into a `StorageError` with a hint that fits a store."""
        try:
            with storage_errors(self.root):
                yield
        except StorageError as error:
            error = error.with_place(_OTHER_ROOT)
            raise StorageError(
                error.what, where=error.where or self.root, expected=error.expected, hint=error.hint
            ) from error
        except OSError as error:
            raise StorageError(
                f"the file system failed ({error.strerror or error})",
                where=error.filename or self.root,
                hint=_OTHER_ROOT,
            ) from error

    @contextmanager
    def _try_lock(self, digest: str) -> Iterator[bool]:
        lock = self._take_lock(digest)
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()

    @contextmanager
    def _lock(self, digest: str, report_wait: Callable[[], None]) -> Iterator[None]:
        lock = self._take_lock(digest)
        if lock is None:
            report_wait()
            while (lock := self._take_lock(digest)) is None:
                time.sleep(_POLL_S)
        try:
            yield
        finally:
            lock.release()

    def _take_lock(self, digest: str) -> HeldLock | None:
        folder = self.root / "locks"
        with self._storage():
            folder.mkdir(parents=True, exist_ok=True)
            return try_lock(folder / f"{digest}.lock", hint=f"{_OTHER_ROOT} on a local disk")


def _why_unusable(entry: Entry) -> str | None:
    """Returns why an engine can never load on this machine, or None."""
    if isinstance(entry, BrokenEngine):
        return f"damaged: {entry.fault}"
    error = obstacle(entry.manifest.config)
    return error.what if isinstance(error, (EngineMismatch, ArtifactError)) else None
