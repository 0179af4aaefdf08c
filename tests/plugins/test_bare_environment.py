"""What is carried into a host's Python has 3.10 syntax and imports only torch, numpy and one runtime."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from .places import PLUGINS

ROOT = PLUGINS.parent
ENGINES = ROOT / "engines"
CARRIED = sorted(path for folder in (ENGINES, PLUGINS) for path in folder.rglob("*.py"))
ALWAYS = {"torch", "numpy", "sdcompress_engines", "sdcompress_webui", "comfyui_sdcompress"} | set(
    sys.stdlib_module_names
)
WHERE_USED = {
    "onnx",
    "google",
    "onnxruntime",
    "onnxruntime_ep_nv_tensorrt_rtx",
    "tensorrt",
    "tensorrt_rtx",
    "polygraphy",
    "typing_extensions",  # of an engine: looked for, and their absence reported
    "filelock",  # of torch
    "psutil",  # looked for, with a substitute if it is missing
    "modules",
    "backend",
    "gradio",
    "comfy",
    "folder_paths",
    "nodes",  # the hosts
}
HOSTS = {"modules", "backend", "gradio", "comfy", "folder_paths", "nodes"}


def imports(path: Path, *, top_only: bool = False) -> set[str]:
    """Returns the top-level names that a file imports.

    Args:
        path: the file.
        top_only: leave out the imports in functions and `TYPE_CHECKING` blocks.
    """
    found = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
        elif top_only and (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ):
            continue
        waiting += ast.iter_child_nodes(node)
    return found


def needs_host(path: Path) -> bool:
    """Returns whether a file imports a host, so that only the host can load it."""
    return bool(imports(path, top_only=True) & HOSTS)


@pytest.mark.parametrize("path", CARRIED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_carried_file_is_python_310_and_imports_what_a_host_has(path: Path) -> None:
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
    assert imports(path) <= ALWAYS | WHERE_USED
    assert imports(path, top_only=True) <= ALWAYS | HOSTS


BARE = """
import importlib, importlib.abc, sys

class Bare(importlib.abc.MetaPathFinder):
    # Installed here, but not in a host's environment. What torch, numpy and the runtime need stays.
    absent = set({absent!r})

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.absent:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        return None

sys.meta_path.insert(0, Bare())
sys.path[:0] = {paths!r}
for name in {modules!r}:
    importlib.import_module(name)
heavy = {{"onnxruntime", "tensorrt", "tensorrt_rtx", "gradio"}}
print("imported", len({modules!r}), "loaded", sorted(set(sys.modules) & heavy))
{then}
"""


def absent() -> set[str]:
    """Returns the import names of the project's packages and of all its dependencies but torch, numpy, ONNX Runtime."""
    from importlib.metadata import packages_distributions

    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {
        name.replace("_", "-").lower()
        for each in wanted
        for name in [each.split(";")[0].split("[")[0].split(">")[0].split("<")[0].split("=")[0].strip()]
    }
    keep = {"torch", "filelock", "numpy", "onnxruntime", "onnxruntime-gpu"}
    found = {
        module
        for module, owners in packages_distributions().items()
        for owner in owners
        if owner.replace("_", "-").lower() in names - keep
    }
    return found | {
        "sdcompress",
        "sdcompress_bench",
        "onnx",
        "diffusers",
        "transformers",
        "safetensors",
        "pydantic",
        "polygraphy",
        "gradio",
    }


def run_bare(modules: list[str], paths: list[Path], then: str = "") -> str:
    code = BARE.format(
        absent=sorted(absent()), paths=[str(path) for path in paths], modules=modules, then=textwrap.dedent(then)
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def names_in(folder: Path, package: Path) -> list[str]:
    """Returns the importable names of a package's files that need no host."""
    files = [path for path in sorted(package.rglob("*.py")) if not needs_host(path)]
    return [".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__") for path in files]


def test_the_engines_and_the_webui_plugin_import_with_torch_numpy_and_one_runtime() -> None:
    plugin = PLUGINS / "sd_webui_sdcompress"
    modules = names_in(ENGINES, ENGINES / "sdcompress_engines") + names_in(plugin, plugin / "sdcompress_webui")
    assert {"sdcompress_engines.store", "sdcompress_webui.a1111", "sdcompress_webui.forge"} <= set(modules)
    output = run_bare(
        modules,
        [ENGINES, plugin],
        "from sdcompress_engines.runners import available\nprint(available()['onnxruntime'])",
    )
    assert "loaded []" in output  # no runtime is loaded before an engine is
    assert output.splitlines()[-1] == "None"


def test_the_comfyui_plugin_imports_with_torch_numpy_and_one_runtime() -> None:
    plugin = PLUGINS / "comfyui_sdcompress"
    modules = [name for name in names_in(PLUGINS, plugin) if name != "comfyui_sdcompress"]
    assert modules
    run_bare(modules, [ENGINES, PLUGINS])


def test_a_graph_runs_in_the_webui_plugin_with_nothing_else_installed(tmp_path: Path) -> None:
    """The plugin is laid out as installed: its folder has the engine package inside."""
    import shutil

    import onnx
    from sdcompress_engines.manifest import write_manifest

    extension, folder = tmp_path / "extensions" / "sd-webui-sdcompress", tmp_path / "models" / "sdcompress" / "grey"
    shutil.copytree(PLUGINS / "sd_webui_sdcompress", extension, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(
        ENGINES / "sdcompress_engines", extension / "sdcompress_engines", ignore=shutil.ignore_patterns("__pycache__")
    )
    (folder / "pipeline" / "unet").mkdir(parents=True)
    (folder / "pipeline" / "unet" / "config.json").write_text(
        '{"in_channels": 4, "out_channels": 4, "cross_attention_dim": 8, "block_out_channels": [8, 8],'
        ' "layers_per_block": 1}'
    )
    shape = ["batch", 4, "height", "width"]
    floats = onnx.TensorProto.FLOAT
    ports = [
        onnx.helper.make_tensor_value_info(name, floats, sizes)
        for name, sizes in (
            ("sample", shape),
            ("timesteps", ["batch"]),
            ("encoder_hidden_states", ["batch", "tokens", 8]),
        )
    ]
    half = onnx.helper.make_tensor("half", floats, [1], [0.5])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Mul", ["sample", "half"], ["latent"])],
        "grey",
        ports,
        [onnx.helper.make_tensor_value_info("latent", floats, shape)],
        [half],
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9),
        folder / "unet.onnx",
    )
    write_manifest(
        folder, "onnx", config={"precision": "fp32", "signature": "webui", "components": ["unet"], "model_name": "grey"}
    )
    then = f"""
    import torch
    from pathlib import Path
    from types import SimpleNamespace
    from sdcompress_webui.engine_folders import find_artifacts
    from sdcompress_webui.menu import group_models
    from sdcompress_webui.traits import Traits
    from sdcompress_webui.unet import HostedUNet
    cpu = torch.device("cpu")
    host = SimpleNamespace(device=cpu, checkpoint=lambda: (None, Traits()), changes=lambda: [], warn=print)
    unet = HostedUNet(group_models(find_artifacts(Path({str(folder.parent)!r})))[0], host)
    unet.activate()
    x = torch.ones(3, 4, 8, 8)
    assert torch.equal(unet.forward(x, torch.ones(3), torch.ones(3, 77, 8)), x / 2)
    print("ran")
    """
    assert run_bare(["sdcompress_webui.unet"], [extension], then).splitlines()[-1] == "ran"
