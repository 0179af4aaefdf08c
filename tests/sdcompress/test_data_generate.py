"""Data sets a teacher makes, and what is said about any data set."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from sdcompress_engines.errors import ArtifactError, DataError, UsageError
from sdcompress_engines.manifest import MANIFEST_NAME, faults
from sdcompress_engines.progress import Reporter

from sdcompress.data.config import DataConfig
from sdcompress.data.report import SHEET_PICTURES, Reservoir, look
from sdcompress.data.sources import open_source
from sdcompress.generate.dataset import METADATA, GenerateSettings, generate_dataset, read_prompts

PROMPTS = ["a flat icon of a cat", "a 3d render of a tree", "a cartoon of a scroll"]
SETTINGS = GenerateSettings(count=7, batch_size=3, steps=2, size_px=64, seed=11)


@pytest.fixture(scope="module")
def made(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven 64 px pictures of three prompts."""
    return generate_dataset(random_folder, PROMPTS, tmp_path_factory.mktemp("made") / "set", SETTINGS).folder


def contents(folder: Path) -> dict[str, str]:
    """Name → sha256 of every file but the manifest, which holds the time."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != MANIFEST_NAME}


class Stop(Exception):
    """The plug is pulled."""


class StopAfter(Reporter):
    """Stops the run in its `batches`-th batch."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def task(self, label: str, total: int | None = None):  # type: ignore[no-untyped-def]
        from contextlib import contextmanager

        @contextmanager
        def run():  # type: ignore[no-untyped-def]
            def advance(n: int = 1, note: str = "") -> None:
                self.left -= 1
                if self.left == 0:
                    raise Stop

            yield advance

        return run()


def test_a_finished_set_is_whole_and_is_data(made: Path) -> None:
    assert faults(made, "dataset") == []
    rows = [json.loads(line) for line in (made / METADATA).read_text().splitlines()]
    assert [row["seed"] for row in rows] == list(range(11, 18))
    assert [row["prompt_index"] for row in rows] == [0, 1, 2, 0, 1, 2, 0]
    source = open_source(made)
    assert [record.caption for record in source] == [PROMPTS[i % 3] for i in range(7)]
    assert source.skipped.count == 0
    assert {record.picture().size for record in source} == {(64, 64)}


