"""Whatever a data set holds, its usable pictures are read and the rest is named, in bounded time and memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from sdcompress_engines.errors import DataError, SdCompressError, UsageError
from sdcompress_engines.resources import peak_rss_mib

from sdcompress.data import tar
from sdcompress.data.records import MAX_CAPTION, Record
from sdcompress.data.shards import expand_braces
from sdcompress.data.sources import open_source
from sdcompress.data.views import to_view

from .picture_files import png, write_shard

QUICK = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def check_refusal(error: SdCompressError) -> None:
    assert len(str(error)) < 600
    assert "\n" not in str(error)


def read_all(data: Any) -> tuple[list[str], dict[str, list[str]]]:
    """The captions of a source, and what it leaves out."""
    source = open_source(data)
    return [record.caption for record in source], source.skipped.reasons


@pytest.mark.parametrize(
    "name",
    [
        "{000..100000000000}.tar",
        "{0..99999}{0..99999}.tar",
        "{0..1}" * 30,
        "{1..2}{5..5}" * 40,
        "{0..9}{9..0}" * 20 + "x" * 100_000,
        "{" + "9" * 5000 + ".." + "9" * 5001 + "}.tar",
        "{" + "," * 300_000 + "}",
        "{" + "," * 300_000,
        "{a," * 50 + "{0..9}" * 9 + "}" * 50,
        "",
        " \t",
        "-",
        "~nosuchuser/pictures",
        "x" * 5000,
        "a\0b",
        "\ud800",
    ],
)
def test_a_name_that_stands_for_nothing_or_for_too_much_is_refused_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    began = time.process_time()
    with pytest.raises(UsageError) as refusal:
        open_source(name)
    assert time.process_time() - began < 3
    check_refusal(refusal.value)


def test_brace_lists_are_those_of_a_shell() -> None:
    assert expand_braces("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expand_braces("{3..1}{x,y}") == ["3x", "3y", "2x", "2y", "1x", "1y"]
    assert expand_braces("{a,{b,c}}{1}") == ["a{1}", "b{1}", "c{1}"]
    assert len(expand_braces("{00000..99999}.tar")) == 100_000


@QUICK
@given(st.text(alphabet="{}.,0123456789ab", max_size=60))
def test_any_pattern_is_expanded_or_refused(pattern: str) -> None:
    try:
        assert len(expand_braces(pattern)) <= 250_000
    except UsageError as error:
        check_refusal(error)


def write_tar(path: Path, members: dict[str, int | bytes]) -> Path:
    """A tar whose members have these bytes, or as many zeros, which take no room on the disk."""
    with path.open("wb") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = content if isinstance(content, int) else len(content)
            file.write(info.tobuf())
            if isinstance(content, bytes):
                file.write(content)
            else:
                file.seek(content, os.SEEK_CUR)
            file.seek(-info.size % tarfile.BLOCKSIZE, os.SEEK_CUR)
        file.write(bytes(2 * tarfile.BLOCKSIZE))
    return path


def test_members_of_one_name_do_not_add_up_in_memory(tmp_path: Path) -> None:
    many: dict[str, int | bytes] = {f"a.part{i}": 2**30 for i in range(20)}
    write_tar(tmp_path / "0.tar", many | {"a.png": png(), "a.jpg": 2**28, "a.txt": b"fine"})
    before_mib = peak_rss_mib()
    assert read_all(tmp_path) == (["fine"], {})
    assert peak_rss_mib() - before_mib < 200


@pytest.mark.parametrize("extension", ["txt", "json"])
def test_a_text_of_megabytes_is_left_out_by_its_name(tmp_path: Path, extension: str) -> None:
    write_tar(tmp_path / "0.tar", {f"a.{extension}": 2**28, "a.png": png(), "b.png": png(), "b.txt": b"fine"})
    captions, reasons = read_all(tmp_path)
    assert captions == ["fine"]
    assert reasons["text of over 1 MiB"] == [f"0.tar:a.{extension}"]


def test_a_caption_that_is_too_long_is_left_out(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", {"a.png": png(), "a.txt": b"x" * (MAX_CAPTION + 1), "b.png": png(), "b.txt": b"b"})
    assert read_all(tmp_path) == (["b"], {"caption of over 20,000 characters": ["0.tar:a"]})


def test_a_shard_that_grows_without_end_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MIN_LIMIT_BYTES", 2**26)
    with gzip.open(tmp_path / "0.tar.gz", "wb", compresslevel=1) as file:
        info = tarfile.TarInfo("a.png")
        info.size = 2**33
        file.write(info.tobuf())
        for _ in range(70):
            file.write(bytes(2**20))
    assert read_all(tmp_path) == ([], {"shard damaged (ReadError)": ["0.tar.gz"]})


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("size", "9" * 5000),
        ("size", "-1"),
        ("size", "1e3"),
        ("size", ""),
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.size", "9" * 5000),
    ],
)
def test_a_wrong_size_in_an_extended_header_is_a_damaged_shard(tmp_path: Path, entry: str, value: str) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as shard:
        info = tarfile.TarInfo("a.png")
        info.size, info.pax_headers = len(png()), {entry: value}
        shard.addfile(info, io.BytesIO(png()))
    assert read_all(tmp_path) == ([], {"shard damaged (HeaderError)": ["0.tar"]})


@QUICK
@given(data=st.data())
def test_a_mutated_shard_is_read_or_named(tmp_path: Path, data: st.DataObject) -> None:
    write_shard(tmp_path / "good.tar", {"a.png": png(), "a.txt": b"fine", "b.png": png(), "b.json": b'{"text": "b"}'})
    content = bytearray((tmp_path / "good.tar").read_bytes())
    (tmp_path / "good.tar").unlink()
    size = data.draw(st.integers(0, len(content)))
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=6)):
        content[min(place, len(content) - 1)] = byte
    (tmp_path / "0.tar").write_bytes(content[:size])
    source = open_source(tmp_path)
    for record in source:
        assert len(record.encoded) < 2**20
    assert all(len(key) < 100 for keys in source.skipped.reasons.values() for key in keys)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)


@settings(QUICK, max_examples=40)
@given(meta=st.dictionaries(st.sampled_from(["file_name", "text", "caption", "score"]), JSON))
def test_any_metadata_gives_captions_or_reasons(tmp_path: Path, meta: dict[str, Any]) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png"} | meta))
    (tmp_path / "a.json").write_text(json.dumps(meta))
    captions, reasons = read_all(tmp_path)
    assert all(caption == caption.strip() for caption in captions)
    assert len(reasons.pop("caption without a picture", [])) == (meta.get("file_name", "a.png") != "a.png")
    assert all(keys == ["a.png"] for keys in reasons.values())


@pytest.mark.parametrize(
    ("line", "words"),
    [("[" * 100_000, "is nested too deep"), ('{"a": ' + "9" * 5000 + "}", "is not JSON"), ("x" * 2**21, "has over")],
)
def test_a_line_of_metadata_that_is_too_much_is_named(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n' + line)
    with pytest.raises(DataError, match=rf"metadata\.jsonl:2: {words}") as refusal:
        read_all(tmp_path)
    assert len(str(refusal.value)) < 600


@pytest.mark.parametrize("size", [(65535, 1), (1, 65535), (65, 1)])
def test_a_picture_of_one_row_is_refused_before_it_is_enlarged(size: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    with pytest.raises(DataError, match=f"has {size[0]} x {size[1]} pixels; expected sides of at most 1 to 64"):
        Record("a", buffer.getvalue(), "").picture()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (64, 1), (30, 40)])
def test_a_picture_of_any_mode_becomes_a_view(mode: str, size: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    view = to_view(Record("a", buffer.getvalue(), "").picture(), 64, 64)
    assert view.pixels.shape == (3, 64, 64)


@QUICK
@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF"]),
    changes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=5),
    cut=st.integers(0, 2000),
)
def test_a_mutated_picture_is_decoded_or_refused(kind: str, changes: list[tuple[int, int]], cut: int) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((24, 24), 40).convert("RGB").save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for place, byte in changes:
        content[min(place, len(content) - 1)] = byte
    try:
        assert Record("a", bytes(content[:cut]), "").picture().mode == "RGB"
    except SdCompressError as error:
        check_refusal(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_a_device_and_a_lost_link_are_refused_as_shards_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "zero.tar").symlink_to("/dev/zero")
    (tmp_path / "lost.tar").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder.tar").mkdir()
    for name, words in (
        ("pipe", "a named pipe"),
        ("zero", "a device"),
        ("lost", "cannot be read"),
        ("folder", "a folder"),
    ):
        with pytest.raises(DataError, match=words):
            open_source(str(tmp_path / f"{name}.ta?"))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("warning_filter", ["default", "error"])
def test_damaged_exif_does_not_make_a_picture_unreadable(kind: str, warning_filter: Any) -> None:
    turned = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"  # ends within its entries
    for exif, size in ((b"Exif\0\0garbage!", (40, 20)), (turned, (20, 40))):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 20)).save(buffer, kind, exif=exif)
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter(warning_filter)
            assert Record("a", buffer.getvalue(), "").picture().size == size
        assert shown == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no links for all, and names in Unicode")
def test_names_of_any_bytes_and_links_to_nothing(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(png())
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("fine")
    (tmp_path / "lost.png").symlink_to(tmp_path / "nothing.png")
    assert read_all(tmp_path) == (["fine"], {"link to a file that is missing": ["lost.png"]})
    assert len(open_source(tmp_path).fingerprint()) == 64


def test_a_table_in_another_encoding_is_refused_and_text_in_utf_16_is_no_caption(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_bytes("a cat".encode("utf-16-le"))
    assert read_all(tmp_path) == ([], {"caption is no text": ["a.png"]})
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.png,caf\xe9\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"metadata\.csv: is not UTF-8 \(byte 0xe9\)"):
        read_all(tmp_path)


def test_a_picture_whose_name_has_several_dots_is_named(tmp_path: Path) -> None:
    members = {"a_0.5.png": png(), "a_0.5.txt": b"lost", "b.seg.png": png(), "b.png": png(), "b.txt": b"fine"}
    write_shard(tmp_path / "0.tar", members | {"._b.png": b"of macOS", "c.big.jpg": png(), "c.txt": b"lost"})
    assert read_all(tmp_path) == (["fine"], {"name of several dots": ["0.tar:a_0", "0.tar:c"]})


@pytest.mark.parametrize("pattern", ["{0..3}.tar", "{0,1,*[23]}.tar"])
def test_a_list_of_shards_of_which_some_are_missing_is_refused(tmp_path: Path, pattern: str) -> None:
    folder = tmp_path / "set[1]"
    folder.mkdir()
    for number in (0, 1):
        write_shard(folder / f"{number}.tar", {"a.png": png(), "a.txt": b"fine"})
    assert open_source(f"{folder}/{{0..1}}.tar").count_units() == 2
    with pytest.raises(DataError, match=r"lacks \d of \d files") as refusal:
        open_source(f"{folder}/{pattern}")
    check_refusal(refusal.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_links_to_pictures_are_followed_and_pipes_are_no_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (tmp_path / "elsewhere.png").write_bytes(png())
    (folder / "a.png").symlink_to(tmp_path / "elsewhere.png")
    (folder / "a.txt").write_text("a link")
    os.mkfifo(folder / "b.png")
    assert read_all(folder) == (["a link"], {})
