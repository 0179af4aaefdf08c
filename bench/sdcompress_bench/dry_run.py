"""What a suite would run, and the memory that it needs; nothing is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdcompress_engines.errors import ModelError
from sdcompress_engines.json_files import read_json_object
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.families.schemas.tiny_vae import taesd_config

from .build_suite import read_configs
from .scenario import Scenario, Suite
from .work import Work, count_pipeline, read_pipeline_configs


def list_scenarios(suite: Suite, report: Reporter = SILENT) -> list[dict[str, Any]]:
    """Returns a row for each scenario, as plain values.

    `memory_bytes` is the weights of all components and the largest activations of one of them. The runtime's own
    memory is not in it. `unet_macs` is of one UNet step.

    Args:
        suite: what would be measured.
        report: gets the progress.

    Raises:
        UsageError: a size that the model has no latents for. ModelError: no Stable Diffusion pipeline.
    """
    scenarios = list(suite.scenarios())
    counted: dict[tuple[Any, ...], Mapping[str, Work]] = {}
    rows = []
    with report.task("counting", len(scenarios)) as advance:
        for scenario in scenarios:
            case = scenario.model.name, scenario.size_px, scenario.batch, scenario.setup.precision
            if case not in counted:
                counted[case] = _count_work(scenario)
            rows.append(_describe(scenario, counted[case]))
            advance(note=scenario.model.name)
    return rows


def _count_work(scenario: Scenario) -> Mapping[str, Work]:
    model = scenario.model
    configs = read_configs(model) if model.random else read_pipeline_configs(model.path)
    if model.decoder is not None:
        configs["vae"] = read_json_object(model.decoder / "config.json", ModelError)
    elif model.random and model.random.decoder:
        configs["vae"] = taesd_config(configs["vae"]["latent_channels"])
    return count_pipeline(configs, scenario.size_px, scenario.batch, model.sampling.is_guided, scenario.setup.precision)


def _describe(scenario: Scenario, work: Mapping[str, Work]) -> dict[str, Any]:
    held = sum(part.held_bytes for part in work.values()) + max(part.peak_bytes for part in work.values())
    return {
        "scenario": scenario.key,
        "model": scenario.model.name,
        "backend": scenario.setup.backend,
        "precision": scenario.setup.precision,
        "size_px": scenario.size_px,
        "batch": scenario.batch,
        "steps": scenario.model.sampling.steps,
        "guidance_scale": scenario.model.sampling.guidance_scale,
        "memory_bytes": held,
        "unet_macs": work["unet"].macs,
    }
