"""The figures of a data set and the sheet of its pictures."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from sdcompress.data.config import DataConfig
from sdcompress.data.report import SHEET_PICTURES, Reservoir, inspect_source
from sdcompress.data.sources import open_source


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
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_figures_of_a_known_folder(known: Path) -> None:
    figures, sheet = inspect_source(open_source(known), sheet=True)
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
    figures, sheet = inspect_source(open_source(known, DataConfig(where=("score >= 7",))))
    assert figures.usable == 3
    assert sum(figures.filtered.values()) == 8
    assert sheet is None
    assert inspect_source(open_source(known), limit=4)[0].usable == 4
    whole = (known / "3.png").read_bytes()
    (known / "3.png").write_bytes(whole[: len(whole) // 2])
    assert inspect_source(open_source(known))[0].usable == 10
    assert inspect_source(open_source(known), decode=True)[0].usable == 9


@pytest.mark.parametrize("scores", [(0.3, 0.1 + 0.2), (0.0, 5e-324), (-1e300, 1e300)])
def test_numbers_of_any_distance_have_a_spread(tmp_path: Path, scores: tuple[float, float]) -> None:
    for i, score in enumerate(scores):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.json").write_text(json.dumps({"text": "x", "score": score}))
    spread = inspect_source(open_source(tmp_path))[0].fields["score"]
    assert (spread.least, spread.most) == scores
    assert sum(share for _, _, share in spread.histogram) == 1


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
        (tmp_path / f"{i:03}.txt").write_text("a color")
    _, sheet = inspect_source(open_source(tmp_path), sheet=True)
    assert sheet
    assert sheet.size == (8 * 172, 8 * 172)
    assert sheet.getpixel((0, 0)) == (255, 255, 255)
