"""The installed ComfyUI node runs with torch, numpy and one runtime, and nothing else."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from sdcompress.hosts.find import find_host
from sdcompress.hosts.install import install

from .comfyui_cases import change
from .places import COMFYUI_PLUGIN
from .test_comfyui_folders import engine_folder

HOST_FILES = {
    "comfyui": ("custom_nodes/a", "models/a", "comfy/sd.py"),
    "webui": ("extensions/a", "models/a", "modules/sd_unet.py", "webui.py"),
}
"""Files by which a host's folder is known."""


def closure(*names: str) -> set[str]:
    """Returns these distributions and all that they need here."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", re.split(r"[ ;<>=!\[(~]", waiting.pop())[0]).lower()
        try:
            needs = metadata.requires(name) if name not in found else None
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [need for need in needs or [] if "extra ==" not in need]
    return found


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a `site-packages` of links to torch, numpy, ONNX Runtime and what they need, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    for name in closure("torch", "numpy", "onnxruntime"):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
    return folder


BARE = """
import sys
sys.path.append(sys.argv[1])
import importlib.util, types, torch
folder_paths = types.ModuleType("folder_paths")
known = {}
folder_paths.models_dir, folder_paths.folder_names_and_paths = sys.argv[3], known
folder_paths.add_model_folder_path = lambda name, path: known.setdefault(name, ([path], set()))
folder_paths.get_folder_paths = lambda name: known[name][0]
sys.modules["folder_paths"] = folder_paths
name = sys.argv[2].replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, sys.argv[2] + "/__init__.py")
module = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
node = module.NODE_CLASS_MAPPINGS["LoadSdcompressEngine"]
(engine,) = node.INPUT_TYPES()["required"]["engine"][0]
assert node.VALIDATE_INPUTS(engine) is True
folders, model = sys.modules[name + ".folders"], sys.modules[name + ".model"]
folder = folders.read_folder(engine, node.load.__globals__["find_folder"](engine))
out = model.EngineModel(folder)(torch.ones(1, 4, 8, 8), torch.ones(1), torch.ones(1, 77, 96))
print(out.double().sum().item())
libraries = ("diffusers", "transformers", "onnx", "pydantic", "safetensors")
for name in (*libraries, "sdcompress", "sdcompress_engines", "comfy"):
    assert name not in sys.modules and importlib.util.find_spec(name) is None, name
"""


def test_the_installed_plugin_runs_with_torch_numpy_and_one_runtime_and_nothing_else(
    bare: Path, graph: Path, student: Any, tmp_path: Path
) -> None:
    root = tmp_path / "Comfy UI.v2 é"
    for folder in ("custom_nodes", "models", "comfy"):
        (root / folder).mkdir(parents=True)
    (root / "comfy/sd.py").touch()
    host, root = find_host("comfyui", root)
    install(host, root, [graph], name="kleine Bilder")
    ran = subprocess.run(
        [sys.executable, "-I", "-S", "-c", BARE, bare, root / host.extension, root / "models"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    with torch.no_grad():
        wanted = student.unet(torch.ones(1, 4, 8, 8), torch.ones(1), torch.ones(1, 77, 96)).sample.double().sum().item()
    assert float(ran.stdout) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize(("name", "kind"), [("comfyui", "onnx"), ("comfyui", "engine"), ("webui", "onnx")])
def test_an_install_takes_the_weights_beside_a_graph(
    name: str, kind: str, link: bool, graph: Path, tiny_graph: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    shutil.copytree(graph if name == "comfyui" else tiny_graph, folder / "onnx")
    place = folder / "onnx"
    if kind == "engine":
        place = engine_folder(folder / "engine", graph)
        shutil.copyfile(graph / "unet.onnx.safetensors", place / "unet.engine.safetensors")
        change(place)
    root = tmp_path / "host"
    for inside in HOST_FILES[name]:
        (root / inside).parent.mkdir(parents=True, exist_ok=True)
        (root / inside).touch()
    host, root = find_host(name, root)
    install(host, root, [place], name="small", link=link)
    installed = root / "models/sdcompress/small" / f"unet.{kind}.safetensors"
    assert installed.read_bytes() == (place / installed.name).read_bytes()


def test_the_plugin_keeps_to_python_310_and_to_torch_and_the_engines() -> None:
    for path in COMFYUI_PLUGIN.rglob("*.py"):
        tree = ast.parse(path.read_text(), feature_version=(3, 10))
        for statement in tree.body:
            names = (
                [alias.name for alias in statement.names]
                if isinstance(statement, ast.Import)
                else [statement.module or ""]
                if isinstance(statement, ast.ImportFrom) and not statement.level
                else []
            )
            for imported in names:
                assert imported.partition(".")[0] in {
                    "torch",
                    *sys.stdlib_module_names,
                }, f"{path}:{statement.lineno} imports {imported}"
