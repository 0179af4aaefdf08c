"""A file is replaced whole or not at all, also while another program has it open for a moment."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from sdcompress_engines.errors import ArtifactError
from sdcompress_engines.files import check_regular, copy_tree, replace_file, sync_tree, write_atomically


def refuse_like_windows(patch: pytest.MonkeyPatch, times: int, winerror: int) -> list[str]:
    """Let `os.replace` fail this often, as on Windows. Returns the list of its later calls."""
    calls: list[str] = []
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        calls.append(str(target))
        if len(calls) <= times:
            error = PermissionError(errno.EACCES, "in use", str(target))
            error.winerror = winerror  # type: ignore[attr-defined]
            raise error
        real(source, target)

    patch.setattr(os, "replace", replace)
    patch.setattr("time.sleep", lambda seconds: None)
    return calls


@pytest.mark.parametrize("winerror", [5, 32])
def test_a_file_that_is_in_use_for_a_moment_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, winerror: int
) -> None:
    (tmp_path / "target").write_text("old")
    calls = refuse_like_windows(monkeypatch, 3, winerror)
    write_atomically(tmp_path / "target", "new")
    assert (tmp_path / "target").read_text() == "new"
    assert len(calls) == 4


def test_a_file_that_stays_in_use_is_an_error_and_keeps_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "target").write_text("old")
    calls = refuse_like_windows(monkeypatch, 1000, 32)
    with pytest.raises(PermissionError):
        write_atomically(tmp_path / "target", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target").read_text() == "old"
    assert 2 < len(calls) < 20


@pytest.mark.parametrize("winerror", [None, 1314])
def test_other_refusals_are_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, winerror: int | None
) -> None:
    (tmp_path / "source").touch()
    calls = refuse_like_windows(monkeypatch, 1, winerror or 0)
    with pytest.raises(PermissionError):
        replace_file(tmp_path / "source", tmp_path / "target")
    assert len(calls) == 1


def test_a_folder_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "source").touch()
    calls = refuse_like_windows(monkeypatch, 1, 5)
    with pytest.raises(PermissionError):
        replace_file(tmp_path / "source", tmp_path / "target")
    assert len(calls) == 1


def test_text_is_written_in_utf8_with_its_line_ends(tmp_path: Path) -> None:
    write_atomically(tmp_path / "text", "é\n")
    assert (tmp_path / "text").read_bytes() == b"\xc3\xa9\n"


def test_an_error_leaves_nothing_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with pytest.raises(OSError, match="target"):
        write_atomically(tmp_path / "target", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("sync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda source, target: (done.append("rename"), replace(source, target)))
    write_atomically(tmp_path / "target", "new")
    assert done[:2] == ["sync", "rename"]


@pytest.mark.skipif(os.name != "posix", reason="Windows synchronizes only what may be written")
def test_a_read_only_folder_is_synchronized_and_its_copy_may_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source/part").mkdir(parents=True)
    (tmp_path / "source/part/file").touch()
    (tmp_path / "source/part/file").chmod(0o444)
    (tmp_path / "source/part").chmod(0o555)
    copy_tree(tmp_path / "source", tmp_path / "copy")
    assert (tmp_path / "copy/part").stat().st_mode & 0o200
    assert (tmp_path / "copy/part/file").stat().st_mode & 0o200
    opened = os.open

    def refuse_to_write(path: Any, flags: int, *args: Any) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(13, "no permission", str(path))
        return opened(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse_to_write)  # as it is for users without root's rights
    sync_tree(tmp_path / "source")


def test_a_disk_that_fails_at_the_end_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "target").write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "target", "new")
    assert (tmp_path / "target").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_names_of_any_length_that_the_system_has_are_written(tmp_path: Path) -> None:
    write_atomically(tmp_path / ("x" * 255), "new")
    assert (tmp_path / ("x" * 255)).read_text() == "new"


@pytest.mark.parametrize("make", [Path.mkdir, getattr(os, "mkfifo", Path.mkdir)])
def test_only_regular_files_are_opened(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "weights")
    with pytest.raises(ArtifactError, match="expected a regular file"):
        check_regular(tmp_path / "weights")


def test_a_link_to_a_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").symlink_to("/dev/zero")
    with pytest.raises(ArtifactError, match="is a device"):
        check_regular(tmp_path / "weights")
