"""The two TensorRT libraries behind one name each: found by importing them, told apart by what they can do, never by a
version string.

And what their engines are bound to, as NVIDIA documents it, so that one of another version, card or platform is refused
with a sentence instead of by a runtime: see "Engine Compatibility" in the TensorRT 11 and TensorRT-RTX documentation.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from .errors import ArtifactError, BackendMissing, EngineMismatch, SdCompressError, UsageError

Card = tuple[int, int]
"""A compute capability, (major, minor)."""


@dataclass(frozen=True)
class Flavour:
    """One library: the name users type, the module, and how to install it."""

    name: str
    module: str
    install: str

    def load(self) -> Any:
        """The module.

        Raises:
            BackendMissing: it is not installed, or its libraries do not load.
        """
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError, RuntimeError) as error:
            raise BackendMissing(f"{self.name} is not usable ({error})", hint=self.install) from error

    def missing(self) -> str | None:
        """Why it cannot be imported here, or None."""
        try:
            self.load()
        except BackendMissing as error:
            return error.what
        return None

    def builds_ahead(self) -> bool:
        """Whether it builds for a card that is not in this machine."""
        trt = self.load()
        return hasattr(trt, "ComputeCapability") and hasattr(trt.IBuilderConfig, "set_compute_capability")

    def served_cards(self) -> tuple[Card, ...] | None:
        """Returns the compute capabilities that this library lists as its own, (major, minor) each; None where it has
        no such list.
        """
        listed = getattr(self.load(), "ComputeCapability", None)
        if listed is None:
            return None
        return tuple(sorted((int(name[2:-1]), int(name[-1])) for name in listed.__members__ if name.startswith("SM")))

    def unserved(self, card: Card) -> str | None:
        """Returns why engines of this library do not run on a card of this compute capability, or None."""
        served = self.served_cards()
        if served is None or card in served:
            return None
        return (
            f"{self.name} {self.version} serves no compute capability {_dotted(card)}, only"
            f" {', '.join(map(_dotted, served))}"
        )

    @property
    def version(self) -> str:
        return str(self.load().__version__)


TENSORRT = Flavour("tensorrt", "tensorrt", "pip install 'sdcompress[trt]'")
TENSORRT_RTX = Flavour("tensorrt-rtx", "tensorrt_rtx", "pip install 'sdcompress[rtx]'")
FLAVOURS = {flavour.name: flavour for flavour in (TENSORRT, TENSORRT_RTX)}


def present_card(device: Any = None) -> Card | None:
    """Returns the compute capability of the GPU in this machine, or None where there is none.

    Args:
        device: a torch CUDA device; by default the current one.
    """
    import torch

    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def choose_flavour(
    requested: str | None = None, card: Card | None = None, wanted_cards: Sequence[Card] | None = None
) -> Flavour:
    """Returns the flavour to build with: the requested one, else `tensorrt` for the GPU that is here and `tensorrt-rtx`
    where none is.

    With a GPU but no `tensorrt` installed, `tensorrt-rtx` is used if it serves that GPU. Without a GPU only
    `tensorrt-rtx` builds.

    Args:
        card: compute capability of the GPU in this machine; None where there is none.
        wanted_cards: compute capabilities to build for, where they are not this machine's.

    Raises:
        UsageError: no flavour of that name. BackendMissing: it is not installed, or does not serve this GPU, with what
            to type next.
    """
    if requested is not None and requested not in FLAVOURS:
        raise UsageError(f"no TensorRT flavour {requested!r}", expected=" or ".join(FLAVOURS))
    wanted = [FLAVOURS[requested]] if requested else [TENSORRT, TENSORRT_RTX] if card else [TENSORRT_RTX]
    reasons: dict[str, str] = {}
    for flavour in wanted:
        reason = flavour.missing() or _cannot_build(flavour, card, wanted_cards)
        if reason is None:
            return flavour
        reasons[flavour.name] = reason
    if card and TENSORRT_RTX.name in reasons and not TENSORRT_RTX.missing():
        hint = f"{TENSORRT.install}, --backend ort, or --compute-capability 8.9 to build for another card"
    else:
        hint = wanted[0].install if card else TENSORRT_RTX.install
    raise BackendMissing("; ".join(reasons.values()), hint=hint)


def _cannot_build(flavour: Flavour, card: Card | None, wanted_cards: Sequence[Card] | None) -> str | None:
    """Why a library that is installed builds nothing for these cards, or None."""
    if flavour.builds_ahead():
        return None if wanted_cards or card is None else flavour.unserved(card)
    return None if card else f"{flavour.name} builds only for a GPU in this machine, and there is none"


REBUILD = "build it again: sdcompress export MODEL --trt -o DIR"
_AMPERE = (8, 0)
_READS_OLDER = {10: (8,), 11: (10,)}  # major version → earlier ones whose version-compatible engines it runs


def platform_name() -> str:
    """Operating system and processor of this machine: `linux-x86_64`, `linux-aarch64`, `windows-amd64`."""
    return f"{platform.system()}-{platform.machine()}".lower()


def binding(config: Mapping[str, Any]) -> dict[str, Any]:
    """`version`, `cards` and `platform`: what an engine made with this manifest config is bound to, and no more.

    | | `tensorrt` | `tensorrt-rtx` |
    |---|---|---|
    | version | all of it; major and minor with `version_compatible` | all of it |
    | cards | the compute capability; 8.0 and up with `hardware_compatible` = `ampere_plus` | those it was built for; 8.0 and up with none given |
    | platform | system and processor | the processor |

    Raises:
        ArtifactError: the config does not say it.
    """
    try:
        flavour, version, options = config["flavour"], config["version"], dict(config.get("options", {}))
        cards = sorted({(int(major), int(minor)) for major, minor in config["compute_capabilities"]})
        rtx = flavour == TENSORRT_RTX.name
        from_ampere = not cards if rtx else options.get("hardware_compatible") == "ampere_plus"
        if not all(isinstance(text, str) and text for text in (flavour, version, config["platform"])) or not (
            cards or from_ampere
        ):
            raise ValueError("an empty field")
        return {
            "version": ".".join(version.split(".")[:2]) if _forward(config) else version,
            "cards": [f"{_dotted(_AMPERE)}+"] if from_ampere else [_dotted(card) for card in cards],
            "platform": _processor(config["platform"]) if rtx else config["platform"],
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ArtifactError(
            f"the engine's manifest does not say what it was built for ({type(error).__name__}: {error})", hint=REBUILD
        ) from error


def obstacle(
    config: Mapping[str, Any], where: str | PathLike[str] | None = None, device: Any = None
) -> SdCompressError | None:
    """The error that loading an engine with this manifest config would end in on this machine, or None; no runtime sees
    its bytes.

    An `EngineMismatch` for another version, card or platform; a `BackendMissing` where there is no runtime or no GPU to
    tell by.

    Args:
        where: the engine's path, for the message.
        device: the torch CUDA device it is to run on; by default the current one.
    """
    try:
        bound = binding(config)
    except ArtifactError as error:
        return ArtifactError(error.what, where=where, hint=error.hint)
    flavour, version = FLAVOURS.get(config["flavour"]), config["version"]
    if flavour is None:
        return EngineMismatch(
            f"an engine of {config['flavour']!r}, which is not known here",
            where=where,
            expected=" or ".join(FLAVOURS),
            hint=REBUILD,
        )
    here = platform_name()
    if bound["platform"] != (_processor(here) if flavour is TENSORRT_RTX else here):
        return EngineMismatch(
            f"the engine was built for {config['platform']}, and this is {here}",
            where=where,
            expected=f"an engine for {here}",
            hint=f"here, {REBUILD}",
        )
    if reason := flavour.missing():
        return BackendMissing(reason, where=where, hint=flavour.install)
    if not _version_fits(version, flavour.version, _forward(config)):
        return EngineMismatch(
            f"the engine was built with {flavour.name} {version}, and {flavour.version} is installed here",
            where=where,
            expected=f"an engine of {flavour.version}",
            hint=f"{REBUILD}, or install {flavour.name} {version}",
        )
    import torch

    if not torch.cuda.is_available():
        return BackendMissing(
            f"a {flavour.name} engine runs on an NVIDIA GPU and there is none",
            where=where,
            hint="--backend ort, which runs the ONNX graphs on any machine",
        )
    card = torch.cuda.get_device_capability(device)
    if reason := flavour.unserved(card):
        return BackendMissing(
            f"{reason}; this is {torch.cuda.get_device_name(device)}",
            where=where,
            hint=f"an engine of {TENSORRT.name}, or --backend ort",
        )
    if _dotted(card) not in bound["cards"] and not (bound["cards"] == [f"{_dotted(_AMPERE)}+"] and card >= _AMPERE):
        found = f"{torch.cuda.get_device_name(device)} has {_dotted(card)}"
        return EngineMismatch(
            f"the engine was built for compute capability {', '.join(bound['cards'])}, and {found}",
            where=where,
            expected=f"an engine for {_dotted(card)}",
            hint=f"sdcompress export MODEL --trt --compute-capability {_dotted(card)} -o DIR",
        )
    return None


def why_not_here(config: Mapping[str, Any]) -> str | None:
    """Why an engine with this manifest config does not load on this machine, with what to type next; None where it
    should.
    """
    found = obstacle(config)
    return None if found is None else str(found)


def check_fits_here(config: Mapping[str, Any], where: str | PathLike[str], device: Any = None) -> None:
    """Refuse an engine that cannot load on this machine, before a runtime sees its bytes.

    Raises:
        EngineMismatch: made with another version, or for another card or platform. BackendMissing: no runtime, or no
            GPU.
        ArtifactError: its manifest does not say what it was made for.
    """
    if (found := obstacle(config, where, device)) is not None:
        raise found


def check_model(config: Mapping[str, Any], component: str, model_sha256: str, where: str | PathLike[str]) -> None:
    """Refuse an engine of another model.

    Raises:
        EngineMismatch: its graph was not the one with `model_sha256`.
    """
    models = config.get("model")
    made_of = models.get(component) if isinstance(models, Mapping) else None
    if made_of != model_sha256:
        found = (
            f"from the graph {made_of[:12]}" if isinstance(made_of, str) else "from a graph its manifest does not name"
        )
        raise EngineMismatch(
            f"the {component} engine is of another model: it was built {found}",
            where=where,
            expected=f"one built from {model_sha256[:12]}",
            hint="build this model's: sdcompress export MODEL --trt -o DIR",
        )


def _dotted(card: tuple[int, int]) -> str:
    return f"{card[0]}.{card[1]}"


def _processor(name: str) -> str:
    processor = name.rpartition("-")[2]
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(processor, processor)


def _forward(config: Mapping[str, Any]) -> bool:
    """Whether later versions load it too: TensorRT's version-compatible engines; TensorRT-RTX has none."""
    return config["flavour"] == TENSORRT.name and bool(config.get("options", {}).get("version_compatible"))


def _version_fits(built: str, here: str, forward: bool) -> bool:
    """Whether a runtime of version `here` takes an engine of version `built`; with `forward`, from a later one too."""
    if not forward or built == here:
        return built == here
    try:
        made, runs = ([int(part) for part in version.split(".")] for version in (built, here))
    except ValueError:
        return False
    return made <= runs and (made[0] == runs[0] or made[0] in _READS_OLDER.get(runs[0], ()))
