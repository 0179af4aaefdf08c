"""Data sets as users have them: folders, tables, shards, hub data sets, and their faults."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from sdcompress_engines.errors import DataError, UsageError
from sdcompress_engines.resources import peak_rss_mib

from sdcompress.data.config import DataConfig
from sdcompress.data.records import CAPTION_COLUMNS, Record
from sdcompress.data.shards import expand_braces
from sdcompress.data.skipped import Skipped
from sdcompress.data.sources import open_source
from sdcompress.data.views import to_pixels

from .picture_files import add_member, png, write_shard


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
    write_shard(
        tmp_path / "00000.tar",
        {
            "000.png": png(),
            "000.txt": b"first",
            "000.json": b'{"aesthetic": 8}',
            "001.png": png(),
            "001.json": b'{"caption": "second"}',
        },
    )
    write_shard(tmp_path / "00001.tar", {"002.json": b"not json", "002.png": png(), "002.txt": b"third"})
    assert [r.caption for r in open_source(tmp_path)] == ["first", "second", "third"]
    assert [r.meta for r in open_source(str(tmp_path / "*0.tar"))] == [{"aesthetic": 8}, {"caption": "second"}]


def test_a_cut_shard_gives_what_it_has_and_is_counted(tmp_path: Path) -> None:
    path = write_shard(
        tmp_path / "0.tar", {f"{i:03}.{e}": png() if e == "png" else b"x" for i in range(30) for e in ("png", "txt")}
    )
    path.write_bytes(path.read_bytes()[: 20 * 1024 + 540])  # inside the picture of the 11th record
    source = open_source(tmp_path)
    assert len(list(source)) == 10
    assert source.skipped.reasons == {"shard cut short": ["0.tar"]}


def test_members_that_point_outside_write_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_shard(
        folder / "0.tar", {"../../evil.png": png(), "../../evil.txt": b"x", "good.png": png(), "good.txt": b"fine"}
    )
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
    before_mib = peak_rss_mib()
    assert list(source) == []
    assert peak_rss_mib() - before_mib < 200
    assert source.skipped.reasons == {"no caption": ["0.tar.gz:a"]}


def test_a_damaged_shard_is_reported(tmp_path: Path) -> None:
    path = write_shard(
        tmp_path / "0.tar", {f"{i}.{e}": png() if e == "png" else b"x" for i in range(9) for e in ("png", "txt")}
    )
    payload = bytearray(path.read_bytes())
    payload[4 * 2048 + 100] ^= 255  # in a header
    path.write_bytes(payload)
    source = open_source(tmp_path)
    assert len(list(source)) == 3
    assert [reason for reason in source.skipped.reasons if reason.startswith("shard damaged")]


def test_malformed_json_gives_no_caption_and_no_crash(tmp_path: Path) -> None:
    write_shard(
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
    with pytest.raises(DataError, match="not a readable picture"):
        Record("cut", png()[:50], "x").picture()


def test_too_many_unusable_pictures_stop_with_examples(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(png())
        (tmp_path / f"{i}.txt").write_text("" if i < 3 else "fine")
    source = open_source(tmp_path)
    assert len(list(source)) == 7
    with pytest.raises(DataError, match=r"3 of 10 .*0\.png"):
        source.skipped.check(source.name, source.config.max_unusable)


def test_paths_without_data_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        open_source(tmp_path / "gone")
    (tmp_path / "a.zip").write_bytes(b"x")
    with pytest.raises(DataError, match="not a webdataset shard"):
        open_source(tmp_path / "a.zip")
    with pytest.raises(DataError, match="no picture and no shard"):
        open_source(tmp_path)


@pytest.mark.parametrize("size", [(64, 64), (200, 100), (100, 333), (64, 65)])
def test_pixels_are_the_center_square(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, "black")
    picture.paste("white", (size[0] // 2 - 2, size[1] // 2 - 2, size[0] // 2 + 2, size[1] // 2 + 2))
    pixels = to_pixels(picture, 64)
    assert pixels.shape == (3, 64, 64)
    assert pixels.dtype == torch.float32
    assert pixels[:, 30:34, 30:34].mean() > pixels.mean()
    assert -1 <= pixels.min() <= pixels.max() <= 1


def test_a_thousand_pictures_with_broken_ones_a_cut_shard_and_hostile_members(tmp_path: Path) -> None:
    """Every count is right and nothing is written.

    There are 1,000 pictures in ten shards, 30 of them broken, 10 lost by a cut, and 20 hostile members, two of them
    behind the cut.
    """
    folder = tmp_path / "in"
    folder.mkdir()
    whole = png(size=(8, 8))
    for number in range(10):
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for i in range(100):
                broken = i < 3
                for extension, payload in (("png", whole[:40] if broken else whole), ("txt", b"a picture")):
                    add_member(tar, f"{i:05}.{extension}", payload)
            for name, kind in (("link.png", tarfile.SYMTYPE), ("/etc/evil.png", tarfile.REGTYPE)):
                add_member(tar, name, b"" if kind == tarfile.SYMTYPE else whole, kind)
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


def test_a_shard_cut_exactly_between_two_members_is_reported(tmp_path: Path) -> None:
    path = write_shard(
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


def test_brace_lists_are_expanded(tmp_path: Path) -> None:
    assert expand_braces("a/{08..11}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert expand_braces("{a,b}{0..1}") == ["a0", "a1", "b0", "b1"]
    for number in range(3):
        write_shard(tmp_path / f"{number:05}.tar", {"0.png": png(), "0.txt": f"shard {number}".encode()})
    assert [r.caption for r in open_source(f"{tmp_path}/{{00001..00002}}.tar")] == ["shard 1", "shard 2"]
    assert open_source(f"{tmp_path}/{{00001..00002}}.tar").count_units() == 2


def write_table(folder: Path, rows: list[dict[str, object]], size: tuple[int, int] = (40, 30)) -> Path:
    for number, row in enumerate(rows):
        (folder / f"{number}.png").write_bytes(png(size=size))
        row["file_name"] = f"{number}.png"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_conditions_filter_and_are_counted_apart_from_faults(tmp_path: Path) -> None:
    write_table(
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
        none.skipped.check(none.name, none.config.max_unusable)
    with pytest.raises(ValueError, match="FIELD"):
        DataConfig(where=("aesthetic about 7",))
    small = open_source(tmp_path, DataConfig(min_size_px=31))
    assert list(small) == []
    assert small.skipped.filtered == {"smaller than 31 px": 4}
    assert [r.key for r in open_source(tmp_path, DataConfig(max_aspect=1.4))] == ["0.png", "1.png", "2.png", "3.png"]
    assert list(open_source(tmp_path, DataConfig(max_aspect=1.3))) == []


def test_several_caption_columns_with_shares(tmp_path: Path) -> None:
    write_table(tmp_path, [{"short": "cat", "long": "a cat on a mat"}, {"short": "dog"}, {"short": 5, "long": "x"}])
    source = open_source(tmp_path, DataConfig(captions={"short": 1, "long": 3}))
    assert [r.captions for r in source] == [(("cat", 0.25), ("a cat on a mat", 0.75)), (("dog", 1.0),)]
    assert source.skipped.reasons == {"caption is no text": ["2.png"]}


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "shard", "hub"])
def test_every_source_takes_the_first_caption_column_that_is_not_empty(tmp_path: Path, form: str) -> None:
    empty = dict.fromkeys(reversed(CAPTION_COLUMNS), "")  # the order in the data is not the order of the choice
    rows = [empty | {column: f"from {column}" for column in CAPTION_COLUMNS[first:]} for first in range(3)]
    data: Path | str = tmp_path
    if form == "jsonl":
        write_table(tmp_path, rows)
    elif form == "csv":
        write_table(tmp_path, rows)
        (tmp_path / "metadata.jsonl").unlink()
        lines = [",".join(str(row[column]) for column in rows[0]) for row in rows]
        (tmp_path / "metadata.csv").write_text("\n".join([",".join(rows[0]), *lines]))
    elif form == "hub":
        datasets = pytest.importorskip("datasets")
        columns = {"image": [{"bytes": png(), "path": None}] * 3} | {c: [row[c] for row in rows] for c in empty}
        features = {"image": datasets.Image()} | dict.fromkeys(empty, datasets.Value("string"))
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        table.to_parquet(tmp_path / "train.parquet")
        data = f"hub:{tmp_path}"
    else:
        members = {f"{i}.json": json.dumps(row).encode() for i, row in enumerate(rows)}
        members = dict(sorted((members | {f"{i}.png": png() for i in range(3)}).items()))
        if form == "shard":
            write_shard(tmp_path / "0.tar", members)
        else:
            for name, payload in members.items():
                (tmp_path / name).write_bytes(payload)
    assert [r.caption for r in open_source(data)] == ["from text", "from caption", "from prompt"]


def test_captions_that_are_no_text_are_reported(tmp_path: Path) -> None:
    for name, caption in (("a", b"\xff\xfe\x00"), ("b", b"fine")):
        (tmp_path / f"{name}.png").write_bytes(png())
        (tmp_path / f"{name}.txt").write_bytes(caption)
    source = open_source(tmp_path)
    assert [r.caption for r in source] == ["fine"]
    assert source.skipped.reasons == {"caption is no text": ["a.png"]}


def test_units_read_in_any_order_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdcompress.data.folder.UNIT_PICTURES", 3)
    write_table(tmp_path, [{"text": f"picture {i}"} for i in range(8)])
    source = open_source(tmp_path)
    assert source.count_units() == 3
    apart = {i: [r.caption for r in source.read_unit(i, Skipped())] for i in (2, 0, 1)}
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


@pytest.mark.parametrize("picture_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))  # 1 to 8 have a meaning
def test_every_orientation_is_set_upright_as_pillow_does(orientation: int, picture_format: str) -> None:
    noise = torch.randint(256, (6, 9, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise.numpy()).save(file, picture_format, exif=exif)
    with Image.open(file) as stored:
        upright = ImageOps.exif_transpose(stored).convert("RGB")
    found = Record("turned", file.getvalue(), "x").picture()
    assert found.size == upright.size
    assert found.tobytes() == upright.tobytes()


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
    assert source.count_units() == 2
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
