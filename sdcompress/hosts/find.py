"""Find a host's folder, and what can be learned of it without running anything of it."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from sdcompress_engines.command import command_line
from sdcompress_engines.errors import UsageError

from sdcompress.hosts.host import Host

_RUNTIMES = re.compile(
    r"(torch|numpy|onnxruntime(_gpu)?|tensorrt(_rtx)?(_cu\d+)?)-([0-9][^-]*)\.dist-info", re.IGNORECASE
)

_PYTHONS = ("venv", ".venv", "../venv", "../.venv", "python_embeded", "../python_embeded", "../system/python")


def hosts() -> dict[str, Host]:
    """The hosts there are, by name."""
    from sdcompress.hosts.definitions import COMFYUI, FORGE, WEBUI

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
