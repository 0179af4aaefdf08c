"""Training as processes: killed at any moment, shared by two, in shards, stopped by a signal, with one of them lost.

Each run is the command as it is typed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from sdcompress_engines.manifest import read_manifest

from sdcompress.data.build_cache import build_cache
from sdcompress.data.sources import open_source
from sdcompress.models.load import load_pipeline
from sdcompress.train.checkpoint import is_intact, list_checkpoints

STEPS = 24
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sdcompress"]
FSDP = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--num_processes", "2"]
FSDP += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
FSDP += ["-m", "sdcompress"]
ALONE = [sys.executable, "-m", "sdcompress"]


@pytest.fixture(scope="module")
def shared_cache(random_folder: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "cache"
    build_cache(open_source(pictures), load_pipeline(random_folder), folder)
    return folder


@pytest.fixture(scope="module")
def arguments(random_folder: Path, pictures: Path, shared_cache: Path) -> list[str]:
    """`distill` with everything but the output: batches of 4, a checkpoint every 3 steps, fp32."""
    knobs = ["ema_decay=0.9", "keep_checkpoints=3", "log_every=1", "learning_rate=0.001"]
    plain = [
        "distill",
        str(random_folder),
        "--data",
        str(pictures),
        "--cache",
        str(shared_cache),
        "--steps",
        str(STEPS),
        "--batch-size",
        "4",
        "--precision",
        "fp32",
        "--checkpoint-every",
        "3",
    ]
    return plain + [part for knob in knobs for part in ("--set", knob)]


def run(command: list[str], arguments: list[str], output: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *arguments, "-o", str(output), *extra],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        timeout=500,
    )


def weights(output: Path) -> dict[str, torch.Tensor]:
    return dict(UNet2DConditionModel.from_pretrained(output / "pipeline/unet").state_dict())


def metrics(output: Path) -> list[dict[str, Any]]:
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []


@pytest.fixture(scope="module")
def whole(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption."""
    output = tmp_path_factory.mktemp("whole") / "run"
    done = run(ALONE, arguments, output)
    assert done.returncode == 0, done.stderr
    return output


def kill_all(process: subprocess.Popen[Any]) -> None:
    """Kill a launcher and the processes it has started, which have sessions of their own."""
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


def killed_until_it_ends(command: list[str], arguments: list[str], output: Path, kills: int, seed: int) -> list[int]:
    """Start a run, kill it after a random number of further steps and resume it, `kills` times; then let it end.

    Returns the steps at which it was killed.
    """
    draw = random.Random(seed)
    killed = []
    for _ in range(kills):
        reached = len(metrics(output))
        stop_at = min(STEPS - 1, reached + draw.randint(1, 5))
        process = subprocess.Popen(
            [*command, *arguments, "-o", str(output), *(["--resume"] if output.exists() else [])],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
        )
        while process.poll() is None and len(metrics(output)) < stop_at:
            time.sleep(0.01)
        time.sleep(draw.random() * 0.2)
        killed.append(len(metrics(output)))
        kill_all(process)
    done = run(command, arguments, output, "--resume")
    assert done.returncode == 0, done.stderr
    return killed


