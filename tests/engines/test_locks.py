"""A lock has one holder, ends with its process, and is refused in one line where the file system has none."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sdcompress_engines.errors import ArtifactError, ModelError, StorageError, storage_error
from sdcompress_engines.locks import try_lock
from sdcompress_engines.store import EngineStore

from sdcompress.train.run_folder import LOCK, run_folder

HOLDER = """
import sys, time
from pathlib import Path
from sdcompress_engines.locks import try_lock
lock = try_lock(Path(sys.argv[1]), hint="")
print("held" if lock else "refused", flush=True)
time.sleep(60)
"""


def take(path: Path) -> bool:
    lock = try_lock(path, hint="another folder")
    if lock is not None:
        lock.release()
    return lock is not None


def test_a_lock_of_another_process_is_refused_until_that_process_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "one.lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert not take(path)
        process.kill()
        process.wait()
    assert take(path)


def test_a_lock_is_taken_once_in_a_process_and_again_after_its_release(tmp_path: Path) -> None:
    lock = try_lock(tmp_path / "one.lock", hint="")
    assert lock is not None
    assert not take(tmp_path / "one.lock")
    lock.release()
    assert take(tmp_path / "one.lock")


def test_a_discarded_lock_leaves_no_file(tmp_path: Path) -> None:
    lock = try_lock(tmp_path / "one.lock", hint="")
    assert lock is not None
    lock.discard()
    assert not list(tmp_path.iterdir())


def test_a_lock_file_that_cannot_be_removed_while_it_is_held_is_removed_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "one.lock"
    lock, unlink = try_lock(path, hint=""), Path.unlink

    def like_windows(self: Path, missing_ok: bool = False) -> None:
        if not take(self):
            raise PermissionError(errno.EACCES, "used by another process", str(self))
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", like_windows)
    assert lock is not None
    lock.discard()
    assert not path.exists()


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a network file system: none with locks is missing here."""

    def flock(file: int, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr("fcntl.flock", flock)


@pytest.mark.skipif(sys.platform == "win32", reason="locks are made otherwise there")
@pytest.mark.usefixtures("without_locks")
def test_a_file_system_without_locks_is_refused_and_no_lock_stays_behind(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"one\.lock: .*lock.*\. Try: another folder$"):
        try_lock(tmp_path / "one.lock", hint="another folder")
    with (
        pytest.raises(StorageError, match=r"SDCOMPRESS_CACHE to another folder on a local disk$"),
        EngineStore(tmp_path / "store")._lock("0" * 20, lambda: None),
    ):
        pass
    with (
        pytest.raises(StorageError, match=r"choose another -o, on a local disk$"),
        run_folder(tmp_path / "run", resume=False, force=False),
    ):
        pass
    assert not (tmp_path / "run").exists()


RECIPE = '{"steps": 1, "batch_size": 1, "learning_rate": 1}'


def test_a_training_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    output = tmp_path / "run"
    for resume, force in ((False, False), (True, False), (False, True)):
        with run_folder(output, resume=resume, force=force):
            (output / "recipe.json").write_text(RECIPE)
            (output / "metrics.jsonl").touch()
            with (
                pytest.raises(ArtifactError, match="another run is using this folder"),
                run_folder(output, resume=True, force=False),
            ):
                pass
            with (
                pytest.raises(ArtifactError, match="another run is using this folder"),
                run_folder(output, resume=False, force=True),
            ):
                pass
            assert (output / "metrics.jsonl").exists()


def test_force_keeps_nothing_and_a_run_that_could_not_begin_leaves_no_folder(tmp_path: Path) -> None:
    output = tmp_path / "run"
    (output / "checkpoints").mkdir(parents=True)
    (output / "recipe.json").write_text(RECIPE)
    (output / "plan.json").touch()
    with run_folder(output, resume=False, force=True):
        assert [path.name for path in output.iterdir()] == [LOCK]
    with pytest.raises(ModelError), run_folder(output, resume=False, force=True):  # noqa: PT012
        (output / "plan.json").touch()
        raise ModelError("is no teacher")
    assert not output.exists()


def test_a_resumed_run_that_could_not_begin_leaves_the_folder(tmp_path: Path) -> None:
    output = tmp_path / "run"
    (output / "checkpoints").mkdir(parents=True)
    (output / "recipe.json").write_text(RECIPE)
    with pytest.raises(ModelError), run_folder(output, resume=True, force=False):
        raise ModelError("is no teacher")
    assert (output / "checkpoints").is_dir()


@pytest.mark.parametrize(
    ("winerror", "number", "words"),
    [
        (32, errno.EACCES, "in use by another program"),
        (33, errno.EACCES, "in use by another program"),
        (1224, errno.EINVAL, "in use by another program"),
        (1314, errno.EINVAL, "not allow this account to create links"),
        (5, errno.EACCES, "no permission"),
    ],
)
def test_errors_of_windows_become_messages_of_ours(winerror: int, number: int, words: str) -> None:
    error = OSError(number, "as Windows words it", "C:\\out\\unet.engine")
    error.winerror = winerror  # type: ignore[attr-defined]
    translated = storage_error(error, "C:\\out")
    assert translated is not None
    assert str(translated).startswith("C:\\out\\unet.engine: ")
    assert words in str(translated)
