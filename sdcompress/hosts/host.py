"""The programs that take plugins and engines, and what can be told of one in its folder without running anything of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sdcompress_engines.command import command_line
from sdcompress_engines.errors import UsageError

RECORD = "installed.json"
_RUNTIMES = re.compile(
    r"(torch|numpy|onnxruntime(_gpu)?|tensorrt(_rtx)?(_cu\d+)?)-([0-9][^-]*)\.dist-info", re.IGNORECASE
)
_PYTHONS = ("venv", ".venv", "../venv", "../.venv", "python_embeded", "../python_embeded", "../system/python")


@dataclass(frozen=True)
class Host:
    """A program that makes pictures, and where it takes plugins and models.

    Attributes:
        name: as it is typed. title: as people call it.
        plugin: its folder in `plugins/`. extension: where that goes. models: where engines go.
        marks: what its folder holds; of each entry one alternative.
        absent: what it does not hold, and which host that would be.
        programs: what it is started with, in its folder.
        signatures: of the engines its plugin calls, the first one preferred.
        steps: what to do in the program after an install.
    """

    name: str
    title: str
    plugin: str
    extension: str
    marks: tuple[tuple[str, ...], ...]
    programs: tuple[str, ...]
    signatures: tuple[str, ...]
    steps: tuple[str, ...]
    absent: Mapping[str, str] = field(default_factory=dict)
    models: str = "models/sdcompress"

    @property
    def record(self) -> str:
        return f"{self.extension}/{RECORD}"

    def missing(self, root: Path) -> str | None:
        """What of this host's marks `root` lacks, or None where it is one."""
        return next(
            (" or ".join(each) for each in self.marks if not any((root / path).exists() for path in each)), None
        )


def hosts() -> dict[str, Host]:
    """The hosts there are, by name."""
    from sdcompress.hosts.comfyui import COMFYUI
    from sdcompress.hosts.webui import FORGE, WEBUI

    return {host.name: host for host in (WEBUI, FORGE, COMFYUI)}


def find_host(name: str, path: str | Path) -> tuple[Host, Path]:
    """The host of that name and its absolute folder.

    Raises:
        UsageError: no such host, no such folder, or a folder that is not this host's.
    """
    known = hosts()
    if name not in known:
        raise UsageError(f"no host {name!r}", expected=" or ".join(known))
    host, root = known[name], Path(path).expanduser().absolute()
    if not root.is_dir():
        raise UsageError("no such folder", where=root, expected=f"the folder of {host.title}")
    lacking, other = (
        host.missing(root),
        next((other for mark, other in host.absent.items() if (root / mark).exists()), None),
    )
    if lacking is None and other is None:
        return host, root
    other = other or next(
        (each.name for each in known.values() if each is not host and each.missing(root) is None), None
    )
    if other is not None:
        raise UsageError(
            f"is {known[other].title}, not {host.title}",
            where=root,
            hint=command_line(["sdcompress", "install", other, str(root)]),
        )
    inside = next((entry for entry in sorted(root.iterdir()) if entry.is_dir() and host.missing(entry) is None), None)
    hint = None if inside is None else command_line(["sdcompress", "install", name, str(inside)])
    raise UsageError(
        f"is no {host.title}: it has no {lacking}",
        where=root,
        expected="the folder the program is started from",
        hint=hint,
    )


def running(host: Host, root: Path) -> int | None:
    """Returns the id of the process that runs this host from this folder, or None.

    Another user's processes may not be seen.
    """
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # gone, or another user's
            for name in map(Path, process.cmdline()[1:4]):
                if name.name in host.programs and (Path(process.cwd()) / name).samefile(root / name.name):
                    return int(process.pid)
    return None


def host_packages(root: Path) -> dict[str, str] | None:
    """What the host's own Python has of torch and the runtimes: package → version; None where that Python is not found.

    Nothing of it is run.
    """
    for place in _PYTHONS:
        for folder in (*root.glob(f"{place}/lib/python*/site-packages"), *root.glob(f"{place}/Lib/site-packages")):
            found = (_RUNTIMES.fullmatch(entry.name) for entry in folder.iterdir())
            return {match[1].lower().replace("_", "-"): match[5] for match in found if match}
    return None
