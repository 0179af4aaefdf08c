"""A name in a manifest, record, index or graph leads to a file inside its folder, or is refused."""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath

import pytest
from hypothesis import given, settings
from sdcompress_engines.errors import ArtifactError, EngineError
from sdcompress_engines.paths import file_inside, hide_home, is_plain_path

from ..hostile_text import NAMES


@pytest.mark.parametrize("name", ["unet.onnx", "pipeline/unet/config.json", "..hidden", "a b", "é.bin", "console.txt"])
def test_plain_names_lead_into_the_folder(tmp_path: Path, name: str) -> None:
    path = file_inside(tmp_path, name, source=tmp_path / "sdcompress.json")
    assert path.resolve().is_relative_to(tmp_path.resolve())


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/etc/passwd", "a//b", "", ".", "..", "a\\..\\x", "C:/x", "C:x", "a\0b", "a\nb", "x" * 300,
     "a/" * 600 + "a", ".. ", "... /x", "unet.onnx.", "NUL", "con.txt", "a/COM1", "conin$", "LPT³.txt", None,
     7, ["a"], {"a": 1}, True,
     "\ud800" * 100],
)  # fmt: skip
def test_other_names_are_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(ArtifactError, match="a name inside"):
        file_inside(tmp_path, name, source=tmp_path / "sdcompress.json")
    with pytest.raises(EngineError, match="a name inside"):
        file_inside(tmp_path, name, source=tmp_path / "unet.onnx", error=EngineError)


@settings(deadline=None, max_examples=300)
@given(NAMES)
def test_no_name_leads_out_of_the_folder_on_linux_or_windows(name: str) -> None:
    folder = Path("/some/folder")
    if is_plain_path(name):
        assert file_inside(folder, name, source=folder).parts[:3] == folder.parts
        windows = PureWindowsPath("C:/some/folder") / name
        assert windows.parts == ("C:\\", "some", "folder", *name.split("/"))
    else:
        with pytest.raises(ArtifactError):
            file_inside(folder, name, source=folder)


@pytest.mark.skipif(os.name != "posix", reason="HOME")
@pytest.mark.parametrize(
    ("home", "shown"), [("/home/me", "~/x and /y"), ("/home/me/", "~/x and /y"), ("/", None), ("", None), ("~", None)]
)
def test_only_a_known_home_folder_is_hidden(monkeypatch: pytest.MonkeyPatch, home: str, shown: str | None) -> None:
    monkeypatch.setenv("HOME", home)
    text = "/home/me/x and /y"
    assert hide_home(text) == (shown or text)


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


def test_the_links_of_a_hub_cache_are_taken_and_others_in_it_are_not(tmp_path: Path) -> None:
    repository = tmp_path / "models--me--style"
    snapshot = repository / "snapshots/0123abcd"
    (snapshot / "unet").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs/abc").write_text("blob")
    (snapshot / "unet/config.json").symlink_to("../../../blobs/abc")
    assert file_inside(snapshot, "unet/config.json", source=snapshot).read_text() == "blob"
    (tmp_path / "secret").write_text("secret")
    (repository / "blobs/out").symlink_to(tmp_path / "secret")
    (snapshot / "blob").symlink_to("../../blobs/out")
    (snapshot / "direct").symlink_to(tmp_path / "secret")
    (snapshot / "folder").symlink_to("../../blobs")
    for name in ("blob", "direct", "folder/abc"):
        with pytest.raises(ArtifactError, match="is a link"):
            file_inside(snapshot, name, source=snapshot)
