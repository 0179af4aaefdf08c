"""What a wheel carries besides Python packages is found in it, with no repository around."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = (
    "sdcompress",
    "engines",
    "bench",
    "plugins",
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)
FOUND = """
import sys
from importlib.resources import files
from pathlib import Path
from sdcompress.hosts.find import find_host
from sdcompress.hosts.install import install, uninstall
from sdcompress.hosts.plugin_files import plugin_folder
from sdcompress.train.recipes import recipe_names
unpacked = Path(sys.argv[1])
for plugin in ("sd_webui_sdcompress", "comfyui_sdcompress"):
    assert plugin_folder(plugin).is_relative_to(unpacked), plugin_folder(plugin)
place = find_host("comfyui", sys.argv[2])
install(*place)
print(sorted(path.name for path in (files("sdcompress_bench") / "scenarios").iterdir()))
print(sorted(recipe_names()))
uninstall(*place)
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this repository, built away from it, with its files laid out as an installation has them."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                folder / "source" / name,
                ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "results"),
            )
        else:
            shutil.copy(ROOT / name, folder / "source" / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        str(folder / "source"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder / "installed")
    return folder / "installed"


def test_plugins_and_scenarios_are_in_the_wheel_whole(unpacked: Path) -> None:
    for source, target, kind in (
        ("plugins", "sdcompress/plugins", "*.py"),
        ("bench/scenarios", "sdcompress_bench/scenarios", "*.yaml"),
        ("bench/sdcompress_bench/templates", "sdcompress_bench/templates", "*.j2"),
        ("sdcompress/recipes", "sdcompress/recipes", "*.yaml"),
    ):
        wanted = {path.relative_to(ROOT / source): path.read_bytes() for path in (ROOT / source).rglob(kind)}
        assert wanted
        assert {
            path.relative_to(unpacked / target): path.read_bytes() for path in (unpacked / target).rglob(kind)
        } == wanted
    assert not list(unpacked.rglob("*.pyc"))


def test_an_installation_without_the_repository_installs_plugins(unpacked: Path, tmp_path: Path) -> None:
    host = tmp_path / "Comfy UI"
    for folder in ("custom_nodes", "models", "comfy"):
        (host / folder).mkdir(parents=True)
    (host / "comfy/sd.py").touch()
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}  # before the editable installation of the repository
    ran = subprocess.run(
        [sys.executable, "-c", FOUND, unpacked, host],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    scenarios, recipes = ran.stdout.splitlines()
    assert scenarios == str(sorted(path.name for path in (ROOT / "bench/scenarios").iterdir()))
    assert "'bk-sdm-tiny'" in recipes
    assert sorted(path.name for path in host.rglob("*")) == ["comfy", "custom_nodes", "models", "sd.py"]
