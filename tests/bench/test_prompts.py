"""Public prompt files are read as published, and a broken file is reported with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sdcompress_bench.prompts import read_prompts, read_reference
from sdcompress_bench.scenario import Prompt
from sdcompress_engines.errors import DataError, UsageError


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def captions(path: Path) -> list[str]:
    return [prompt.caption for prompt in read_prompts(path)]


def test_partiprompts(tmp_path: Path) -> None:
    # The published file has quotes that no table dialect writes, and notes only in some rows.
    rows = [
        "Prompt\tCategory\tChallenge\tNote",
        "bond\tAbstract\tBasic\tBiology-inspired",
        'The words "Fly" on a wall\tOutdoor Scenes\tComplex\t',
        '"Toaday"\tAnimals\tImagination',
    ]
    assert captions(write(tmp_path, "PartiPrompts.tsv", "\n".join(rows) + "\n")) == [
        "bond",
        'The words "Fly" on a wall',
        '"Toaday"',
    ]


def test_coco_captions_give_each_picture_its_first(tmp_path: Path) -> None:
    annotations = [
        {"image_id": 203564, "id": 37, "caption": "A bicycle replica with a clock.\n"},
        {"image_id": 179765, "id": 38, "caption": "A black Honda  motorcycle."},
        {"image_id": 203564, "id": 39, "caption": "The bike has a clock as a tire."},
    ]
    path = write(tmp_path, "captions_val2014.json", json.dumps({"info": {}, "images": [], "annotations": annotations}))
    assert captions(path) == ["A bicycle replica with a clock.", "A black Honda motorcycle."]


def test_lines_and_tables(tmp_path: Path) -> None:
    assert captions(write(tmp_path, "a.txt", "\ufeffa cat, \u201creal\u201d\r\n\n  \n# one\r\n")) == [
        "a cat, \u201creal\u201d",
        "# one",
    ]
    assert read_prompts(write(tmp_path, "a.csv", 'id,Caption,style\n1,"a cat, and\na dog",flat\n2,a tree,\n')) == [
        Prompt("a cat, and a dog", "flat"),
        Prompt("a tree"),
    ]
    assert read_prompts(write(tmp_path, "a.JSONL", '{"prompt": "a cat", "style": "3d"}\n\n{"text": "a dog"}\n')) == [
        Prompt("a cat", "3d"),
        Prompt("a dog"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "a.txt: has no prompts"),
        ("a.txt", b"a cat\nun caf\xe9\n", "a.txt:2: byte 0xe9 is not UTF-8"),
        (
            "a.tsv",
            "Category\tChallenge\nAnimals\tBasic\n",
            "a.tsv:1: no captions among the columns Category, Challenge; expected one of text, caption, prompt",
        ),
        ("a.tsv", "Category\tPrompt\nAnimals\ta cat\nAnimals\n", "a.tsv:3: no caption"),
        ("a.csv", "", "a.csv:1: no captions among the columns (none)"),
        ("a.csv", "caption\na cat\n\t\n", "a.csv:3: caption '\\t'"),
        ("a.csv", 'caption\na cat\n"a dog\n', "a.csv:3: cannot be read as a table (unexpected end of data)"),
        ("a.jsonl", '{"caption": "a cat"}\n{"caption": "a dog"\n', "a.jsonl:2: is not JSON ("),
        ("a.jsonl", '["a cat"]\n', "a.jsonl:1: a JSON list; expected an object"),
        ("a.jsonl", '{"caption": "a cat"}\n{"title": "a dog"}\n', "a.jsonl:2: no captions among the columns title"),
        ("a.jsonl", '{"caption": 7}\n', "a.jsonl:1: caption 7"),
        ("a.jsonl", '{"caption": "\\ud800"}\n', "a.jsonl:1: caption '\\ud800'"),
        ("a.json", '{"annotations": [\n{"image_id": 1,]}', "a.json: is not JSON ("),
        ("a.json", "[" * 200_000, "a.json: is nested too deep"),
        ("a.json", '["a cat"]', "a.json: has no annotations; expected COCO's captions"),
        (
            "a.json",
            '{"annotations": [{"image_id": 1, "caption": "a cat"}, {"image_id": 2, "bbox": []}]}',
            "a.json: annotations[1]: is no caption",
        ),
        ("a.json", '{"annotations": [{"image_id": [1], "caption": "a cat"}]}', "a.json: annotations[0]: is no caption"),
        ("a.json", '{"annotations": [{"image_id": 1, "caption": null}]}', "a.json: annotations[0]: no caption"),
    ],
)
def test_broken_files_are_reported_with_their_line(name: str, content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_prompts(write(tmp_path, name, content))
    assert message in str(caught.value)


def test_missing_files_and_unknown_kinds_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file of prompts"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(
        UsageError, match=r"prompts in a file of type \.xlsx; expected \.txt, \.tsv, \.csv, \.jsonl, \.json"
    ):
        read_prompts(write(tmp_path, "a.xlsx", "a cat"))
    with pytest.raises(UsageError, match="no such folder of reference pictures"):
        read_reference(tmp_path / "none", 64)


def test_reference_pictures_are_squares_from_the_middle_in_order(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    wide = Image.new("RGB", (300, 100), "blue")
    wide.paste("red", (100, 0, 200, 100))
    wide.save(tmp_path / "more/a.png")
    Image.new("L", (7, 9), 255).save(tmp_path / "b.png")
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "C.PNG")
    (tmp_path / "notes.txt").touch()
    pictures = read_reference(tmp_path, 32)
    assert [p.name for p in pictures.paths] == ["C.PNG", "b.png", "a.png"]
    assert (len(pictures), len(pictures[1:]), pictures[1:].paths) == (3, 2, pictures.paths[1:])
    assert all(p.dtype == torch.uint8 and p.shape == (3, 32, 32) for p in pictures)
    assert pictures[0].min() == pictures[1].min() == 255  # what was transparent is white
    red, green, blue = pictures[2][:, :, 3:-3]
    assert red.min() > 250
    assert max(green.max(), blue.max()) < 5


def test_reference_without_pictures_or_with_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no pictures"):
        read_reference(tmp_path, 32)
    write(tmp_path, "a.png", b"no picture")
    with pytest.raises(DataError, match=r"a\.png: is not a readable picture"):
        read_reference(tmp_path, 32)[0]
