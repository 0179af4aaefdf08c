"""Data as people have it: folders, tables, shards, and all that can be wrong with them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from sdcompress_engines.errors import DataError, UsageError

from sdcompress.data.cache import to_pixels
from sdcompress.data.sources import Record, open_source


def png(color: str = "red", size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, payload in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


@pytest.mark.parametrize("form", ["txt", "jsonl", "csv"])
def test_captions_of_a_folder_in_each_form(tmp_path: Path, form: str) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(png())
    if form == "txt":
        for name in ("a", "b"):
            (tmp_path / f"{name}.txt").write_text(f"picture {name}\n")
    elif form == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"{n}.png", "text": f"picture {n}", "aesthetic": 7.5}) + "\n" for n in "ab"))
    else:
        (tmp_path / "metadata.csv").write_text("file_name,caption\na.png,picture a\nb.png,picture b\n")
    assert [(r.key, r.caption) for r in open_source(tmp_path)] == [("a.png", "picture a"), ("b.png", "picture b")]


def test_shards_as_img2dataset_writes_them(tmp_path: Path) -> None:
    shard(tmp_path / "00000.tar", {"000.png": png(), "000.txt": b"first", "000.json": b'{"aesthetic": 8}', "001.png": png(), "001.json": b'{"caption": "second"}'})
    shard(tmp_path / "00001.tar", {"002.json": b"not json", "002.png": png(), "002.txt": b"third"})
    assert [r.caption for r in open_source(tmp_path)] == ["first", "second", "third"]
    assert [r.meta for r in open_source(str(tmp_path / "*0.tar"))] == [{"aesthetic": 8}, {"caption": "second"}]


def test_a_cut_shard_gives_what_it_has_and_is_counted(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", {f"{i:03}.{e}": (png() if e == "png" else b"x") for i in range(30) for e in ("png", "txt")})
    path.write_bytes(path.read_bytes()[: 20 * 1024 + 540])  # inside a picture
    source = open_source(tmp_path)
    count = len(list(source))
    assert 0 < count < 30
    assert sum("cut short" in reason for reason in source.skipped.reasons) == 1


def test_members_that_point_outside_write_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    shard(folder / "0.tar", {"../../evil.png": png(), "../../evil.txt": b"x"})
    assert [r.caption for r in open_source(folder)] == ["x"]
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_bomb_and_a_broken_picture_are_refused() -> None:
    with pytest.raises(DataError, match="pixels"):
        Record("big", png(size=(9000, 9000)), "x").picture()
    with pytest.raises(DataError, match="no readable picture"):
        Record("cut", png()[:50], "x").picture()


def test_too_many_unusable_pictures_stop_with_examples(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(png())
        (tmp_path / f"{i}.txt").write_text("" if i < 3 else "fine")
    source = open_source(tmp_path)
    assert len(list(source)) == 7
    with pytest.raises(DataError, match=r"3 of 10 .*0\.png"):
        source.skipped.check(source.name)


def test_what_is_no_data_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        open_source(tmp_path / "gone")
    (tmp_path / "a.zip").write_bytes(b"x")
    with pytest.raises(DataError, match="no webdataset shard"):
        open_source(tmp_path / "a.zip")
    with pytest.raises(DataError, match="no picture and no shard"):
        open_source(tmp_path)


@pytest.mark.parametrize("size", [(64, 64), (200, 100), (100, 333), (64, 65)])
def test_pixels_are_the_centre_square(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, "black")
    picture.paste("white", (size[0] // 2 - 2, size[1] // 2 - 2, size[0] // 2 + 2, size[1] // 2 + 2))
    pixels = to_pixels(picture, 64)
    assert pixels.shape == (3, 64, 64)
    assert pixels.dtype == torch.float32
    assert pixels[:, 30:34, 30:34].mean() > pixels.mean()
    assert -1 <= pixels.min() <= pixels.max() <= 1
