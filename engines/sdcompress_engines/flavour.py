"""The two TensorRT libraries, and what their engines are bound to.

What a library can do is looked up in its module, never in its version string.

An engine is bound to a version, cards and a platform. One that does not fit is refused before a runtime reads it, with
a sentence. Source: "Engine Compatibility" in the documentation of TensorRT 11 and TensorRT-RTX.
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
    """One library.

    Attributes:
        name: what users type.
        module: what Python imports.
        install: the command that installs it.
    """

    name: str
    module: str
    install: str

    def load(self) -> Any:
        """Returns the module.

        Raises:
            BackendMissing: it is not installed, or its libraries do not load.
        """
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError, RuntimeError) as error:
            raise BackendMissing(f"{self.name} is not usable ({error})", hint=self.install) from error

    def missing(self) -> str | None:
        """Returns why it cannot be imported here, or None."""
        try:
            self.load()
        except BackendMissing as error:
            return error.what
        return None

    def builds_ahead(self) -> bool:
        """Returns whether it builds for a card that is not in this machine."""
        trt = self.load()
        return hasattr(trt, "ComputeCapability") and hasattr(trt.IBuilderConfig, "set_compute_capability")

    def supported_cards(self) -> tuple[Card, ...] | None:
        """Returns the compute capabilities that this library supports, (major, minor) each; None without a list."""
        listed = getattr(self.load(), "ComputeCapability", None)
        if listed is None:
            return None
        return tuple(sorted((int(name[2:-1]), int(name[-1])) for name in listed.__members__ if name.startswith("SM")))

    def explain_unsupported(self, card: Card) -> str | None:
        """Returns why engines of this library do not run on a card of this compute capability, or None."""
        served = self.supported_cards()
        if served is None or card in served:
            return None
        return (
            f"{self.name} {self.version} does not support compute capability {_dotted(card)}, only"
            f" {', '.join(map(_dotted, served))}"
        )

    @property
    def version(self) -> str:
        return str(self.load().__version__)


TENSORRT = Flavour("tensorrt", "tensorrt", 'pip install "sdcompress[trt]"')
TENSORRT_RTX = Flavour("tensorrt-rtx", "tensorrt_rtx", 'pip install "sdcompress[rtx]"')
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
    """Returns the flavour to build with: the requested one, else `tensorrt` with a GPU and `tensorrt-rtx` without.

    With a GPU but no `tensorrt` installed, `tensorrt-rtx` is used if it supports that GPU. Without a GPU only
    `tensorrt-rtx` builds.

    Args:
        requested: a key of `FLAVOURS`.
        card: compute capability of the GPU in this machine; None where there is none.
        wanted_cards: compute capabilities to build for, where they are not this machine's.

    Raises:
        UsageError: no flavour of that name. BackendMissing: it is not installed, or does not support this GPU. The
            hint is what to type next.
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
        hint = f"{TENSORRT.install}, or for another card: sdcompress export MODEL --trt --compute-capability 8.9 -o DIR"
    elif requested == TENSORRT.name and not card:
        hint = f"--flavour {TENSORRT_RTX.name}: {TENSORRT_RTX.install}"
    else:
        hint = wanted[0].install
    raise BackendMissing("; ".join(reasons.values()), hint=hint)


def _cannot_build(flavour: Flavour, card: Card | None, wanted_cards: Sequence[Card] | None) -> str | None:
    """Returns why an installed library builds nothing for these cards, or None."""
    if flavour.builds_ahead():
        return None if wanted_cards or card is None else flavour.explain_unsupported(card)
    return None if card else f"{flavour.name} builds only for a GPU in this machine, and there is none"


REBUILD = "build it again: sdcompress export MODEL --trt -o DIR"
_AMPERE = (8, 0)
_READS_OLDER = {10: (8,), 11: (10,)}  # major version → earlier ones whose version-compatible engines it loads


def platform_name() -> str:
    """Returns the system and processor of this machine, such as `linux-x86_64`, `linux-aarch64` or `windows-amd64`."""
    return f"{platform.system()}-{platform.machine()}".lower()


def binding(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what an engine with this manifest config is bound to: `version`, `cards` and `platform`.

    | | `tensorrt` | `tensorrt-rtx` |
    |---|---|---|
    | version | all of it; with `version_compatible` major and minor | all of it |
    | cards | the compute capability; 8.0 and up with `hardware_compatible` = `ampere_plus` | see below |
    | platform | system and processor | the processor |

    A `tensorrt-rtx` engine is bound to the cards it was built for, or without any to 8.0 and up.

    Raises:
        ArtifactError: the config lacks a part of this.
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
            "version": ".".join(version.split(".")[:2]) if _is_forward_compatible(config) else version,
            "cards": [f"{_dotted(_AMPERE)}+"] if from_ampere else [_dotted(card) for card in cards],
            "platform": _processor(config["platform"]) if rtx else config["platform"],
        }
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ArtifactError(
            f"the engine's manifest does not say what it was built for ({type(error).__name__}: {error})", hint=REBUILD
        ) from error


