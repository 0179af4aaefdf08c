"""`sdcompress recipes` and `sdcompress push`: what they print, what they refuse, and what a hub is sent."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml
from PIL import Image
from sdcompress_engines.manifest import write_manifest

from sdcompress.lora.files import LoraLayer, write_lora
from sdcompress.train.config import LoraConfig
from sdcompress.train.recipes import load_config, recipe_names, recipe_path

from .conftest import Cli, one_line


def test_list_names_every_recipe(cli: Cli) -> None:
    code, out, _ = cli("recipes", "list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == recipe_names()
    facts = {fact["name"]: fact for fact in json.loads(cli("recipes", "list", "--json")[1])}
    assert facts["segmind-portrait"]["kind"] == "finetune"
    assert facts["segmind-portrait"]["steps"] == 131_000
    assert facts["bk-sdm-tiny"]["batch_size"] == 256
    assert "BK-SDM-Tiny" in facts["bk-sdm-tiny"]["purpose"]


def test_show_is_the_file_and_resolved_is_every_knob(cli: Cli) -> None:
    assert cli("recipes", "show", "nano-lora")[1] == recipe_path("nano-lora").read_text()
    code, out, _ = cli("recipes", "show", "nano-lora", "--resolved")
    assert code == 0
    assert yaml.safe_load(out)["rank"] == 8
    assert yaml.safe_load(out)["data"]["flip"] is False
    assert "# Of the adapter's matrices: higher learns more" in out


def test_copy_keeps_what_is_there(cli: Cli, tmp_path: Path) -> None:
    mine = tmp_path / "new/mine.yaml"
    assert cli("recipes", "copy", "nano", mine)[0] == 0
    assert mine.read_text() == recipe_path("nano").read_text()
    mine.write_text("steps: 7\n")
    code, _, err = cli("recipes", "copy", "nano", mine)
    assert code == 1
    assert "--force" in one_line(err)
    assert mine.read_text() == "steps: 7\n"
    assert cli("recipes", "copy", "nano", mine, "--force")[0] == 0
    assert mine.read_text() == recipe_path("nano").read_text()
    assert cli("recipes", "copy", "nano", tmp_path / "mine.txt")[0] == 2
    assert cli("recipes", "copy", "nano", mine / "deeper.yaml")[0] == 1


def test_validate_tells_all_faults_at_once_and_the_nearest_names(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("stepz: 3\nlearning_rate: -1\ndata:\n  flipp: true\n  size_px: 100\n")
    code, _, err = cli("recipes", "validate", path)
    assert code == 2
    for fault in (
        "stepz: unknown knob, did you mean steps?",
        "learning_rate",
        "data.flipp: unknown knob, did you mean flip?",
        "data.size_px",
    ):
        assert fault in one_line(err)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kind: finetun\n", "kind: finetune"),
        ("batch_size: 10\ngradient_accumulation: 4\n", "multiple of 4"),
        ("plan: bk-tny\n", "bk-tiny"),
        ("- steps\n", "no mapping"),
        ("steps: [1\n", "not YAML"),
    ],
)
def test_validate_refuses_what_no_run_could_use(cli: Cli, tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    code, _, err = cli("recipes", "validate", path)
    assert code == 2
    assert fault in one_line(err)


def test_validate_prints_the_figures_with_what_is_set(cli: Cli) -> None:
    code, out, _ = cli(
        "recipes",
        "validate",
        "segmind-tiny",
        "--set",
        "learning_rate=1e-5",
        "--set",
        "data.captions={generated_caption: 1}",
    )
    assert code == 0
    assert "128, in 4 passes of 32" in out
    assert "16,000,000" in out
    assert "1e-05, cosine" in out
    assert "task x 1, output x 0.5, feature x 0.5" in out
    resolved = json.loads(
        cli("recipes", "validate", "segmind-tiny", "--set", "data.captions={generated_caption: 1}", "--json")[1]
    )
    assert resolved["data"]["captions"] == {"generated_caption": 1.0}
    assert "rank 8, alpha 8, on to_q" in cli("recipes", "validate", "nano-lora")[1]


@pytest.mark.parametrize("command", [("show",), ("validate",), ("copy",)])
def test_an_unknown_recipe_names_the_nearest(cli: Cli, tmp_path: Path, command: tuple[str, ...]) -> None:
    code, _, err = cli("recipes", *command, "bk-sdm-tny", *([tmp_path / "a.yaml"] if command == ("copy",) else []))
    assert code == 2
    assert "bk-sdm-tiny" in one_line(err).split("Try:")[1]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A training folder with a small LoRA under lora/ and a grid of samples, as `lora train` leaves it."""
    folder = tmp_path / "style"
    layers = {("unet", "mid_block.attentions.0.proj_in"): LoraLayer(torch.randn(2, 8), torch.randn(8, 2), 2.0)}
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


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload speaks to; what it was sent is kept in `server.sent`."""

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
            server.sent = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines[1:]}
            self._answer(200, {"commitUrl": f"{here}/commit/{'0' * 40}", "commitOid": "0" * 40})

    def do_GET(self) -> None:
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
    server.refusal, server.sent = None, {}
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


@pytest.mark.parametrize(("status", "says"), [(401, "hf auth login"), (403, "hf auth login"), (500, "try again later")])
def test_a_refusal_of_the_hub_is_one_line(cli: Cli, trained: Path, hub: Any, status: int, says: str) -> None:
    hub.refusal = status
    code, _, err = cli("push", trained, "me/style")
    assert code == 1
    assert says in one_line(err)


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


def test_what_cannot_be_pushed(cli: Cli, trained: Path, tmp_path: Path, random_folder: Path) -> None:
    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoints").mkdir(parents=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, code, says in (
        (tmp_path / "nowhere", 2, "does not exist"),
        (empty, 1, "no pipeline and no LoRA"),
        (unfinished, 1, "--resume"),
        (random_folder, 1, "no sdcompress.json"),
    ):
        found, _, err = cli("push", folder, "me/style", "--dry-run")
        assert found == code
        assert says in one_line(err)


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
def test_names_the_hub_would_not_take(cli: Cli, trained: Path, arguments: tuple[str, ...]) -> None:
    code, _, err = cli("push", trained, *arguments, *(() if "-o" in arguments else ("--dry-run",)))
    assert code == 2
    assert "Traceback" not in err
