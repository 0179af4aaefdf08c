"""The studies that run for long: a few rounds of each, and how memory is judged."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdcompress.lora.fuse import shapes_of
from sdcompress.lora.remap import remap_lora
from sdcompress.models.load import load_pipeline
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import meta_unet

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "bench" / "studies"


def load_study(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"study_{name}", STUDIES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def run_study(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(STUDIES / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


@pytest.mark.parametrize(("growth_mib", "flat"), [(0.0, True), (0.1, True), (1.0, False), (-1.0, False)])
def test_memory_is_flat_within_two_percent_after_warm_up(growth_mib: float, flat: bool) -> None:
    readings = [300.0] * 20 + [500.0 + growth_mib * number for number in range(80)]
    judged = load_study("soak").judge({"memory_mib": readings})
    assert judged["flat"] is flat
    assert judged["first_mib"] == pytest.approx(500 + 4.5 * growth_mib)


def test_a_student_keeps_the_root_of_the_weights_share_of_a_random_lora() -> None:
    study = load_study("lora_remap")
    unet = load_pipeline("nano").pipeline.unet
    shapes = {name: shape for name, shape in shapes_of(unet).items() if name.endswith(study.ATTENTION)}
    plan = make_plan(unet.config, "bk-tiny")
    student = shapes_of(meta_unet(plan.student_config()))
    found = remap_lora(study.make_random_lora(shapes), plan, student)
    weights = [math.prod(shape) for shape in shapes.values()]
    kept = [math.prod(shape) for name, shape in shapes.items() if plan.student_key(name) is not None]
    assert len(kept) == len(found.layers) == 72
    assert found.kept_norm == pytest.approx(math.sqrt(sum(kept) / sum(weights)), rel=0.01)


def test_every_arm_of_the_remapped_loras_is_judged_once() -> None:
    study = load_study("lora_remap")
    arms = list(study.list_arms(3, 1))
    assert len(set(arms)) == len(arms)
    remapped = [arm for arm in arms if arm.kind == study.MAIN_KIND and arm.model != arm.trained_on]
    assert {arm.weight for arm in remapped if arm.prompts == "word" and arm.seed == 2} == set(study.WEIGHTS)


@pytest.mark.slow
def test_soak_reads_the_memory_after_each_part_of_the_calls(tmp_path: Path) -> None:
    output = tmp_path / "soak.json"
    done = run_study(
        "soak", "--calls", "6", "--only", "generate, torch", "-o", str(output), "--work", str(tmp_path / "work")
    )
    assert done.returncode in (0, 3), done.stderr  # six calls do not decide whether memory is flat
    figures = json.loads(output.read_text())["subjects"]["generate, torch"]
    assert len(figures["memory_mib"]) == 6
    assert min(figures["memory_mib"]) > 100


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills process groups")
def test_a_killed_install_loses_nothing_and_the_study_goes_on_after_its_rows(tmp_path: Path) -> None:
    output = tmp_path / "kills.jsonl"
    arguments = ["--kills", "2", "--only", "install", "-o", str(output), "--work", str(tmp_path / "work")]
    done = run_study("kills", *arguments)
    assert "Traceback" not in done.stderr
    first, *rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert first["environment"]["cores"]
    rounds = [row for row in rows if "round" in row]
    assert [row for row in rounds if row["lost"] or not row["equal"]] == [], done.stdout
    assert len(rows) == len(rounds) + 1  # two at once
    assert sum(len(row["kills"]) for row in rows) >= 2
    again = run_study("kills", *arguments, "--resume")
    assert again.returncode == done.returncode, again.stderr
    assert len(output.read_text().splitlines()) == 1 + len(rows)
