"""Hints where a sampling differs from the one that a few-step model was trained for. Nothing here imports ComfyUI."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from .folders import EngineFolder

LOG = logging.getLogger("sdcompress")
_NEGATIVE = 1
"""ComfyUI's number of the negative prompt in `cond_or_uncond`."""


class LateReader:
    """Reads a number from the device without waiting for it: the value is known one or more calls later."""

    def __init__(self) -> None:
        self._copy: torch.Tensor | None = None
        self._copied: Any = None

    def read(self, tensor: torch.Tensor) -> float | None:
        """Returns the first element: of this tensor on a CPU, else of an earlier one, or None while none has arrived.

        Args:
            tensor: any shape, with one element at least.
        """
        first = tensor.detach().flatten()[:1]
        if first.device.type != "cuda":
            return float(first)
        if self._copy is not None and not self._copied.query():
            return None
        found = None if self._copy is None else float(self._copy)
        self._copy = first.to("cpu", non_blocking=True)
        self._copied = torch.cuda.current_stream(first.device).record_event()
        return found


class SamplingHints:
    """Logs once for each difference between a sampling and the one that an engine was trained for.

    Args:
        folder: the engine; one without sampling gets no hints.
    """

    def __init__(self, folder: EngineFolder) -> None:
        self._folder = folder
        self._reader = LateReader()
        self._given: set[str] = set()

    def look(self, timesteps: torch.Tensor, options: Mapping[str, Any]) -> None:
        """Look at a call, which shows what the nodes before it have chosen.

        Args:
            timesteps: of the call, (B,) or (1,).
            options: ComfyUI's `transformer_options`.
        """
        sampling = self._folder.sampling
        if sampling is None:
            return
        differences = []
        trained, now = sampling.timesteps, self._reader.read(timesteps)
        if trained is not None and now is not None and all(abs(now - each) > 0.5 for each in trained):
            differences.append(f"other timesteps than {', '.join(map(str, trained))}")
        if sampling.guidance_scale <= 1 and _NEGATIVE in options.get("cond_or_uncond", ()):
            differences.append("a CFG other than 1: its guidance is in its weights, and each step takes two calls")
        for difference in set(differences) - self._given:
            self._given.add(difference)
            settings = sampling.describe("comfyui")
            LOG.warning("%s was trained for %s. This sampling has %s", self._folder.name, settings, difference)
