"""An install that is refused, fails or is killed leaves the host as it was."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from sdcompress_engines.errors import ArtifactError, EngineMismatch, SdCompressError, StorageError
from sdcompress_engines.manifest import MANIFEST_NAME, write_manifest

from sdcompress.hosts import transaction
from sdcompress.hosts.entry import Item
from sdcompress.hosts.files import PARTIAL
from sdcompress.hosts.find import find_host
from sdcompress.hosts.install import install, uninstall
from sdcompress.hosts.plugin_files import plugin_folder
from sdcompress.hosts.status import read_status
from sdcompress.hosts.storage import host_lock

from .trees import make_engine, make_tree, snapshot


@pytest.mark.parametrize("what", ["dangling", "file"])
def test_a_dangling_link_or_a_file_in_place_of_the_models_folder_is_refused(
    what: str, tmp_path: Path, engine: Path
) -> None:
    host, root = find_host("webui", make_tree(tmp_path / "webui", "webui"))
    made = make_engine(tmp_path / "webui engine")
    place = root / "models/sdcompress"
    place.symlink_to(tmp_path / "not mounted") if what == "dangling" else place.write_text("")
    before = snapshot(root)
    with pytest.raises(
        StorageError,
        match="not mounted, which is not there" if what == "dangling" else "is a file, and a folder is needed here",
    ):
        install(host, root, [made])
    assert snapshot(root) == before


@contextmanager
def as_nobody() -> Iterator[None]:
    """Run the block without root's permissions if the tests run as root."""
    if os.geteuid():
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
@pytest.mark.parametrize("what", ["custom_nodes", "models", "uninstall"])
def test_without_permission_nothing_is_written_and_the_error_has_a_hint(what: str) -> None:
    with TemporaryDirectory() as name:  # pytest's own folder is closed to other users
        Path(name).chmod(0o755)
        host, root = find_host("comfyui", make_tree(Path(name) / "ComfyUI", "comfyui"))
        made = make_engine(Path(name) / "made", "comfyui")
        if what == "uninstall":
            install(host, root, [made])
        closed = [
            path for path in (root, *root.rglob("*")) if path.is_dir() and (what == "uninstall" or path.name == what)
        ]
        for path in (root / "models", root / "custom_nodes"):
            path.chmod(0o777)
        for path in closed:
            path.chmod(0o555)
        before = snapshot(root)
        with as_nobody():
            if not os.access(plugin_folder(host.plugin), os.R_OK):
                pytest.skip("the checkout is closed to other users")
            with pytest.raises(StorageError, match=r"no permission to write here.*as the user who runs"):
                uninstall(host, root) if what == "uninstall" else install(host, root, [made])
        for path in closed:
            path.chmod(0o755)
        assert snapshot(root) == before


def check_unchanged(host: Any, root: Path, before: dict[str, Any]) -> None:
    """Nothing but the record may differ from a snapshot, and the record fits the files."""
    after = snapshot(root)
    assert after.keys() == before.keys()
    assert {path for path in before if before[path] != after[path]} <= {host.record}
    assert not read_status(host, root).changed


def test_a_copy_that_fails_leaves_the_host_as_it_was(comfyui: tuple[Any, Path], tmp_path: Path) -> None:
    host, root = comfyui
    made = make_engine(
        tmp_path / "made", "comfyui", extra={"pipeline/" + "n" * 240 + ".json": "{}"}
    )  # the name of a partial copy would be too long
    before = snapshot(root)
    with pytest.raises(StorageError, match="a name in this path is too long"):
        install(host, root, [made])
    assert snapshot(root) == before
    install(host, root, [make_engine(tmp_path / "first", "comfyui", "first")])
    during = snapshot(root)
    with pytest.raises(StorageError):
        install(host, root, [made])
    check_unchanged(host, root, during)
    uninstall(host, root)
    assert snapshot(root) == before


