"""`engines verify`, `engines trust` and `--trust`: a downloaded engine is checked, and runs only after a consent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from sdcompress_engines import trust
from sdcompress_engines.engine_key import EngineKey
from sdcompress_engines.flavour import platform_name
from sdcompress_engines.manifest import sha256_file, write_manifest

from .conftest import Cli, one_line

KEY = EngineKey(
    "a" * 64,
    "unet",
    "fp16",
    "comfyui",
    "tensorrt-rtx",
    "1.0",
    ((8, 9),),
    platform_name(),
    ({"x": ((1, 4, 16, 16), (1, 4, 16, 16), (1, 4, 16, 16))},),
)


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDCOMPRESS_CONFIG", str(tmp_path / "config"))


@pytest.fixture
def downloaded(tmp_path: Path) -> Path:
    """A folder with an engine of somebody else's, as `export --trt` lays it out."""
    folder = tmp_path / "downloaded" / "engine"
    (folder / "pipeline").mkdir(parents=True)
    (folder / "pipeline" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (folder / "unet.engine").write_bytes(b"code" * 100)
    write_manifest(folder, "engine", config=KEY.config() | {"model_name": "portraits"})
    return folder


def test_verify_shows_a_downloaded_engine_and_that_it_was_built_elsewhere(cli: Cli, downloaded: Path) -> None:
    digest = sha256_file(downloaded / "unet.engine")
    for path in (downloaded, downloaded.parent):
        code, out, _ = cli("engines", "verify", path)
        assert code == 0
        assert f"unet.engine         sha256 {digest}  built elsewhere, not allowed to run" in out
        assert "They do not show who made the folder" in out
    assert cli("engines", "trust", downloaded)[0] == 0
    code, out, _ = cli("engines", "verify", downloaded)
    assert "allowed on 20" in out
    assert "who made the folder" not in out
    (finding,) = json.loads(cli("engines", "verify", downloaded, "--json")[1])["findings"]
    assert finding["code"][0]["sha256"] == digest
    trust.withdraw(downloaded / "unet.engine")
    trust.record_built(downloaded / "unet.engine")
    assert "built here on 20" in cli("engines", "verify", downloaded)[1]


def test_verify_names_damage_and_links(cli: Cli, downloaded: Path) -> None:
    config = downloaded / "pipeline" / "model_index.json"
    text = config.read_text()
    config.write_text(text.replace("Stable", "Stabel"))
    code, out, err = cli("engines", "verify", downloaded)
    assert code == 3
    assert "model_index.json is not what the manifest says (sha256 differs)" in out
    assert "1 damaged" in one_line(err)
    config.write_text(text)
    assert cli("engines", "verify", downloaded)[0] == 0
    shutil.move(config, downloaded.parent / "index.json")
    config.symlink_to(downloaded.parent / "index.json")
    code, out, _ = cli("engines", "verify", downloaded)
    assert code == 3
    assert "is a link" in out


def test_a_downloaded_engine_is_refused_until_it_is_allowed(cli: Cli, downloaded: Path) -> None:
    digest = sha256_file(downloaded / "unet.engine")
    code, _, err = cli("generate", downloaded, "a cat", "--backend", "trt")
    assert code == 1
    line = one_line(err)
    assert f"was built elsewhere or by an earlier version, and is executable code (sha256 {digest})" in line
    assert f"sdcompress engines trust {downloaded / 'unet.engine'}" in line
    code, _, err = cli("generate", downloaded, "a cat", "--backend", "trt", "--trust")
    assert f"sha256 {digest}, allowed on 20" in err
    assert "built elsewhere" not in one_line(err)  # the next obstacle: these are no configs
    assert cli("engines", "trust", "--withdraw", downloaded)[0] == 0
    assert trust.find_consent(digest) is None


def test_a_consent_is_refused_for_what_is_no_code_and_for_what_was_altered(
    cli: Cli, downloaded: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert cli("engines", "trust", tmp_path / "empty")[0] == 2
    assert cli("engines", "trust", tmp_path / "nowhere")[0] == 2
    (downloaded / "unet.engine").write_bytes(b"cod3" * 100)
    code, _, err = cli("engines", "trust", downloaded)
    assert code == 1
    assert "is not the file that its sdcompress.json names" in one_line(err)
    assert not trust.trust_folder().exists()


def test_install_says_that_an_engine_was_built_elsewhere_and_takes_a_consent(
    cli: Cli, downloaded: Path, tmp_path: Path
) -> None:
    host = tmp_path / "ComfyUI"
    for name in ("custom_nodes/x", "models/x", "comfy/sd.py", "main.py", "nodes.py", "user/x"):
        (host / name).parent.mkdir(parents=True, exist_ok=True)
        (host / name).write_text("")
    code, out, err = cli("install", "comfyui", host, downloaded)
    assert code == 0, err
    assert "was built elsewhere or by an earlier version, and is executable code" in out
    state = json.loads(cli("status", "comfyui", host, "--json")[1])
    assert not state["engines"][0]["loads_here"]
    code, out, err = cli("install", "comfyui", host, downloaded, "--trust")
    assert code == 0, err
    assert "built elsewhere" not in out
    installed = host / "models" / "sdcompress" / "portraits" / "unet.engine"
    assert trust.find_consent(sha256_file(installed)) is not None
