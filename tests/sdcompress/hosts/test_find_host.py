"""A host is recognized by its files, and its packages are read without running it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sdcompress_engines.errors import UsageError

from sdcompress.hosts.definitions import hosts
from sdcompress.hosts.environment import read_packages
from sdcompress.hosts.find import find_host

from .trees import HOSTS, make_tree


def test_the_hosts_have_these_names() -> None:
    assert tuple(hosts()) == HOSTS


@pytest.mark.parametrize(
    ("host", "tree", "words"),
    [
        ("webui", "comfyui", r"is ComfyUI, not SD-WebUI\. Try: the same command with comfyui instead of webui"),
        ("comfyui", "webui", r"is SD-WebUI, not ComfyUI\. Try: the same command with webui"),
        ("webui", "forge", r"is Forge, not SD-WebUI\. Try: the same command with forge"),
        ("forge", "webui", r"is SD-WebUI, not Forge\. Try: the same command with webui"),
    ],
)
def test_another_host_is_recognized_by_its_files(host: str, tree: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        find_host(host, make_tree(tmp_path / "there", tree))


def test_a_folder_of_no_host_is_refused(tmp_path: Path) -> None:
    make_tree(tmp_path / "portable/ComfyUI", "comfyui")
    with pytest.raises(
        UsageError,
        match=r"is not the folder of ComfyUI: it has no custom_nodes.*same command with the folder .*portable/ComfyUI",
    ):
        find_host("comfyui", tmp_path / "portable")
    with pytest.raises(UsageError, match="no such folder"):
        find_host("webui", tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"is not the folder of SD-WebUI: it has no webui\.py"):
        find_host("webui", tmp_path)
    with pytest.raises(UsageError, match=r"no host 'invokeai'; expected webui or forge or comfyui"):
        find_host("invokeai", tmp_path)


def test_the_folder_of_the_desktop_application_counts_as_comfyui(tmp_path: Path) -> None:
    for folder in ("custom_nodes", "models", "user", "input", "output"):
        (tmp_path / folder).mkdir()
    assert find_host("comfyui", tmp_path)[0].name == "comfyui"


def test_the_packages_of_the_host_are_read_without_running_its_python(comfyui: tuple[Any, Path]) -> None:
    _, root = comfyui
    assert read_packages(root) is None
    folder = root / "venv/lib/python3.10/site-packages"
    for name in (
        "torch-2.1.2+cu121",
        "numpy-1.26.2",
        "onnxruntime_gpu-1.23.0",
        "tensorrt_cu12_bindings-10.9.0",
        "tensorrt_cu12-10.9.0.34",
        "tensorrt_rtx_cu13-1.7.1.116",
        "torchvision-0.16.2",
    ):
        (folder / f"{name}.dist-info").mkdir(parents=True)
    assert read_packages(root) == {
        "torch": "2.1.2+cu121",
        "numpy": "1.26.2",
        "onnxruntime-gpu": "1.23.0",
        "tensorrt-cu12": "10.9.0.34",
        "tensorrt-rtx-cu13": "1.7.1.116",
    }
