"""The TensorRT engines of an exported ONNX folder.

One profile, in pixels, gives the shapes of all components. Each engine is built once and kept in the store.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sdcompress_engines.build_options import BuildOptions
from sdcompress_engines.builder import builds_refittable, targets
from sdcompress_engines.few_steps import read_exported_few_steps
from sdcompress_engines.files import copy_tree
from sdcompress_engines.flavour import Flavour, choose_flavour, present_card
from sdcompress_engines.graph import weights_path
from sdcompress_engines.manifest import MANIFEST_NAME, Manifest, sha256_file, write_manifest
from sdcompress_engines.output_folders import staged
from sdcompress_engines.profiles import (
    DEFAULT_PRESET,
    GUIDANCE_FREE_PRESET,
    ShapeRanges,
    check_ranges,
    parse_profile,
)
from sdcompress_engines.progress import SILENT, Reporter
from sdcompress_engines.signature import signature
from sdcompress_engines.store import EngineStore
from sdcompress_engines.store_entries import StoredEngine

from sdcompress.export.components import PARTS, latent_side
from sdcompress.export.engine_build import EngineBuilder, vae_scale
from sdcompress.export.graph_folder import read_graph_folder
from sdcompress.export.settings import check_components
from sdcompress.models.locate import read_component_config


@dataclass(frozen=True)
class BuiltEngine:
    """The engine of one component.

    Attributes:
        seconds: of wall clock that its build took; of the earlier build where it was in the store.
        bytes: of its file.
        peak_mib: highest resident memory of that build.
        reused: whether it was in the store already.
    """

    seconds: float
    bytes: int
    peak_mib: float
    reused: bool

    @classmethod
    def of(cls, stored: StoredEngine, reused: bool) -> BuiltEngine:
        """Returns the figures of an engine of the store."""
        figures = stored.manifest.figures
        return cls(figures["seconds"], figures["bytes"], figures["peak_mib"], reused)


@dataclass(frozen=True)
class EnginesResult:
    """An `engine` folder.

    Attributes:
        folder: with `<component>.engine` and `pipeline/`.
        manifest: of the folder.
        builds: the engines by component.
        ranges: the shapes that they were built for.
    """

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
    loras: bool | None = None,
    components: Iterable[str] | None = None,
    store: EngineStore | None = None,
    force: bool = False,
    report: Reporter = SILENT,
) -> EnginesResult:
    """Write `<component>.engine` for the graphs of an `onnx` folder, and `pipeline/` beside them.

    An engine that the store has is not built again.

    Args:
        onnx_folder: as `export_onnx` writes it.
        output: the folder to write.
        profiles: presets, texts such as `batch=...,height=...`, or ranges, to tune for each; see `_choose_preset`.
        flavour: `tensorrt` or `tensorrt-rtx`; by default the first with a GPU, and the second without.
        compute_capabilities: (major, minor) of the cards to build for; see `sdcompress_engines.builder.targets`.
        options: of the build.
        loras: whether LoRAs can be put into the engines; None is wherever the library can build such engines.
        components: by default those in the folder. store: by default the user's.
        force: replace an existing output.
        report: gets the progress.

    Raises:
        ArtifactError: no `onnx` folder, or a damaged one. UsageError: a size without latents. Others as `build_engine`.
    """
    manifest = read_graph_folder(onnx_folder)
    requested = manifest.config["components"] if components is None else components
    chosen = check_components(requested, manifest.config["signature"])
    parts = {component: PARTS[component] for component in (*chosen, "unet", "vae_decoder")}
    configs = {name: read_component_config(onnx_folder / "pipeline", part) for name, part in parts.items()}
    library = choose_flavour(flavour, present_card(), compute_capabilities)
    cards = targets(library, compute_capabilities)
    default, scale = _choose_preset(onnx_folder, manifest), vae_scale(configs["vae_decoder"])
    ranges = tuple(shape_ranges(profiles, configs["unet"], scale, default))
    options = replace(options, loras=_choose_loras(loras, library, options, manifest, report))
    where = library, compute_capabilities, cards, options
    builder = EngineBuilder(onnx_folder, manifest, configs, ranges, *where, report)
    store, engines, builds = store or EngineStore(), dict[str, StoredEngine](), dict[str, BuiltEngine]()
    with staged(output, force, [onnx_folder]) as folder:
        for component in chosen:
            engines[component], reused = builder.get_or_build(component, store)
            builds[component] = BuiltEngine.of(engines[component], reused)
            store.link_or_copy(engines[component], folder)
        copy_tree(onnx_folder / "pipeline", folder / "pipeline")
        written = write_manifest(
            folder,
            "engine",
            config=_merge_configs(engines, manifest.config["precision"]),
            inputs={"onnx": sha256_file(onnx_folder / MANIFEST_NAME)} | manifest.inputs,
            figures={component: asdict(built) for component, built in builds.items()},
        )
    return EnginesResult(output, written, builds, ranges)


def _choose_loras(
    wanted: bool | None, library: Flavour, options: BuildOptions, manifest: Manifest, report: Reporter
) -> bool:
    """Returns whether the engines are built so that they take LoRAs."""
    has_weights = any(weights_path(f"{name}.onnx").name in manifest.files for name in manifest.config["components"])
    if wanted is False or options.refit or options.strip_plan or not has_weights:
        return False
    if wanted is None and not builds_refittable(library):
        report.show_line(
            f"these engines take no LoRA: {library.name} builds those that do only on a machine with the card"
        )
        return False
    return True


def _choose_preset(onnx_folder: Path, manifest: Manifest) -> str:
    """Returns the preset for a model where none is chosen: `dynamic`, or `few-step` where it draws without guidance."""
    has_index = "pipeline/model_index.json" in manifest.files  # not in an export of single components
    sampling = read_exported_few_steps(onnx_folder, manifest) if has_index else None
    return DEFAULT_PRESET if sampling is None or sampling.guidance_scale > 1 else GUIDANCE_FREE_PRESET


def _merge_configs(engines: Mapping[str, StoredEngine], precision: str) -> dict[str, Any]:
    """Returns the manifest config of an engine folder.

    Args:
        engines: by component.
        precision: of the export.
    """
    configs = {component: stored.manifest.config for component, stored in engines.items()}
    by_component = ("profiles", "inputs", "outputs", "keys", "model")
    return {
        **next(iter(configs.values())),
        **{name: {component: each[name][component] for component, each in configs.items()} for name in by_component},
        "components": list(configs),
        "precision": precision,
        "precisions": {component: each["precision"] for component, each in configs.items()},
    }


def shape_ranges(
    profiles: Sequence[str | ShapeRanges],
    unet_config: Mapping[str, Any],
    scale: int = 8,
    default: str = DEFAULT_PRESET,
) -> list[ShapeRanges]:
    """Returns the ranges of profiles for a UNet.

    Args:
        profiles: presets, texts or ranges; none is the preset `default`.
        unet_config: from diffusers.
        scale: pixels in a latent pixel.
        default: the preset that has what a text leaves out.

    Raises:
        UsageError: there is no such preset, or the UNet does not take the sizes.
    """
    step = signature("unet", unet_config).multiple * scale
    native = latent_side(unet_config) * scale
    ranges = [
        profile if isinstance(profile, ShapeRanges) else parse_profile(profile, native, step, default)
        for profile in profiles or [default]
    ]
    for each in ranges:
        check_ranges(each, step)
    return ranges