def test_a_stopped_run_goes_on_and_equals_one_that_was_not_stopped(
    made: Path, random_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        generate_dataset(random_folder, PROMPTS, tmp_path / "set", SETTINGS, report=StopAfter(2))
    assert not (tmp_path / "set" / MANIFEST_NAME).exists()
    (tmp_path / "set" / "000004.webp").unlink()
    (tmp_path / "set" / "000006.webp.part").write_bytes(b"half a pic")
    result = generate_dataset(random_folder, PROMPTS, tmp_path / "set", SETTINGS)
    assert result.drawn == 2
    assert contents(result.folder) == contents(made)
    assert faults(result.folder, "dataset") == []


def test_a_finished_set_is_left_alone_and_a_damaged_one_repaired(
    made: Path, random_folder: Path, tmp_path: Path
) -> None:
    import shutil

    copy = shutil.copytree(made, tmp_path / "copy")
    before = (copy / MANIFEST_NAME).read_bytes()
    assert generate_dataset(random_folder, PROMPTS, copy, SETTINGS).drawn == 0
    assert (copy / MANIFEST_NAME).read_bytes() == before
    (copy / "000000.webp").unlink()
    (copy / "000005.webp").write_bytes(b"altered")
    (copy / MANIFEST_NAME).write_bytes(before)
    assert generate_dataset(random_folder, PROMPTS, copy, SETTINGS).drawn == 2
    assert contents(copy) == contents(made)
    (copy / MANIFEST_NAME).write_bytes(before[:100])
    assert generate_dataset(random_folder, PROMPTS, copy, SETTINGS).drawn == 0
    assert faults(copy, "dataset") == []


def test_other_settings_are_refused_by_name_and_force_begins_anew(
    made: Path, random_folder: Path, tmp_path: Path
) -> None:
    import shutil

    copy = shutil.copytree(made, tmp_path / "copy")
    with pytest.raises(ArtifactError, match=r"steps: 2 there, 3 here.*--force"):
        generate_dataset(random_folder, PROMPTS, copy, replace(SETTINGS, steps=3))
    with pytest.raises(ArtifactError, match="prompts: "):
        generate_dataset(random_folder, PROMPTS[:2], copy, SETTINGS)
    assert contents(copy) == contents(made)
    again = generate_dataset(random_folder, PROMPTS, copy, replace(SETTINGS, count=2, picture_format="png"), force=True)
    assert sorted(p.name for p in copy.iterdir()) == [
        "000000.png",
        "000001.png",
        METADATA,
        MANIFEST_NAME,
        "settings.json",
    ]
    assert again.manifest.figures["pictures"] == 2


def test_a_stop_before_the_first_picture_binds_to_nothing(random_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "settings.json.part").write_text("{")
    with pytest.raises(UsageError, match="steps"):
        generate_dataset(random_folder, PROMPTS, folder, replace(SETTINGS, steps=0))
    assert generate_dataset(random_folder, PROMPTS, folder, replace(SETTINGS, count=1)).drawn == 1


def test_what_is_not_ours_is_not_touched(random_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ArtifactError, match="not empty"):
        generate_dataset(random_folder, PROMPTS, tmp_path, SETTINGS)
    with pytest.raises(ArtifactError, match="is a file"):
        generate_dataset(random_folder, PROMPTS, tmp_path / "precious", SETTINGS, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_prompts_are_lines_that_are_not_empty(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff a cat \r\n\n\t\n\u00e9t\u00e9\n".encode())
    assert read_prompts(file) == ["a cat", "\u00e9t\u00e9"]
    file.write_text(" \n\n")
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(file)
    with pytest.raises(UsageError, match="does not exist"):
        read_prompts(tmp_path / "gone")


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """Ten pictures of known sizes and scores; one more without a caption and one that is no picture."""
    rows = []
    for i in range(10):
        Image.new("RGB", (400 + 100 * i, 600), (25 * i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append(
            {
                "file_name": f"{i}.png",
                "text": "one two three" + " four" * (i % 2),
                "score": float(i),
                "name": f"n{i}",
                "same": "3",
            }
        )
    Image.new("RGB", (8, 8)).save(tmp_path / "empty.png")
    (tmp_path / "junk.png").write_bytes(b"junk")
    rows.append({"file_name": "junk.png", "text": "junk"})
    (tmp_path / METADATA).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_figures_of_a_known_folder(known: Path) -> None:
    figures, sheet = look(open_source(known), sheet=True)
    assert figures.usable == 10
    assert sum(found.count for found in figures.unusable.values()) == 2
    assert {example for found in figures.unusable.values() for example in found.examples} == {"empty.png", "junk.png"}
    assert figures.width_px
    assert (figures.width_px.least, figures.width_px.median, figures.width_px.most) == (400, 850, 1300)
    assert figures.aspect
    assert figures.aspect.least == pytest.approx(2 / 3)
    assert figures.small == pytest.approx(0.2)
    assert set(figures.fields) == {"score", "same"}
    assert figures.fields["score"].median == 4.5
    assert sum(share for _, _, share in figures.fields["score"].histogram) == pytest.approx(1)
    assert len(figures.fields["same"].histogram) == 1
    assert figures.caption_words
    assert figures.caption_words.median == 3.5
    assert figures.fault
    assert sheet
    assert sheet.size == (8 * 172, 2 * 172)


def test_conditions_limit_and_a_cut_picture(known: Path) -> None:
    figures, sheet = look(open_source(known, DataConfig(where=("score >= 7",))))
    assert figures.usable == 3
    assert sum(figures.filtered.values()) == 8
    assert sheet is None
    assert look(open_source(known), limit=4)[0].usable == 4
    whole = (known / "3.png").read_bytes()
    (known / "3.png").write_bytes(whole[: len(whole) // 2])
    assert look(open_source(known))[0].usable == 10
    assert look(open_source(known), decode=True)[0].usable == 9


def test_a_sample_is_bounded_uniform_and_repeatable() -> None:
    def draw() -> list[int]:
        sample = Reservoir[int](1000)
        for number in range(50_000):
            sample.offer(number)
        return sample.items()

    drawn = draw()
    assert drawn == draw() == sorted(drawn)
    assert len(drawn) == 1000
    assert sum(drawn) / 1000 == pytest.approx(25_000, rel=0.06)


def test_the_sheet_is_bounded(tmp_path: Path) -> None:
    for i in range(SHEET_PICTURES + 20):
        Image.new("RGB", (10, 20), tuple(random.Random(i).randbytes(3))).save(tmp_path / f"{i:03}.png")
        (tmp_path / f"{i:03}.txt").write_text("a colour")
    _, sheet = look(open_source(tmp_path), sheet=True)
    assert sheet
    assert sheet.size == (8 * 172, 8 * 172)
    assert sheet.getpixel((0, 0)) == (255, 255, 255)
