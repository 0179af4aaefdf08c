"""An export folder in which anything differs from its manifest is refused before anything of it is opened."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sdcompress_engines import verified
from sdcompress_engines.errors import ArtifactError
from sdcompress_engines.export_folder import check_export, read_named_json
from sdcompress_engines.manifest import MANIFEST_NAME, read_manifest, write_manifest
from sdcompress_engines.verified import sha256_once

FILES = {
    "unet.onnx": b"graph" * 50,
    "unet.onnx.data": bytes(range(256)),
    "pipeline/model_index.json": b"{}",
    "pipeline/unet/config.json": b'{"in_channels": 4}',
}


def write_export(folder: Path, kind: str = "onnx") -> Path:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_manifest(folder, kind)
    return folder


def alter(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1
    path.write_bytes(content)


def replace_by_link(path: Path, at: int) -> None:
    twin = path.parent.parent / f"twin-{at}"
    path.rename(twin)
    path.symlink_to(twin)


def replace_by_pipe(path: Path, at: int) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path: Path, at: int) -> None:
    path.unlink()
    path.mkdir()


def add_beside(path: Path, at: int) -> None:
    path.with_name(f"{path.stem}{at}{path.suffix}").write_bytes(b"x")


def cut(path: Path, at: int) -> None:
    path.write_bytes(path.read_bytes()[:-1])


CHANGES: list[Callable[[Path, int], object]] = [
    *(alter, cut, replace_by_folder, add_beside),
    lambda path, at: path.unlink(),
    lambda path, at: path.rename(path.with_name(f"other-{at}")),
    lambda path, at: path.write_bytes(path.read_bytes() + b"x"),
    *([] if sys.platform == "win32" else [replace_by_link, replace_by_pipe]),
]


@settings(deadline=None, max_examples=60)
@given(change=st.sampled_from(CHANGES), name=st.sampled_from(sorted(FILES)), at=st.integers(0, 10**6))
def test_any_change_of_any_file_is_refused_in_one_line(
    change: Callable[[Path, int], object], name: str, at: int
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = write_export(Path(place) / "export")
        assert check_export(folder, ["onnx", "engine"]).kind == "onnx"
        change(folder / name, at)
        with pytest.raises(ArtifactError) as refusal:
            check_export(folder, ["onnx", "engine"])
        assert "\n" not in str(refusal.value)
        assert len(str(refusal.value)) < 1000


def test_a_folder_without_a_manifest_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export")
    with pytest.raises(ArtifactError, match=r"is of kind 'onnx'; expected a folder of kind engine"):
        check_export(folder, ["engine"])
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(ArtifactError, match=r"has no sdcompress.json.*Try: export it again"):
        check_export(folder, ["onnx"])


def test_what_people_and_hubs_add_is_accepted(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export")
    for name in ("README.md", "LICENSE", ".gitattributes", ".cache/huggingface/unet.onnx.metadata"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    check_export(folder, ["onnx"])
    (folder / "pipeline" / "README.md").write_text("")
    with pytest.raises(ArtifactError, match=r"holds pipeline/README.md, which its sdcompress.json does not name"):
        check_export(folder, ["onnx"])
    check_export(folder, ["onnx"], unnamed=True)


def test_a_damaged_folder_of_the_cache_is_made_again_after_it_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path / "cache"))
    folder = write_export(tmp_path / "cache" / "models" / "a" / "onnx-fp32")
    alter(folder / "unet.onnx", 7)
    with pytest.raises(ArtifactError, match="delete this folder; the next run makes it again"):
        check_export(folder, ["onnx"])


def test_a_config_is_read_only_as_the_manifest_has_it(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export")
    manifest = read_manifest(folder)
    assert manifest is not None
    assert read_named_json(folder, manifest, "pipeline/unet/config.json") == {"in_channels": 4}
    (folder / "pipeline/vae.json").write_text("{}")
    assert read_named_json(folder, manifest, "pipeline/vae.json") is None
    (folder / "pipeline/unet/config.json").write_text('{"in_channels": 9}')
    with pytest.raises(ArtifactError, match="sha256 differs"):
        read_named_json(folder, manifest, "pipeline/unet/config.json")


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is large enough for a note, and that has not changed for a minute."""
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "LEAST_BYTES", 100)
    monkeypatch.setattr(verified, "_SETTLED_NS", -(10**12))
    path = tmp_path / "large"
    path.write_bytes(b"a" * 1000)
    return path


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    reads: list[Path] = []
    real = verified.sha256_file
    monkeypatch.setattr(verified, "sha256_file", lambda path: (reads.append(path), real(path))[1])
    return reads


def test_a_large_file_is_read_once_and_again_after_each_change(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = count_reads(monkeypatch)
    first = sha256_once(large)
    assert sha256_once(large) == first
    assert len(reads) == 1
    times = large.stat().st_mtime_ns
    large.write_bytes(b"b" * 1000)
    os.utime(large, ns=(times, times))  # as a copy that keeps its times
    second = sha256_once(large)
    assert second != first
    shutil.copy2(large, large.with_name("copy"))
    os.replace(large.with_name("copy"), large)
    assert sha256_once(large) == second
    assert len(reads) == 3


def test_a_note_is_not_used_where_it_is_damaged_and_not_written_where_the_file_has_just_changed(
    large: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reads = count_reads(monkeypatch)
    sha256_once(large)
    (note,) = (tmp_path / "cache" / "verified").iterdir()
    note.write_bytes(note.read_bytes()[:-1])
    sha256_once(large)
    assert len(reads) == 2
    note.unlink()
    monkeypatch.setattr(verified, "_SETTLED_NS", 10**15)
    sha256_once(large)
    assert not note.exists()


def test_a_sha256_in_a_manifest_is_64_hex_digits(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export")
    raw = json.loads((folder / MANIFEST_NAME).read_text())
    raw["files"]["unet.onnx"]["sha256"] = "../../../elsewhere"
    raw["seal"] = ""
    (folder / MANIFEST_NAME).write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match="no sha256 and size of unet"):
        read_manifest(folder)