def obstacle(
    config: Mapping[str, Any], where: str | PathLike[str] | None = None, device: Any = None
) -> SdCompressError | None:
    """Returns the error that loading an engine on this machine would end in, or None; no runtime reads its bytes.

    An `EngineMismatch` for another version, card or platform; a `BackendMissing` without a runtime or a GPU; an
    `ArtifactError` for a config that does not say what the engine was built for.

    Args:
        config: of the engine's manifest.
        where: the engine's path, for the message.
        device: the torch CUDA device that it is to run on; by default the current one.
    """
    try:
        bound = binding(config)
    except ArtifactError as error:
        return ArtifactError(error.what, where=where, hint=error.hint)
    flavour = FLAVOURS.get(config["flavour"])
    if flavour is None:
        return EngineMismatch(
            f"an engine of {config['flavour']!r}, which is not known here",
            where=where,
            expected=" or ".join(FLAVOURS),
            hint=REBUILD,
        )
    return _library_obstacle(flavour, config, bound, where) or _card_obstacle(flavour, bound, where, device)


def _library_obstacle(
    flavour: Flavour, config: Mapping[str, Any], bound: Mapping[str, Any], where: str | PathLike[str] | None
) -> SdCompressError | None:
    """Returns the error for an engine of another platform or version, or for a missing library; or None."""
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
    version = config["version"]
    if not accepts_version(version, flavour.version, _is_forward_compatible(config)):
        return EngineMismatch(
            f"the engine was built with {flavour.name} {version}, and {flavour.version} is installed here",
            where=where,
            expected=f"an engine of {flavour.version}",
            hint=f"{REBUILD}, or install {flavour.name} {version}",
        )
    return None


def _card_obstacle(
    flavour: Flavour, bound: Mapping[str, Any], where: str | PathLike[str] | None, device: Any
) -> SdCompressError | None:
    """Returns the error for an engine of another card, or where there is no card for it; or None."""
    import torch

    if not torch.cuda.is_available():
        return BackendMissing(
            f"a {flavour.name} engine runs on an NVIDIA GPU and there is none",
            where=where,
            hint="run the ONNX graph instead: it needs no GPU",
        )
    card = torch.cuda.get_device_capability(device)
    if reason := flavour.explain_unsupported(card):
        return BackendMissing(
            f"{reason}; this is {torch.cuda.get_device_name(device)}",
            where=where,
            hint=f"an engine of {TENSORRT.name}, or the ONNX graph",
        )
    from_ampere = bound["cards"] == [f"{_dotted(_AMPERE)}+"]
    if _dotted(card) not in bound["cards"] and not (from_ampere and card >= _AMPERE):
        present = f"{torch.cuda.get_device_name(device)} has {_dotted(card)}"
        return EngineMismatch(
            f"the engine was built for compute capability {', '.join(bound['cards'])}, and {present}",
            where=where,
            expected=f"an engine for {_dotted(card)}",
            hint=f"sdcompress export MODEL --trt --compute-capability {_dotted(card)} -o DIR",
        )
    return None


def check_fits_here(config: Mapping[str, Any], where: str | PathLike[str], device: Any = None) -> None:
    """Refuse an engine that cannot load on this machine, before a runtime reads its bytes.

    Args:
        config: of the engine's manifest.
        where: the engine's path, for the message.
        device: the torch CUDA device that it is to run on; by default the current one.

    Raises:
        EngineMismatch: built with another version, or for another card or platform. BackendMissing: no runtime, or no
            GPU.
        ArtifactError: its manifest does not say what it was built for.
    """
    if (error := obstacle(config, where, device)) is not None:
        raise error


def _dotted(card: tuple[int, int]) -> str:
    return f"{card[0]}.{card[1]}"


def _processor(name: str) -> str:
    processor = name.rpartition("-")[2]
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(processor, processor)


def _is_forward_compatible(config: Mapping[str, Any]) -> bool:
    """Returns whether later versions load the engine too. TensorRT-RTX has no such engines."""
    return config["flavour"] == TENSORRT.name and bool(config.get("options", {}).get("version_compatible"))


def accepts_version(built: str, here: str, forward: bool) -> bool:
    """Returns whether a runtime loads an engine of another version.

    Args:
        built: the version that built the engine.
        here: the runtime's version.
        forward: whether the engine was built for later versions too.
    """
    if not forward or built == here:
        return built == here
    try:
        engine, runtime = ([int(part) for part in version.split(".")] for version in (built, here))
    except ValueError:
        return False
    return engine <= runtime and (engine[0] == runtime[0] or engine[0] in _READS_OLDER.get(runtime[0], ()))
