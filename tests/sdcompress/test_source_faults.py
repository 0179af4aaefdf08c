"""Faulty files of a data set are reported by their name, each once."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from sdcompress_engines.errors import DataError

from sdcompress.data.config import DataConfig
from sdcompress.data.skipped import Skipped
from sdcompress.data.sources import open_source

from .picture_files import add_member, png, write_shard


def test_a_csv_row_with_more_cells_than_the_header_has_only_the_headers_fields(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "metadata.csv").write_text("file_name,caption,score\na.png,a cat, sitting,7.5\n")
    source = open_source(tmp_path, DataConfig(where=("aesthetic >= 5",)))
    assert list(source) == []
    with pytest.raises(DataError, match="the fields are caption, file_name, score"):
        source.skipped.check(source.name, source.config.max_unusable)


def test_a_csv_file_with_an_unclosed_quote_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "metadata.csv").write_text('file_name,caption\na.png,"a cat\n' + "x" * 140_000)
    with pytest.raises(DataError, match=r"metadata\.csv: is not CSV \(field larger"):
        list(open_source(tmp_path))


def test_of_several_files_the_one_that_is_not_a_shard_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", {"0.png": png(), "0.txt": b"fine"})
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(DataError, match=r"b\.json: is not a webdataset shard"):
        open_source(f"{tmp_path}/*")


@pytest.mark.parametrize("order", ["picture first", "caption first"])
def test_a_faulty_picture_and_its_caption_are_counted_once(tmp_path: Path, order: str) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add_member(tar, "a.png", png())
        add_member(tar, "a.txt", b"fine")
        if order == "caption first":
            add_member(tar, "b.txt", b"its picture is a link")
        add_member(tar, "b.png", b"", tarfile.SYMTYPE)
        if order == "picture first":
            add_member(tar, "b.txt", b"its picture is a link")
        add_member(tar, "c.txt", b"alone")
    source = open_source(tmp_path)
    assert [record.caption for record in source] == ["fine"]
    assert source.skipped.reasons == {
        "member is a link or a device": ["0.tar:b.png"],
        "caption without a picture": ["0.tar:c"],
    }


def test_what_a_folder_names_or_holds_and_does_not_give_is_counted(tmp_path: Path) -> None:
    for name in ("a.png", "b.gif", "c.TIFF"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "notes.txt").write_text("no caption")
    rows = ({"file_name": name, "text": name} for name in ("./a.png", "b.gif", "gone.png"))
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(tmp_path)
    assert [(record.key, record.caption) for record in source] == [("a.png", "./a.png")]
    assert source.skipped.reasons == {
        "caption without a picture": ["gone.png"],
        "picture of a kind that is not read": ["b.gif", "c.TIFF"],
    }


def test_each_unit_counts_its_share_of_the_rows_without_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many in one unit would stop a build that has few in all."""
    monkeypatch.setattr("sdcompress.data.folder.UNIT_PICTURES", 3)
    for number in range(9):
        (tmp_path / f"{number}.png").write_bytes(png())
    rows = ({"file_name": f"{number}.png", "text": "x"} for number in range(16))
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, counts = open_source(tmp_path), []
    for number in range(source.count_units()):
        skipped = Skipped()
        assert len(list(source.read_unit(number, skipped))) == 3
        counts.append(skipped.count)
    assert counts == [3, 2, 2]
