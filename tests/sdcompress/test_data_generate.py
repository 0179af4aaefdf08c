"""Data sets that a teacher draws: stopped, resumed, repaired and refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sdcompress_engines.errors import ArtifactError, DataError, UsageError
from sdcompress_engines.leftovers import temporary_path
from sdcompress_engines.manifest import MANIFEST_NAME, faults
from sdcompress_engines.progress import Advance, Reporter

from sdcompress.backends import assemble
from sdcompress.data.drawn import latents_name
from sdcompress.data.sources import open_source
from sdcompress.generate.dataset import generate_dataset, hash_teacher
from sdcompress.generate.output_folder import METADATA
from sdcompress.generate.settings import GenerateSettings, read_prompts

PROMPTS = ["a flat icon of a cat", "a 3d render of a tree", "a cartoon of a scroll"]
SETTINGS = GenerateSettings(count=7, batch_size=3, steps=2, size_px=64, seed=11)


@pytest.fixture(scope="module")
def drawn(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven 64 px pictures of three prompts."""
    return generate_dataset(random_folder, PROMPTS, tmp_path_factory.mktemp("drawn") / "set", SETTINGS).folder


def contents(folder: Path) -> dict[str, str]:
    """Name → sha256 of every file but the manifest, which holds the time."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != MANIFEST_NAME}


class Stop(Exception):
    """Stands for the end of the process."""


class StopAfter(Reporter):
    """Stops the run in its `batches`-th batch."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Advance]:
        def advance(n: int = 1, note: str = "") -> None:
            self.left -= 1
            if self.left == 0:
                raise Stop

        yield advance


def test_a_finished_set_is_complete_and_a_data_set(drawn: Path) -> None:
    assert faults(drawn, "dataset") == []
    rows = [json.loads(line) for line in (drawn / METADATA).read_text().splitlines()]
    assert [row["seed"] for row in rows] == list(range(11, 18))
    assert [row["prompt_index"] for row in rows] == [0, 1, 2, 0, 1, 2, 0]
    source = open_source(drawn)
    assert [record.caption for record in source] == [PROMPTS[i % 3] for i in range(7)]
    assert source.skipped.count == 0
    assert {record.picture().size for record in source} == {(64, 64)}


