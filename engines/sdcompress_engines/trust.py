"""Consent to run code: an engine or a package that this machine did not build is opened only after it.

An engine (`.engine`) and an AOTInductor package (`.pt2`) are executable code. The seal of a manifest shows damage and
edits, and anybody can write a manifest and its seal. So code is opened only where a consent of this user names its
sha256. A build gives it, `sdcompress engines trust`, `--trust`, or the button in the WebUI's tab.

Each consent is a small file in `trust_folder`, and belongs to the user, not to a program: an engine that is built or
allowed on the command line is allowed in a WebUI of the same user, too.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Collection
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from os import PathLike
from pathlib import Path
from typing import Literal

from .command import as_argument, command_line
from .engine_files import find_manifest_folder
from .errors import ArtifactError, NotTrusted, SdCompressError, UsageError, storage_errors
from .files import write_atomically
from .json_files import read_json_object
from .manifest import MANIFEST_NAME, Manifest, read_manifest, sha256_file
from .paths import expand_user

CODE_SUFFIXES = (".engine", ".pt2")
"""Files that are executable code."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Consent:
    """That a file may run here.

    Attributes:
        sha256: of the file.
        origin: `built here`, or `allowed` by the user.
        file: its path at that time.
        created: time in UTC, ISO 8601.
    """

    sha256: str
    origin: Literal["built here", "allowed"]
    file: str
    created: str

    def __str__(self) -> str:
        return f"{self.origin} on {self.created[:10]}"


def trust_folder() -> Path:
    """Returns the folder of the consents.

    It is `trusted` in `$SDCOMPRESS_CONFIG`, else in `sdcompress` in the user's folder for settings: `%APPDATA%` on
    Windows, else `$XDG_CONFIG_HOME` or `~/.config`.
    """
    if chosen := os.environ.get("SDCOMPRESS_CONFIG"):
        return expand_user(chosen) / "trusted"
    settings = os.environ.get("APPDATA" if sys.platform == "win32" else "XDG_CONFIG_HOME")
    return expand_user(settings or "~/.config") / "sdcompress" / "trusted"


def find_consent(sha256: str) -> Consent | None:
    """Returns the consent for a file with this sha256, or None where it was neither built here nor allowed."""
    if not _SHA256.fullmatch(sha256):
        return None
    try:
        raw = read_json_object(trust_folder() / f"{sha256}.json", most_mib=1)
        consent = Consent(raw["sha256"], raw["origin"], str(raw["file"]), str(raw["created"]))
    except (OSError, SdCompressError, KeyError):
        return None
    return consent if consent.sha256 == sha256 and consent.origin in ("built here", "allowed") else None


def check_trusted(path: str | PathLike[str], sha256: str) -> None:
    """Refuse code that was built elsewhere and that the user has not allowed. Call it before the code is opened.

    Args:
        path: the engine or package, for the message.
        sha256: of the bytes that will be opened.

    Raises:
        NotTrusted: there is no consent for it.
    """
    if (error := refusal(path, sha256)) is not None:
        raise error


def refusal(path: str | PathLike[str], sha256: str) -> NotTrusted | None:
    """Returns the error that `check_trusted` raises, or None where the code may be opened."""
    if find_consent(sha256) is not None:
        return None
    return NotTrusted(
        f"was built elsewhere or by an earlier version, and is executable code (sha256 {sha256})",
        where=path,
        expected="one that was built on this machine, or that you allow to run",
        hint=f"{trust_command(path)}, if you trust where it comes from",
    )


def code_files(manifest: Manifest) -> dict[str, str]:
    """Returns name → sha256 of the engines and packages that a manifest names."""
    return {name: entry.sha256 for name, entry in manifest.files.items() if name.endswith(CODE_SUFFIXES)}


def find_unallowed(manifest: Manifest) -> list[str]:
    """Returns the engines and packages of a manifest that have no consent."""
    return [name for name, sha256 in code_files(manifest).items() if find_consent(sha256) is None]


def trust_command(path: str | PathLike[str]) -> str:
    """Returns the command that allows the code in a file or folder to run."""
    return command_line(["sdcompress", "engines", "trust", as_argument(os.fspath(path))])


def allow(path: Path) -> Consent:
    """Store the user's consent to run an engine or package. Returns it; one that was built here stays so.

    Args:
        path: the file. Where a manifest lies beside it, the file has to be the one that it names.

    Raises:
        UsageError: no such file, or one of another kind. ArtifactError: it is not the one of its manifest.
        StorageError: the consent cannot be stored.
    """
    if path.suffix not in CODE_SUFFIXES or not path.is_file():
        what = "is not code" if path.is_file() else "no such file"
        raise UsageError(what, where=path, expected=f"a file that ends in {' or '.join(CODE_SUFFIXES)}")
    sha256, manifest = sha256_file(path), read_manifest(path.parent)
    entry = None if manifest is None else manifest.files.get(path.name)
    if manifest is not None and (entry is None or entry.sha256 != sha256):
        raise ArtifactError(
            f"is not the file that its {MANIFEST_NAME} names",
            where=path,
            expected="no file of that name" if entry is None else f"sha256 {entry.sha256}",
            hint="get it again from where it came from",
        )
    return find_consent(sha256) or _store(path, sha256, "allowed")


def withdraw(path: Path) -> bool:
    """Remove the consent for a file, so that it is asked for again. Returns whether there was one.

    Raises:
        StorageError: it cannot be removed.
    """
    consent = trust_folder() / f"{sha256_file(path)}.json"
    with storage_errors(consent):
        there = consent.is_file()
        consent.unlink(missing_ok=True)
    return there


def record_built(path: Path) -> None:
    """Note that this machine has built a file.

    A note that cannot be written is a warning: the file is complete, and its first use will ask.
    """
    try:
        _store(path, sha256_file(path), "built here")
    except (OSError, SdCompressError) as error:
        warnings.warn(
            f"{path}: it is not kept that this machine has built it ({error}), so its first use will ask",
            RuntimeWarning,
            stacklevel=2,
        )


def find_code(path: Path, kinds: Collection[str] = ("engine", "package")) -> list[Path]:
    """Returns the engines and packages at a path: the file, or those that a folder's manifest names; none for others.

    Args:
        path: a file, or a folder that `export`, `build` or the cache has written.
        kinds: of the manifests to look for.

    Raises:
        UsageError: there is nothing at this path. ArtifactError: the folder's manifest is damaged.
    """
    if path.is_file():
        return [path] if path.suffix in CODE_SUFFIXES else []
    if not path.is_dir():
        raise UsageError("no such file or folder", where=path, expected="an engine, or the folder of one")
    place = find_manifest_folder(path)
    manifest = None if place is None else read_manifest(place)
    if place is None or manifest is None or manifest.kind not in kinds:
        return []
    return [place / name for name in code_files(manifest)]


def _store(path: Path, sha256: str, origin: Literal["built here", "allowed"]) -> Consent:
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    consent = Consent(sha256, origin, str(path.absolute()), created)
    target = trust_folder() / f"{sha256}.json"
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, json.dumps(asdict(consent), indent=1) + "\n")
    return consent
