"""Folders of hosts and of engines for the tests of installs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sdcompress_engines.engine_key import EngineKey
from sdcompress_engines.flavour import platform_name
from sdcompress_engines.manifest import write_manifest
from sdcompress_engines.trust import record_built

HOSTS = ("webui", "forge", "comfyui")


TREES = {
    "webui": (
        "webui.py",
        "modules/sd_unet.py",
        "extensions/another/scripts/a.py",
        "models/Stable-diffusion/rv4.safetensors",
        "models/Unet-trt/model.json",
    ),
    "forge": (
        "webui.py",
        "modules/sd_unet.py",
        "modules_forge/initialization.py",
        "extensions/another/a.py",
        "models/Stable-diffusion/rv4.safetensors",
    ),
    "comfyui": (
        "main.py",
        "nodes.py",
        "comfy/sd.py",
        "custom_nodes/another/__init__.py",
        "models/checkpoints/rv4.safetensors",
    ),
}


def make_tree(root: Path, host: str) -> Path:
    """Create the files by which a host's folder is recognized."""
    for name in TREES[host]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{name} of the host\n")
    return root


def make_engine(
    folder: Path,
    host: str = "webui",
    name: str = "sd-tiny",
    plan: bytes = b"a plan" * 1000,
    *,
    inputs: dict[str, str] | None = None,
    extra: dict[str, str] | None = None,
    **changes: Any,
) -> Path:
    """Create an engine folder as `export --trt --signature` writes it. Its plan is not a real engine."""
    (folder / "pipeline/unet").mkdir(parents=True)
    (folder / "pipeline/scheduler").mkdir()
    (folder / "unet.engine").write_bytes(plan)
    (folder / "pipeline/unet/config.json").write_text("{}")
    for path, text in (extra or {}).items():
        (folder / path).write_text(text)
    values: dict[str, Any] = {
        "flavour": "tensorrt-rtx",
        "version": "1.0.0",
        "compute_capabilities": ((8, 9),),
        "platform": platform_name(),
    } | changes
    key = EngineKey(
        "0" * 64,
        "unet",
        "fp16",
        "webui" if host == "forge" else host,
        profiles=({"sample": ((1, 4, 8, 8),) * 3},),
        **values,
    )
    write_manifest(folder, "engine", config=key.config() | {"model_name": name}, inputs=inputs)
    record_built(folder / "unet.engine")
    return folder


def snapshot(root: Path) -> dict[str, bytes | str | None]:
    """Returns everything in a folder: files by content, links by target, and folders."""
    return {
        str(path.relative_to(root)): (
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        )
        for path in sorted(root.rglob("*"))
    }
