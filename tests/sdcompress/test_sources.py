"""Data as people have it: folders, tables, shards, and all that can be wrong with them."""

from __future__ import annotations

import gzip
import io
import json
import resource
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from sdcompress_engines.errors import DataError, UsageError

from sdcompress.data.cache import to_pixels
from sdcompress.data.config import DataConfig
from sdcompress.data.records import Record, Skipped
from sdcompress.data.shards import expand_braces
from sdcompress.data.sources import open_source


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
        (tmp_path / "metadata.jsonl").write_text(
            "".join(
                json.dumps({"file_name": f"{n}.png", "text": f"picture {n}", "aesthetic": 7.5}) + "\n" for n in "ab"
            )
        )
    else:
        (tmp_path / "metadata.csv").write_text("file_name,caption\na.png,picture a\nb.png,picture b\n")
    assert [(r.key, r.caption) for r in open_source(tmp_path)] == [("a.png", "picture a"), ("b.png", "picture b")]


def test_shards_as_img2dataset_writes_them(tmp_path: Path) -> None:
    shard(
        tmp_path / "00000.tar",
        {
            "000.png": png(),
            "000.txt": b"first",
            "000.json": b'{"aesthetic": 8}',
            "001.png": png(),
            "001.json": b'{"caption": "second"}',
        },
    )
    shard(tmp_path / "00001.tar", {"002.json": b"not json", "002.png": png(), "002.txt": b"third"})
    assert [r.caption for r in open_source(tmp_path)] == ["first", "second", "third"]
    assert [r.meta for r in open_source(str(tmp_path / "*0.tar"))] == [{"aesthetic": 8}, {"caption": "second"}]


def test_a_cut_shard_gives_what_it_has_and_is_counted(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "0.tar", {f"{i:03}.{e}": png() if e == "png" else b"x" for i in range(30) for e in ("png", "txt")}
    )
    path.write_bytes(path.read_bytes()[: 20 * 1024 + 540])  # inside a picture
    source = open_source(tmp_path)
    count = len(list(source))
    assert 0 < count < 30
    assert sum("cut short" in reason for reason in source.skipped.reasons) == 1


