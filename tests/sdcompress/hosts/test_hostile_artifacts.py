"""An engine folder or a record that somebody else wrote changes nothing outside our folders in a host."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sdcompress_engines.errors import SdCompressError
from sdcompress_engines.manifest import MANIFEST_NAME, read_manifest, sha256_file

from sdcompress.hosts import transaction
from sdcompress.hosts.find import find_host
from sdcompress.hosts.install import install, uninstall
from sdcompress.hosts.record import Record, write_record
from sdcompress.hosts.status import read_status

from ...hostile_text import NAMES, TEXTS, write_sealed
from .trees import HOSTS, make_engine, make_tree, snapshot


def change_manifest(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / MANIFEST_NAME).read_text()) | changes
    del raw["seal"]
    write_sealed(folder / MANIFEST_NAME, raw)


def outside_of(host: Any, tree: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a snapshot that an install has no business in."""
    ours = (f"{host.extension}/", f"{host.models}/")
    return {path: content for path, content in tree.items() if not f"{path}/".startswith(ours)}


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(HOSTS), NAMES, NAMES)
def test_an_engine_with_any_names_writes_only_into_its_folder(kind: str, file: str, model: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        host, root = find_host(kind, make_tree(Path(place) / "deep/down/host", kind))
        engine = make_engine(Path(place) / "deep/made/engine", kind)
        (root / host.models).mkdir(parents=True)
        (root / host.extension).mkdir(parents=True)
        source, entry = engine / file, {"sha256": "0" * 64, "bytes": 9}
        with suppress(OSError, ValueError):  # not every name is one that this system can create
            if source.resolve().is_relative_to(Path(place)):
                source.parent.mkdir(parents=True, exist_ok=True)
                source.write_bytes(b"import os")
                entry["sha256"] = sha256_file(source)
        raw = json.loads((engine / MANIFEST_NAME).read_text())
        change_manifest(engine, files=raw["files"] | {file: entry}, config=raw["config"] | {"model_name": model})
        before, tree = snapshot(Path(place)), snapshot(root)
        with suppress(SdCompressError):
            install(host, root, [engine])
            assert outside_of(host, snapshot(root)) == outside_of(host, tree)
            assert not [path for path in snapshot(root / host.models) if path.endswith((".py", ".so", ".pyc"))]
            uninstall(host, root)
        assert snapshot(Path(place)) == before


@pytest.mark.parametrize("name", ["pipeline/x.py", "__init__.py", "student.safetensors", "x.so", "unet.pt2", "a.json"])
def test_only_the_files_of_an_engine_are_installed(comfyui: tuple[Any, Path], tmp_path: Path, name: str) -> None:
    host, root = comfyui
    before = snapshot(root)
    with pytest.raises(SdCompressError, match="which no engine consists of"):
        install(host, root, [make_engine(tmp_path / "made", "comfyui", extra={name: "import os"})])
    assert snapshot(root) == before


@pytest.mark.parametrize("name", ["unet.engine", "pipeline", "pipeline/unet/config.json", MANIFEST_NAME])
def test_links_in_an_engine_folder_are_refused(comfyui: tuple[Any, Path], engine: Path, name: str) -> None:
    host, root = comfyui
    before = snapshot(root)
    (engine / name).rename(engine.parent / "elsewhere")
    (engine / name).symlink_to(engine.parent / "elsewhere")
    with pytest.raises(SdCompressError, match="is a link"):
        install(host, root, [engine])
    assert snapshot(root) == before


@settings(deadline=None, max_examples=60)
@given(
    st.lists(NAMES, max_size=4),
    st.lists(NAMES, max_size=4),
    st.sampled_from(["extensions", "models", "models/sdcompress", "extensions/sd-webui-sdcompress", ""]),
)
def test_a_record_with_any_names_removes_nothing_of_others(files: list[str], folders: list[str], start: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        host, root = find_host("webui", make_tree(Path(place) / "deep/webui", "webui"))
        (root / "outputs/empty").mkdir(parents=True)
        (root / host.extension).mkdir(parents=True)
        (root / host.models).mkdir(parents=True)
        theirs = Path(place) / "theirs"
        (theirs / "empty").mkdir(parents=True)
        (theirs / "x.py").write_text("theirs")
        (root / host.models / "link").symlink_to(theirs)
        (root / host.extension / "link").symlink_to(theirs)
        entry = {"sha256": sha256_file(theirs / "x.py"), "bytes": 6}
        fixed = [f"{host.models}/link/x.py", f"{host.extension}/link/x.py"]
        names = [f"{start}/{name}" for name in files]
        record = {
            "schema": 1,
            "version": "1",
            "created": "",
            "files": dict.fromkeys([*names, *fixed], entry),
            "folders": [f"{start}/{name}" for name in folders] + [f"{host.models}/link/empty"],
        }
        write_sealed(root / host.record, record)
        before = snapshot(Path(place))
        with suppress(SdCompressError):
            read_status(host, root)
            uninstall(host, root)
        gone = before.keys() - snapshot(Path(place)).keys()
        assert gone <= {str((root / host.record).relative_to(place))}
        assert (theirs / "empty").is_dir()


@pytest.mark.parametrize("folder", ["outputs", "outputs/empty", "models/Lora", "custom_nodes/another"])
def test_a_record_of_folders_of_others_is_broken(comfyui: tuple[Any, Path], folder: str) -> None:
    host, root = comfyui
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / host.extension).mkdir(parents=True)
    write_record(root / host.record, Record({}, (folder,), "1", ""))
    assert "does not install" in str(read_status(host, root).broken)
    with pytest.raises(SdCompressError, match="broken"):
        uninstall(host, root)
    assert (root / folder).is_dir()


@pytest.mark.parametrize(
    "content",
    [b"[" * 200_000, b"[]", b"7", b"{}", b"\xff\xfe", b'{"schema": 1, "seal": []}', b'{"a": ' * 50 + b"1" + b"}" * 50],
)
def test_a_record_that_is_none_is_reported(comfyui: tuple[Any, Path], content: bytes) -> None:
    host, root = comfyui
    (root / host.extension).mkdir(parents=True)
    (root / host.record).write_bytes(content)
    assert read_status(host, root).broken
    with pytest.raises(SdCompressError, match="broken"):
        uninstall(host, root)


@pytest.mark.parametrize(
    "change",
    [{"files": []}, {"files": {"models/sdcompress/a": {"sha256": 7}}}, {"folders": [7]}, {"version": {}},
     {"files": {"models/sdcompress/a": {"link": ["x"]}}}, {"files": {"models/sdcompress/a": {"bytes": "7"}}}],
)  # fmt: skip
def test_a_record_with_other_types_is_broken(comfyui: tuple[Any, Path], change: dict[str, Any]) -> None:
    host, root = comfyui
    (root / host.extension).mkdir(parents=True)
    write_sealed(root / host.record, {"schema": 1, "version": "1", "created": "", "files": {}, "folders": []} | change)
    assert read_status(host, root).broken


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_record_that_is_no_file_is_not_followed(comfyui: tuple[Any, Path], engine: Path, kind: str) -> None:
    host, root = comfyui
    place = root / host.record
    place.parent.mkdir(parents=True)
    if kind == "link":
        place.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    before = snapshot(root)
    assert read_status(host, root).broken
    for change in (lambda: uninstall(host, root), lambda: install(host, root, [engine])):
        with pytest.raises(SdCompressError):
            change()
    assert snapshot(root) == before


@pytest.mark.parametrize("linked", ["custom_nodes", "models", "models/sdcompress"])
def test_a_hosts_own_folders_may_be_links(comfyui: tuple[Any, Path], engine: Path, linked: str) -> None:
    host, root = comfyui
    elsewhere = root.parent / "elsewhere"
    (root / linked).mkdir(exist_ok=True)
    (root / linked).rename(elsewhere)
    (root / linked).symlink_to(elsewhere)
    before = snapshot(root.parent)
    install(host, root, [engine])
    assert not read_status(host, root).changed
    uninstall(host, root)
    assert snapshot(root.parent) == before


def test_what_lies_behind_a_link_of_somebody_is_kept(comfyui: tuple[Any, Path], engine: Path) -> None:
    host, root = comfyui
    install(host, root, [engine])
    moved = root.parent / "moved"
    (root / host.models / "sd-tiny").rename(moved)
    (root / host.models / "sd-tiny").symlink_to(moved)
    before = snapshot(moved)
    assert set(read_status(host, root).changed.values()) == {f"lies behind the link {root / host.models / 'sd-tiny'}"}
    done = uninstall(host, root)
    assert snapshot(moved) == before
    assert all("behind the link" in reason for reason in done.kept.values())
    assert (root / host.models / "sd-tiny").is_symlink()


def test_after_a_failed_change_from_links_to_copies_an_uninstall_leaves_the_linked_engine(
    comfyui: tuple[Any, Path], engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, root = comfyui
    before, made = snapshot(root), snapshot(engine)
    install(host, root, [engine], link=True)
    with monkeypatch.context() as patch:
        patch.setattr(transaction, "copy_beside", fail)
        with pytest.raises(SdCompressError):
            install(host, root, [engine])
    uninstall(host, root)
    assert snapshot(root) == before
    assert snapshot(engine) == made


def fail(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_an_install_that_was_killed_at_any_write_is_removed_whole(
    comfyui: tuple[Any, Path], engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill leaves everything as it is, so the clean-up after an error is switched off here."""
    host, root = comfyui
    before = snapshot(root)
    for step in ("write_record", "copy_beside", "replace_file"):
        for calls in (0, 1, 5):
            with monkeypatch.context() as patch:
                left = iter(range(calls))
                original = getattr(transaction, step)

                def killed(*arguments: Any, left: Any = left, original: Any = original) -> Any:
                    if next(left, None) is None:
                        raise KeyboardInterrupt
                    return original(*arguments)

                patch.setattr(transaction, step, killed)
                patch.setattr(transaction, "_roll_back", lambda *_: None)
                with suppress(KeyboardInterrupt):
                    install(host, root, [engine])
            uninstall(host, root)
            assert snapshot(root) == before, (step, calls)


VALUES = st.recursive(
    st.none() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2),
)


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.sampled_from(["signature", "components", "model_name", "flavour", "options", "profiles", "keys", "version",
                         "compute_capabilities", "platform", "precision", "model"]),
        VALUES,
        max_size=4,
    )
)  # fmt: skip
def test_status_reports_engines_with_any_config(changes: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as place:
        host, root = find_host("webui", make_tree(Path(place) / "webui", "webui"))
        folder = make_engine(root / host.models / "strange", "webui")
        change_manifest(folder, config=json.loads((folder / MANIFEST_NAME).read_text())["config"] | changes)
        assert [engine.name for engine in read_status(host, root).engines] == ["strange"]
        assert read_manifest(folder)
