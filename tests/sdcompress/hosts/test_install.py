"""Install, status and uninstall: everything is written once, reported, and removed without a trace."""

from __future__ import annotations

import py_compile
import shutil
from pathlib import Path
from typing import Any

import pytest
from sdcompress_engines.errors import UsageError
from sdcompress_engines.flavour import platform_name
from sdcompress_engines.manifest import MANIFEST_NAME

from sdcompress.hosts.find import find_host
from sdcompress.hosts.host import RECORD
from sdcompress.hosts.install import install, uninstall
from sdcompress.hosts.plugin_files import plugin_folder
from sdcompress.hosts.record import read_host_record
from sdcompress.hosts.status import read_status

from .trees import make_engine, make_tree, snapshot


@pytest.mark.parametrize("link", [False, True], ids=["copy", "link"])
def test_install_status_uninstall_leaves_the_tree_byte_equal(
    link: bool, place: tuple[Any, Path], tmp_path: Path
) -> None:
    host, root = place
    made = [make_engine(tmp_path / f"made {name}", host.name, name) for name in ("Straße bei Nacht", "sd-tiny")]
    before, sources = snapshot(root), [snapshot(folder) for folder in made]
    done = install(host, root, made, link=link)
    assert done.written
    during = snapshot(root)
    assert {path: content for path, content in during.items() if path in before} == before
    state = read_status(host, root)
    assert state.record
    assert not state.broken
    assert not state.changed
    assert [engine.name for engine in state.engines] == ["Straße bei Nacht", "sd-tiny"]
    assert all(engine.is_recorded and engine.fault is None and engine.why_not for engine in state.engines), (
        "this machine has no such card"
    )
    assert snapshot(root) == during, "status writes nothing"
    for source in (root / host.extension).rglob("*.py"):  # as a running host does
        if not link:
            py_compile.compile(str(source), doraise=True)
    gone = uninstall(host, root)
    assert not gone.kept
    assert snapshot(root) == before
    assert [snapshot(folder) for folder in made] == sources
    with pytest.raises(UsageError, match="nothing is installed here"):
        uninstall(host, root)


@pytest.mark.parametrize("link", [False, True], ids=["copy", "link"])
def test_installing_twice_writes_nothing_the_second_time(link: bool, place: tuple[Any, Path], tmp_path: Path) -> None:
    host, root = place
    made = make_engine(tmp_path / "made", host.name)
    install(host, root, [made], link=link)
    before, times = snapshot(root), {path: path.lstat().st_mtime_ns for path in root.rglob("*")}
    done = install(host, root, [made], link=link)
    assert not done.written
    assert not done.removed
    assert done.unchanged
    assert snapshot(root) == before
    assert {path: path.lstat().st_mtime_ns for path in root.rglob("*")} == times


@pytest.mark.parametrize("link", [False, True], ids=["copy", "link"])
def test_an_engine_of_another_model_under_the_same_name_is_replaced_with_a_note(
    link: bool, place: tuple[Any, Path], tmp_path: Path
) -> None:
    host, root = place
    first, again, other = (
        make_engine(tmp_path / name, host.name, plan=name.encode(), inputs={"pipeline": digit * 64})
        for name, digit in (("first", "a"), ("again", "a"), ("other", "b"))
    )
    assert not install(host, root, [first], link=link).notes
    assert not install(host, root, [again], link=link).notes
    note = f"sd-tiny replaces the engine of another model: sd-tiny, sha256 {'a' * 12}"
    assert note in install(host, root, [other], link=link).notes


def test_the_installed_plugin_is_complete_and_carries_the_engine_package(place: tuple[Any, Path]) -> None:
    host, root = place
    install(host, root)
    source, target = plugin_folder(host.plugin), root / host.extension
    for path in source.rglob("*.py"):
        assert (target / path.relative_to(source)).read_bytes() == path.read_bytes()
    assert (target / "sdcompress_engines/runners/base.py").is_file()
    assert not list(target.rglob("__pycache__"))
    assert read_status(host, root).engines == ()


