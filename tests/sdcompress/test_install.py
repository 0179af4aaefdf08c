"""Plugins and engines in a host's folder: put there once, told of truly, taken away without a trace, and nobody else's
file touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import py_compile
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
from sdcompress_engines.errors import ArtifactError, EngineMismatch, SdCompressError, StorageError, UsageError
from sdcompress_engines.flavour import platform_name
from sdcompress_engines.manifest import MANIFEST_NAME, canonical, write_manifest
from sdcompress_engines.store import EngineKey

from sdcompress.checkpoints.read import load_single_file
from sdcompress.checkpoints.write import export_ldm
from sdcompress.hosts import record as records
from sdcompress.hosts.engine_folder import WEIGHTS
from sdcompress.hosts.find import find_host, host_packages, hosts
from sdcompress.hosts.host import RECORD
from sdcompress.hosts.install import install, plugin_folder, uninstall
from sdcompress.hosts.status import status
from sdcompress.hosts.transaction import read
from sdcompress.models.locate import sha256_of

HOSTS = ("webui", "forge", "comfyui")
TREES = {
    "webui": (
        "webui.py",
        "modules/sd_unet.py",
        "extensions/another/scripts/a.py",
        "models/Stable-diffusion/rv4.safetensors",
        "models/Unet-trt/model.json",
    ),
    "forge": (
        "webui.py",
        "modules/sd_unet.py",
        "modules_forge/initialization.py",
        "extensions/another/a.py",
        "models/Stable-diffusion/rv4.safetensors",
    ),
    "comfyui": (
        "main.py",
        "nodes.py",
        "comfy/sd.py",
        "custom_nodes/another/__init__.py",
        "models/checkpoints/rv4.safetensors",
    ),
}


def make_tree(root: Path, host: str) -> Path:
    """A host's folder, as far as it is told by its files."""
    for name in TREES[host]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{name} of the host\n")
    return root


def make_engine(
    folder: Path,
    host: str = "webui",
    name: str = "sd-tiny",
    plan: bytes = b"a plan" * 1000,
    *,
    inputs: dict[str, str] | None = None,
    extra: dict[str, str] | None = None,
    **changes: Any,
) -> Path:
    """An engine's folder as `export --trt --signature` writes it; its plan is no engine, which nobody looks at here."""
    (folder / "pipeline/unet").mkdir(parents=True)
    (folder / "unet.engine").write_bytes(plan)
    (folder / "pipeline/unet/config.json").write_text("{}")
    for path, text in (extra or {}).items():
        (folder / path).write_text(text)
    values: dict[str, Any] = {
        "flavour": "tensorrt-rtx",
        "version": "1.0.0",
        "compute_capabilities": ((8, 9),),
        "platform": platform_name(),
    } | changes
    key = EngineKey(
        "0" * 64,
        "unet",
        "fp16",
        "webui" if host == "forge" else host,
        profiles=({"sample": ((1, 4, 8, 8),) * 3},),
        **values,
    )
    write_manifest(folder, "engine", config=key.config() | {"model_name": name}, inputs=inputs)
    return folder


def snapshot(root: Path) -> dict[str, bytes | str | None]:
    """Everything in a folder: files by content, links by target, folders."""
    return {
        str(path.relative_to(root)): (
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        )
        for path in sorted(root.rglob("*"))
    }


