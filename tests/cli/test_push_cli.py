"""`sdcompress push`: what it prints, what it refuses, and what it sends to a hub."""

from __future__ import annotations

import base64
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from PIL import Image
from sdcompress_engines.errors import SdCompressError
from sdcompress_engines.manifest import MANIFEST_NAME, faults, read_manifest, sha256_file, write_manifest

from sdcompress.lora.adapters import LowRank
from sdcompress.lora.files import write_lora
from sdcompress.publish.finished_model import find_finished_model
from sdcompress.train.config import LoraConfig
from sdcompress.train.recipes import load_config

from ..hostile_text import NAMES, write_sealed
from .conftest import Cli, one_line


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A training folder as `lora train` leaves it: a small LoRA under lora/ and a grid of samples."""
    folder = tmp_path / "style"
    layers = {("unet", "mid_block.attentions.0.proj_in"): LowRank(torch.randn(2, 8), torch.randn(8, 2), 2.0)}
    write_lora(layers, folder / "lora/lora.safetensors", "diffusers")
    write_lora(layers, folder / "lora/lora-kohya.safetensors", "kohya")
    config = load_config(LoraConfig, "nano-lora", {}).model_dump(mode="json")
    write_manifest(
        folder / "lora",
        "lora",
        config={"train": config, "model_name": "nano"},
        inputs={"model": "a" * 64, "data": "b" * 64},
        figures={"steps": 200, "losses": {"task_loss": 0.1}},
        seed=0,
    )
    (folder / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "samples/step-000200.webp")
    return folder


def test_a_dry_run_needs_neither_token_nor_network(
    cli: Cli, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    before = sorted(trained.rglob("*"))
    code, out, _ = cli("push", trained, "me/style", "--dry-run")
    assert code == 0
    assert out.startswith("---\nlicense: other\n")
    assert sorted(line.split()[0] for line in out.splitlines()[-5:]) == [
        "README.md",
        "lora-kohya.safetensors",
        "lora.safetensors",
        "samples.webp",
        "sdcompress.json",
    ]
    code, out, _ = cli("push", trained, "me/style", "--dry-run", "-o", tmp_path / "card")
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "card").iterdir()) == ["README.md", "samples.webp"]
    assert "---" not in out
    assert sorted(trained.rglob("*")) == before
    assert cli("push", trained, "me/style", "--dry-run", "-o", tmp_path / "card")[0] == 1


def test_the_folder_where_the_command_runs_is_pushed_with_its_samples(
    cli: Cli, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained / "lora")
    code, out, err = cli("push", ".", "me/style", "--dry-run")
    assert code == 0, err
    assert "samples.webp" in [line.split()[0] for line in out.splitlines()[-5:]]


class Hub(BaseHTTPRequestHandler):
    """The part of the hub that an upload needs. It keeps the files it receives in `server.sent`."""

    def do_POST(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        here = f"http://127.0.0.1:{server.server_port}/me/style"
        if server.refusal:
            self._answer(server.refusal, {"error": "no"})
        elif self.path == "/api/repos/create":
            server.created = json.loads(body)
            self._answer(200, {"url": here})
        elif self.path == "/api/validate-yaml":
            server.checked = json.loads(body)["content"]
            self._answer(200, {"warnings": [], "errors": []})
        elif "/preupload/" in self.path:
            self._answer(
                200,
                {
                    "files": [
                        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for file in json.loads(body)["files"]
                    ]
                },
            )
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            server.message = lines[0]["value"]["summary"]
            server.deleted = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
            files = [line["value"] for line in lines if line["key"] == "file"]
            server.sent = {file["path"]: base64.b64decode(file["content"]) for file in files}
            self._answer(200, {"commitUrl": f"{here}/commit/{'0' * 40}", "commitOid": "0" * 40})

    def do_GET(self) -> None:
        server: Any = self.server
        if self.path == "/api/models/me/style":
            files = [{"rfilename": name} for name in server.files]
            self._answer(200, {"id": "me/style", "private": server.is_private, "siblings": files})
        else:
            self._answer(401, {"error": "no"})

    def _answer(self, status: int, values: dict[str, Any]) -> None:
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.refusal, server.sent, server.is_private, server.files = None, {}, True, [".gitattributes"]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_push_sends_the_files_with_the_card_in_one_commit(cli: Cli, trained: Path, hub: Any) -> None:
    (trained / "lora/notes.txt").write_text("mine")
    code, out, err = cli("push", trained, "me/style", "--private", "--license", "apache-2.0", "--message", "first")
    assert code == 0, err
    assert hub.created["name"] == "style"
    assert hub.created["organization"] == "me"
    assert "private" in json.dumps(hub.created)
    assert set(hub.sent) == {
        "README.md",
        "samples.webp",
        "sdcompress.json",
        "lora.safetensors",
        "lora-kohya.safetensors",
    }
    for name in ("lora.safetensors", "sdcompress.json"):
        assert hub.sent[name] == (trained / "lora" / name).read_bytes()
    assert hub.sent["samples.webp"] == (trained / "samples/step-000200.webp").read_bytes()
    assert hub.sent["README.md"].decode() == hub.checked
    assert "license: apache-2.0" in hub.checked
    assert hub.message == "first"
    assert "127.0.0.1" in out
    assert not (trained / "lora/README.md").exists()


def test_private_files_are_not_sent_to_a_public_repository(cli: Cli, trained: Path, hub: Any) -> None:
    hub.is_private = False
    code, _, err = cli("push", trained, "me/style", "--private")
    assert code == 1
    assert "is public, and --private was given" in one_line(err)
    assert hub.sent == {}
    assert cli("push", trained, "me/style")[0] == 0


def test_a_model_in_the_repository_is_replaced_only_by_force_and_then_as_a_whole(
    cli: Cli, trained: Path, hub: Any
) -> None:
    hub.files = ["README.md", "sdcompress.json", "notes.txt", "text_encoder_2/model.safetensors", ".gitattributes"]
    code, _, err = cli("push", trained, "me/style")
    assert code == 1
    assert "me/style: holds 4 files already, such as README.md" in one_line(err)
    assert hub.sent == {}
    code, _, err = cli("push", trained, "me/style", "--force")
    assert code == 0, err
    assert "lora.safetensors" in hub.sent
    assert hub.deleted == ["text_encoder_2/model.safetensors"]


@pytest.mark.parametrize(
    ("status", "message"), [(401, "hf auth login"), (403, "hf auth login"), (500, "try again later")]
)
def test_a_refusal_of_the_hub_is_one_line(cli: Cli, trained: Path, hub: Any, status: int, message: str) -> None:
    hub.refusal = status
    code, _, err = cli("push", trained, "me/style")
    assert code == 1
    assert message in one_line(err)


def test_no_token_and_no_network_are_one_line_each(
    cli: Cli, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    code, _, err = cli("push", trained, "me/style")
    assert code == 2
    assert "HF_TOKEN" in one_line(err)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    code, _, err = cli("push", trained, "me/style")
    assert code == 1
    assert "check the network" in one_line(err)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, _, err = cli("push", trained, "me/style")
    assert code == 1
    assert "HF_HUB_OFFLINE" in one_line(err)


def test_unfinished_and_unknown_folders_are_not_pushed(
    cli: Cli, trained: Path, tmp_path: Path, random_folder: Path
) -> None:
    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoints").mkdir(parents=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, code, message in (
        (tmp_path / "nowhere", 2, "does not exist"),
        (empty, 1, "neither a pipeline nor a LoRA"),
        (unfinished, 1, "--resume"),
        (random_folder, 1, "no sdcompress.json"),
    ):
        exit_code, _, err = cli("push", folder, "me/style", "--dry-run")
        assert exit_code == code
        assert message in one_line(err)


def test_a_damaged_artifact_is_not_pushed(cli: Cli, trained: Path) -> None:
    weights = trained / "lora/lora.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (trained / "lora/lora-kohya.safetensors").unlink()
    code, _, err = cli("push", trained, "me/style", "--dry-run")
    assert code == 1
    assert "sha256 differs" in one_line(err)
    assert "lora-kohya.safetensors is missing" in one_line(err)
    (trained / "lora/sdcompress.json").write_text("{")
    code, _, err = cli("push", trained, "me/style", "--dry-run")
    assert code == 1
    assert "broken manifest" in one_line(err)


@pytest.mark.parametrize(
    "arguments",
    [
        ("style",),
        ("me/st yle",),
        ("me/a/b",),
        ("me/style", "--license", "My Own"),
        ("me/style", "--base-model", "teacher"),
        ("me/style", "-o", "card"),
    ],
)
def test_invalid_names_are_refused(cli: Cli, trained: Path, arguments: tuple[str, ...]) -> None:
    code, _, err = cli("push", trained, *arguments, *(() if "-o" in arguments else ("--dry-run",)))
    assert code == 2
    assert "Traceback" not in err


def change_manifest(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / MANIFEST_NAME).read_text()) | changes
    raw.pop("seal", None)
    write_sealed(folder / MANIFEST_NAME, raw)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES)
def test_no_name_in_a_manifest_uploads_a_file_from_elsewhere(trained: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    folder = Path(tempfile.mkdtemp(dir=tmp_path)) / "a/lora"
    shutil.copytree(trained / "lora", folder)
    raw = json.loads((folder / MANIFEST_NAME).read_text())
    entry = {"sha256": sha256_file(secret), "bytes": 6}
    for climbing in (name, os.path.relpath(secret, folder), str(secret)):
        change_manifest(folder, files=raw["files"] | {climbing: entry})
        with pytest.raises(SdCompressError):
            find_finished_model(folder)


@pytest.mark.parametrize("name", ["lora.safetensors", "sdcompress.json", "../samples/step-000200.webp"])
def test_a_link_is_not_uploaded(cli: Cli, trained: Path, tmp_path: Path, name: str) -> None:
    file = trained / "lora" / name
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    code, _, err = cli("push", trained, "me/style", "--dry-run")
    assert code == 1
    assert "is a link" in one_line(err)


def test_samples_that_are_no_picture_are_not_uploaded(cli: Cli, trained: Path) -> None:
    (trained / "samples/step-000200.webp").write_text("secret")
    code, _, err = cli("push", trained, "me/style", "--dry-run")
    assert code == 1
    assert "is no picture" in one_line(err)


def test_what_is_uploaded_names_no_folder_of_this_machine(cli: Cli, trained: Path, hub: Any, tmp_path: Path) -> None:
    folder = trained / "lora"
    (folder / "config.json").write_text(json.dumps({"_name_or_path": "/home/lovelace/models/teacher", "rank": 2}))
    raw = json.loads((folder / MANIFEST_NAME).read_text())
    train = raw["config"]["train"] | {"validation_prompts": ["and/or a 1/2 cat", "like /home/lovelace/cat.png, 4:3"]}
    places = {
        "train": train | {"plan": "plans/mine.json"},
        "model_name": r"C:\Users\lovelace\teacher.safetensors",
        "teacher_name": "org/teacher",
        "data": {"source": "../lovelace/pictures", "pictures": 3},
        "run": [
            "~lovelace/runs/x",
            "file:///home/lovelace/x",
            r"\\lovelace-pc\share\x",
            "lovelace@lovelace-pc:/srv/x",
            "a/lovelace/b",
            r"C:\Users\Ada lovelace\my models\x",
            "/home/ada lovelace/x",
            r"\\pc\of lovelace\x",
            "~/of lovelace/x",
            "../of lovelace/x",
        ],
    }
    write_manifest(folder, "lora", config=places, inputs=raw["inputs"], figures=raw["figures"], seed=0)
    code, _, err = cli("push", trained, "me/style")
    assert code == 0, err
    sent = tmp_path / "sent"
    for name, content in hub.sent.items():
        (sent / name).parent.mkdir(parents=True, exist_ok=True)
        (sent / name).write_bytes(content)
        assert b"lovelace" not in content, name
        assert str(tmp_path).encode() not in content
    assert faults(sent) == []
    manifest = read_manifest(sent)
    assert manifest is not None
    assert manifest.seal
    assert manifest.config["model_name"] == "teacher.safetensors"
    assert manifest.config["teacher_name"] == "org/teacher"
    assert manifest.config["data"] == {"source": "pictures", "pictures": 3}
    assert manifest.config["run"] == ["x", "x", "x", "x", "b", "x", "x", "x", "x", "x"]
    assert manifest.config["train"]["plan"] == "mine.json"
    assert manifest.config["train"]["validation_prompts"] == ["and/or a 1/2 cat", "like cat.png, 4:3"]
    assert json.loads((sent / "config.json").read_text()) == {"_name_or_path": "teacher", "rank": 2}


def test_an_upload_leaves_nothing_behind(cli: Cli, trained: Path, hub: Any, tmp_path: Path, monkeypatch: Any) -> None:
    staging = tmp_path / "staging"
    staging.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(staging))
    before = sorted(tmp_path.rglob("*"))
    assert cli("push", trained, "me/style")[0] == 0
    assert hub.sent
    assert sorted(tmp_path.rglob("*")) == before