def test_a_stopped_run_continues_and_equals_one_that_was_not_stopped(
    drawn: Path, random_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        generate_dataset(random_folder, PROMPTS, tmp_path / "set", SETTINGS, report=StopAfter(2))
    assert not (tmp_path / "set" / MANIFEST_NAME).exists()
    (tmp_path / "set" / "000004.webp").unlink()
    (tmp_path / "set" / latents_name(0)).unlink()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = temporary_path(tmp_path / "set/000006.webp")
    left.with_name(left.name.replace(f".{os.getpid()}-", f".{ended.pid}-")).write_bytes(b"half a pic")
    result = generate_dataset(random_folder, PROMPTS, tmp_path / "set", SETTINGS)
    assert result.drawn == 2
    assert contents(result.folder) == contents(drawn)
    assert faults(result.folder, "dataset") == []


@pytest.mark.parametrize("stopped", [False, True])
def test_the_pipeline_is_closed_at_the_end(
    stopped: bool, random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Any] = []
    monkeypatch.setattr(assemble, "close_pipeline", closed.append)
    with pytest.raises(Stop) if stopped else nullcontext():
        report = StopAfter(1 if stopped else 100)
        generate_dataset(random_folder, PROMPTS, tmp_path / "set", replace(SETTINGS, count=1), report=report)
    assert len(closed) == 1


def test_a_finished_set_is_not_changed_and_a_damaged_one_is_repaired(
    drawn: Path, random_folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(drawn, tmp_path / "copy")
    before = (copy / MANIFEST_NAME).read_bytes()
    assert generate_dataset(random_folder, PROMPTS, copy, SETTINGS).drawn == 0
    assert (copy / MANIFEST_NAME).read_bytes() == before
    (copy / "000000.webp").unlink()
    (copy / "000005.webp").write_bytes(b"altered")
    (copy / latents_name(6)).write_bytes(b"altered")
    (copy / MANIFEST_NAME).write_bytes(before)
    assert generate_dataset(random_folder, PROMPTS, copy, SETTINGS).drawn == 2
    assert contents(copy) == contents(drawn)
    (copy / MANIFEST_NAME).write_bytes(before[:100])
    assert generate_dataset(random_folder, PROMPTS, copy, SETTINGS).drawn == 0
    assert faults(copy, "dataset") == []


def test_edited_captions_are_kept(drawn: Path, random_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(drawn, tmp_path / "copy")
    (copy / METADATA).write_text((copy / METADATA).read_text().replace("cat", "tabby"))
    before = contents(copy)
    with pytest.raises(ArtifactError, match="was edited, and would be written anew"):
        generate_dataset(random_folder, PROMPTS, copy, SETTINGS)
    assert contents(copy) == before
    (copy / METADATA).unlink()
    assert generate_dataset(random_folder, PROMPTS, copy, SETTINGS).drawn == 0
    assert contents(copy) == contents(drawn)


def test_other_settings_are_refused_by_name_and_force_replaces_the_set(
    drawn: Path, random_folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(drawn, tmp_path / "copy")
    with pytest.raises(ArtifactError, match=r"steps: 2 in the folder, 3 now.*--force"):
        generate_dataset(random_folder, PROMPTS, copy, replace(SETTINGS, steps=3))
    with pytest.raises(ArtifactError, match="prompts: "):
        generate_dataset(random_folder, PROMPTS[:2], copy, SETTINGS)
    assert contents(copy) == contents(drawn)
    again = generate_dataset(random_folder, PROMPTS, copy, replace(SETTINGS, count=2, picture_format="png"), force=True)
    assert sorted(p.name for p in copy.iterdir()) == [
        "000000.png",
        "000001.png",
        "latents-000000.safetensors",
        METADATA,
        MANIFEST_NAME,
        "settings.json",
    ]
    assert again.manifest.figures["pictures"] == 2


def test_a_run_stopped_before_its_first_picture_allows_other_settings(random_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "settings.json").write_text('{"prompts": "other", "picture_format": "png"}')
    with pytest.raises(UsageError, match="steps"):
        generate_dataset(random_folder, PROMPTS, folder, replace(SETTINGS, steps=0))
    assert generate_dataset(random_folder, PROMPTS, folder, replace(SETTINGS, count=1)).drawn == 1


def test_a_set_that_another_process_has_replaced_gets_no_pictures_of_this_one(
    random_folder: Path, tmp_path: Path
) -> None:
    class ReplaceAfterOne(StopAfter):
        @contextmanager
        def task(self, label: str, total: int | None = None) -> Iterator[Advance]:
            def advance(n: int = 1, note: str = "") -> None:
                self.left -= 1
                if self.left == 0:
                    generate_dataset(random_folder, PROMPTS[1:], tmp_path / "set", SETTINGS, force=True)

            yield advance

    with pytest.raises(ArtifactError, match="was replaced by another process"):
        generate_dataset(random_folder, PROMPTS, tmp_path / "set", SETTINGS, report=ReplaceAfterOne(1))
    assert faults(tmp_path / "set", "dataset") == []
    assert open_source(tmp_path / "set").skipped.count == 0


def test_foreign_files_are_not_touched(random_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ArtifactError, match="not empty"):
        generate_dataset(random_folder, PROMPTS, tmp_path, SETTINGS)
    with pytest.raises(ArtifactError, match="is a file"):
        generate_dataset(random_folder, PROMPTS, tmp_path / "precious", SETTINGS, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_prompts_are_the_lines_that_are_not_empty(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff a cat \r\n\n\t\n\u00e9t\u00e9\n".encode())
    assert read_prompts(file) == ["a cat", "\u00e9t\u00e9"]
    file.write_text(" \n\n")
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(file)
    for text in (b"\xff\xfe\x00", "a cat\n".encode("utf-16-le"), "a cat\n".encode("utf-16")):
        file.write_bytes(text)
        with pytest.raises(DataError, match="is no UTF-8 text"):
            read_prompts(file)
    for name in ("prompts.csv", "prompts.TSV", "prompts.jsonl", "captions.json"):
        (tmp_path / name).write_text("caption,style\na cat,flat\n")
        with pytest.raises(DataError, match="whose lines are no prompts"):
            read_prompts(tmp_path / name)
    with pytest.raises(UsageError, match="does not exist"):
        read_prompts(tmp_path / "gone")


def test_two_single_file_teachers_have_different_hashes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    assert hash_teacher(tmp_path / "one.safetensors") != hash_teacher(tmp_path / "two.safetensors")
