"""Manifests are sealed, and a broken one is an error of ours."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sdcompress_engines.errors import ArtifactError, StorageError
from sdcompress_engines.files import replace_file
from sdcompress_engines.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    cache_folder,
    faults,
    read_manifest,
    write_manifest,
)
from sdcompress_engines.output_folders import staged
from sdcompress_engines.trust import trust_folder

from ..hostile_text import NAMES, write_sealed


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


def test_links_and_what_is_no_file_are_faults(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    (folder / "sub").mkdir(parents=True)
    for name in ("weights", "sub/config.json", "pipe"):
        (folder / name).write_text("content")
    write_manifest(folder, "student")
    outside = tmp_path / "outside"
    outside.mkdir()
    (folder / "weights").rename(outside / "weights")
    (folder / "weights").symlink_to(outside / "weights")
    (folder / "sub").rename(outside / "sub")
    (folder / "sub").symlink_to(outside / "sub")
    (folder / "pipe").unlink()
    os.mkfifo(folder / "pipe")
    assert sorted(faults(folder)) == [
        "pipe is no regular file",
        "sub/config.json is a link, or lies behind one",
        "weights is a link, or lies behind one",
    ]
    (folder / MANIFEST_NAME).rename(outside / MANIFEST_NAME)
    (folder / MANIFEST_NAME).symlink_to(outside / MANIFEST_NAME)
    with pytest.raises(ArtifactError, match="is a link"):
        read_manifest(folder)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(NAMES, st.sampled_from(["0" * 64, "0" * 63, "G" * 64, "", 7, None]), min_size=1, max_size=3))
def test_a_manifest_with_any_names_reads_nothing_outside(files: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "a/b/artifact"
        folder.mkdir(parents=True)
        content = {"schema": 1, "kind": "student", "files": {n: {"sha256": s, "bytes": 0} for n, s in files.items()}}
        write_sealed(folder / MANIFEST_NAME, content)
        opened: list[Path] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sdcompress_engines.manifest.sha256_file", lambda path: opened.append(path) or "")
            with suppress(ArtifactError):
                assert faults(folder)
        assert all(path.resolve().is_relative_to(folder.resolve()) for path in opened)


@pytest.mark.parametrize(
    "change",
    [{"kind": ["student"]}, {"kind": None}, {"created": 7}, {"inputs": {"teacher": 1}}, {"versions": {"torch": None}},
     {"files": {"a": {"sha256": "0" * 64, "bytes": -1}}}, {"files": {"a": {"sha256": "0" * 64, "bytes": True}}},
     {"files": {"a": {"sha256": "0" * 64, "bytes": 2**63}}}, {"files": []}, {"schema": {"a": 1}}, {"unknown": 1}],
)  # fmt: skip
def test_a_manifest_with_other_types_is_our_error(tmp_path: Path, change: dict[str, Any]) -> None:
    write_sealed(tmp_path / MANIFEST_NAME, {"schema": 1, "kind": "student", "files": {}} | change)
    with pytest.raises(ArtifactError):
        read_manifest(tmp_path)


def test_the_home_folder_is_meant_in_the_variables_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("SDCOMPRESS_CACHE", "~/cache")
    monkeypatch.setenv("SDCOMPRESS_CONFIG", "~/config")
    assert cache_folder() == tmp_path / "cache"
    assert trust_folder() == tmp_path / "config/trusted"
