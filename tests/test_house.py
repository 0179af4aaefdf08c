"""What holds for the repository as a whole: who may import whom, what ships, and that the README's figures are the
measured ones.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["sdcompress_engines", "sdcompress", "sdcompress_bench", "sdcompress.cli"]


def floor(module: str) -> int | None:
    """The floor a module of ours stands on; None for others' modules."""
    if module.startswith("sdcompress.cli") or module == "sdcompress.__main__":
        return 3
    return {"sdcompress_engines": 0, "sdcompress": 1, "sdcompress_bench": 2}.get(module.partition(".")[0])


def sources() -> list[tuple[str, Path]]:
    found = []
    for base in (ROOT, ROOT / "engines", ROOT / "bench"):
        for package in base.glob("sdcompress*/"):
            found += [(".".join(p.relative_to(base).with_suffix("").parts), p) for p in package.rglob("*.py")]
    return found


@pytest.mark.parametrize(("module", "path"), sources(), ids=lambda v: v if isinstance(v, str) else "")
def test_no_module_imports_from_a_higher_floor(module: str, path: Path) -> None:
    own = floor(module)
    assert own is not None
    for node in ast.walk(ast.parse(path.read_text())):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom) and node.module and not node.level
            else []
        )
        for name in names:
            other = floor(name)
            assert other is None or other <= own, f"{path}:{node.lineno} imports {name}"


def test_engines_keep_to_python_310_syntax() -> None:
    for module, path in sources():
        if floor(module) == 0:
            ast.parse(path.read_text(), feature_version=(3, 10))


def test_weights_and_data_fit() -> None:
    assets = ROOT / "sdcompress/assets/nano"
    weights = [p.stat().st_size for p in assets.rglob("*.safetensors")]
    data = sum(p.stat().st_size for p in (assets / "data").rglob("*.tar.gz"))
    assert weights
    assert max(weights) <= 15 * 2**20
    assert sum(weights) <= 26 * 2**20
    assert 0 < data <= 9e6


def test_no_machine_path_is_in_what_ships() -> None:
    for path in (ROOT / "sdcompress/assets").rglob("*.json"):
        assert not re.search(r"/(tmp|home|root|work|Users)/", path.read_text()), path


def test_readme_figures_are_the_measured_ones() -> None:
    spec = importlib.util.spec_from_file_location("results_to_readme", ROOT / "tools/results_to_readme.py")
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    readme = (ROOT / "README.md").read_text()
    assert tool.updated(readme) == readme
