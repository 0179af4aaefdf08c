"""An edited checkpoint or metrics file of a training is named, and never loaded in part."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from sdcompress_engines.errors import TrainingError
from sdcompress_engines.files import append_line
from sdcompress_engines.manifest import write_manifest

from sdcompress.train.checkpoint import STATE, Checkpoints
from sdcompress.train.metrics import keep_lines_up_to

EDITS: dict[str, Any] = {
    "a part missing": lambda state: {key: value for key, value in state.items() if key != "optimizer"},
    "no mapping": lambda state: [state],
    "a weight missing": lambda state: state | {"trained": {"bias": state["trained"]["bias"]}},
    "another shape": lambda state: state | {"trained": state["trained"] | {"weight": torch.zeros(1)}},
    "not finite": lambda state: state | {"trained": state["trained"] | {"bias": torch.full((2,), float("nan"))}},
    "an unknown average": lambda state: state | {"average": {"nothing": torch.zeros(2)}},
    "a state of another shape": lambda state: (
        state | {"optimizer": state["optimizer"] | {"state": {0: {"exp_avg": torch.zeros(7)}}}}
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_checkpoint_is_refused_and_changes_nothing(tmp_path: Path, edit: str) -> None:
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoints = Checkpoints(tmp_path, Accelerator(cpu=True), {"seed": 1}, 2)
    checkpoints.save(5, network, optimizer, None)
    found = checkpoints.find_newest()
    assert found is not None
    assert found[0] == 5
    checkpoints.load(found[1], network, optimizer)
    state = torch.load(found[1] / STATE, weights_only=True)
    torch.save(EDITS[edit](state), found[1] / STATE)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    with pytest.raises(TrainingError, match="not a checkpoint of this run") as refusal:
        checkpoints.load(found[1], network, optimizer)
    assert len(str(refusal.value)) < 600
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
    write_manifest(found[1], "checkpoint", config={"step": "five", "identity": {"seed": 1}})
    with pytest.raises(TrainingError, match="has a manifest with the step 'five'"):
        checkpoints.find_newest()


def test_lines_of_metrics_that_were_edited_are_left_out(tmp_path: Path) -> None:
    lines = ['{"step": 1}', "[]}", "5", '{"step": "x"}', "[" * 100_000, '{"step": 9}', '{"step": 2}', '{"step": 3']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    keep_lines_up_to(tmp_path / "metrics.jsonl", 5)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe"])
def test_losses_are_written_into_the_folder_whatever_lies_there(tmp_path: Path, kind: str) -> None:
    outside, metrics = tmp_path / "outside", tmp_path / "metrics.jsonl"
    if kind == "link":
        outside.write_text("mine\n")
    if kind == "pipe":
        os.mkfifo(metrics)
    else:
        metrics.symlink_to(outside)
    keep_lines_up_to(metrics, 5)
    append_line(metrics, "{}")
    assert metrics.read_text() == "{}\n"
    assert not metrics.is_symlink()
    assert not outside.exists() or outside.read_text() == "mine\n"
