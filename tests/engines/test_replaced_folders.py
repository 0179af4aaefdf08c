"""A folder that is replaced is whole before or after: a kill, an error or another process loses neither."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sdcompress_engines import leftovers
from sdcompress_engines.errors import ArtifactError, StorageError
from sdcompress_engines.leftovers import OLD, temporary_path
from sdcompress_engines.output_folders import check_free, locked, replace_folder, staged

from .artifact_folders import make_artifact, snapshot

STOPPED = """
import os, signal, sys
from pathlib import Path
from sdcompress_engines import files, output_folders

real, renames = os.replace, 0

def replace(source, target):
    global renames
    real(source, target)
    renames += Path(source).parent == Path(sys.argv[1]).parent  # not of the manifest inside
    if renames == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace
with output_folders.staged(Path(sys.argv[1]), force=True) as folder:
    (folder / "after").touch()
    if sys.argv[2] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize(("renames", "expected"), [(0, "before"), (1, "before"), (2, "after")])
def test_after_a_kill_the_next_command_finds_the_old_or_the_new_folder(
    tmp_path: Path, renames: int, expected: str
) -> None:
    target = make_artifact(tmp_path / "out")
    ended = subprocess.run([sys.executable, "-c", STOPPED, str(target), str(renames)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) > 1 or renames == 1
    assert target.exists() == (renames != 1)
    if expected == "before":
        check_free(target, force=True)
        assert (target / "part/file").read_text() == "before"
    else:
        with pytest.raises(ArtifactError, match="after"):  # it has no manifest
            check_free(target, force=True)
        (target / "after").unlink()
        check_free(target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_running_process_uses_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for use in ("partial", OLD):
        temporary_path(target, use).mkdir()
    of_pid_1(temporary_path(target), leftovers._read_start(1)).mkdir()
    foreign = tmp_path / ".out.99999-0000000123456789.partial"  # of another machine
    foreign.mkdir()
    check_free(target)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.skipif(not leftovers._read_start(1), reason="the system does not say when a process started")
def test_the_id_of_a_killed_process_may_belong_to_another_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    of_pid_1(temporary_path(target), "0" * 6).mkdir()
    (aside := of_pid_1(temporary_path(target, OLD), "0" * 6)).mkdir()
    make_artifact(aside / "out")
    check_free(target, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def of_pid_1(path: Path, start: str) -> Path:
    """Returns a temporary path as process 1 would have named it, had it started at `start`."""
    own = f".{os.getpid()}-{leftovers._machine()}{leftovers._read_start(os.getpid())}"
    assert own in path.name
    return path.with_name(path.name.replace(own, f".1-{leftovers._machine()}{start}"))


def test_a_leftover_of_another_output_stays(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = temporary_path(tmp_path / "other")
    left = left.with_name(left.name.replace(f".{os.getpid()}-", f".{ended.pid}-"))
    left.mkdir()
    check_free(tmp_path / "out")
    assert left.is_dir()
    check_free(tmp_path / "other")
    assert not left.exists()


def test_a_folder_that_cannot_be_put_in_place_brings_the_old_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, new = make_artifact(tmp_path / "out"), tmp_path / "new"
    new.mkdir()
    before = snapshot(tmp_path)
    real = os.replace

    def replace(source: Path, place: Path) -> None:
        if Path(source) == new:
            raise PermissionError(13, "in use", str(place))
        real(source, place)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PermissionError):
        replace_folder(new, target)
    assert snapshot(tmp_path) == before


def test_an_old_folder_that_cannot_be_put_back_is_kept_until_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make_artifact(tmp_path / "out")
    before, replace = snapshot(tmp_path), os.replace

    def refuse_in_place(source: Path, place: Path) -> None:
        if Path(place) == target:
            raise PermissionError(13, "in use", str(place))
        replace(source, place)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refuse_in_place)
        with pytest.raises(StorageError), staged(target, force=True):
            pass
    monkeypatch.setattr(leftovers, "_is_running", lambda *_: False)  # this process has ended
    with pytest.raises(ArtifactError, match="--force"):
        check_free(target)
    assert snapshot(tmp_path) == before


def test_one_process_at_a_time_writes_an_output(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "new/out"),
        pytest.raises(ArtifactError, match="another process"),
        locked(tmp_path / "new/out"),
    ):
        pass
    assert list((tmp_path / "new").iterdir()) == []


def test_the_lock_of_a_mounted_folder_lies_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # as beside a mount point of root's
    with locked(tmp_path / "out"):
        assert [path.name for path in tmp_path.rglob("*")] == ["out", ".lock"]
        with pytest.raises(ArtifactError, match="another process"), locked(tmp_path / "out"):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]
