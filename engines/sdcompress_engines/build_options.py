"""The options of an engine build, and which of them a TensorRT flavour supports."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from .errors import UsageError
from .flavour import Flavour

# An engine that is built ahead of the card is portable, and compiled on the card that loads it. There these options
# would change nothing, or the build would fail.
_NOT_AHEAD = ("hardware_compatible", "version_compatible", "optimization_level")


@dataclass(frozen=True)
class BuildOptions:
    """The options of a build. The defaults are right for most engines.

    Attributes:
        optimization_level: 0 (fast build) to 5 (thorough); None is the library's own, 3.
        workspace_mib: upper limit of a layer's scratch memory, MiB; None is all there is.
        refit: weights can be exchanged later: `any`, or `identical` for equal ones only, which costs no speed and
            exists from TensorRT 10 on.
        loras: the weights that a LoRA changes can be exchanged, and only these; see `Runner.set_weights`.
        strip_plan: the engine carries no weights; they are read from the graph when it is loaded.
        weight_streaming: weights may stay in host memory and be streamed, for cards that they do not fit on.
        hardware_compatible: run on other cards too, more slowly: `ampere_plus` or `same_compute_capability`;
            `tensorrt` only.
        version_compatible: run on later versions of the same major version too, more slowly; `tensorrt` only.

    Raises:
        UsageError: an unknown value.
    """

    optimization_level: int | None = None
    workspace_mib: int | None = None
    refit: str | None = None
    loras: bool = False
    strip_plan: bool = False
    weight_streaming: bool = False
    hardware_compatible: str | None = None
    version_compatible: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("refit", self.refit, ("any", "identical")),
            ("hardware compatibility", self.hardware_compatible, ("ampere_plus", "same_compute_capability")),
            ("optimization level", self.optimization_level, range(6)),
        ):
            if value is not None and value not in known:
                raise UsageError(f"{name} {value!r}", expected=" or ".join(map(str, known)))

    def chosen(self) -> dict[str, Any]:
        """Returns the options that differ from their defaults."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}


def check_options(flavour: Flavour, options: BuildOptions) -> None:
    """Refuse options that this flavour does not build.

    Raises:
        UsageError: names the option.
    """
    if not flavour.builds_ahead():
        return
    for name in _NOT_AHEAD:
        if name in options.chosen():
            raise UsageError(
                f"--{name.replace('_', '-')} with {flavour.name}",
                expected="the flavour tensorrt",
                hint="leave it out: this engine is tuned on the card that loads it",
            )
