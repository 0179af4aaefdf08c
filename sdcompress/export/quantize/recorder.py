"""Recording of the UNet's inputs while a pipeline draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sdcompress_engines.errors import DataError

from sdcompress.support.pipeline import TextToImagePipeline

_INPUTS = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")


class InputRecorder:
    """Records some rows of the UNet's inputs, spread evenly over its calls, over the prompts and over guidance.

    Args:
        pipeline: the one that draws.
        samples: rows to record in all.
        prompts: prompts to draw in all.
        on_call: called after each call of the UNet.
    """

    def __init__(self, pipeline: TextToImagePipeline, samples: int, prompts: int, on_call: Callable[[], None]) -> None:
        self._pipeline, self._samples, self._prompts, self._on_call = pipeline, samples, prompts, on_call
        self._rows: dict[str, list[torch.Tensor]] = {}

    @contextmanager
    def recording(self, first: int, count: int) -> Iterator[None]:
        """Record while the block draws `count` prompts, of which `first` is the number of the first one."""
        calls = 0

        def record(module: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            nonlocal calls
            inputs = dict(zip(("sample", "timestep"), arguments, strict=False)) | options
            inputs |= inputs.pop("added_cond_kwargs", None) or {}
            self._record(inputs, calls, first, count)
            calls += 1
            self._on_call()

        handle = self._pipeline.unet.register_forward_pre_hook(record, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def rows(self) -> dict[str, np.ndarray]:
        """Returns the recorded rows by input name, float32."""
        return {name: torch.cat(parts).numpy() for name, parts in self._rows.items()}

    def _record(self, inputs: dict[str, Any], call: int, first: int, count: int) -> None:
        """Record the rows of one call.

        The number of a row decides its call, and then in turn its half of the guided batch and its prompt.

        Args:
            inputs: of the call, by canonical name.
            call: its number.
            first, count: the prompts of the batch, by their numbers.
        """
        batch, calls = inputs["sample"].shape[0], len(self._pipeline.scheduler.timesteps)
        halves = batch // count
        if self._samples > (most := calls * halves * self._prompts):
            raise DataError(
                f"{self._samples} samples cannot be taken from {calls} UNet calls for each of {self._prompts} prompts",
                expected=f"at most {most}",
                hint=f"give at least {-(-self._samples // (calls * halves))} prompts",
            )
        numbers = range(-(-call * self._samples // calls), -(-(call + 1) * self._samples // calls))
        places = [(number % halves, number // halves % self._prompts - first) for number in numbers]
        chosen = [half * count + prompt for half, prompt in places if 0 <= prompt < count]
        inputs["timestep"] = torch.as_tensor(inputs["timestep"], dtype=torch.float32).reshape(-1).expand(batch)
        for name in _INPUTS:
            if chosen and inputs.get(name) is not None:
                self._rows.setdefault(name, []).append(inputs[name][chosen].detach().float().cpu())
