"""`Backend`: what the rest of the project asks about a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sdcompress_engines.progress import SILENT, Reporter

if TYPE_CHECKING:
    from sdcompress_engines.runners import Runner

    from sdcompress.export.components import Precision, Runtime
    from sdcompress.models.load import LoadedPipeline


@dataclass(frozen=True)
class UNetRequest:
    """What a backend needs to open a UNet.

    Attributes:
        loaded: the pipeline in torch; its UNet is already on `device`, in `precision`.
        device: `cpu`, `cuda` or `cuda:N`.
        precision: of the UNet.
        artifacts: the folder with the compiled UNet; None uses the one in the cache folder, compiled now if it is not
            there.
        report: gets the progress.
        loras: whether LoRAs are to be put into the UNet while it is open.
    """

    loaded: LoadedPipeline
    device: str
    precision: Precision
    artifacts: Path | None = None
    report: Reporter = SILENT
    loras: bool = False


@dataclass(frozen=True)
class Backend:
    """One backend: it runs the components of a pipeline.

    Attributes:
        name: as it is typed and stored.
        title: as people write it, in reports and messages.
        colors: in reports, on a light and on a dark page (CSS).
        alias: another name.
        artifact: the kind of export folder that it runs whole pipelines from; None runs the pipeline in torch.
        suffix: of the file with one component, where there is one.
        open_unet: returns the open runner of a UNet, for backends that replace the UNet of a pipeline in torch.
        compiles: whether `open_unet` compiles the UNet, which takes minutes; `doctor` then proves a small one.
        cached_unet: (sha256 of the model, device, precision) → the file in the cache folder that `open_unet` uses,
            whether it is there or not; None where nothing is kept on disk.
        missing: returns why it does not run on a kind of device (`cpu`, `cuda`), or None where it does.
        devices: the kinds of device that it can run on.
        auto: device → the precisions that `--backend auto` measures there; bf16 only on CPUs that compute it.
        lacks: device → a precision it does not compute there → the reason.
        graph_runtimes: device → the runtime that its ONNX graphs are written for; `any` elsewhere.
        package: what pip reinstalls where it does not work.
        gpu_package: the same on a GPU, where that is another package.
        libraries: the libraries that it can run on, where there are several: name → what pip reinstalls. `doctor`
            proves each of them.
    """

    name: str
    title: str
    colors: tuple[str, str]
    alias: str | None = None
    artifact: Literal["onnx", "engine"] | None = None
    suffix: str | None = None
    open_unet: Callable[[UNetRequest], Runner] | None = None
    compiles: bool = False
    cached_unet: Callable[[str, str, Precision], Path] | None = None
    missing: Callable[[str], str | None] = lambda device: None
    devices: tuple[str, ...] = ("cpu", "cuda")
    auto: Mapping[str, tuple[Precision, ...]] = field(default_factory=dict)
    lacks: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    graph_runtimes: Mapping[str, Runtime] = field(default_factory=dict)
    package: str = "torch"
    gpu_package: str | None = None
    libraries: Mapping[str, str] = field(default_factory=dict)

    @property
    def short_name(self) -> str:
        """The shorter of its names, which help texts and hints show."""
        return min(self.alias or self.name, self.name, key=len)

    def package_for(self, name: str, device: str) -> str:
        """Returns what pip reinstalls where the backend does not work.

        Args:
            name: of the backend, or of one of its libraries.
            device: `cpu` or `cuda`.
        """
        if name in self.libraries:
            return self.libraries[name]
        return self.gpu_package or self.package if device != "cpu" else self.package
