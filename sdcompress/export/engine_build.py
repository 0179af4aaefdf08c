"""The engine of one component: its key, and its build where the store has none of that key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcompress_engines.build_options import BuildOptions
from sdcompress_engines.builder import build_engine
from sdcompress_engines.engine_key import EngineKey
from sdcompress_engines.files import link_or_copy
from sdcompress_engines.flavour import Card, Flavour, platform_name
from sdcompress_engines.graph import sha256_files, weights_path
from sdcompress_engines.manifest import Manifest
from sdcompress_engines.profiles import Profile, ShapeRanges, component_profile
from sdcompress_engines.progress import Reporter
from sdcompress_engines.runners import TensorSpec
from sdcompress_engines.signature import signature
from sdcompress_engines.store import EngineStore
from sdcompress_engines.store_entries import StoredEngine

from sdcompress.export.components import DTYPES
from sdcompress.export.quantize.precisions import PRECISIONS as QUANTIZED
from sdcompress.prune.plan import PLAN_ENTRY


@dataclass(frozen=True)
class EngineBuilder:
    """Builds the engines of an exported ONNX folder.

    Attributes:
        onnx_folder: with the graphs. manifest: of that folder.
        configs: component → its diffusers or transformers config.
        ranges: the shapes to build for. The UNet gets a profile for each; the others get one profile over all, because
            they run once a picture.
        flavour: the library.
        compute_capabilities: as requested; None is the card in this machine.
        cards: (major, minor) of the cards that the engine is for.
        options: of the build.
        report: gets the progress.
    """

    onnx_folder: Path
    manifest: Manifest
    configs: Mapping[str, Mapping[str, Any]]
    ranges: Sequence[ShapeRanges]
    flavour: Flavour
    compute_capabilities: Sequence[Card] | None
    cards: tuple[Card, ...]
    options: BuildOptions
    report: Reporter

    @property
    def _scale(self) -> int:
        return vae_scale(self.configs["vae_decoder"])

    def get_or_build(self, component: str, store: EngineStore) -> tuple[StoredEngine, bool]:
        """Returns the engine of a component, built now where the store has none, and whether it was there.

        Raises:
            BackendMissing, EngineError, StorageError: as `build_engine`.
        """
        profiles = self._profiles(component)
        key = self._key(component, profiles)
        ports = self._describe_ports(component)

        def build(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
            return ports, self._build(component, profiles, folder)

        stored, reused = store.get_or_build(key, build, self.report)
        if reused:
            self.report.show_line(f"{component}: the store has this engine already ({key.digest})")
        return stored, reused

    def _build(self, component: str, profiles: Sequence[Profile], folder: Path) -> dict[str, Any]:
        """Build an engine into a folder, with its weights beside it if it takes LoRAs. Returns the build's figures."""
        graph, engine = self.onnx_folder / f"{component}.onnx", folder / f"{component}.engine"
        built = build_engine(
            graph, engine, profiles, self.flavour, self.compute_capabilities, self.options, self.report
        )
        if self.options.loras and weights_path(graph).is_file():
            link_or_copy(weights_path(graph), weights_path(engine))
        return {"seconds": round(built.seconds, 2), "bytes": built.bytes, "peak_mib": round(built.peak_mib, 1)}

    def _profiles(self, component: str) -> list[Profile]:
        ranges = self.ranges if component == "unet" else [_cover_ranges(self.ranges)]
        config, host = self.configs[component], self.manifest.config["signature"]
        return [component_profile(component, config, each, self._scale, host) for each in ranges]

    def _key(self, component: str, profiles: Sequence[Profile]) -> EngineKey:
        files = {
            name: entry.sha256 for name, entry in self.manifest.files.items() if name.startswith(f"{component}.onnx")
        }
        return EngineKey(
            sha256_files(files),
            component,
            self.manifest.config["precisions"][component],
            self.manifest.config["signature"],
            self.flavour.name,
            self.flavour.version,
            self.cards,
            platform_name(),
            tuple(profile.shapes for profile in profiles),
            self.options.chosen(),
        )

    def _describe_ports(self, component: str) -> dict[str, Any]:
        """Returns what the engine's manifest holds about its inputs and outputs."""
        precision, host = self.manifest.config["precisions"][component], self.manifest.config["signature"]
        dtype = DTYPES["fp16" if precision in QUANTIZED else precision]
        ports = signature(component, self.configs[component], dtype, host)
        return {
            "vae_scale": self._scale,
            "inputs": {component: _describe_specs(ports.inputs)},
            "outputs": {component: _describe_specs(ports.outputs)},
            "model_name": self.manifest.config.get("model_name", ""),
            PLAN_ENTRY: self.manifest.config.get(PLAN_ENTRY),
        }


def vae_scale(vae_config: Mapping[str, Any]) -> int:
    """Returns the pixels in a latent pixel; 8 for Stable Diffusion."""
    return int(2 ** (len(vae_config["block_out_channels"]) - 1))


def _cover_ranges(ranges: Sequence[ShapeRanges]) -> ShapeRanges:
    """Returns the ranges that cover all of these, tuned for the first."""

    def cover(name: str) -> tuple[int, int, int]:
        values = [getattr(each, name) for each in ranges]
        return min(value[0] for value in values), values[0][1], max(value[2] for value in values)

    return ShapeRanges(cover("batch"), cover("height"), cover("width"), cover("tokens"), cover("vae_batch"))


def _describe_specs(specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
    return [
        {"name": spec.name, "shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}
        for spec in specs
    ]
