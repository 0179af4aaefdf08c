"""The key of an engine: everything that decides what the engine is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import ArtifactError
from .flavour import REBUILD, binding
from .manifest import canonical

ShapeRange = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
Profiles = tuple[Mapping[str, ShapeRange], ...]
"""Optimization profiles: for each, input → (min, opt, max) shapes."""
_MOST = 2**31
"""Sizes of tensors are below it."""


@dataclass(frozen=True)
class EngineKey:
    """Everything that decides what an engine is. Two builds with one key give the same engine.

    Names and values are those of an engine manifest's config.

    Attributes:
        model: sha256 of the graph.
        version: of the flavour's library. It enters as far as it binds the engine, see `flavour.binding`; the same
            holds for `compute_capabilities` and `platform`.
        profiles: input → (min, opt, max) shapes, one mapping for each profile, in the engine's order.
        options: of the builder; all of them enter.
    """

    model: str
    component: str
    precision: str
    signature: str
    flavour: str
    version: str
    compute_capabilities: tuple[tuple[int, int], ...]
    platform: str
    profiles: Profiles
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Returns 20 hex digits, the engine's name in the store."""
        described = self._described() | {"compute_capabilities": None} | binding(vars(self))
        return hashlib.sha256(canonical(described)).hexdigest()[:20]

    def config(self) -> dict[str, Any]:
        """Returns the part of an engine manifest's config that holds this key."""
        return self._described() | {"keys": {self.component: self.digest}}

    def _described(self) -> dict[str, Any]:
        texts = ("flavour", "version", "platform", "precision", "signature")
        return {name: getattr(self, name) for name in texts} | {
            "compute_capabilities": [list(card) for card in self.compute_capabilities],
            "components": [self.component],
            "profiles": {
                self.component: [
                    {name: [list(shape) for shape in shapes] for name, shapes in profile.items()}
                    for profile in self.profiles
                ]
            },
            "options": dict(self.options),
            "model": {self.component: self.model},
        }

    @classmethod
    def of(cls, config: Mapping[str, Any], component: str) -> EngineKey:
        """Returns the key of one component's engine, from the config of a manifest.

        Raises:
            ArtifactError: the config lacks a part of the key, or has a wrong value there.
        """
        try:
            texts = {name: str(config[name]) for name in ("precision", "signature", "flavour", "version", "platform")}
            cards = tuple((int(major), int(minor)) for major, minor in config["compute_capabilities"])
            profiles = tuple(
                {str(name): _shape_range(shapes) for name, shapes in profile.items()}
                for profile in config["profiles"][component]
            )
            return cls(
                str(config["model"][component]),
                component,
                compute_capabilities=cards,
                profiles=profiles,
                options=dict(config["options"]),
                **texts,
            )
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ArtifactError(
                f"the manifest does not say what the {component} engine is ({type(error).__name__}: {error})",
                hint=REBUILD,
            ) from error


def _shape_range(shapes: Any) -> ShapeRange:
    least, best, most = (tuple(shape) for shape in shapes)
    if not all(type(size) is int and 0 <= size < _MOST for shape in (least, best, most) for size in shape):
        raise ValueError("a size of a profile is no number that an engine takes")
    return least, best, most
