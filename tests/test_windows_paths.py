"""Paths as Windows has them, in what is typed and in what is written for another machine to read."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from sdcompress_bench.scenario import slug
from sdcompress_bench.suite_file import check_suite
from sdcompress_engines.builder import timing_cache
from sdcompress_engines.command import command_line
from sdcompress_engines.errors import ArtifactError, EngineError, UsageError
from sdcompress_engines.flavour import FLAVOURS
from sdcompress_engines.graph import read_graph
from sdcompress_engines.manifest import FileEntry, by_parts, read_manifest, save_manifest, write_manifest
from sdcompress_engines.paths import is_plain_path

from sdcompress.data.sources import open_source
from sdcompress.export.aot import package_folder
from sdcompress.hosts.definitions import hosts
from sdcompress.hosts.entry import Entry, without_prefix
from sdcompress.hosts.install import install
from sdcompress.hosts.record import Record, read_record, write_record
from sdcompress.lora.fuse import parse_lora
from sdcompress.models.locate import locate_pipeline

OUTSIDE = [
    "..\\..\\x.py",
    "unet\\..\\..\\x.py",
    "C:\\x.py",
    "C:x.py",
    "C:/x.py",
    "\\x.py",
    "\\\\server\\share\\x.py",
    "file:stream",
    "../x.py",
    "/x.py",
    "a//b",
    "./x",
    "a/../b",
    "",
]
INSIDE = ["unet.engine", "pipeline/unet/config.json", "a b/ü-1.2(3).json", "..x/y..z"]
NAME = re.compile(r'[^<>:"/\\|?*\x00-\x1f]+(?<![. ])')
"""A file name that NTFS takes."""


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leaves_its_folder_on_either_system_is_refused(name: str) -> None:
    assert not is_plain_path(name)


@pytest.mark.parametrize("name", INSIDE)
def test_a_plain_name_stays_in_its_folder_on_both_systems(name: str) -> None:
    assert is_plain_path(name)
    for kind, folder in ((PurePosixPath, "/models"), (PureWindowsPath, "D:\\models")):
        assert (kind(folder) / name).relative_to(folder).as_posix() == name


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_that_names_a_file_outside_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "unet.engine").touch()
    manifest = write_manifest(tmp_path, "engine")
    save_manifest(tmp_path, replace(manifest, files={**manifest.files, name: FileEntry("0" * 64, 0)}))
    with pytest.raises(ArtifactError, match=re.escape(f"{name!r} is no path in its folder")):
        read_manifest(tmp_path)


def test_a_manifest_names_files_with_slashes(tmp_path: Path) -> None:
    (tmp_path / "pipeline" / "unet").mkdir(parents=True)
    (tmp_path / "pipeline" / "unet" / "config.json").write_text("{}")
    assert list(write_manifest(tmp_path, "onnx").files) == ["pipeline/unet/config.json"]


def test_files_are_in_one_order_on_both_systems() -> None:
    """A teacher's sha256 is over its files in order; what is made with it on one system must fit it on the other."""
    names = ["unet/config.json", "README.md", "unet-2/x", "model_index.json", "Unet/x", "a/B/c", "a/b"]
    expected = sorted(names, key=lambda name: name.split("/"))
    for kind in (PurePosixPath, PureWindowsPath):
        assert [path.as_posix() for path in sorted(map(kind, names), key=by_parts)] == expected


