"""What the rest of the project asks about a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sdcompress_engines.progress import SILENT, Reporter

if TYPE_CHECKING:
    from sdcompress_engines.runners import Runner

    from sdcompress.export.components import Precision
    from sdcompress.models.load import LoadedPipeline


@dataclass(frozen=True)
class UNetRequest:
    """What a backend gets to open a UNet.

    Attributes:
        loaded: the pipeline in torch; its UNet is already on `device`, in `precision`.
        artifacts: the folder of what was compiled before; None takes it from the cache folder, or makes it there.
    """

    loaded: LoadedPipeline
    device: str
    precision: Precision
    artifacts: Path | None = None
    report: Reporter = SILENT


@dataclass(frozen=True)
class Backend:
    """What runs a pipeline's components.

    Attributes:
        name: as it is typed and stored. title: as people write it, in reports and messages.
        colors: in reports, on a light and on a dark page (CSS).
        alias: a shorter name; also the one that help texts show.
        artifact: the kind of export folder that it runs whole pipelines from; None runs the pipeline in torch.
        suffix: of the file with one component, where there is one.
        open_unet: returns the open runner of a UNet, for backends that replace the UNet of a pipeline in torch.
        missing: returns why it does not run on a kind of device (`cpu`, `cuda`), or None where it does.
        auto: device → the precisions that `--backend auto` measures there; bf16 only on CPUs that compute it.
        lacks: device → a precision it does not compute there → the reason.
        package: what pip reinstalls where it does not work.
        note: beside the name in help texts.
    """

    name: str
    title: str
    colors: tuple[str, str]
    alias: str | None = None
    artifact: Literal["onnx", "engine"] | None = None
    suffix: str | None = None
    open_unet: Callable[[UNetRequest], Runner] | None = None
    missing: Callable[[str], str | None] = lambda device: None
    auto: Mapping[str, tuple[Precision, ...]] = field(default_factory=dict)
    lacks: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    package: str = "torch"
    note: str | None = None

    @property
    def short_name(self) -> str:
        """The name that help texts and hints show."""
        return self.alias or self.name
