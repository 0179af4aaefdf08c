"""ONNX graphs → TensorRT engines: one profile in a person's units for all components, each engine built once and kept
in the store.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdcompress_engines.build_options import BuildOptions
from sdcompress_engines.builder import build_engine, targets
from sdcompress_engines.errors import ArtifactError
from sdcompress_engines.flavour import Flavour, choose_flavour, platform_name, present_card
from sdcompress_engines.graph import sha256_files
from sdcompress_engines.manifest import (
    MANIFEST_NAME,
    Manifest,
    faults,
    read_manifest,
    sha256_file,
    staged,
    write_manifest,
)
from sdcompress_engines.profiles import PRESETS, Profile, ShapeRanges, check_ranges, component_profile, parse_profile
from sdcompress_engines.progress import SILENT, Reporter
from sdcompress_engines.signature import signature
from sdcompress_engines.engine_key import EngineKey
from sdcompress_engines.store import EngineStore

from sdcompress.export.components import DTYPES, PARTS
from sdcompress.export.onnx import checked_components
from sdcompress.export.quantize.precisions import PRECISIONS as QUANTIZED


@dataclass(frozen=True)
class BuiltEngine:
    """One component's engine.

    Attributes:
        seconds, peak_mib: of the build, wall clock and resident memory; of the earlier one where it was in the store.
        reused: it was in the store already.
    """

    seconds: float
    bytes: int
    peak_mib: float
    reused: bool


@dataclass(frozen=True)
class EnginesResult:
    """An `engine` folder: its manifest, by component what was built, and for which shapes."""

    folder: Path
    manifest: Manifest
    builds: dict[str, BuiltEngine]
    ranges: tuple[ShapeRanges, ...]


def build_engines(
    onnx_folder: Path,
    output: Path,
    *,
    profiles: Sequence[str | ShapeRanges] = (),
    flavour: str | None = None,
    compute_capabilities: Sequence[tuple[int, int]] | None = None,
    options: BuildOptions = BuildOptions(),  # noqa: B008 (frozen)
    components: Iterable[str] | None = None,
    store: EngineStore | None = None,
    force: bool = False,
    report: Reporter = SILENT,
) -> EnginesResult:
    """Write `<component>.engine` for the graphs of an `onnx` folder, and `pipeline/` beside them.

    What the store has is not built again.

    Args:
        profiles: presets, `batch=…,height=…` texts or ranges; several give engines that are tuned for each. By default
            `dynamic`.
        flavour: `tensorrt` or `tensorrt-rtx`; by default the first with a GPU, the second, ahead of time, without.
        compute_capabilities: (major, minor) of the cards to build for; see `sdcompress_engines.builder.targets`.
        components: by default those the folder has.

    Raises:
        ArtifactError: no `onnx` folder, or a damaged one. UsageError: a size the model has no latents for.
        BackendMissing, EngineError, StorageError: as `build_engine`.
    """
    manifest = read_manifest(onnx_folder)
    if manifest is None or manifest.kind != "onnx":
        raise ArtifactError("is not an exported ONNX folder", where=onnx_folder, hint="sdcompress export MODEL -o DIR")
    if found := faults(onnx_folder, "onnx"):
        raise ArtifactError(
            f"is damaged: {'; '.join(found[:3])}",
            where=onnx_folder,
            hint="export it again: sdcompress export MODEL -o DIR",
        )
    host = manifest.config["signature"]
    chosen = checked_components(components if components is not None else manifest.config["components"], host)
    library = choose_flavour(flavour, present_card(), compute_capabilities)
    cards = targets(library, compute_capabilities)
    configs = {component: _config(onnx_folder, component) for component in {*chosen, "unet", "vae_decoder"}}
    scale = vae_scale(configs["vae_decoder"])
    ranges = shape_ranges(profiles, configs["unet"], scale)
    store = store or EngineStore()
    builds: dict[str, BuiltEngine] = {}
    parts: dict[str, Mapping[str, Any]] = {}
    with staged(output, force) as folder:
        for component in chosen:
            # Of what is not a UNet one profile over all shapes is enough: it is called once a picture.
            shapes = [
                component_profile(component, configs[component], each, scale, host)
                for each in (ranges if component == "unet" else [_hull(ranges)])
            ]
            precision = manifest.config["precisions"][component]
            ports = signature(
                component, configs[component], DTYPES["fp16" if precision in QUANTIZED else precision], host
            )
            key = EngineKey(
                sha256_files(
                    {
                        name: entry.sha256
                        for name, entry in manifest.files.items()
                        if name.startswith(f"{component}.onnx")
                    }
                ),
                component,
                precision,
                host,
                library.name,
                library.version,
                cards,
                platform_name(),
                tuple(profile.shapes for profile in shapes),
                options.chosen(),
            )
            said = {
                "vae_scale": scale,
                "inputs": {component: _ports(ports.inputs)},
                "outputs": {component: _ports(ports.outputs)},
                "model_name": manifest.config.get("model_name", ""),
            }
            stored, reused = store.get_or_build(
                key,
                _Build(onnx_folder, component, shapes, library, compute_capabilities, options, said, report),
                report,
            )
            if reused:
                report.say(f"{component}: the store has this engine already ({key.digest})")
            figures = stored.manifest.figures
            builds[component] = BuiltEngine(figures["seconds"], figures["bytes"], figures["peak_mib"], reused)
            parts[component] = stored.manifest.config
            store.adopt(stored, folder)
        shutil.copytree(onnx_folder / "pipeline", folder / "pipeline")
        first = next(iter(parts.values()))
        merged = {
            name: {component: parts[component][name][component] for component in chosen}
            for name in ("profiles", "inputs", "outputs", "keys", "model")
        }
        config = {
            **first,
            **merged,
            "components": list(chosen),
            "precision": manifest.config["precision"],
            "precisions": {component: parts[component]["precision"] for component in chosen},
        }
        written = write_manifest(
            folder,
            "engine",
            config=config,
            inputs={"onnx": sha256_file(onnx_folder / MANIFEST_NAME)} | manifest.inputs,
            figures={component: asdict(built) for component, built in builds.items()},
        )
    return EnginesResult(output, written, builds, tuple(ranges))


@dataclass(frozen=True)
class _Build:
    """What the store calls where it has no engine of a key."""

    onnx_folder: Path
    component: str
    profiles: Sequence[Profile]
    flavour: Flavour
    compute_capabilities: Sequence[tuple[int, int]] | None
    options: BuildOptions
    said: Mapping[str, Any]
    report: Reporter

    def __call__(self, folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        graph, engine = self.onnx_folder / f"{self.component}.onnx", folder / f"{self.component}.engine"
        built = build_engine(
            graph, engine, self.profiles, self.flavour, self.compute_capabilities, self.options, self.report
        )
        return self.said, {
            "seconds": round(built.seconds, 2),
            "bytes": built.bytes,
            "peak_mib": round(built.peak_mib, 1),
        }


def shape_ranges(
    profiles: Sequence[str | ShapeRanges], unet_config: Mapping[str, Any], scale: int = 8
) -> list[ShapeRanges]:
    """The ranges these profiles stand for with a UNet of this config.

    Raises:
        UsageError: no such preset, or sizes the UNet has no place for.
    """
    step = signature("unet", unet_config).multiple * scale
    size = unet_config["sample_size"]
    native = (size if isinstance(size, int) else max(size)) * scale
    ranges = [
        profile if isinstance(profile, ShapeRanges) else parse_profile(profile, native, step)
        for profile in profiles or [next(iter(PRESETS))]
    ]
    for each in ranges:
        check_ranges(each, step)
    return ranges


def vae_scale(vae_config: Mapping[str, Any]) -> int:
    """Pixels a latent pixel: 8 for Stable Diffusion."""
    return int(2 ** (len(vae_config["block_out_channels"]) - 1))


def _hull(ranges: Sequence[ShapeRanges]) -> ShapeRanges:
    """The ranges that cover all of these, tuned for the first."""

    def over(name: str) -> tuple[int, int, int]:
        values = [getattr(each, name) for each in ranges]
        return min(v[0] for v in values), values[0][1], max(v[2] for v in values)

    return ShapeRanges(over("batch"), over("height"), over("width"), over("tokens"), over("vae_batch"))


def _config(onnx_folder: Path, component: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((onnx_folder / "pipeline" / PARTS[component] / "config.json").read_text())
    return config


def _ports(specs: Iterable[Any]) -> list[dict[str, Any]]:
    return [
        {"name": spec.name, "shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}
        for spec in specs
    ]
