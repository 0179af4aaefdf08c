"""Manifests are sealed, and a broken one is an error of ours."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from sdcompress_engines.errors import ArtifactError, StorageError
from sdcompress_engines.files import replace_file
from sdcompress_engines.manifest import MANIFEST_NAME, FileEntry, Manifest, faults, read_manifest, write_manifest
from sdcompress_engines.output_folders import staged


def test_a_manifest_is_sealed_and_an_edit_shows(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"w")
    write_manifest(
        tmp_path,
        "student",
        config={"steps": 3, "by": {2: "two", 10: "ten"}},
        figures={"loss": float("nan"), "shape": (1, 2)},
    )
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert len(manifest.seal) == 64
    assert faults(tmp_path) == []
    path = tmp_path / MANIFEST_NAME
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text), sort_keys=True))  # another order, the same words
    assert read_manifest(tmp_path) is not None
    path.write_text(text.replace('"steps": 3', '"steps": 4'))
    with pytest.raises(ArtifactError, match="edited"):
        read_manifest(tmp_path)
    path.write_text(text.replace(manifest.seal, manifest.seal[::-1]))
    with pytest.raises(ArtifactError, match="edited"):
        read_manifest(tmp_path)


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "file").write_text("before")
    write_manifest(target, "results")

    def replace(source: Path, place: Path) -> None:
        if source.suffix == ".partial":
            raise PermissionError(13, "in use", str(place))
        replace_file(source, place)

    monkeypatch.setattr("sdcompress_engines.output_folders.replace_file", replace)
    with pytest.raises(StorageError), staged(target, force=True) as folder:
        (folder / "file").write_text("after")
    assert (target / "file").read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_manifests_of_before_the_seal_are_read_but_engines_need_one(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"w")
    for kind in ("student", "engine"):
        raw = asdict(write_manifest(tmp_path, kind))
        del raw["seal"]
        (tmp_path / MANIFEST_NAME).write_text(json.dumps(raw))
        if kind == "student":
            assert read_manifest(tmp_path) == Manifest(
                **raw | {"files": {"weights": FileEntry(**raw["files"]["weights"])}}
            )
        else:
            with pytest.raises(ArtifactError, match="no seal"):
                read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        "{}",
        "[" * 100_000,
        '{"schema": 1, "kind": "x", "files": {"a": {"sha256": 1, "bytes": "2"}}}',
        '{"schema": 1, "kind": "x", "files": {}, "config": []}',
    ],
)
def test_a_broken_manifest_is_our_error(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(ArtifactError):
        read_manifest(tmp_path)