def test_a_newer_engine_replaces_the_older_one_and_foreign_files_stay(
    comfyui: tuple[Any, Path], tmp_path: Path
) -> None:
    host, root = comfyui
    install(
        host,
        root,
        [
            make_engine(tmp_path / "old", "comfyui", extra={"pipeline/notes.json": "[]"}),
            make_engine(tmp_path / "other", "comfyui", "other"),
        ],
    )
    folder = root / host.models / "sd-tiny"
    (folder / "my notes.txt").write_text("mine")
    other = snapshot(root / host.models / "other")
    done = install(host, root, [make_engine(tmp_path / "new", "comfyui", plan=b"another plan")])
    assert sorted(done.written) == [f"{host.models}/sd-tiny/{name}" for name in (MANIFEST_NAME, "unet.engine")]
    assert done.removed == (f"{host.models}/sd-tiny/pipeline/notes.json",)
    assert (folder / "unet.engine").read_bytes() == b"another plan"
    assert (folder / "my notes.txt").read_text() == "mine"
    assert snapshot(root / host.models / "other") == other
    assert not read_status(host, root).changed
    uninstall(host, root)
    assert snapshot(root / host.models) == {"sd-tiny": None, "sd-tiny/my notes.txt": b"mine"}


def test_one_engine_is_uninstalled_alone(comfyui: tuple[Any, Path], tmp_path: Path) -> None:
    host, root = comfyui
    install(host, root, [make_engine(tmp_path / "first", "comfyui", "first")])
    before = snapshot(root)
    install(host, root, [make_engine(tmp_path / "second", "comfyui", "second")])
    with pytest.raises(UsageError, match=r"no engine 'third'.*expected first, second"):
        uninstall(host, root, ["third"])
    uninstall(host, root, ["second"])
    after = snapshot(root)
    recorded = f"{host.extension}/{RECORD}"
    assert {path: content for path, content in after.items() if path != recorded} == {
        path: content for path, content in before.items() if path != recorded
    }
    assert [engine.name for engine in read_status(host, root).engines] == ["first"]


@pytest.mark.parametrize("link", [False, True], ids=["to copies", "to links"])
def test_links_replace_copies_and_copies_replace_links(link: bool, comfyui: tuple[Any, Path], engine: Path) -> None:
    host, root = comfyui
    before, source = snapshot(root), snapshot(engine)
    install(host, root, [engine], link=not link)
    done = install(host, root, [engine], link=link)
    assert done.written
    assert (root / host.models / "sd-tiny").is_symlink() == link
    assert (root / host.models / "sd-tiny/unet.engine").read_bytes() == (engine / "unet.engine").read_bytes()
    assert not read_status(host, root).changed
    assert snapshot(engine) == source
    uninstall(host, root)
    assert snapshot(root) == before


def test_a_link_whose_engine_is_gone_is_reported(comfyui: tuple[Any, Path], engine: Path) -> None:
    host, root = comfyui
    install(host, root, [engine], link=True)
    engine.rename(engine.with_name("moved"))
    state = read_status(host, root)
    assert "is not there" in state.changed[f"{host.models}/sd-tiny"]
    uninstall(host, root)


def test_an_installed_engine_is_not_replaced_by_a_link_to_itself(
    comfyui: tuple[Any, Path], engine: Path, tmp_path: Path
) -> None:
    host, root = comfyui
    other = find_host("comfyui", make_tree(tmp_path / "other", "comfyui"))
    install(host, root, [engine])
    installed = root / host.models / "sd-tiny"
    install(*other, [installed], link=True)
    before = snapshot(root)
    for given in (installed, other[1] / host.models / "sd-tiny"):
        with pytest.raises(UsageError, match="lies where the link to it would be"):
            install(host, root, [given], link=True)
        assert snapshot(root) == before


