"""What holds for the whole repository: who imports whom, how long files are, what ships, where figures come from."""

from __future__ import annotations

import ast
import graphlib
import importlib
import importlib.util
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {"sdcompress_engines": 0, "sdcompress": 1, "sdcompress_bench": 2}
CLI_FLOOR = 3
ROOMS = (
    ("support",),
    ("families",),
    ("checkpoints", "prune"),
    ("lora",),
    ("models",),
    ("data",),
    ("sampling",),
    ("export",),
    ("backends", "train"),
    ("generate",),
    ("hosts", "publish"),
    ("cli",),
    ("__main__",),
)
"""The rooms of `sdcompress`, lowest first. A room imports from lower ones, and not from those of its own row."""
MOST_FUNCTION_LINES, MOST_FILE_LINES = 60, 400


WRITERS = {
    "write_text",
    "write_bytes",
    "save",
    "save_file",
    "save_pretrained",
    "save_config",
    "copyfile",
    "copytree",
    "savez",
}
"""Calls that write a file or a folder in its place."""
UNGUARDED = {
    "engines/sdcompress_engines/files.py": "the helpers themselves",
    "engines/sdcompress_engines/build_worker.py": "to the file that `builder` renames",
    "sdcompress/backends/worker.py": "an answer in a temporary folder",
    "sdcompress/backends/fastest_worker.py": "an answer in a temporary folder",
    "sdcompress/checkpoints/taesd.py": "a staged folder",
    "sdcompress/checkpoints/write.py": "a staged file, and configs in a temporary folder",
    "sdcompress/cli/data.py": "a staged file",
    "sdcompress/cli/generate.py": "a staged file",
    "sdcompress/cli/plan.py": "a staged file",
    "sdcompress/cli/recipes.py": "a staged file",
    "sdcompress/data/drawn.py": "the content of a file, in memory",
    "sdcompress/data/cache_units.py": "to a file of `atomic_file`",
    "sdcompress/data/build_cache.py": "the hidden folder of a build, which is synchronized before its rename",
    "sdcompress/export/layers.py": "graphs in a temporary folder",
    "sdcompress/export/onnx_component.py": "a copy of a graph in a staged folder",
    "sdcompress/export/onnx_file.py": "a graph in a staged folder",
    "sdcompress/export/pipeline_files.py": "configs in a staged folder",
    "sdcompress/export/quantize/quantize_graph.py": "calibration data in a temporary folder",
    "sdcompress/export/quantize/worker.py": "a graph in a temporary folder",
    "sdcompress/export/weights.py": "the weights of a graph in a staged folder",
    "sdcompress/hosts/files.py": "a copy that is renamed; an uninstall knows what was left by its name",
    "sdcompress/hosts/record.py": "as `hosts/files.py`",
    "sdcompress/lora/files.py": "a staged file",
    "sdcompress/models/nano.py": "a staged folder",
    "sdcompress/publish/upload.py": "a staged or temporary folder",
    "sdcompress/support/pictures.py": "to memory",
    "sdcompress/train/checkpoint.py": "the staging folder of a checkpoint, which is synchronized before its rename",
    "sdcompress/train/decoder.py": "a staged folder",
    "sdcompress/train/loop.py": "`Checkpoints.save`",
    "sdcompress/train/pipelines.py": "a staged folder",
    "bench/sdcompress_bench/isolated.py": "a setting of the kernel",
    "bench/sdcompress_bench/models.py": "a staged folder",
    "bench/sdcompress_bench/outputs.py": "to a file of `atomic_file`",
    "bench/sdcompress_bench/suite.py": "`Results.save`, which writes atomically",
}
"""The files of the packages that write without `write_atomically`, each with what it writes to instead."""


