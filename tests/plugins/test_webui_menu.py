"""The UNet menu, the settings, the tab and the install script of the WebUI extension."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sdcompress_engines import trust
from sdcompress_engines.errors import EngineMismatch
from sdcompress_engines.manifest import read_manifest, save_manifest, sha256_file
from sdcompress_webui import engine_folders
from sdcompress_webui.menu import Label

from .places import WEBUI_PLUGIN
from .webui_cases import (
    TITLE,
    change_manifest,
    make_engine,
)
from .webui_host import WebUI, Widget, running


def test_automatic_takes_an_engine_of_the_checkpoint_and_never_a_student(
    installed: Path, whole_graph: Path, tiny_graph: Path, random_pipeline: Any
) -> None:
    root = installed / "models" / "sdcompress"
    change_manifest(root / "tiny", model_name="teacher")  # a student with its teacher's name
    with running(WebUI(installed, random_pipeline.unet)) as host:
        host.load_extension(WEBUI_PLUGIN)
        host.apply_unet("Automatic")
        assert host.sd_unet.current_unet is None
        shutil.copytree(whole_graph, root / "teacher")
        host.list_unets()
        host.apply_unet("Automatic")
        assert host.sd_unet.current_unet.hosted.model.usable[0].folder.name == "teacher"
        manifest = read_manifest(root / "teacher")
        assert manifest is not None
        save_manifest(
            root / "teacher", replace(manifest, inputs={**manifest.inputs, "lora style.safetensors:0.8": "0"})
        )
        host.list_unets()
        host.apply_unet("Automatic")  # with a LoRA baked in it is another model
        assert host.sd_unet.current_unet is None


def test_looking_again_does_not_load_again(webui: WebUI) -> None:
    webui.apply_unet(TITLE)
    before = webui.sd_unet.current_unet
    webui.list_unets()
    webui.apply_unet(TITLE)
    assert webui.sd_unet.current_unet is before
    webui.apply_unet("None")


def test_a_label_is_found_by_what_the_settings_kept_of_it() -> None:
    fit, unfit = Label(TITLE), Label(f"{TITLE} – cannot run: no card")
    assert fit == unfit == TITLE
    assert hash(fit) == hash(unfit)
    assert fit != f"{TITLE}2"
    assert len({fit, unfit}) == 1


def test_an_engine_that_is_gone_is_an_error_and_not_the_checkpoints_unet(webui: WebUI, installed: Path) -> None:
    webui.opts.sd_unet = TITLE
    shutil.rmtree(installed / "models" / "sdcompress" / "tiny")
    webui.list_unets()
    with pytest.raises(EngineMismatch, match="any more"):
        webui.apply_unet()


def test_the_settings_hold_the_folder_of_the_engines(webui: WebUI, installed: Path, tmp_path: Path) -> None:
    assert set(webui.labels) == {"sdcompress_folder", "sdcompress_fallback", "sdcompress_cuda_graph"}
    shutil.move(installed / "models" / "sdcompress", tmp_path / "elsewhere")
    assert TITLE not in webui.list_unets()
    webui.opts.sdcompress_folder = str(tmp_path / "elsewhere")
    assert TITLE in webui.list_unets()
    webui.opts.sdcompress_folder = "~nobody-here/engines"
    assert TITLE not in webui.list_unets()
    assert "The engine folder is <code>~nobody-here/engines</code>" in webui.tab()


def test_the_tab_shows_engines_reasons_and_commands(webui: WebUI, installed: Path, tiny_graph: Path) -> None:
    root = installed / "models" / "sdcompress"
    make_engine(root / "far <away>", tiny_graph, platform="plan9-mips")
    text = webui.tab()
    assert "far &lt;away&gt;" in text
    assert "was built for plan9-mips" in text
    assert "sdcompress export MODEL --trt --flavour tensorrt-rtx" in text
    assert "<td>ready</td>" in text
    for named in ("LoRA", "ControlNet", "tiling"):
        assert named in text
    again = next(widget for widget in Widget.created if widget.clicked)
    shutil.rmtree(root)
    assert "There are no engines yet" in again.clicked()[0]


def test_the_tab_knows_the_entry_that_the_settings_have_now(webui: WebUI) -> None:
    webui.tab()
    refresh = next(widget for widget in Widget.created if widget.clicked).clicked
    webui.opts.sd_unet = f"{TITLE} of yesterday"
    assert "of yesterday" in refresh()[0]


@pytest.fixture
def foreign(installed: Path, tiny_graph: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An engine folder that was built elsewhere, on a stand-in for a machine that could run it."""
    monkeypatch.setenv("SDCOMPRESS_CONFIG", str(tmp_path / "config"))
    monkeypatch.setattr(engine_folders, "obstacle", lambda config: None)
    return make_engine(installed / "models" / "sdcompress" / "from <afar>", tiny_graph, platform="<b>plan9</b>")


def test_the_tab_asks_before_an_engine_that_was_built_elsewhere_runs(webui: WebUI, foreign: Path) -> None:
    sha256 = sha256_file(foreign / "unet.engine")
    entry = next(label for label in webui.list_unets() if "tensorrt-rtx" in label)
    assert "built elsewhere or by an earlier version, and is executable code" in entry
    webui.opts.sd_unet = str(entry)
    with pytest.raises(EngineMismatch, match="allow it in the sdcompress tab"):
        webui.apply_unet()
    page = webui.tab()
    assert sha256 in page
    assert "&lt;b&gt;plan9" in page
    assert "<b>plan9" not in page
    button = next(widget for widget in Widget.created if widget.args[:1] == ("Allow this engine to run",))
    assert "Choose one" in button.clicked("none")[0]
    assert trust.find_consent(sha256) is None
    choice = next(widget for widget in Widget.created if type(widget).__name__ == "Dropdown")
    shown, update = button.clicked(choice.args[0][1])
    assert f"may run now (sha256 {sha256})" in shown
    assert "These engines were built elsewhere" not in shown
    assert update["choices"] == ["none"]
    consent = trust.find_consent(sha256)
    assert consent is not None
    assert consent.origin == "allowed"
    assert "[sdcompress] tiny (tensorrt-rtx fp32)" in [str(label) for label in webui.list_unets()]


def test_an_engine_that_differs_from_its_manifest_is_not_allowed(webui: WebUI, foreign: Path) -> None:
    webui.tab()
    button = next(widget for widget in Widget.created if widget.args[:1] == ("Allow this engine to run",))
    choice = next(widget for widget in Widget.created if type(widget).__name__ == "Dropdown")
    (foreign / "unet.engine").write_bytes(b"anothr" * 100)
    assert "It is not allowed" in button.clicked(choice.args[0][1])[0]
    assert not trust.trust_folder().exists()


def test_the_install_script_reports_and_installs_nothing(tmp_path: Path) -> None:
    import subprocess

    shutil.copytree(WEBUI_PLUGIN, tmp_path / "extension", ignore=shutil.ignore_patterns("__pycache__"))
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", str(tmp_path / "extension" / "install.py")],
        capture_output=True,
        text=True,
        check=True,
    )  # -S: without site-packages
    assert "sdcompress install webui" in done.stdout
    assert "-m pip install tensorrt" in done.stdout
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
