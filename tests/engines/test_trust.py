"""Code that was built elsewhere is opened only after a consent that names its sha256."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from sdcompress_engines import trust
from sdcompress_engines.errors import ArtifactError, NotTrusted, UsageError
from sdcompress_engines.flavour import TENSORRT_RTX, platform_name
from sdcompress_engines.manifest import cache_folder, sha256_file, write_manifest
from sdcompress_engines.runners import TensorRTRunner, TensorSpec, aot_inductor, compile_package, open_runner


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings of their own for each test."""
    monkeypatch.setenv("SDCOMPRESS_CONFIG", str(tmp_path / "config"))
    return tmp_path / "config"


def write_code(folder: Path, name: str = "unet.engine", content: bytes = b"code", kind: str = "engine") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    write_manifest(folder, kind)
    return folder / name


def test_a_file_is_refused_until_it_is_allowed_and_again_after_any_change(tmp_path: Path) -> None:
    path = write_code(tmp_path / "engine")
    digest = sha256_file(path)
    with pytest.raises(
        NotTrusted,
        match=f"executable code .sha256 {digest}.*engines trust",
    ):
        trust.check_trusted(path, digest)
    consent = trust.allow(path)
    assert (consent.sha256, consent.origin) == (digest, "allowed")
    trust.check_trusted(path, digest)
    copy = write_code(tmp_path / "copy")
    trust.check_trusted(copy, sha256_file(copy))  # the same bytes, wherever they lie
    path.write_bytes(b"cod3")
    with pytest.raises(NotTrusted):
        trust.check_trusted(path, sha256_file(path))
    with pytest.raises(ArtifactError, match="is not the file that its"):
        trust.allow(path)


def test_what_is_built_here_stays_so_and_a_consent_can_be_withdrawn(tmp_path: Path) -> None:
    path = write_code(tmp_path / "engine")
    trust.record_built(path)
    assert trust.allow(path).origin == "built here"
    assert trust.withdraw(path)
    assert not trust.withdraw(path)
    with pytest.raises(NotTrusted):
        trust.check_trusted(path, sha256_file(path))


@pytest.mark.parametrize(
    "content",
    [
        *(
            "",
            "{",
            "[]",
            "[" * 10**5,
            '{"sha256": 1}',
            "{}",
            '{"sha256": "%s", "origin": "x", "file": "", "created": ""}',
        ),
        '{"sha256": "%s", "origin": {}, "file": "", "created": ""}',
        json.dumps({"sha256": "0" * 64, "origin": "allowed", "file": "", "created": ""}),
    ],
    ids=range(9),
)
def test_a_broken_consent_is_none(tmp_path: Path, content: str) -> None:
    path = write_code(tmp_path / "engine")
    digest = sha256_file(path)
    trust.allow(path)
    (trust.trust_folder() / f"{digest}.json").write_text(content.replace("%s", digest))
    assert trust.find_consent(digest) is None


@pytest.mark.parametrize("digest", ["", "..", "../../x", "A" * 64, "0" * 63, "0" * 64 + "\n", "/" * 64])
def test_a_sha256_that_is_none_has_no_consent(digest: str) -> None:
    assert trust.find_consent(digest) is None


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a folder that cannot be written")
def test_a_build_succeeds_where_its_note_cannot_be_kept(tmp_path: Path, config: Path) -> None:
    config.mkdir(mode=0o500)
    with pytest.warns(RuntimeWarning, match="its first use will ask"):
        trust.record_built(write_code(tmp_path / "engine"))


def test_a_build_succeeds_where_a_file_is_in_the_way_of_its_note(tmp_path: Path, config: Path) -> None:
    config.write_text("")
    with pytest.warns(RuntimeWarning, match="its first use will ask"):
        trust.record_built(write_code(tmp_path / "engine"))


def test_only_code_can_be_allowed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not code"):
        trust.allow(write_code(tmp_path / "engine", "unet.onnx"))
    with pytest.raises(UsageError, match="no such file"):
        trust.allow(tmp_path / "nowhere.engine")
    assert trust.find_code(tmp_path / "engine") == []
    write_code(tmp_path / "out" / "engine")
    assert trust.find_code(tmp_path / "out") == [tmp_path / "out" / "engine" / "unet.engine"]


class Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_a_package_is_not_opened_before_it_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TensorSpec("x", (4,), torch.float32)
    path = compile_package(Double(), (torch.ones(4),), None, tmp_path / "double.pt2", (spec,), (spec,))
    with open_runner(path) as runner:  # it was compiled here
        assert runner.infer({"x": torch.ones(4)})["x"].tolist() == [2.0] * 4
    assert trust.withdraw(path)

    def open_it(path: Path) -> Any:
        raise AssertionError("the package was opened")

    with monkeypatch.context() as patch:
        patch.setattr(aot_inductor, "read_facts", open_it)
        with pytest.raises(NotTrusted, match="pt2: was built elsewhere"):
            open_runner(path)
    trust.allow(path)
    open_runner(path).close()


@pytest.mark.skipif(TENSORRT_RTX.missing() is not None, reason="tensorrt-rtx is not installed")
def test_an_engine_is_not_opened_before_it_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is a stand-in: the refusal comes before anything of it is used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    path = write_code(tmp_path / "engine")
    config = {
        "flavour": "tensorrt-rtx",
        "version": TENSORRT_RTX.version,
        "platform": platform_name(),
        "compute_capabilities": [[8, 9]],
    }
    write_manifest(path.parent, "engine", config=config)
    with pytest.raises(NotTrusted, match="engine: was built elsewhere"):
        TensorRTRunner(path).open()


def test_a_checkpoint_beside_an_engine_needs_no_consent_and_gets_none(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.write_bytes(b"weights")
    assert trust.find_code(checkpoint) == []


def test_without_a_home_folder_a_finished_build_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SDCOMPRESS_CONFIG", "XDG_CONFIG_HOME", "APPDATA"):
        monkeypatch.delenv(name, raising=False)

    def fail(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", fail)
    engine = tmp_path / "unet.engine"
    engine.write_bytes(b"code")
    with pytest.warns(RuntimeWarning, match="its first use will ask"):
        trust.record_built(engine)
    assert trust.find_consent(sha256_file(engine)) is None


def test_a_folder_in_a_variable_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "expanduser", lambda path: Path(str(path).replace("~", str(tmp_path))))
    for name in ("SDCOMPRESS_CONFIG", "SDCOMPRESS_CACHE"):
        monkeypatch.setenv(name, "~/mine")
    assert trust.trust_folder() == tmp_path / "mine/trusted"
    assert cache_folder() == tmp_path / "mine"