@pytest.mark.parametrize("location", ["..\\secret", "C:secret", "C:\\secret", "sub\\..\\..\\secret"])
def test_a_graph_whose_weights_lie_outside_its_folder_on_windows_is_refused(location: str, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    weight = helper.make_tensor("w", TensorProto.FLOAT, [64], bytes(256), raw=True)
    port = helper.make_tensor_value_info("x", TensorProto.FLOAT, [64])
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "small",
        [port],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64])],
        [weight],
    )
    onnx.save(
        helper.make_model(graph),
        tmp_path / "small.onnx",
        save_as_external_data=True,
        location="small.data",
        size_threshold=0,
    )
    model = onnx.load(tmp_path / "small.onnx", load_external_data=False)
    next(entry for entry in model.graph.initializer[0].external_data if entry.key == "location").value = location
    (tmp_path / "small.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="a name inside"):
        read_graph(tmp_path / "small.onnx")


@pytest.mark.parametrize("inside", ["..\\..\\..\\x.py", "C:\\x.py", "..\\x"])
def test_an_install_record_that_names_a_file_outside_is_not_believed(inside: str, tmp_path: Path) -> None:
    ours = ("extensions/sd-webui-sdcompress", "models/sdcompress")
    path = tmp_path / "installed.json"
    for record in (Record({f"{ours[0]}/{inside}": Entry("0" * 64, 1)}), Record({}, (f"{ours[0]}/{inside}",))):
        write_record(path, record)
        found, fault = read_record(path, ours)
        assert found is None
        assert str(fault).startswith("it names ")
    write_record(path, Record({f"{ours[0]}/scripts/a.py": Entry("0" * 64, 1)}, (ours[0],)))
    assert read_record(path, ours)[1] is None


@pytest.mark.parametrize(
    ("read", "made"),
    [
        ("\\\\?\\C:\\my engines\\sd15", "C:\\my engines\\sd15"),
        ("\\\\?\\UNC\\nas\\engines", "\\\\nas\\engines"),
        ("C:\\engines", "C:\\engines"),
        ("/srv/engines", "/srv/engines"),
    ],
)
def test_a_link_is_recognized_as_windows_reads_it(read: str, made: str) -> None:
    assert without_prefix(read) == made


@pytest.mark.parametrize(
    ("typed", "file", "weight"),
    [
        ("C:\\loras\\x.safetensors:0.8", "C:\\loras\\x.safetensors", 0.8),
        ("C:\\loras\\x.safetensors", "C:\\loras\\x.safetensors", 1.0),
        ("C:/loras/x.safetensors:1", "C:/loras/x.safetensors", 1.0),
        ("D:\\loras\\style", "D:\\loras\\style", 1.0),
        ("D:/loras/style", "D:/loras/style", 1.0),
        ("\\\\nas\\loras\\x.safetensors:0.5", "\\\\nas\\loras\\x.safetensors", 0.5),
        ("x.safetensors:-0.5", "x.safetensors", -0.5),
    ],
)
def test_a_lora_is_read_with_its_drive(typed: str, file: str, weight: float) -> None:
    assert parse_lora(typed) == (Path(file), weight)


@pytest.mark.parametrize("typed", ["C:\\loras\\x.safetensors:strong", "style:strong"])
def test_a_lora_weight_that_is_no_number_is_refused(typed: str) -> None:
    with pytest.raises(UsageError, match="FILE or FILE:WEIGHT"):
        parse_lora(typed)


@pytest.mark.parametrize(
    ("typed", "name", "path"),
    [
        ("small=C:\\students\\pipeline", "small", "C:\\students\\pipeline"),
        ("small=C:\\a=b\\pipeline", "small", "C:\\a=b\\pipeline"),
        ("C:\\a=b\\pipeline", None, "C:\\a=b\\pipeline"),
        ("C:\\students\\pipeline", None, "C:\\students\\pipeline"),
        ("./a=b/pipeline", None, "./a=b/pipeline"),
        ("small=owner/name", "small", "owner/name"),
    ],
)
def test_a_bench_model_is_read_with_its_drive(typed: str, name: str | None, path: str) -> None:
    (model,) = check_suite({"models": [typed]}, "the options").models
    assert (model.name, model.path) == (name, path)


@pytest.mark.parametrize(
    "typed", ["C:\\models\\sd15", "C:/models", "models\\sd15", "\\\\nas\\models\\sd15.safetensors"]
)
def test_a_windows_path_that_is_not_there_is_never_asked_of_the_hub(
    typed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdcompress.models.locate._download", lambda name: pytest.fail(f"asked the hub for {name}"))
    with pytest.raises(UsageError, match="does not exist"):
        locate_pipeline(typed)


def test_a_table_of_captions_that_was_written_on_windows_is_read(pictures: Path, tmp_path: Path) -> None:
    picture = next(path for path in sorted(pictures.iterdir()) if path.suffix == ".png")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "1.png").write_bytes(picture.read_bytes())
    row = json.dumps({"file_name": "sub\\1.png", "text": "café №1"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(f"\ufeff{row}\r\n".encode())
    (record,) = open_source(tmp_path)
    assert (record.key, record.caption) == ("sub/1.png", "café №1")


def test_captions_beside_pictures_are_read_without_the_mark_of_notepad(pictures: Path, tmp_path: Path) -> None:
    picture = next(path for path in sorted(pictures.iterdir()) if path.suffix == ".png")
    (tmp_path / "1.png").write_bytes(picture.read_bytes())
    (tmp_path / "1.txt").write_bytes("\ufeffcafé №1\r\n".encode())
    (record,) = open_source(tmp_path)
    assert record.caption == "café №1"


def test_names_of_caches_are_names_that_ntfs_takes() -> None:
    paths = [
        timing_cache(flavour, ((8, 9), (12, 0))).name for flavour in FLAVOURS.values() if flavour.missing() is None
    ]
    paths += [package_folder("0" * 64, "cuda:0", "fp16").name, slug("C:\\models\\a: b*?"), slug("owner/name")]
    assert len(paths) >= 4
    assert [name for name in paths if not NAME.fullmatch(name)] == []


@pytest.mark.parametrize(
    "words",
    [
        [
            "C:\\my models\\a.safetensors",
            "plain",
            "it's",
            'say "x"',
            "",
            "C:\\dir x\\",
            "50%&",
            "batch=1:2:8,height=512",
        ],
        ["D:\\a\\b"],
    ],
)
def test_a_command_for_windows_is_read_back_as_its_words(words: list[str]) -> None:
    line = command_line(["sdcompress", *words], windows=True)
    assert split_as_windows_does(line) == ["sdcompress", *words]


def split_as_windows_does(line: str) -> list[str]:
    """The rules of `CommandLineToArgvW`."""
    words, word, quoted, started, at = [], "", False, False, 0
    while at < len(line):
        slashes = len(line[at:]) - len(line[at:].lstrip("\\"))
        at += slashes
        here = line[at : at + 1]
        if here == '"':
            word += "\\" * (slashes // 2)
            if slashes % 2:
                word += '"'
            else:
                quoted = not quoted
            started = True
        elif here in (" ", "") and not quoted:
            word += "\\" * slashes
            if started or word:
                words.append(word)
            word, started = "", False
        else:
            word += "\\" * slashes + here
        at += 1
    return words + [word] * (started or bool(word))


def test_a_command_for_this_system_is_the_shells() -> None:
    assert command_line(["sdcompress", "a b"], windows=False) == "sdcompress 'a b'"


@pytest.mark.skipif(sys.platform == "win32", reason="the account may make links there")
def test_an_install_by_links_says_what_windows_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdcompress_engines.errors import StorageError

    def refuse(source: str, target: Path, target_is_directory: bool = False) -> None:
        error = OSError(22, "A required privilege is not held by the client", str(target))
        error.winerror = 1314  # type: ignore[attr-defined]
        raise error

    for name in ("webui.py", "modules/sd_unet.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.raises(StorageError, match="Developer Mode"):
        install(hosts()["webui"], tmp_path, link=True)
