"""A training folder keeps what is in it: an older run that cannot be replaced, another run, and what is no run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from sdcompress_engines import leftovers
from sdcompress_engines.errors import ArtifactError, ModelError, TrainingError
from sdcompress_engines.leftovers import OLD, temporary_path

from sdcompress.train import run_folder as module
from sdcompress.train.checkpoint import Checkpoints, list_checkpoints
from sdcompress.train.config import DistillConfig, FinetuneConfig
from sdcompress.train.run_folder import LOCK, run_folder, write_recipe

SHORT = DistillConfig(steps=6, batch_size=2)


def write_run(folder: Path) -> dict[str, str]:
    """A finished run without a checkpoint. Returns what `read` returns for it."""
    (folder / "samples").mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(SHORT.model_dump(mode="json")))
    (folder / "plan.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"step": 6}\n')
    (folder / "samples/step-000006.webp").write_text("picture")
    return read(folder)


def read(folder: Path) -> dict[str, str]:
    """Path → text of every file but the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


@pytest.mark.parametrize("name", ["recipe.json", "plan.json", "samples"])
def test_an_older_run_of_which_a_part_cannot_be_moved_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before, replace_file = write_run(tmp_path / "run"), module.replace_file

    def replace(source: Path, target: Path) -> None:
        if source == tmp_path / "run" / name:
            raise PermissionError(13, "in use", str(source))
        replace_file(source, target)

    monkeypatch.setattr(module, "replace_file", replace)
    with pytest.raises(Exception, match="no permission"), run_folder(tmp_path / "run", resume=False, force=True):
        pass
    assert read(tmp_path / "run") == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_older_run_is_put_back_where_the_new_one_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rmtree = write_run(tmp_path / "run"), shutil.rmtree

    def remove(path: Any, *args: Any, **options: Any) -> None:
        if Path(path).name == "wandb":
            raise PermissionError(13, "in use", str(path))
        rmtree(path, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", remove)
    with pytest.raises(ModelError), run_folder(tmp_path / "run", resume=False, force=True):  # noqa: PT012
        (tmp_path / "run/wandb").mkdir()
        raise ModelError("is no teacher")
    assert read(tmp_path / "run") == before


def test_resume_writes_nothing_into_a_folder_that_holds_no_training(tmp_path: Path) -> None:
    (tmp_path / "mine/checkpoints/step-1000").mkdir(parents=True)
    (tmp_path / "mine/metrics.jsonl").write_text('{"loss": 1}\n')
    with (
        pytest.raises(ArtifactError, match=r"holds no training to continue, but checkpoints, metrics\.jsonl"),
        run_folder(tmp_path / "mine", resume=True, force=False),
    ):
        pass
    assert sorted(os.listdir(tmp_path / "mine")) == ["checkpoints", "metrics.jsonl"]


def test_a_resume_that_could_not_begin_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError), run_folder(tmp_path / "new/run", resume=True, force=False):
        raise ModelError("is no teacher")
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_checkpoint_is_not_resumed_with_another_recipe_or_plan(tmp_path: Path) -> None:
    before = write_run(tmp_path / "run")
    others = (
        (SHORT.model_copy(update={"learning_rate": 0.5}), "{}", "learning_rate: 5e-05 in the folder, 0.5 in this run"),
        (SHORT, '{"name": "bk-base"}', "name: None in the folder, 'bk-base' in this run"),
        (FinetuneConfig(steps=6, batch_size=2), None, "attention_kd_weight"),
    )
    for config, plan, message in others:
        with (
            pytest.raises(TrainingError, match=message),
            run_folder(tmp_path / "run", resume=True, force=False),
        ):
            write_recipe(config, tmp_path / "run", plan)
        assert read(tmp_path / "run") == before
    with run_folder(tmp_path / "run", resume=True, force=False):
        write_recipe(SHORT, tmp_path / "run", "{}")


def test_the_end_of_a_resumed_run_removes_the_older_run_that_a_killed_one_moved_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, older = write_run(tmp_path / "run"), temporary_path(tmp_path / "run", OLD)
    write_run(older / "run")
    monkeypatch.setattr(leftovers, "_is_running", lambda *_: False)  # this process stands for the killed one
    with pytest.raises(ModelError), run_folder(tmp_path / "run", resume=True, force=False):
        raise ModelError("is no teacher")
    assert older.is_dir()
    with run_folder(tmp_path / "run", resume=True, force=False):
        pass
    assert not older.exists()
    assert read(tmp_path / "run") == before


def test_a_damaged_later_checkpoint_does_not_take_the_place_of_a_new_one(tmp_path: Path) -> None:
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    checkpoints = Checkpoints(tmp_path, Accelerator(cpu=True), {"seed": 1}, 1)
    (tmp_path / "step-00000008").mkdir()
    for step in (4, 6):
        checkpoints.save(step, network, optimizer, None)
        assert (checkpoints.find_newest() or (0,))[0] == step
    shutil.copytree(tmp_path / "step-00000006", tmp_path / "step-00000006-mine")
    checkpoints.save(8, network, optimizer, None)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000008"]
    assert (tmp_path / "step-00000006-mine/state.pt").is_file()
