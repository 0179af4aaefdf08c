"""What the backends of a suite run from: exported graphs, compiled packages and engines, prepared before timing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdcompress_engines.progress import SILENT, Reporter
from sdcompress_engines.signature import CONTEXT_TOKENS

from .journal import Journal
from .scenario import BackendSetup, ModelUnderTest, Scenario, Suite

Artifacts = Mapping[tuple[str, BackendSetup], Mapping[str, Any]]
"""Model name and setup → what `prepare_artifacts` returns for them."""


def prepare_artifacts(
    suite: Suite, journal: Journal, report: Reporter = SILENT
) -> dict[tuple[str, BackendSetup], dict[str, Any]]:
    """Returns for each model and setup what it runs from: `{"artifacts", "build_s"}`, or `{"failed": reason}`.

    None of this time counts in later measurements. TensorRT gets one engine for pictures and probes. Under `static` it
    also gets one engine for each timed shape alone, because such an engine is the fastest.

    Args:
        suite: what will be measured.
        journal: keeps the outcomes, so that a stopped suite does not build again.
        report: shows progress.
    """
    found: dict[tuple[str, BackendSetup], dict[str, Any]] = {}
    wanted = [(model, setup) for model in suite.models for setup in suite.setups]
    with report.task("preparing graphs", len(wanted)) as advance:
        for model, setup in wanted:
            advance(0, note=f"{model.name}, {setup}")
            from_weights = setup.backend in ("torch", "compile")
            found[model.name, setup] = {} if from_weights else _prepare(suite, model, setup, journal)
            advance()
    return found


def _prepare(suite: Suite, model: ModelUnderTest, setup: BackendSetup, journal: Journal) -> dict[str, Any]:
    existing = model.artifacts(setup.backend)
    case: dict[str, Any] = {
        "path": str(model.path),
        "decoder": model.decoder and str(model.decoder),
        "backend": setup.backend,
        "precision": setup.precision,
        "device": suite.device,
        "artifacts": None if existing is None else str(existing),
        "loras": bool(model.loras),
        "profiles": [],
    }
    name, limit_s = f"prepare {model.name} {setup}", suite.scenario_timeout_s
    if setup.backend != "tensorrt" or existing is not None:
        return journal.call(name, build_artifacts, case, limit_s)
    found = journal.call(name, build_artifacts, case | {"profiles": [picture_profile(suite, model)]}, limit_s)
    if "failed" in found:
        return found
    static = {}
    for scenario in suite.scenarios():
        if (scenario.model, scenario.setup) == (model, setup):
            shape, only = _shape_name(scenario), case | {"profiles": [static_profile(scenario)]}
            static[shape] = journal.call(f"{name} {shape}", build_artifacts, only, limit_s)
    return found | {"static": static}


def _shape_name(scenario: Scenario) -> str:
    return f"{scenario.size_px}px-{scenario.batch}"


def static_profile(scenario: Scenario) -> str:
    """Returns the engine profile that accepts only the timed shape of a scenario."""
    return (
        f"batch={scenario.unet_batch},pictures={scenario.batch},"
        f"height={scenario.size_px},width={scenario.size_px},tokens={CONTEXT_TOKENS}"
    )


def picture_profile(suite: Suite, model: ModelUnderTest) -> str:
    """Returns the engine profile for the probes and the pictures of a model, as many at once as the suite allows."""
    pictures = max(1, min(suite.pictures_at_once(model), max(suite.pictures, suite.quality_pictures)))
    calls = model.sampling.unet_batch(pictures)
    most, size = max(calls, suite.probes_at_once(model)), suite.sizes_px[0]
    return f"batch=1:{calls}:{most},pictures=1:{pictures}:{pictures},height={size},width={size},tokens={CONTEXT_TOKENS}"


def find_artifacts(scenario: Scenario, artifacts: Artifacts) -> Mapping[str, Any]:
    """Returns what a scenario runs from: the engine for its shape alone, if there is one."""
    found = artifacts[scenario.model.name, scenario.setup]
    static: Mapping[str, Any] = found.get("static", {}).get(_shape_name(scenario), found)
    return static


def build_artifacts(case: dict[str, Any]) -> dict[str, Any]:
    """Returns the folder that a setup runs from (`artifacts`) and how many seconds it took to build (`build_s`).

    The folder is built now if it does not exist yet.
    """
    from sdcompress_engines.manifest import read_manifest

    from sdcompress.backends.cached import cached_artifacts
    from sdcompress.export.aot import cached_package
    from sdcompress.models.load import load_pipeline

    folder = Path(case["artifacts"]) if case["artifacts"] else None
    if folder is None and case["backend"] == "aot":
        loaded = load_pipeline(case["path"])
        folder = cached_package(loaded, case["device"], case["precision"], loras=case["loras"]).parent
    decoder = Path(case["decoder"]) if case["decoder"] else None
    if folder is None:
        options = {"profiles": case["profiles"], "decoder": decoder, "loras": case["loras"]}
        folder = cached_artifacts(case["path"], case["backend"], case["precision"], **options)
    manifest = read_manifest(folder)
    figures = manifest.figures if manifest else {}
    parts = [figures, *(part for part in figures.values() if isinstance(part, dict))]
    seconds = [part["seconds"] for part in parts if isinstance(part.get("seconds"), int | float)]
    return {"artifacts": str(folder), "build_s": sum(seconds) if seconds else None}