def test_members_that_point_outside_write_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    shard(folder / "0.tar", {"../../evil.png": png(), "../../evil.txt": b"x", "good.png": png(), "good.txt": b"fine"})
    source = open_source(folder)
    assert [r.caption for r in source] == ["fine"]
    assert len(source.skipped.reasons["member points outside the shard"]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_header_that_claims_to_be_huge_is_not_read_into_memory(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "0.tar.gz", "wb", compresslevel=1) as file:
        name = tarfile.TarInfo("././@LongLink")
        name.type, name.size = tarfile.GNUTYPE_LONGNAME, 600 * 2**20
        file.write(name.tobuf())
        for _ in range(600):
            file.write(bytes(2**20))
        picture = tarfile.TarInfo("a.png")
        picture.size = len(png())
        file.write(picture.tobuf() + png() + bytes(-len(png()) % 512) + bytes(1024))
    source = open_source(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert list(source) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    assert source.skipped.reasons == {"no caption": ["0.tar.gz:a"]}


def test_a_damaged_shard_is_told(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "0.tar", {f"{i}.{e}": png() if e == "png" else b"x" for i in range(9) for e in ("png", "txt")}
    )
    payload = bytearray(path.read_bytes())
    payload[4 * 2048 + 100] ^= 255  # in a header
    path.write_bytes(payload)
    source = open_source(tmp_path)
    assert len(list(source)) == 3
    assert [reason for reason in source.skipped.reasons if reason.startswith("shard damaged")]


def test_json_that_is_odd_is_no_caption_and_no_crash(tmp_path: Path) -> None:
    shard(
        tmp_path / "0.tar",
        {
            "0.png": png(),
            "0.json": b"[" * 100000,
            "1.png": png(),
            "1.json": b'{"caption": "\\ud800"}',
            "2.txt": b"alone",
        },
    )
    source = open_source(tmp_path)
    assert list(source) == []
    assert source.skipped.reasons == {
        "no caption": ["0.tar:0"],
        "caption is no text": ["0.tar:1"],
        "caption without a picture": ["0.tar:2"],
    }
    folder = tmp_path / "lines"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    (folder / "metadata.jsonl").write_text(
        json.dumps({"file_name": "a.png", "text": "one\u2028two"}, ensure_ascii=False) + "\n"
    )
    assert [r.caption for r in open_source(folder)] == ["one\u2028two"]


def test_a_bomb_and_a_broken_picture_are_refused() -> None:
    with pytest.raises(DataError, match="pixels"):
        Record("big", png(size=(9000, 9000)), "x").picture()
    with pytest.raises(DataError, match="DecompressionBomb"):
        Record("bigger", png(size=(10000, 10000)), "x").size()
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


def test_a_thousand_pictures_with_broken_ones_a_cut_shard_and_hostile_members(tmp_path: Path) -> None:
    """1,000 pictures in ten shards, 30 of them broken, 10 lost by a cut, and 20 hostile members, two behind the cut:
    every count is right, nothing is written.
    """
    folder = tmp_path / "in"
    folder.mkdir()
    sound = png(size=(8, 8))
    for number in range(10):
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for i in range(100):
                broken = i < 3
                for extension, payload in (("png", sound[:40] if broken else sound), ("txt", b"a picture")):
                    add(tar, f"{i:05}.{extension}", payload)
            for name, kind in (("link.png", tarfile.SYMTYPE), ("/etc/evil.png", tarfile.REGTYPE)):
                add(tar, name, b"" if kind == tarfile.SYMTYPE else sound, kind)
    last = folder / "00009.tar"
    cut = 90 * 2048 + 700  # each picture with its caption takes 2048 bytes; this is inside the 91st picture
    last.write_bytes(last.read_bytes()[:cut])
    source = open_source(folder)
    unreadable = 0
    for record in source:
        try:
            record.picture()
        except DataError:
            unreadable += 1
    assert unreadable == 30
    assert source.skipped.read == 990
    assert {reason: len(keys) for reason, keys in source.skipped.reasons.items()} == {
        "member is a link or a device": 9,
        "member points outside the shard": 9,
        "shard cut short": 1,
    }
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert len(list(folder.iterdir())) == 10


def add(tar: tarfile.TarFile, name: str, payload: bytes, kind: bytes = tarfile.REGTYPE) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname = kind, len(payload), "/etc/passwd" if kind == tarfile.SYMTYPE else ""
    tar.addfile(member, io.BytesIO(payload))


def test_a_shard_cut_exactly_between_two_members_is_told(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "0.tar", {f"{i}.{e}": png() if e == "png" else b"x" for i in range(4) for e in ("png", "txt")}
    )
    path.write_bytes(path.read_bytes()[: 2 * 2048])
    source = open_source(tmp_path)
    assert len(list(source)) == 2
    assert "shard cut short" in source.skipped.reasons
    with gzip.open(tmp_path / "1.tar.gz", "wb") as file:
        file.write(path.read_bytes())
    zipped = open_source(tmp_path / "1.tar.gz")
    assert len(list(zipped)) == 2
    assert zipped.skipped.reasons == {"shard cut short": ["1.tar.gz"]}


def test_brace_lists_are_written_out(tmp_path: Path) -> None:
    assert expand_braces("a/{08..11}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert expand_braces("{a,b}{0..1}") == ["a0", "a1", "b0", "b1"]
    for number in range(3):
        shard(tmp_path / f"{number:05}.tar", {"0.png": png(), "0.txt": f"shard {number}".encode()})
    assert [r.caption for r in open_source(f"{tmp_path}/{{00001..00002}}.tar")] == ["shard 1", "shard 2"]
    assert open_source(f"{tmp_path}/{{00001..00002}}.tar").units() == 2


def table(folder: Path, rows: list[dict[str, object]], size: tuple[int, int] = (40, 30)) -> Path:
    for number, row in enumerate(rows):
        (folder / f"{number}.png").write_bytes(png(size=size))
        row["file_name"] = f"{number}.png"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_conditions_choose_and_are_counted_apart_from_faults(tmp_path: Path) -> None:
    table(
        tmp_path,
        [
            {"text": "a", "aesthetic": 8},
            {"text": "b", "aesthetic": "7.5"},
            {"text": "c", "aesthetic": 3},
            {"text": "d"},
            {"aesthetic": 9},
        ],
    )
    source = open_source(tmp_path, DataConfig(where=("aesthetic >= 7.5",)))
    assert [r.caption for r in source] == ["a", "b"]
    assert source.skipped.filtered == {"not aesthetic >= 7.5": 1, "no number in 'aesthetic'": 1}
    assert source.skipped.reasons == {"no caption": ["4.png"]}
    none = open_source(tmp_path, DataConfig(where=("esthetic > 1",)))
    assert list(none) == []
    with pytest.raises(DataError, match="the fields are aesthetic, file_name, text"):
        none.skipped.check(none.name)
    with pytest.raises(UsageError, match="FIELD"):
        open_source(tmp_path, DataConfig(where=("aesthetic about 7",)))
    small = open_source(tmp_path, DataConfig(min_size_px=31))
    assert list(small) == []
    assert small.skipped.filtered == {"smaller than 31 px": 4}
    assert [r.key for r in open_source(tmp_path, DataConfig(max_aspect=1.4))] == ["0.png", "1.png", "2.png", "3.png"]
    assert list(open_source(tmp_path, DataConfig(max_aspect=1.3))) == []


def test_several_caption_columns_with_shares(tmp_path: Path) -> None:
    table(tmp_path, [{"short": "cat", "long": "a cat on a mat"}, {"short": "dog"}, {"short": 5, "long": "x"}])
    source = open_source(tmp_path, DataConfig(captions={"short": 1, "long": 3}))
    assert [r.captions for r in source] == [(("cat", 0.25), ("a cat on a mat", 0.75)), (("dog", 1.0),)]
    assert source.skipped.reasons == {"caption is no text": ["2.png"]}


def test_captions_that_are_no_text_are_named(tmp_path: Path) -> None:
    for name, caption in (("a", b"\xff\xfe\x00"), ("b", b"fine")):
        (tmp_path / f"{name}.png").write_bytes(png())
        (tmp_path / f"{name}.txt").write_bytes(caption)
    source = open_source(tmp_path)
    assert [r.caption for r in source] == ["fine"]
    assert source.skipped.reasons == {"caption is no text": ["a.png"]}


def test_units_are_the_whole_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdcompress.data.folder.UNIT_PICTURES", 3)
    table(tmp_path, [{"text": f"picture {i}"} for i in range(8)])
    source = open_source(tmp_path)
    assert source.units() == 3
    apart = {i: [r.caption for r in source.unit(i, Skipped())] for i in (2, 0, 1)}
    assert [c for i in range(3) for c in apart[i]] == [r.caption for r in source]


def test_a_turned_photo_is_set_upright_and_sixteen_bits_become_eight() -> None:
    turned = Image.new("RGB", (40, 20), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    turned.save(file, "JPEG", exif=exif)
    assert Record("turned", file.getvalue(), "x").picture().size == (20, 40)
    file = io.BytesIO()
    Image.new("I;16", (4, 4), 32768).save(file, "PNG")
    assert Record("deep", file.getvalue(), "x").picture().getpixel((0, 0)) == (128, 128, 128)


def test_a_hub_dataset_is_streamed_by_its_own_shards(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for number in range(2):
        rows = {
            "image": [{"bytes": png(), "path": None}] * 2,
            "text": [f"{number} {i}" for i in range(2)],
            "aesthetic": [5.0, 9.0],
        }
        features = datasets.Features(
            {"image": datasets.Image(), "text": datasets.Value("string"), "aesthetic": datasets.Value("float64")}
        )
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"train-{number}.parquet")
    source = open_source(f"hub:{tmp_path}", DataConfig(where=("aesthetic > 6",)))
    assert source.units() == 2
    records = list(source)
    assert [r.caption for r in records] == ["0 1", "1 1"]
    assert records[0].picture().size == (40, 30)
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    outside = tmp_path / "outside"
    outside.mkdir()
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(
        {"image": [{"bytes": None, "path": str(secret)}], "text": ["x"]}, features=features
    ).to_parquet(outside / "train.parquet")
    assert [r.encoded for r in open_source(f"hub:{outside}")] == [b""]
