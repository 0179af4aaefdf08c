"""Whatever a results file or a journal holds, it is compared, measured again, or refused in one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sdcompress_bench import isolated
from sdcompress_bench.compare import compare, render, to_json
from sdcompress_bench.journal import Journal
from sdcompress_bench.outputs import read_prediction, read_probe
from sdcompress_bench.results import RESULTS_SCHEMA, read_losses, read_results
from sdcompress_engines.errors import ArtifactError, SdCompressError

KEPT = Path(__file__).parents[2] / "bench/results/bench-nano.json"
QUICK = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
VALUES: list[Any] = [None, -1, 0, "x", "", [], {}, [1], {"a": 1}, True, float("nan"), 10**400, "x" * 5000, [[[]]]]


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    """Measured results, with few samples."""
    found: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8"))
    for run in found["latency"]:
        run["samples_ms"] = {stage: [samples[:2] for samples in rounds] for stage, rounds in run["samples_ms"].items()}
    return found


def list_places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values of a JSON document are; of a list, the first two."""
    children = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value[:2] if isinstance(value, list) else ()))
    )
    return [place, *(found for key, child in children for found in list_places(child, (*place, key)))]


def use(path: Path) -> None:
    """Compare a file with the kept results, as `sdcompress bench compare` does."""
    results = read_results(path)
    found = compare(read_results(KEPT), results)
    assert render(found)
    assert json.loads(to_json(found))
    assert isinstance(results.failed_gates(), list)


def check_refusal(error: SdCompressError) -> None:
    assert len(str(error)) < 600
    assert "\n" not in str(error)


@QUICK
@given(data=st.data())
def test_results_with_an_edited_value_are_compared_or_refused(kept: Any, tmp_path: Path, data: st.DataObject) -> None:
    edited = copy.deepcopy(kept)
    place = data.draw(st.sampled_from(list_places(kept)[1:]))
    holder = edited
    for key in place[:-1]:
        holder = holder[key]
    if data.draw(st.booleans()):
        holder[place[-1]] = data.draw(st.sampled_from(VALUES))
    else:
        del holder[place[-1]]
    (tmp_path / "results.json").write_text(json.dumps(edited))
    try:
        use(tmp_path / "results.json")
    except SdCompressError as error:
        check_refusal(error)


def test_all_faults_are_named_at_once(kept: Any, tmp_path: Path) -> None:
    edited = copy.deepcopy(kept)
    edited["settings"]["steps"] = "many"
    edited["latency"][0]["samples_ms"]["unet_step"][0][0] = float("nan")
    edited["surprise"] = 1
    del edited["models"][0]["sha256"]
    (tmp_path / "results.json").write_text(json.dumps(edited))
    with pytest.raises(ArtifactError) as refusal:
        read_results(tmp_path / "results.json")
    check_refusal(refusal.value)
    for name in ("settings.steps", "models.0.sha256", "samples_ms", "surprise"):
        assert name in str(refusal.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        "[]",
        "null",
        '{"schema": 1}',
        '{"schema": [2]}',
        '{"schema": "' + "x" * 10_000 + '"}',
        f'{{"schema": {RESULTS_SCHEMA}}}',
        '{"schema": ' + "9" * 5000 + "}",
        "\xff\xfe",
    ],
)
def test_what_is_no_results_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError) as refusal:
        read_results(tmp_path / "results.json")
    check_refusal(refusal.value)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{}", {}),
        ('{"step": 1, "loss": NaN}', {}),
        ('{"step": "x", "loss": 1}', {}),
        ('{"step": 1, "loss": ' + "9" * 400 + "}", {}),
        ('{"step": 1, "loss": 2}', {"loss": [[1, 2.0]]}),
    ],
)
def test_losses_are_finite_numbers_at_steps(tmp_path: Path, line: str, found: Any) -> None:
    (tmp_path / "metrics.jsonl").write_text(line)
    assert read_losses(tmp_path / "metrics.jsonl") == found


@pytest.mark.parametrize("line", ["[]", "5", "[" * 100_000, "\xff", "x" * 2**21])
def test_a_line_that_is_no_object_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(line, encoding="latin-1")
    with pytest.raises(ArtifactError) as refusal:
        read_losses(tmp_path / "metrics.jsonl")
    check_refusal(refusal.value)


def test_an_edited_outcome_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "call", lambda function, argument, timeout_s: function(argument))  # in this process
    path = tmp_path / "work" / "journal.jsonl"
    for name in ("a", "b"):
        Journal(path, "same").call(name, dict, {"value": 1}, 60)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1].replace('"value": 1', '"value": 2'), lines[2], "[" * 9999, "5"]))
    assert Journal(path, "same").known == {"b": {"value": 1}}


def test_outputs_of_a_case_that_were_edited_are_refused(tmp_path: Path) -> None:
    import torch

    for content in ({"latents": 1}, [1], torch.zeros(2), {"latents": torch.zeros(2), "timesteps": 5}):
        torch.save(content, tmp_path / "probe.pt")
        torch.save(content, tmp_path / "prediction.pt")
        for read, path in ((read_probe, tmp_path / "probe.pt"), (read_prediction, tmp_path)):
            with pytest.raises(ArtifactError, match=r"is no (probe|prediction)"):
                read(path)
