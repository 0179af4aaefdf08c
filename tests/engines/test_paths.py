"""A name in a manifest, record, index or graph leads to a file inside its folder, or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from sdcompress_engines.errors import ArtifactError
from sdcompress_engines.paths import file_inside


@pytest.mark.parametrize("name", ["unet.onnx", "pipeline/unet/config.json", "..hidden", "a b", "é.bin"])
def test_plain_names_lead_into_the_folder(tmp_path: Path, name: str) -> None:
    path = file_inside(tmp_path, name, source=tmp_path / "sdcompress.json")
    assert path.resolve().is_relative_to(tmp_path.resolve())


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/etc/passwd", "a//b", "", ".", "..", "a\\..\\x", "C:/x", "C:x", "a\0b", "a\nb", "x" * 300,
     None, 7, ["a"], {"a": 1}, True, "\ud800" * 100],
)  # fmt: skip
def test_other_names_are_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(ArtifactError, match="a name inside"):
        file_inside(tmp_path, name, source=tmp_path / "sdcompress.json")


def test_a_link_is_refused_as_a_file_and_on_the_way(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").symlink_to(outside / "file")
    (folder / "sub").symlink_to(outside)
    for name in ("file", "sub/file"):
        with pytest.raises(ArtifactError, match="is a link"):
            file_inside(folder, name, source=folder / "sdcompress.json")
        assert file_inside(folder, name, source=folder / "sdcompress.json", links=True).read_text() == "secret"
