"""What an export to ONNX writes, checked before anything is exported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from sdcompress_engines.errors import BackendMissing, UsageError
from sdcompress_engines.signature import COMPONENTS, HOSTS

from sdcompress.export.components import (
    DTYPES,
    Precision,
    Runtime,
    default_components,
    part_of,
    stable_precision,
)
from sdcompress.export.onnx_file import OPSET
from sdcompress.export.quantize.precisions import INSTALL, Quantized, missing
from sdcompress.export.quantize.precisions import PRECISIONS as QUANTIZED
from sdcompress.support.bounds import LEAST_OPSET, MOST_OPSET
from sdcompress.support.pipeline import TextToImagePipeline, check_host_noise


@dataclass(frozen=True)
class ExportSettings:
    """What an export writes.

    Attributes:
        precision: the requested one.
        precisions: component → the precision that torch exports it in, in the order of the export. A UNet that is
            quantized afterwards is exported in fp16.
        host: whose names the inputs and outputs have, a key of `HOSTS`.
        runtime: the one that the graphs are written for.
        opset: of the standard operators.
    """

    precision: Precision | Quantized
    precisions: Mapping[str, Precision]
    host: str = "diffusers"
    runtime: Runtime = "any"
    opset: int = OPSET

    @property
    def quantized(self) -> Quantized | None:
        """The precision that the UNet is quantized to after its export, or None."""
        return self.precision if self.precision in QUANTIZED and "unet" in self.precisions else None

    @property
    def stored_precisions(self) -> dict[str, str]:
        """Component → the precision of its graph in the folder."""
        return {**self.precisions, **({"unet": self.quantized} if self.quantized else {})}

    def to_config(self) -> dict[str, Any]:
        """Returns the settings as an export's manifest holds them."""
        return {
            "precision": self.precision,
            "opset": self.opset,
            "runtime": self.runtime,
            "signature": self.host,
            "components": list(self.precisions),
            "precisions": self.stored_precisions,
        }


def choose_settings(
    pipeline: TextToImagePipeline,
    precision: Precision | Quantized = "fp32",
    components: Iterable[str] | None = None,
    host: str = "diffusers",
    runtime: Runtime = "any",
    opset: int | None = None,
) -> ExportSettings:
    """Returns the settings of an export.

    Args:
        pipeline: to be exported.
        precision: of the weights, inputs and outputs.
        components: None is all that `host` needs for text-to-image.
        host: whose names the inputs and outputs have, a key of `HOSTS`.
        runtime: the one that the graphs are written for.
        opset: of the standard operators; None is `OPSET`.

    Raises:
        UsageError: an unknown component, precision, host, runtime or opset. ModelError: the pipeline lacks a component,
            or was trained on what the host would not know. BackendMissing: a quantized precision, and what it needs
            is not installed.
    """
    if runtime not in get_args(Runtime):
        raise UsageError(f"no runtime {runtime!r}", expected=" or ".join(get_args(Runtime)))
    if opset is not None and not LEAST_OPSET <= opset <= MOST_OPSET:
        raise UsageError(f"opset {opset}", expected=f"{LEAST_OPSET} to {MOST_OPSET}, which torch exports")
    if precision not in (*DTYPES, *QUANTIZED):
        raise UsageError(f"no precision {precision!r}", expected=" or ".join((*DTYPES, *QUANTIZED)))
    if precision in QUANTIZED and (reason := missing()) is not None:
        raise BackendMissing(reason, hint=INSTALL)
    chosen = check_components(default_components(pipeline, host) if components is None else components, host)
    for component in chosen:
        part_of(pipeline, component)
    if host != "diffusers":
        check_host_noise(pipeline, f"a graph with the signature {host}", schedule=host == "webui")
    base: Precision = "fp16" if precision in QUANTIZED else precision  # type: ignore[assignment]
    precisions = {component: stable_precision(pipeline, component, base) for component in chosen}
    return ExportSettings(precision, precisions, host, runtime, opset or OPSET)


def check_components(components: Iterable[str], host: str = "diffusers") -> tuple[str, ...]:
    """Returns the components, each once, in the order given.

    Raises:
        UsageError: there is no component, an unknown one, or one that the host runs itself.
    """
    chosen = tuple(dict.fromkeys(components))
    if host not in HOSTS:
        raise UsageError(f"no signature {host!r}", expected=" or ".join(HOSTS))
    if not chosen or set(chosen) - set(COMPONENTS):
        raise UsageError(
            f"no component {', '.join(sorted(set(chosen) - set(COMPONENTS))) or 'given'}",
            expected=f"some of {', '.join(COMPONENTS)}",
        )
    if run_by_host := set(chosen) - set(HOSTS[host]):
        raise UsageError(
            f"{', '.join(sorted(run_by_host))} with the signature {host}, which runs its own",
            expected=", ".join(HOSTS[host]),
        )
    return chosen