@cache
def modules() -> dict[str, Path]:
    """Every module of the three packages, by its name."""
    found = {}
    for base in (ROOT, ROOT / "engines", ROOT / "bench"):
        for package in base.glob("sdcompress*/"):
            for path in package.rglob("*.py"):
                found[".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of ours that a module imports, at its top or inside its functions."""
    path, known = modules()[module], modules()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{source}.{alias.name}" for alias in node.names}
    ours: set[str] = set()
    for name in names:
        while name and name not in known:
            name = name.rpartition(".")[0]
        ours |= {name} - {"", module}
    return frozenset(ours)


def floor(module: str) -> int:
    parts = module.split(".")
    return CLI_FLOOR if parts[:2] in (["sdcompress", "cli"], ["sdcompress", "__main__"]) else FLOORS[parts[0]]


def room(module: str) -> int | None:
    """The row of a module of `sdcompress` in `ROOMS`; None for others."""
    parts = module.split(".")
    if parts[0] != "sdcompress" or len(parts) == 1:
        return None
    return next(row for row, names in enumerate(ROOMS) if parts[1] in names)


def tracked(*patterns: str) -> list[Path]:
    """Files that git knows, or all where this is no checkout."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return [path for pattern in patterns for path in ROOT.rglob(pattern.rpartition("/")[2])]
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_no_module_imports_from_a_higher_floor() -> None:
    wrong = [(module, name) for module in modules() for name in imports(module) if floor(name) > floor(module)]
    assert wrong == []


def test_a_room_imports_from_lower_rooms_only() -> None:
    wrong = []
    for module in modules():
        own = room(module)
        for name in imports(module):
            other = room(name)
            if own is None or other is None or name.split(".")[1] == module.split(".")[1]:
                continue
            if other >= own:
                wrong.append((module, name))
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: set(imports(module)) for module in modules()}
    circle: list[str] = []
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1]
    assert circle == []


def test_nothing_lies_loose_at_the_root_of_sdcompress() -> None:
    assert {path.name for path in (ROOT / "sdcompress").glob("*.py")} == {"__init__.py", "__main__.py", "sampling.py"}


def test_no_module_is_named_like_a_package_beside_it() -> None:
    assert [str(path) for path in modules().values() if path.with_suffix("").is_dir()] == []


def test_studies_and_peers_stand_on_the_library() -> None:
    paths = tracked("bench/*.py")
    assert len(paths) > 40
    assert [str(path) for path in paths if "sdcompress.cli" in path.read_text(encoding="utf-8")] == []


def test_no_function_is_longer_than_a_screen() -> None:
    assert {
        f"{path.relative_to(ROOT)}: {node.name}": length
        for path in tracked("*.py")
        for node in functions(path)
        if (length := (node.end_lineno or 0) - node.lineno + 1) > MOST_FUNCTION_LINES
    } == {}


def test_no_file_is_longer_than_one_subject() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in tracked("*.py")
    }
    assert {path: length for path, length in lengths.items() if length > MOST_FILE_LINES} == {}


def writes_in_place(node: ast.AST) -> bool:
    """Whether a call writes a file by its own name: a writer's, or `open` to write."""
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    modes = [a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
    opens = name == "open" and any(
        isinstance(mode, str) and re.fullmatch(r"[rwaxbt+]*[wax+][rwaxbt+]*", mode) for mode in modes
    )
    return name in WRITERS or opens


def test_every_file_is_written_by_the_helpers_or_into_a_staged_folder() -> None:
    writing = {
        path.relative_to(ROOT).as_posix()
        for path in modules().values()
        if any(map(writes_in_place, ast.walk(ast.parse(path.read_text(encoding="utf-8")))))
    }
    assert writing == set(UNGUARDED)


def test_every_kind_of_artifact_is_one_that_force_may_replace() -> None:
    from sdcompress_engines.output_marks import KINDS

    kinds = {
        node.args[1].value
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") in ("write_manifest", "save_pipeline")
        and len(node.args) > 1
        and isinstance(node.args[1], ast.Constant)
    }
    assert {"cache", "engine", "onnx"} <= kinds <= KINDS


def test_engines_and_plugins_keep_to_python_310_syntax() -> None:
    paths = tracked("engines/*.py", "plugins/*.py")
    assert len(paths) > 30
    for path in paths:
        ast.parse(path.read_text(encoding="utf-8"), filename=str(path), feature_version=(3, 10))


def test_every_python_process_is_started_by_the_helper_that_keeps_the_working_folder_out() -> None:
    helper, script = "child_process.py", "part_nano.py"  # the latter runs a script, which imports what lies beside it
    paths = tracked("engines/*.py", "plugins/*.py", "sdcompress/*.py", "bench/sdcompress_bench/*.py")
    assert len(paths) > 200
    starts = re.compile(r"(?<!\{)\bsys\.executable\b(?!\})")  # in braces it is part of a text, such as a hint
    found = {path.name for path in paths if starts.search(path.read_text(encoding="utf-8"))}
    assert found == {helper, script}


def test_weights_and_data_fit() -> None:
    assets = ROOT / "sdcompress/assets/nano"
    weights = [p.stat().st_size for p in assets.rglob("*.safetensors")]
    data = sum(p.stat().st_size for p in (assets / "data").rglob("*.tar.gz"))
    assert weights
    assert max(weights) <= 15 * 2**20
    assert sum(weights) <= 28 * 2**20
    assert 0 < data <= 9e6


def test_no_machine_path_is_in_what_ships() -> None:
    for path in (ROOT / "sdcompress/assets").rglob("*.json"):
        assert not re.search(r"/(tmp|home|root|work|Users)/", path.read_text(encoding="utf-8")), path


def test_the_figures_of_readme_and_docs_are_the_measured_ones() -> None:
    spec = importlib.util.spec_from_file_location("results_to_readme", ROOT / "tools/results_to_readme.py")
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for name in tool.DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert tool.updated(name, text) == text, name


def test_what_can_run_code_from_a_file_is_called_only_where_it_is_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    code_loaders = importlib.import_module("code_loaders")
    files = {file for loader in code_loaders.LOADERS for file in loader.files}
    assert {file for file in files if not (ROOT / file).is_file()} == set()
    assert code_loaders.unexpected_calls() == []
    unused = [
        (loader.calls, file)
        for loader in code_loaders.LOADERS
        for file in loader.files
        if not any(code_loaders.loads_code(name, loader) for name, _ in code_loaders.find_calls(ROOT / file))
    ]
    assert unused == []


def test_commands_print_where_names_are_escaped() -> None:
    paths = [path for path in tracked("sdcompress/cli/*.py") if path.name not in ("__init__.py", "_console.py")]
    assert len(paths) > 15
    assert [
        str(path)
        for path in paths
        if re.search(r"click\.echo\(|\bprint\((?!f?\"sdcompress: )", path.read_text("utf-8"))
    ] == []
