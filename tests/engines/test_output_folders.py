"""Outputs take their place without a loss: no input, no foreign file, no link and no special folder is replaced."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sdcompress_engines.errors import ArtifactError, StorageError
from sdcompress_engines.manifest import MANIFEST_NAME
from sdcompress_engines.output_folders import (
    begun_folder,
    check_file,
    check_free,
    staged,
    staged_file,
    unless_present,
)
from sdcompress_engines.output_marks import list_foreign

from .artifact_folders import make_artifact, snapshot

TRAINING = json.dumps({"steps": 1, "batch_size": 1, "learning_rate": 1e-4})


def refuse(target: Path, *, force: bool = True, inputs: list[Path] = []) -> ArtifactError:  # noqa: B006
    """Returns the refusal of `staged`, after a check that nothing above `target` has changed."""
    place = target.parent
    before = snapshot(place)
    with pytest.raises(ArtifactError) as refusal, staged(target, force, inputs):
        pass
    assert snapshot(place) == before
    return refusal.value


@pytest.mark.parametrize("leads_to", ["folder", "file", "nothing", "itself"])
@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_is_a_link_is_refused(tmp_path: Path, leads_to: str, force: bool) -> None:
    make_artifact(tmp_path / "folder")
    (tmp_path / "file").write_text("x")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    if leads_to != "itself":
        (tmp_path / "link").symlink_to(tmp_path / leads_to)
    link = tmp_path / ("itself" if leads_to == "itself" else "link")
    assert "is a link" in str(refuse(link, force=force))
    with pytest.raises(ArtifactError, match="is a link"):
        check_file(link)


@pytest.mark.parametrize("where", ["same", "above", "inside", "by a link", "linked from inside", "by another case"])
@pytest.mark.parametrize("force", [False, True])
def test_an_output_is_apart_from_every_input(tmp_path: Path, where: str, force: bool) -> None:
    data = make_artifact(tmp_path / "base/data")
    (tmp_path / "alias").symlink_to(tmp_path / "base")
    links = tmp_path / "links"
    links.mkdir()
    (links / "unet").symlink_to(data / "part")
    if where == "by another case" and not (tmp_path / "BASE").exists():
        os.symlink(tmp_path / "base", tmp_path / "BASE")  # what a file system that ignores case does by itself
    target, given = {
        "same": (data, data),
        "above": (data, data / "part/file"),
        "inside": (data / "part/new", data),
        "by a link": (tmp_path / "alias/data", data),
        "linked from inside": (data, links),
        "by another case": (tmp_path / "BASE/data", data / "part"),
    }[where]
    assert "which this command reads" in str(refuse(target, force=force, inputs=[given])).replace(
        "is what this command reads", "which this command reads"
    )


def test_the_proposed_place_is_free_also_for_who_is_in_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_artifact(tmp_path / "data")
    monkeypatch.chdir(data)
    with pytest.raises(ArtifactError) as refusal:
        check_free(Path("out"), inputs=[Path()])
    assert refusal.value.hint is not None
    assert refusal.value.hint.endswith(f"-o {tmp_path / 'data-output'}")


def test_the_error_of_a_folder_in_the_cache_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="SDCOMPRESS_CACHE"), unless_present(tmp_path / "file/model"):
        check_free(tmp_path / "file/model")
    with pytest.raises(ArtifactError, match=r"is a file; .*set SDCOMPRESS_CACHE"), unless_present(tmp_path / "file"):
        check_free(tmp_path / "file")


def test_an_output_beside_an_input_is_free(tmp_path: Path) -> None:
    model = make_artifact(tmp_path / "run/pipeline", "student")
    with staged(tmp_path / "run/onnx", inputs=[model, tmp_path / "run2", Path("nano")]) as folder:
        (folder / "new").touch()
    assert (tmp_path / "run/onnx/new").is_file()


def test_force_refuses_what_sdcompress_did_not_write(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(5):
        (pictures / f"{number}.png").write_text("x")
    message = str(refuse(pictures))
    assert "5 files" in message
    assert "0.png, 1.png, 2.png, ..." in message


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "part/notes.txt", "new/notes.txt", "part/.git", ".env", ".env.old", ".notes.partial.txt", ".x.work"],
)
def test_force_refuses_an_output_with_a_foreign_file(tmp_path: Path, name: str) -> None:
    folder = make_artifact(tmp_path / "out")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    assert name in str(refuse(folder))


@pytest.mark.parametrize("manifest", ["", "{}", "[" * 10_000, '{"kind": "results"}'])
def test_force_refuses_a_manifest_that_cannot_be_read(tmp_path: Path, manifest: str) -> None:
    folder = make_artifact(tmp_path / "out")
    (folder / MANIFEST_NAME).write_text(manifest)
    refuse(folder)


def test_force_refuses_a_manifest_of_an_unknown_kind(tmp_path: Path) -> None:
    refuse(make_artifact(tmp_path / "out", "holiday"))


def test_force_refuses_a_folder_of_several_outputs(tmp_path: Path) -> None:
    make_artifact(tmp_path / "all/one")
    make_artifact(tmp_path / "all/two")
    refuse(tmp_path / "all")


@pytest.mark.parametrize("special", ["here", "above", "home", "repository"])
def test_special_folders_are_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, special: str) -> None:
    folder = make_artifact(tmp_path / "out")
    if special == "repository":
        (folder / ".git").mkdir()
    elif special == "home":
        monkeypatch.setenv("HOME", str(folder))
        monkeypatch.setenv("USERPROFILE", str(folder))
    else:
        monkeypatch.chdir(folder if special == "here" else folder / "part")
    for target in (folder, Path(os.path.relpath(folder))):
        with pytest.raises(ArtifactError, match=r"is (or holds )?(the folder you are in|your home|a git)"):
            check_free(target, force=True)


def test_an_empty_folder_that_stays_is_refused_before_the_work_unless_it_is_written_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="is or holds the folder you are in"):
        check_free(Path())
    check_free(Path(), in_place=True)
    with pytest.raises(ArtifactError, match="stop"), begun_folder(tmp_path, "mark"):  # noqa: PT012
        (tmp_path / "mark").touch()
        raise ArtifactError("stop")
    assert list(tmp_path.iterdir()) == []


def test_the_root_is_never_replaced() -> None:
    for force in (False, True):
        with pytest.raises(ArtifactError):
            check_free(Path("/"), force)


def write_training(folder: Path) -> None:
    """What a training leaves, with what later stages put into its folder."""
    for name in (".lock", "plan.json", "metrics.jsonl", "samples/step-000010.webp", "sdcompress/events.out.tfevents.1"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "recipe.json").write_text(TRAINING)
    make_artifact(folder / "checkpoints/step-00000010", "checkpoint")
    make_artifact(folder / "pipeline", "student")
    make_artifact(folder / "onnx", "onnx")
    (folder / "checkpoints/.step-00000020.partial").mkdir()


def write_run(folder: Path) -> None:
    """What `sdcompress run` leaves when it is killed in its last stage."""
    write_training(folder / "bk-tiny")
    (folder / "run.json").write_text(json.dumps({"teacher": "nano", "data": "nano", "plans": [], "recipe": None}))
    make_artifact(folder / "cache", "cache")
    make_artifact(folder / "nano/onnx", "onnx")
    for name in (".cache.lock", ".report.lock"):
        (folder / name).touch()
    (folder / ".report.work").mkdir()
    (folder / ".report.work/journal.jsonl").touch()
    (folder / "Thumbs.db").touch()


def write_data_set(folder: Path) -> None:
    """What `data generate` leaves when it is stopped."""
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({"prompts": "0", "picture_format": "webp"}))
    for name in ("000000.webp", "latents-000000.safetensors"):
        (folder / name).touch()


def write_engines(folder: Path) -> None:
    """What `export --trt` leaves."""
    make_artifact(folder / "onnx", "onnx")
    make_artifact(folder / "engine", "engine")


def write_cache(folder: Path) -> None:
    """What `data cache` leaves when it is killed after its last rename."""
    make_artifact(folder, "cache")
    (folder / "build.json").write_text(json.dumps({"teacher": "0", "files": "0", "units": 1}))
    (folder / "unit-00000.safetensors.json").touch()


@pytest.mark.parametrize(
    "write", [write_training, write_run, write_data_set, write_cache, write_engines, make_artifact]
)
def test_force_replaces_what_each_stage_leaves_and_nothing_with_a_note_in_it(
    tmp_path: Path, write: Callable[[Path], object]
) -> None:
    for number, place in enumerate(("", "pipeline", "onnx", "samples", "checkpoints")):
        folder = tmp_path / f"out{number}"
        write(folder)
        if (folder / place).is_dir():
            (folder / place / "notes.txt").write_text("mine")
            assert "notes.txt" in str(refuse(folder))
            (folder / place / "notes.txt").unlink()
        with staged(folder, force=True) as new:
            (new / "after").touch()
        assert [path.name for path in folder.iterdir()] == ["after"]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from(["a", "b", "part"]), min_size=1, max_size=3), st.sampled_from(["x", "file", "sdcompress"])
)
def test_every_file_is_of_the_manifest_or_foreign(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], name: str
) -> None:
    folder = make_artifact(tmp_path_factory.mktemp("case") / "out")
    path = folder.joinpath(*parts, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = path.exists()
    path.touch()
    assert list_foreign(folder) == ([] if known else [path.relative_to(folder).as_posix()])


def test_what_came_to_the_output_in_the_meantime_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(ArtifactError, match=r"precious"), staged(target, force=True):  # noqa: PT012
        target.mkdir()
        (target / "precious").write_text("x")
    assert snapshot(tmp_path) == {"out": None, "out/precious": b"x"}


def test_a_failed_command_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), staged(tmp_path / "a/b/c") as folder:  # noqa: PT012
        (folder / "file").touch()
        raise ValueError("stop")
    with pytest.raises(ValueError, match="stop"), staged_file(tmp_path / "a/b/c"):
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
def test_an_output_file_is_a_regular_file(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "folder":
        target.mkdir()
    elif kind == "fifo":
        os.mkfifo(target)
    else:
        target = Path("/dev/null")
    with pytest.raises(ArtifactError, match=r"is a (folder|device or a pipe)"):
        check_file(target)


def test_an_output_file_is_no_input_and_replaced_only_if_allowed(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    file.write_text("x")
    os.link(file, tmp_path / "other name")
    for target in (file, tmp_path / "other name"):
        with pytest.raises(ArtifactError, match="is what this command reads"):
            check_file(target, [file])
    with pytest.raises(ArtifactError, match=r"exists.*--force"):
        check_file(file, replace=False)
    check_file(file)


def test_a_place_without_permission_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="not a folder"):
        check_free(tmp_path / "file/out")


def test_thousands_of_inputs_in_one_folder_are_checked_at_once(tmp_path: Path) -> None:
    shards = [tmp_path / "data" / f"{number:05}.tar" for number in range(5000)]
    shards[0].parent.mkdir()
    for shard in shards:
        shard.touch()
    started = time.monotonic()
    check_free(tmp_path / "out", False, shards)
    assert time.monotonic() - started < 2
    for target in (shards[-1].parent, shards[-1]):
        with pytest.raises(ArtifactError):
            check_free(target, True, shards)