def test_a_full_disk_leaves_the_links_of_an_earlier_install(
    comfyui: tuple[Any, Path], engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(item: Item, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    host, root = comfyui
    before = snapshot(root)
    install(host, root, [engine], link=True)
    during = snapshot(root)
    monkeypatch.setattr(transaction, "copy_beside", fail)
    with pytest.raises(StorageError, match=r"no space left.*Try: free some space, then install again"):
        install(host, root, [engine])
    check_unchanged(host, root, during)
    uninstall(host, root)
    assert snapshot(root) == before


def test_where_links_are_not_possible_installed_copies_stay(
    comfyui: tuple[Any, Path], engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, target: Path, target_is_directory: bool = False) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", str(target))

    host, root = comfyui
    install(host, root, [engine])
    before = snapshot(root)
    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.raises(StorageError) as caught:
        install(host, root, [engine], link=True)
    assert caught.value.where == str(root / host.models)
    assert snapshot(root) == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the process is read from /proc")
def test_a_running_host_is_reported_and_keeps_the_engine_it_has_loaded(place: tuple[Any, Path], tmp_path: Path) -> None:
    host, root = place
    before, program = snapshot(root), root / host.programs[0]
    made = make_engine(tmp_path / "made", host.name)
    assert not install(host, root, [made]).notes
    engine = root / host.models / "sd-tiny/unet.engine"
    old = program.read_bytes() if program.exists() else None
    program.write_text(
        "import mmap, sys\nfile = open(sys.argv[1], 'rb')\nheld = mmap.mmap(file.fileno(), 0,"
        " access=mmap.ACCESS_READ)\nprint('started', flush=True)\nsys.stdin.read()\nprint(held[:6])\n"
    )
    with subprocess.Popen(
        [sys.executable, program.name, str(engine)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        newer = make_engine(tmp_path / "newer", host.name, plan=b"another plan" * 1000)
        assert install(host, root, [newer]).notes == (
            (f"{host.title} is running (process {process.pid}): it uses what it has loaded until it is restarted"),
        )
        assert engine.read_bytes()[:12] == b"another plan"
        assert not install(host, root, [newer]).notes, "nothing was changed"
        assert "is running" in uninstall(host, root).notes[0]
        assert process.communicate()[0] == "b'a plan'\n", "the mapped engine has not changed"
    program.unlink() if old is None else program.write_bytes(old)
    assert snapshot(root) == before


KILLED = """
import sys
from sdcompress.hosts.find import find_host
from sdcompress.hosts.install import install
install(*find_host("comfyui", sys.argv[1]), [sys.argv[2]])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_install_is_reported_and_can_be_uninstalled_or_repeated(
    comfyui: tuple[Any, Path], tmp_path: Path
) -> None:
    host, root = comfyui
    made = make_engine(tmp_path / "made", "comfyui", plan=bytes(400 * 2**20))
    before = snapshot(root)
    process = subprocess.Popen([sys.executable, "-c", KILLED, root, made])
    for _ in range(6000):
        if any(path.stat().st_size for path in (root / host.models).rglob(f"*unet.engine*{PARTIAL}")):
            break
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = read_status(host, root)
    assert state.leftovers
    assert not any(engine.fault is None for engine in state.engines), "no engine looks finished"
    uninstall(host, root)
    assert snapshot(root) == before
    install(host, root, [made])
    assert not read_status(host, root).changed


def alter(folder: Path) -> None:
    content = bytearray((folder / "unet.engine").read_bytes())
    content[0] ^= 1
    (folder / "unet.engine").write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (alter, r"is damaged: unet\.engine is not what the manifest says \(sha256 differs\)"),
        (lambda folder: (folder / "unet.engine").write_bytes(b"cut"), r"is damaged: unet\.engine has 3 bytes"),
        (lambda folder: (folder / MANIFEST_NAME).unlink(), r"holds no engine"),
        (
            lambda folder: (folder / MANIFEST_NAME).write_text(
                (folder / MANIFEST_NAME).read_text().replace("fp16", "fp32")
            ),
            r"this manifest was edited",
        ),
        (lambda folder: write_manifest(folder, "student"), r"is a student, not an engine"),
    ],
)
def test_a_damaged_engine_is_not_installed(spoil: Any, words: str, comfyui: tuple[Any, Path], engine: Path) -> None:
    host, root = comfyui
    before = snapshot(root)
    spoil(engine)
    with pytest.raises(ArtifactError, match=words):
        install(host, root, [engine])
    assert snapshot(root) == before


def test_an_engine_with_another_signature_is_refused_with_the_command_that_builds_the_right_one(tmp_path: Path) -> None:
    webui, comfyui = (
        find_host("webui", make_tree(tmp_path / "webui", "webui")),
        find_host("comfyui", make_tree(tmp_path / "comfyui", "comfyui")),
    )
    with pytest.raises(
        EngineMismatch,
        match=(
            r"has the signature comfyui, which SD-WebUI does not call; expected a UNet with the signature"
            r" webui.*--signature webui"
        ),
    ):
        install(*webui, [make_engine(tmp_path / "one", "comfyui")])
    with pytest.raises(EngineMismatch, match=r"has the signature diffusers"):
        install(*comfyui, [make_engine(tmp_path / "two", "diffusers")])
    assert install(*comfyui, [make_engine(tmp_path / "three", "webui")]).written, (
        "the node of ComfyUI calls engines of the WebUI too"
    )


def test_every_error_of_an_install_is_one_line(comfyui: tuple[Any, Path], tmp_path: Path) -> None:
    with pytest.raises(SdCompressError) as raised:
        install(*comfyui, [tmp_path / "nowhere"])
    assert "\n" not in str(raised.value)
    assert "--signature comfyui" in str(raised.value)


def test_a_second_install_at_the_same_time_is_refused_and_changes_nothing(
    comfyui: tuple[Any, Path], engine: Path
) -> None:
    host, root = comfyui
    before = snapshot(root)
    with host_lock(root):
        for change in (lambda: install(host, root, [engine]), lambda: uninstall(host, root)):
            with pytest.raises(ArtifactError, match="another install or uninstall is at work"):
                change()
    assert snapshot(root) == before
    install(host, root, [engine])
    uninstall(host, root)
    assert snapshot(root) == before


def test_an_install_removes_what_a_killed_one_left(comfyui: tuple[Any, Path], engine: Path) -> None:
    host, root = comfyui
    install(host, root, [engine])
    before = snapshot(root)
    left = root / host.extension / f".layout.py.abc{PARTIAL}"
    left.write_text("half")
    install(host, root, [engine])
    assert not left.exists()
    assert snapshot(root).keys() == before.keys()