@pytest.fixture(params=HOSTS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A host and its folder, whose name has spaces and letters of other alphabets."""
    return find_host(request.param, make_tree(tmp_path / "größe 模型 (2)", request.param))


@pytest.fixture
def comfyui(tmp_path: Path) -> tuple[Any, Path]:
    return find_host("comfyui", make_tree(tmp_path / "ComfyUI", "comfyui"))


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return make_engine(tmp_path / "made/engine", "comfyui")


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
    state = status(host, root)
    assert state.record
    assert not state.broken
    assert not state.changed
    assert [engine.name for engine in state.engines] == ["Straße bei Nacht", "sd-tiny"]
    assert all(engine.ours and engine.fault is None and engine.why_not for engine in state.engines), (
        "this machine has no such card"
    )
    assert snapshot(root) == during, "status writes nothing"
    for source in (root / host.extension).rglob("*.py"):  # as a host does that runs
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


def test_the_plugin_is_whole_and_has_the_engines_library_inside(place: tuple[Any, Path]) -> None:
    host, root = place
    install(host, root)
    source, target = plugin_folder(host.plugin), root / host.extension
    for path in source.rglob("*.py"):
        assert (target / path.relative_to(source)).read_bytes() == path.read_bytes()
    assert (target / "sdcompress_engines/runners/base.py").is_file()
    assert not list(target.rglob("__pycache__"))
    assert status(host, root).engines == ()


def test_a_newer_engine_takes_the_place_of_the_older_and_others_files_stay(
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
    assert not status(host, root).changed
    uninstall(host, root)
    assert snapshot(root / host.models) == {"sd-tiny": None, "sd-tiny/my notes.txt": b"mine"}


def test_one_engine_is_taken_away_alone(comfyui: tuple[Any, Path], tmp_path: Path) -> None:
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
    assert [engine.name for engine in status(host, root).engines] == ["first"]


def test_a_file_that_was_changed_is_kept_and_said(comfyui: tuple[Any, Path], engine: Path) -> None:
    host, root = comfyui
    before = snapshot(root)
    install(host, root, [engine])
    changed, missing = f"{host.extension}/node.py", f"{host.models}/sd-tiny/pipeline/unet/config.json"
    (root / changed).write_text("my own version\n")
    (root / missing).unlink()
    assert status(host, root).changed == {changed: "was changed since", missing: "is missing"}
    assert status(host, root).engines[0].fault == "pipeline/unet/config.json is missing"
    with pytest.raises(ArtifactError, match=r"node\.py: was changed since it was installed"):
        install(host, root, [engine])
    done = uninstall(host, root)
    assert done.kept == {changed: "was changed since it was installed"}
    assert snapshot(root) == before | {host.extension: None, changed: b"my own version\n"}


@pytest.mark.parametrize(
    "what", ["plugin file", "engine file", "engine folder is a file", "foreign link", "link at a file"]
)
def test_what_is_in_the_way_and_not_ours_is_refused_and_nothing_is_written(
    what: str, comfyui: tuple[Any, Path], engine: Path, tmp_path: Path
) -> None:
    host, root = comfyui
    folder = root / host.models / "sd-tiny"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    where = {
        "plugin file": root / host.extension / "node.py",
        "engine folder is a file": folder,
        "foreign link": folder,
    }.get(what, folder / "unet.engine")
    where.parent.mkdir(parents=True, exist_ok=True)
    if what == "foreign link":
        where.symlink_to(foreign)
    elif what == "link at a file":
        where.symlink_to(foreign / "nothing")
    else:
        where.write_text("somebody's")
    before = snapshot(root)
    with pytest.raises((ArtifactError, StorageError), match=r"not ours|is a file"):
        install(host, root, [engine])
    assert snapshot(root) == before
    assert not list(foreign.iterdir())


def test_what_was_there_already_and_is_the_same_stays_after_an_uninstall(
    comfyui: tuple[Any, Path], engine: Path
) -> None:
    host, root = comfyui
    folder = root / host.models / "sd-tiny"
    folder.mkdir(parents=True)
    (folder / "unet.engine").write_bytes((engine / "unet.engine").read_bytes())
    before = snapshot(root)
    done = install(host, root, [engine])
    assert "1 files were there already" in done.notes[0]
    uninstall(host, root)
    assert snapshot(root) == before


BROKEN = {
    "cut": lambda text: text[: len(text) // 2],
    "edited": lambda text: text.replace('"version"', '"Version"'),
    "seal": lambda text: text.replace("sd-tiny", "sd-huge"),
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "another schema": lambda text: text.replace('"schema": 1', '"schema": 7'),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_record_is_kept_aside_and_never_believed(
    how: str, comfyui: tuple[Any, Path], engine: Path, tmp_path: Path
) -> None:
    host, root = comfyui
    before = snapshot(root)
    install(host, root, [engine])
    path = root / host.record
    path.write_text(BROKEN[how](path.read_text()))
    broken = path.read_bytes()
    assert status(host, root).broken
    with pytest.raises(ArtifactError, match=r"record of what was installed is broken.*sdcompress install comfyui"):
        uninstall(host, root)
    assert path.read_bytes() == broken
    done = install(host, root, [engine])
    assert not any(name for name in done.written if name != host.record)
    assert f"{RECORD}.broken-1" in done.notes[0]
    assert path.with_name(f"{RECORD}.broken-1").read_bytes() == broken
    path.write_bytes(b"again")
    install(host, root, [engine])
    assert path.with_name(f"{RECORD}.broken-1").read_bytes() == broken
    assert path.with_name(f"{RECORD}.broken-2").read_bytes() == b"again"
    path.with_name(f"{RECORD}.broken-1").unlink()
    uninstall(host, root)
    assert snapshot(root) == before


@pytest.mark.parametrize(
    "name",
    ["models/checkpoints/rv4.safetensors", "custom_nodes/comfyui-sdcompress/../another/__init__.py", "/etc/hostname"],
)
def test_a_record_that_names_others_files_is_not_believed(name: str, comfyui: tuple[Any, Path]) -> None:
    host, root = comfyui
    install(host, root)
    raw = json.loads((root / host.record).read_text())
    del raw["seal"]
    content = (root / name).read_bytes()
    raw["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (root / host.record).write_text(json.dumps(raw | {"seal": hashlib.sha256(canonical(raw)).hexdigest()}))
    with pytest.raises(ArtifactError, match=r"names .* none of ours"):
        uninstall(host, root)
    assert (root / name).read_bytes() == content


@pytest.mark.parametrize("link", [False, True], ids=["to copies", "to links"])
def test_links_and_copies_take_each_others_place(link: bool, comfyui: tuple[Any, Path], engine: Path) -> None:
    host, root = comfyui
    before, source = snapshot(root), snapshot(engine)
    install(host, root, [engine], link=not link)
    done = install(host, root, [engine], link=link)
    assert done.written
    assert (root / host.models / "sd-tiny").is_symlink() == link
    assert (root / host.models / "sd-tiny/unet.engine").read_bytes() == (engine / "unet.engine").read_bytes()
    assert not status(host, root).changed
    assert snapshot(engine) == source
    uninstall(host, root)
    assert snapshot(root) == before


def test_a_folder_with_somebodys_file_in_it_does_not_become_a_link(comfyui: tuple[Any, Path], engine: Path) -> None:
    host, root = comfyui
    install(host, root, [engine])
    (root / host.models / "sd-tiny/mine.txt").write_text("mine")
    before = snapshot(root)
    with pytest.raises(ArtifactError, match="not ours"):
        install(host, root, [engine], link=True)
    assert snapshot(root) == before


def test_a_link_whose_engine_has_gone_is_told(comfyui: tuple[Any, Path], engine: Path) -> None:
    host, root = comfyui
    install(host, root, [engine], link=True)
    engine.rename(engine.with_name("moved"))
    state = status(host, root)
    assert "is not there" in state.changed[f"{host.models}/sd-tiny"]
    uninstall(host, root)


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


@pytest.mark.parametrize("what", ["dangling", "file"])
def test_a_models_folder_that_is_none_is_refused(what: str, tmp_path: Path, engine: Path) -> None:
    host, root = find_host("webui", make_tree(tmp_path / "webui", "webui"))
    made = make_engine(tmp_path / "webui engine")
    place = root / "models/sdcompress"
    place.symlink_to(tmp_path / "not mounted") if what == "dangling" else place.write_text("")
    before = snapshot(root)
    with pytest.raises(
        StorageError,
        match="not mounted, which is not there" if what == "dangling" else "is a file, and a folder goes here",
    ):
        install(host, root, [made])
    assert snapshot(root) == before


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to write everywhere, where the tests have it."""
    if os.geteuid():
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are other there")
@pytest.mark.parametrize("what", ["custom_nodes", "models", "uninstall"])
def test_without_permission_nothing_is_written_and_the_way_out_is_said(what: str) -> None:
    with TemporaryDirectory() as name:  # pytest's own is for its user alone
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
                pytest.skip("the checkout is for its user alone")
            with pytest.raises(StorageError, match=r"no permission to write here.*as the user who runs"):
                uninstall(host, root) if what == "uninstall" else install(host, root, [made])
        for path in closed:
            path.chmod(0o755)
        assert snapshot(root) == before


def test_a_copy_that_fails_leaves_the_host_as_it_was(comfyui: tuple[Any, Path], tmp_path: Path) -> None:
    host, root = comfyui
    made = make_engine(
        tmp_path / "made", "comfyui", extra={"pipeline/" + "n" * 240 + ".json": "{}"}
    )  # no room in the name for that of a copy
    before = snapshot(root)
    with pytest.raises(StorageError, match="the file system failed"):
        install(host, root, [made])
    assert snapshot(root) == before
    install(host, root, [make_engine(tmp_path / "first", "comfyui", "first")])
    during = snapshot(root)
    with pytest.raises(StorageError):
        install(host, root, [made])
    after = snapshot(root)
    assert {path for path in during if during[path] != after.get(path)} <= {host.record}
    assert after.keys() == during.keys()
    assert not status(host, root).changed
    uninstall(host, root)
    assert snapshot(root) == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what runs")
def test_a_host_that_runs_meanwhile_is_named_and_goes_on_with_what_it_has(
    place: tuple[Any, Path], tmp_path: Path
) -> None:
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
            (
                f"{host.title} is running (process {process.pid}): it goes on with what it has loaded until it is"
                " restarted"
            ),
        )
        assert engine.read_bytes()[:12] == b"another plan"
        assert not install(host, root, [newer]).notes, "nothing was changed"
        assert "is running" in uninstall(host, root).notes[0]
        assert process.communicate()[0] == "b'a plan'\n", "its engine stays the one it was"
    program.unlink() if old is None else program.write_bytes(old)
    assert snapshot(root) == before


