"""Which dependencies can run code from a file, where sdcompress calls them, and what guards the call.

    python tools/code_loaders.py             the table, with the installed versions; for SECURITY.md
    python tools/code_loaders.py --check     exit 1 if a call is in a file where none is expected

A test calls `unexpected_calls`, so that a new call has to be added here, with its guard.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("sdcompress", "engines/sdcompress_engines", "bench/sdcompress_bench", "plugins")


@dataclass(frozen=True)
class Loader:
    """Functions of a package that can run code from their input.

    Attributes:
        package: its name on the package index; `python` for the standard library.
        calls: ends of the dotted names of the functions.
        danger: what they could run.
        guard: what keeps them from it, or why it is accepted.
        files: of this project that call them.
    """

    package: str
    calls: tuple[str, ...]
    danger: str
    guard: str
    files: tuple[str, ...]


LOADERS: tuple[Loader, ...] = ()


def find_calls(path: Path) -> Iterator[tuple[str, int]]:
    """Yields the dotted name and the line of each call in a Python file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


def loads_code(name: str, loader: Loader) -> bool:
    """Returns whether a dotted name is that of one of the loader's functions."""
    return any(name == call or name.endswith(f".{call}") for call in loader.calls)


def unexpected_calls() -> list[str]:
    """Returns `FILE:LINE: NAME` of each call of a loader in a file that its entry does not name."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            found += [
                f"{file}:{line}: {name}"
                for name, line in find_calls(path)
                for loader in LOADERS
                if loads_code(name, loader) and file not in loader.files
            ]
    return found


def main() -> None:
    """Print the table, or check the calls."""
    if "--check" in sys.argv[1:]:
        found = unexpected_calls()
        print("\n".join(found))
        sys.exit(bool(found))
    print("| package | version | functions | could run | guard |\n|---|---|---|---|---|")
    for loader in LOADERS:
        try:
            version = "" if loader.package == "python" else metadata.version(loader.package)
        except metadata.PackageNotFoundError:
            version = "not installed"
        calls = ", ".join(f"`{call}`" for call in loader.calls)
        print(f"| {loader.package} | {version} | {calls} | {loader.danger} | {loader.guard} |")


if __name__ == "__main__":
    main()