def test_links_may_be_given_in_place_of_the_engine_that_they_lead_to(
    comfyui: tuple[Any, Path], engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, root = comfyui
    installed, working = root / host.models / "sd-tiny", engine.parent / "working"
    working.mkdir()
    monkeypatch.chdir(working)
    install(host, root, ["../engine"], link=True)
    monkeypatch.chdir(root)
    working.rmdir()
    assert not read_status(host, root).changed
    assert not install(host, root, [installed], link=True).written
    install(host, root, [installed])
    assert not installed.is_symlink()
    assert (installed / "unet.engine").read_bytes() == (engine / "unet.engine").read_bytes()


def test_a_link_to_an_engine_in_the_hubs_cache_is_whole(
    comfyui: tuple[Any, Path], engine: Path, tmp_path: Path
) -> None:
    host, root = comfyui
    repository = tmp_path / "models--me--engine"
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate([path for path in engine.rglob("*") if path.is_file()]):
        path.rename(repository / "blobs" / str(number))
        path.symlink_to(repository / "blobs" / str(number))
    shutil.copytree(engine, repository / "snapshots/0123abcd", symlinks=True)
    install(host, root, [repository / "snapshots/0123abcd"], link=True)
    assert [found.fault for found in read_status(host, root).engines] == [None]


def test_a_symlinked_models_folder_is_written_through(comfyui: tuple[Any, Path], engine: Path, tmp_path: Path) -> None:
    host, root = comfyui
    elsewhere = tmp_path / "big disk"
    (root / "models").rename(elsewhere)
    (root / "models").symlink_to(elsewhere)
    before, held = snapshot(root), snapshot(elsewhere)
    install(host, root, [engine])
    assert (elsewhere / "sdcompress/sd-tiny/unet.engine").is_file()
    assert (root / "models").is_symlink()
    uninstall(host, root)
    assert (snapshot(root), snapshot(elsewhere)) == (before, held)


def test_an_engine_for_another_machine_is_installed_and_status_says_why_it_does_not_load(
    comfyui: tuple[Any, Path], tmp_path: Path
) -> None:
    host, root = comfyui
    install(host, root, [make_engine(tmp_path / "made", "comfyui", platform="linux-s390x", flavour="tensorrt")])
    (found,) = read_status(host, root).engines
    assert found.fault is None
    assert found.why_not == f"the engine was built for linux-s390x, and this is {platform_name()}"
    assert found.facts["runtime"] == "tensorrt 1.0.0"


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", " ", "a\\b", "what?", "end."])
def test_a_name_that_is_not_valid_for_a_folder_is_refused(name: str, comfyui: tuple[Any, Path], engine: Path) -> None:
    with pytest.raises(UsageError, match="is not a valid name for a folder"):
        install(*comfyui, [engine], name=name)


def test_two_engines_of_one_name_are_refused(comfyui: tuple[Any, Path], engine: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"two engines are called 'sd-tiny'.*--name"):
        install(*comfyui, [engine, make_engine(tmp_path / "again", "comfyui")])


def test_a_name_without_an_engine_is_refused(comfyui: tuple[Any, Path]) -> None:
    with pytest.raises(UsageError, match="--name with 0 engines"):
        install(*comfyui, name="x")


def test_an_engine_is_named_after_its_model_or_its_folder(comfyui: tuple[Any, Path], tmp_path: Path) -> None:
    host, root = comfyui
    install(host, root, [make_engine(tmp_path / "portraits/engine", "comfyui", name="").parent])
    install(host, root, [make_engine(tmp_path / "plain", "comfyui", name="")])
    assert [engine.name for engine in read_status(host, root).engines] == ["plain", "portraits"]


def test_an_engine_that_the_user_copied_there_is_listed_as_not_installed(
    comfyui: tuple[Any, Path], tmp_path: Path
) -> None:
    host, root = comfyui
    make_engine(root / host.models / "by hand", "comfyui")
    (root / host.models / "notes").mkdir()
    state = read_status(host, root)
    assert [(engine.name, engine.is_recorded, engine.fault) for engine in state.engines] == [
        ("by hand", False, None),
        ("notes", False, f"has no {MANIFEST_NAME}"),
    ]
    assert state.record is None


def test_a_host_without_an_install_has_no_record(comfyui: tuple[Any, Path]) -> None:
    assert read_host_record(*comfyui) == (None, None)