@pytest.mark.slow
def test_a_run_killed_five_times_ends_with_the_same_bits(arguments: list[str], whole: Path, tmp_path: Path) -> None:
    killed = killed_until_it_ends(ALONE, arguments, tmp_path / "run", 5, seed=1)
    assert len(set(killed)) > 1
    resumed, expected = weights(tmp_path / "run"), weights(whole)
    assert all(torch.equal(resumed[k], expected[k]) for k in expected)
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_two_processes_are_two_and_give_the_losses_of_one(arguments: list[str], whole: Path, tmp_path: Path) -> None:
    done = run(TORCHRUN, arguments, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "two/pipeline")
    assert manifest is not None
    assert manifest.figures["processes"] == 2
    for one, two in zip(metrics(whole), metrics(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    killed_until_it_ends(TORCHRUN, arguments, tmp_path / "killed", 1, seed=2)
    resumed, expected = weights(tmp_path / "killed"), weights(tmp_path / "two")
    for name, tensor in expected.items():
        assert torch.allclose(resumed[name], tensor, atol=1e-5, rtol=1e-5), name


@pytest.mark.slow
def test_few_step_training_has_the_same_losses_alone_on_two_processes_and_in_shards(
    random_folder: Path, arguments: list[str], tmp_path: Path
) -> None:
    # Of a whole model the default teacher is itself. `--steps` are those of drawing, `--train-steps` those of training.
    few = ["few-step", *["--train-steps" if word == "--steps" else word for word in arguments[1:]], "--steps", "2"]
    few += ["--train-steps", "6"]
    plain = ["ema_decay=0" if word.startswith("ema_decay") else word for word in few]
    for command, knobs, name in (
        (ALONE, few, "one"),
        (TORCHRUN, few, "two"),
        (ALONE, plain, "plain"),
        (FSDP, plain, "shards"),
    ):
        done = run(command, knobs, tmp_path / name)
        assert done.returncode == 0, done.stderr
    for first, second in (("one", "two"), ("plain", "shards")):
        for a, b in zip(metrics(tmp_path / first), metrics(tmp_path / second), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    refused = run(FSDP, few, tmp_path / "refused")
    assert refused.returncode == 1
    assert "does not take weights in shards" in refused.stderr


@pytest.mark.slow
def test_shards_give_the_losses_of_one_and_a_killed_run_goes_on_in_shards_or_alone(
    arguments: list[str], whole: Path, tmp_path: Path
) -> None:
    drawing = ["--set", 'validation_prompts=["a cat"]', "--sample-every", "12"]
    done = run(FSDP, [*arguments, *drawing], tmp_path / "shards")
    assert done.returncode == 0, done.stderr
    assert "no sample pictures" in done.stderr
    assert not (tmp_path / "shards/samples").exists()
    for one, two in zip(metrics(whole), metrics(tmp_path / "shards"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    expected = weights(tmp_path / "shards")
    assert {name: weight.shape for name, weight in expected.items()} == {
        name: weight.shape for name, weight in weights(whole).items()
    }
    killed_until_it_ends(FSDP, [*arguments, *drawing], tmp_path / "killed", 1, seed=3)
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    shutil.rmtree(tmp_path / "alone/checkpoints/step-00000021")
    shutil.rmtree(tmp_path / "alone/pipeline")
    done = run(ALONE, [*arguments, *drawing], tmp_path / "alone", "--resume")
    assert done.returncode == 0, done.stderr
    for resumed in (weights(tmp_path / "killed"), weights(tmp_path / "alone")):
        for name, tensor in expected.items():
            assert torch.allclose(resumed[name], tensor, atol=1e-4, rtol=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings", "tolerance"),
    [
        (["distill"], ["optimizer=muon", "attention_kd_weight=1"], 1e-3),
        (["distill"], ["gradient_accumulation=2", "gradient_checkpointing=true", "max_grad_norm=0.5"], 1e-4),
        (["distill"], ["precision=bf16"], 1e-2),
        (["finetune"], ["ema_decay=0.9"], 1e-4),
        (["lora", "train"], ["text_encoder=true", "gradient_checkpointing=true"], 1e-4),
        (["distill-decoder"], ["width=8", "blocks=[1, 1, 0, 0]", "lpips_net=alex", "ema_decay=0.9"], 1e-4),
    ],
)
def test_every_kind_of_training_works_in_shards(
    arguments: list[str], kind: list[str], settings: list[str], tolerance: float, tmp_path: Path
) -> None:
    command = [*kind, *arguments[1:], "--steps", "4", *(part for each in settings for part in ("--set", each))]
    for name, launcher in (("one", ALONE), ("shards", FSDP)):
        done = run(launcher, command, tmp_path / name)
        assert done.returncode == 0, done.stderr
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "shards"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=tolerance)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.safetensors"))
    assert files
    for file in files:
        one_file, other = (load_file(tmp_path / name / file) for name in ("one", "shards"))
        assert {name: tensor.shape for name, tensor in one_file.items()} == {n: t.shape for n, t in other.items()}


def test_deepspeed_is_refused_in_one_line(arguments: list[str], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENVIRONMENT, "ACCELERATE_USE_DEEPSPEED", "true")
        done = run(ALONE, arguments, tmp_path / "run")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("sdcompress: ")]
    assert "DeepSpeed is not supported" in line
    assert not (tmp_path / "run").exists()


def start_two(commands: list[list[str]]) -> list[subprocess.Popen[str]]:
    """Start a group of two without a launcher that would end one for the other, as on two machines."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [*ALONE, *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT | both | {"RANK": str(number), "LOCAL_RANK": str(number)},
        )
        for number, command in enumerate(commands)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_lost_process_is_named_and_ends_the_other_within_a_minute(
    arguments: list[str], killed: int, tmp_path: Path
) -> None:
    processes = start_two([[*arguments, "--steps", "9999", "-o", str(tmp_path / "run")]] * 2)
    while all(process.poll() is None for process in processes) and len(metrics(tmp_path / "run")) < 2:
        time.sleep(0.05)
    processes[killed].kill()
    _, err = processes[1 - killed].communicate(timeout=60)
    processes[killed].communicate()
    assert processes[1 - killed].returncode == 1, err
    lines = [line for line in err.splitlines() if line.startswith("sdcompress: ")]
    assert len(lines) == 1
    assert f"process {killed} of 2 (pid {processes[killed].pid} on {socket.gethostname()}) was lost" in lines[0]
    assert "Traceback" not in err


@pytest.mark.slow
def test_processes_end_with_their_launcher(arguments: list[str], tmp_path: Path) -> None:
    launcher = subprocess.Popen(
        [*TORCHRUN, *arguments, "--steps", "9999", "-o", str(tmp_path / "run")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    while launcher.poll() is None and len(metrics(tmp_path / "run")) < 2:
        time.sleep(0.05)
    workers = psutil.Process(launcher.pid).children(recursive=True)
    assert len(workers) >= 2
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    for worker in alive:
        worker.kill()
    assert alive == []


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_says_why_and_ends_the_other(
    random_folder: Path, pictures: Path, failing: int, tmp_path: Path
) -> None:
    commands = [["data", "cache", str(pictures), str(random_folder), "-o", str(tmp_path / "cache")] for _ in range(2)]
    commands[failing][2] = str(tmp_path / "nothing")
    processes = start_two(commands)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert processes[failing].returncode in (1, 2)
    assert processes[1 - failing].returncode == 1
    assert len([line for line in errors[failing].splitlines() if line.startswith("sdcompress: ")]) == 1
    assert not any("Traceback" in error for error in errors)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [("distill", "config.seed"), ("data cache", "size_px")])
def test_processes_that_were_given_different_work_are_refused(
    arguments: list[str], pictures: Path, random_folder: Path, kind: str, name: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    cache = ["data", "cache", str(pictures), str(random_folder), "-o", str(output), "--size"]
    seed = [*arguments, "-o", str(output), "--seed"]
    processes = start_two([[*(seed if kind == "distill" else cache), number] for number in ("64", "128")])
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert f"the processes differ in {name}" in errors[0]
    assert not any("Traceback" in error for error in errors)
    assert not output.exists()


@pytest.mark.slow
def test_a_signal_stops_with_a_checkpoint_and_the_message_names_resume(arguments: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = subprocess.Popen(
        [*ALONE, *arguments, "--steps", "2000", "--checkpoint-every", "5000", "-o", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    while process.poll() is None and len(metrics(output)) < 2:
        time.sleep(0.01)
    second = run(ALONE, arguments, output, "--resume")
    assert second.returncode == 1
    assert "another run is using this folder" in second.stderr
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    (line,) = [line for line in err.splitlines() if line.startswith("sdcompress: ")]
    assert "--resume" in line
    (written,) = list_checkpoints(output / "checkpoints")
    assert f"stopped at step {int(written.name.removeprefix('step-'))} of 2000" in line


def test_a_checkpoint_cut_at_any_tenth_is_never_taken_for_intact(whole: Path, tmp_path: Path) -> None:
    newest = list_checkpoints(whole / "checkpoints")[-1]
    assert is_intact(newest)
    for file in ("state.pt", "sdcompress.json"):
        payload = (newest / file).read_bytes()
        for tenth in range(10):
            cut = tmp_path / f"{file}-{tenth}"
            shutil.copytree(newest, cut)
            (cut / file).write_bytes(payload[: len(payload) * tenth // 10])
            assert not is_intact(cut), (file, tenth)