KILLED = """
import sys
from sdcompress.hosts.find import find_host
from sdcompress.hosts.install import install
install(*find_host("comfyui", sys.argv[1]), [sys.argv[2]])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal there")
def test_an_install_that_is_killed_is_told_finished_or_taken_away(comfyui: tuple[Any, Path], tmp_path: Path) -> None:
    host, root = comfyui
    made = make_engine(tmp_path / "made", "comfyui", plan=bytes(400 * 2**20))
    before = snapshot(root)
    process = subprocess.Popen([sys.executable, "-c", KILLED, root, made])
    for _ in range(6000):
        if any(path.stat().st_size for path in (root / host.models).rglob(f"*unet.engine*{records.PARTIAL}")):
            break
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = status(host, root)
    assert state.leftovers
    assert not any(engine.fault is None for engine in state.engines), "nothing that looks finished"
    uninstall(host, root)
    assert snapshot(root) == before
    install(host, root, [made])
    assert not status(host, root).changed


@pytest.mark.parametrize(
    ("host", "tree", "words"),
    [
        ("webui", "comfyui", r"is ComfyUI, not SD-WebUI\. Try: sdcompress install comfyui"),
        ("comfyui", "webui", r"is SD-WebUI, not ComfyUI\. Try: sdcompress install webui"),
        ("webui", "forge", r"is Forge, not SD-WebUI\. Try: sdcompress install forge"),
        ("forge", "webui", r"is SD-WebUI, not Forge\. Try: sdcompress install webui"),
    ],
)
def test_another_host_is_told_by_its_files(host: str, tree: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        find_host(host, make_tree(tmp_path / "there", tree))


def test_a_path_that_is_no_host_is_refused(tmp_path: Path) -> None:
    make_tree(tmp_path / "portable/ComfyUI", "comfyui")
    with pytest.raises(
        UsageError, match=r"is no ComfyUI: it has no custom_nodes.*Try: sdcompress install comfyui .*portable/ComfyUI"
    ):
        find_host("comfyui", tmp_path / "portable")
    with pytest.raises(UsageError, match="no such folder"):
        find_host("webui", tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"is no SD-WebUI: it has no webui\.py"):
        find_host("webui", tmp_path)
    with pytest.raises(UsageError, match=r"no host 'invokeai'; expected webui or forge or comfyui"):
        find_host("invokeai", tmp_path)


def test_the_desktop_applications_folder_counts_as_comfyui(tmp_path: Path) -> None:
    for folder in ("custom_nodes", "models", "user", "input", "output"):
        (tmp_path / folder).mkdir()
    assert find_host("comfyui", tmp_path)[0].name == "comfyui"


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
        "ComfyUI's node calls those of the WebUI too"
    )


def test_an_engine_for_another_machine_is_installed_and_status_says_why_it_does_not_load(
    comfyui: tuple[Any, Path], tmp_path: Path
) -> None:
    host, root = comfyui
    install(host, root, [make_engine(tmp_path / "made", "comfyui", platform="linux-s390x", flavour="tensorrt")])
    (found,) = status(host, root).engines
    assert found.fault is None
    assert found.why_not == f"the engine was built for linux-s390x, and this is {platform_name()}"
    assert found.facts["runtime"] == "tensorrt 1.0.0"


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", " ", "a\\b", "what?", "end."])
def test_a_name_that_is_no_folders_is_refused(
    name: str, comfyui: tuple[Any, Path], engine: Path, tmp_path: Path
) -> None:
    if name:
        with pytest.raises(UsageError, match="is no name for a folder"):
            install(*comfyui, [engine], name=name)
    with pytest.raises(UsageError, match=r"two engines are called 'sd-tiny'.*--name"):
        install(*comfyui, [engine, make_engine(tmp_path / "again", "comfyui")])
    with pytest.raises(UsageError, match="--name with 0 engines"):
        install(*comfyui, name="x")


def test_an_engine_is_named_after_its_model_or_its_folder(comfyui: tuple[Any, Path], tmp_path: Path) -> None:
    host, root = comfyui
    install(host, root, [make_engine(tmp_path / "portraits/engine", "comfyui", name="").parent])
    install(host, root, [make_engine(tmp_path / "plain", "comfyui", name="")])
    assert [engine.name for engine in status(host, root).engines] == ["plain", "portraits"]


def test_an_engine_that_somebody_put_there_is_told_as_not_ours(comfyui: tuple[Any, Path], tmp_path: Path) -> None:
    host, root = comfyui
    make_engine(root / host.models / "by hand", "comfyui")
    (root / host.models / "notes").mkdir()
    state = status(host, root)
    assert [(engine.name, engine.ours, engine.fault) for engine in state.engines] == [
        ("by hand", False, None),
        ("notes", False, f"has no {MANIFEST_NAME}"),
    ]
    assert state.record is None


def test_the_hosts_own_packages_are_read_without_running_its_python(comfyui: tuple[Any, Path]) -> None:
    _, root = comfyui
    assert host_packages(root) is None
    folder = root / "venv/lib/python3.10/site-packages"
    for name in (
        "torch-2.1.2+cu121",
        "numpy-1.26.2",
        "onnxruntime_gpu-1.23.0",
        "tensorrt_cu12_bindings-10.9.0",
        "tensorrt_cu12-10.9.0.34",
        "tensorrt_rtx_cu13-1.7.1.116",
        "torchvision-0.16.2",
    ):
        (folder / f"{name}.dist-info").mkdir(parents=True)
    assert host_packages(root) == {
        "torch": "2.1.2+cu121",
        "numpy": "1.26.2",
        "onnxruntime-gpu": "1.23.0",
        "tensorrt-cu12": "10.9.0.34",
        "tensorrt-rtx-cu13": "1.7.1.116",
    }


@pytest.fixture
def webui(tmp_path: Path) -> tuple[Any, Path]:
    return find_host("webui", make_tree(tmp_path / "webui", "webui"))


def test_the_model_lies_beside_its_engine_as_one_file_where_asked_for(
    webui: tuple[Any, Path], random_folder: Path, random_pipeline: Any, tmp_path: Path
) -> None:
    host, root = webui
    before = snapshot(root)
    made = make_engine(tmp_path / "made", inputs={"pipeline": sha256_of(random_folder)})
    install(host, root, [made], weights=random_folder)
    stored: Any = load_single_file(root / host.models / "sd-tiny" / WEIGHTS)
    for name, weight in random_pipeline.unet.state_dict().items():
        assert (stored.unet.state_dict()[name] == weight.half().float()).all()
    assert not install(host, root, [made], weights=random_folder).written
    assert install(host, root, [made]).removed == (f"{host.models}/sd-tiny/{WEIGHTS}",), (
        "without it, so that no other model's stay behind"
    )
    uninstall(host, root)
    assert snapshot(root) == before


def test_a_model_that_is_one_file_lies_beside_its_engine_as_it_is(
    webui: tuple[Any, Path], random_pipeline: Any, tmp_path: Path
) -> None:
    host, root = webui
    file = export_ldm(random_pipeline, tmp_path / "model.safetensors")
    install(host, root, [make_engine(tmp_path / "made", inputs={"pipeline": sha256_of(file)})], weights=file)
    assert (root / host.models / "sd-tiny" / WEIGHTS).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "was made from another model"),
        ({"pipeline": "0" * 64}, "was made from another model"),
        ({"pipeline": "", "lora style:0.8": "0" * 64}, "has a LoRA in it that this model has not"),
    ],
)
def test_weights_of_another_model_are_refused(
    inputs: dict[str, str], words: str, webui: tuple[Any, Path], random_folder: Path, tmp_path: Path
) -> None:
    host, root = webui
    before = snapshot(root)
    given = {name: value or sha256_of(random_folder) for name, value in inputs.items()}
    with pytest.raises(EngineMismatch, match=words):
        install(host, root, [make_engine(tmp_path / "made", inputs=given)], weights=random_folder)
    assert snapshot(root) == before


def test_weights_are_for_the_webuis_and_for_copies(
    comfyui: tuple[Any, Path], webui: tuple[Any, Path], engine: Path, random_folder: Path
) -> None:
    with pytest.raises(UsageError, match=r"ComfyUI, which loads such a file itself.*--ldm"):
        install(*comfyui, [engine], weights=random_folder)
    with pytest.raises(UsageError, match="--with-weights with --link"):
        install(*webui, [engine], weights=random_folder, link=True)
    with pytest.raises(UsageError, match="--with-weights without an engine"):
        install(*webui, weights=random_folder)


def test_every_error_of_an_install_is_one_line(comfyui: tuple[Any, Path], tmp_path: Path) -> None:
    with pytest.raises(SdCompressError) as raised:
        install(*comfyui, [tmp_path / "nowhere"])
    assert "\n" not in str(raised.value)
    assert "--signature comfyui" in str(raised.value)


def test_hosts_are_known_by_what_is_typed(comfyui: tuple[Any, Path]) -> None:
    assert tuple(hosts()) == HOSTS
    assert read(*comfyui) == (None, None)


@pytest.fixture(autouse=True)
def plain_permissions() -> Iterator[None]:
    old = os.umask(0o022)
    yield
    os.umask(old)
