"""A host's environment: whether the host runs, and which packages its Python has. Nothing of the host is executed."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from sdcompress.hosts.host import Host

_PACKAGE = re.compile(
    r"(torch|numpy|onnxruntime(_gpu)?|tensorrt(_rtx)?(_cu\d+)?)-([0-9][^-]*)\.dist-info", re.IGNORECASE
)
_PYTHONS = ("venv", ".venv", "../venv", "../.venv", "python_embeded", "../python_embeded", "../system/python")
"""Where a host's Python may lie. `python_embeded` is the spelling of ComfyUI's portable build."""


def find_process(host: Host, root: Path) -> int | None:
    """Returns the id of the process that runs this host from this folder, or None.

    The processes of other users may be invisible.
    """
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # it has ended, or belongs to another user
            for argument in map(Path, process.cmdline()[1:4]):
                if argument.name in host.programs and (Path(process.cwd()) / argument).samefile(root / argument.name):
                    return int(process.pid)
    return None


def read_packages(root: Path) -> dict[str, str] | None:
    """Returns the versions of torch, numpy and the runtimes in the host's own Python by package name.

    Returns None if that Python is not found. The versions come from the names of the `.dist-info` folders.
    """
    for place in _PYTHONS:
        for folder in (*root.glob(f"{place}/lib/python*/site-packages"), *root.glob(f"{place}/Lib/site-packages")):
            matches = (_PACKAGE.fullmatch(entry.name) for entry in folder.iterdir())
            return {match[1].lower().replace("_", "-"): match[5] for match in matches if match}
    return None
