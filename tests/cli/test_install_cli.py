"""`install`, `status` and `uninstall` as they are typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sdcompress_engines.command import command_line

from ..sdcompress.hosts.trees import HOSTS, TREES, make_engine, make_tree, snapshot
from .conftest import Cli, one_line


@pytest.mark.parametrize("host", HOSTS)
def test_install_status_uninstall(host: str, cli: Cli, tmp_path: Path) -> None:
    root = make_tree(tmp_path / "my host é", host)
    made = make_engine(tmp_path / "made/engine", host, platform="linux-s390x")
    before = snapshot(root)
    code, out, _ = cli("status", host, root)
    assert code == 0
    assert "not installed" in out
    assert f"next: sdcompress install {host}" in out
    code, out, _ = cli("install", host, root, made.parent)
    assert code == 0
    assert "models/sdcompress/sd-tiny: 3 files written" in out
    assert "restart" in out
    assert f"next: sdcompress status {host} {command_line([str(root)])}" in out
    code, out, _ = cli("install", host, root, made)
    assert (code, "everything was there already" in out) == (0, True)
    code, out, _ = cli("status", host, root)
    assert code == 0
    assert "sd-tiny  (tensorrt-rtx 1.0.0, fp16," in out
    assert "does not load here: the engine was built for linux-s390x" in out
    assert "host's Python  not found" in out
    code, out, _ = cli("uninstall", host, root)
    assert code == 0
    assert "3 files removed" in out
    assert snapshot(root) == before


def test_status_as_json(cli: Cli, tmp_path: Path) -> None:
    root = make_tree(tmp_path / "comfy", "comfyui")
    cli("install", "comfyui", root, make_engine(tmp_path / "made", "comfyui"), "--name", "Ärger")
    (root / "custom_nodes/comfyui-sdcompress/node.py").write_text("changed")
    code, out, _ = cli("status", "comfyui", root, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["installed"]
    assert found["changed"] == {"custom_nodes/comfyui-sdcompress/node.py": "was changed since it was installed"}
    assert [(engine["name"], engine["ours"], engine["fault"], engine["loads_here"]) for engine in found["engines"]] == [
        ("Ärger", True, None, False)
    ]
    assert found["engines"][0]["why_not"]
    code, out, _ = cli("uninstall", "comfyui", root)
    assert (code, "node.py: was changed since it was installed" in out) == (0, True)


@pytest.mark.parametrize(("host", "chosen"), [("webui", "Euler, Simple"), ("comfyui", "euler, simple")])
def test_a_few_step_engine_says_what_to_choose(host: str, chosen: str, cli: Cli, tmp_path: Path) -> None:
    root = make_tree(tmp_path / "host", host)
    scheduler = {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "clip_sample": False}
    index = {"_num_inference_steps": 4, "_guidance_scale": 1.0}
    extra = {
        "pipeline/model_index.json": json.dumps(index),
        "pipeline/scheduler/scheduler_config.json": json.dumps(scheduler),
    }
    code, out, _ = cli("install", host, root, make_engine(tmp_path / "made", host, extra=extra))
    assert code == 0
    assert f"sd-tiny was trained for 4 steps, CFG 1, {chosen}: choose these" in " ".join(out.split())
    code, out, _ = cli("status", host, root)
    assert (code, f"4 steps, CFG 1, {chosen})" in " ".join(out.split())) == (0, True)
    code, out, _ = cli("status", host, root, "--json")
    assert json.loads(out)["engines"][0]["sampling"] == f"4 steps, CFG 1, {chosen}"


def test_a_link_is_said_and_one_engine_is_taken_away(cli: Cli, tmp_path: Path) -> None:
    root = make_tree(tmp_path / "comfy", "comfyui")
    for name in ("first", "second"):
        assert cli("install", "comfyui", root, make_engine(tmp_path / name, "comfyui", name), "--link")[0] == 0
    assert (root / "models/sdcompress/second").is_symlink()
    code, out, _ = cli("uninstall", "comfyui", root, "first")
    assert (code, (root / "models/sdcompress/first").exists(), (root / "models/sdcompress/second").exists()) == (
        0,
        False,
        True,
    )
    assert "1 file removed" in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("install", "webui", "{comfyui}"), 2, "is ComfyUI, not SD-WebUI"),
        (("install", "comfyui", "{nowhere}"), 2, "no such folder"),
        (
            ("install", "comfyui", "{comfyui}", "{nowhere}"),
            2,
            "no such folder; expected one that `sdcompress export` has written",
        ),
        (("install", "comfyui", "{comfyui}", "{comfyui}"), 1, "holds no engine"),
        (("install", "comfyui", "{comfyui}", "{comfyui}/main.py"), 2, "is a file; expected the folder of an engine"),
        (("install", "comfyui", "{comfyui}", "--with-weights", "nano"), 2, "--with-weights for ComfyUI"),
        (("uninstall", "comfyui", "{comfyui}"), 2, "nothing is installed here"),
        (("status", "forge", "{comfyui}"), 2, "is ComfyUI, not Forge"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], code: int, words: str, cli: Cli, tmp_path: Path) -> None:
    make_tree(tmp_path / "comfyui", "comfyui")
    found, _, err = cli(
        *(
            argument.replace("{comfyui}", str(tmp_path / "comfyui")).replace("{nowhere}", str(tmp_path / "nowhere"))
            for argument in arguments
        )
    )
    assert found == code
    assert words in one_line(err)


def test_help_names_the_hosts_and_loads_no_torch() -> None:
    check = (
        "import sys; sys.argv = ['sdcompress', 'install', '--help']\nfrom sdcompress.cli import main\ntry:"
        " main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert all(host in ran.stdout for host in TREES)
