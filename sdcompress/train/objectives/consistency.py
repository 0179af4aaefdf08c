"""Consistency along the teacher's guided trajectory: the loss that makes a model draw in few steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call

from sdcompress.train.batches import NoisyBatch
from sdcompress.train.objectives.objective import Objective, predict_frozen
from sdcompress.train.trajectory import Trajectory

_LEAST_REACH = 0.02
"""Below it a difference is rounding, which a division would enlarge."""


class Consistency(Objective):
    """Latent consistency with one phase (arXiv 2310.04378), phased consistency with several (arXiv 2405.18407).

    From a noisy sample the teacher makes one solver step with guidance. The trained network has to jump from the sample
    to the end of its phase, and to land where its own average lands from the teacher's step. At the end of a phase the
    teacher's step is the target itself. So the network learns the guided trajectory, and draws without guidance.

    Args:
        teacher: the frozen UNet, in eval mode.
        trajectory: the solver's places and phases; the batches' timesteps lie on it.
        absent: the embeddings of the absent caption: `text`, (1, 77, D), and with SDXL `pooled`, (1, P), float.
        guidance_scale: of the teacher's steps; 1 is none.
        huber_c: below this difference the loss is quadratic, above it linear (arXiv 2310.14189, section 3.3).
        unit: `sample` compares where the jumps end; `prediction` divides that by how far an end moves with the
            prediction, so that all places count alike. Otherwise those near pure noise outweigh the rest.
    """

    def __init__(
        self,
        teacher: nn.Module,
        trajectory: Trajectory,
        absent: Mapping[str, torch.Tensor],
        guidance_scale: float,
        huber_c: float,
        unit: Literal["prediction", "sample"] = "prediction",
    ) -> None:
        self.teacher, self.trajectory, self.absent = teacher, trajectory, absent
        self.guidance_scale, self.huber_c, self.unit = guidance_scale, huber_c, unit
        self._trained: nn.Module | None = None
        self._average: Mapping[str, torch.Tensor] = {}

    def use_average(self, average: Mapping[str, torch.Tensor]) -> None:
        """Receive the averaged weights, whose predictions are the targets; where there are none, the network's own."""
        self._average = average

    @contextmanager
    def attach_hooks(self, trained: nn.Module) -> Iterator[None]:
        """Keep the network, which also runs with the averaged weights, for the length of a run."""
        self._trained = trained
        try:
            yield
        finally:
            self._trained = None

    def compute_losses(self, trained: Any, batch: NoisyBatch) -> dict[str, torch.Tensor]:
        """Returns `loss`, the pseudo-Huber distance of the two jumps; a scalar. Call it inside `attach_hooks`."""
        places = self.trajectory.find_places(batch.timesteps)
        ends = self.trajectory.find_phase_ends(places)
        with torch.no_grad():
            predicted = self._predict_with_guidance(batch)
            nearer = self.trajectory.step(batch.sample, predicted, places, places - 1)
            target = self.trajectory.jump(nearer, self._predict_on_average(batch, nearer, places - 1), places - 1, ends)
            # Without an average the target comes from the trained weights: older torch would take autocast's copies of
            # them, which were made without gradients, for the trained pass too.
            torch.clear_autocast_cache()
        arguments, options = batch.unet_arguments()
        jumped = self.trajectory.jump(batch.sample, trained(*arguments, **options)[0].float(), places, ends)
        difference = jumped - target
        if self.unit == "prediction":
            difference = difference / self.trajectory.find_reach(places, ends).clamp_min(_LEAST_REACH)
        distances = (difference.square() + self.huber_c**2).sqrt() - self.huber_c
        return {"loss": (batch.weight * distances.flatten(1).mean(1)).mean()}

    def _predict_with_guidance(self, batch: NoisyBatch) -> torch.Tensor:
        """Returns the teacher's prediction with classifier-free guidance, (B, C, h, w) float32."""
        if self.guidance_scale == 1:
            return predict_frozen(self.teacher, batch).float()
        captioned, absent = predict_frozen(self.teacher, self._with_absent_captions(batch)).float().chunk(2)
        return absent + self.guidance_scale * (captioned - absent)

    def _with_absent_captions(self, batch: NoisyBatch) -> NoisyBatch:
        """Returns the batch, followed by the same samples with the absent caption."""

        def follow(captioned: torch.Tensor, name: str) -> torch.Tensor:
            return torch.cat([captioned, self.absent[name].to(captioned).expand_as(captioned)])

        both = batch.map_tensors(lambda tensor: torch.cat([tensor, tensor]))
        added = both.added
        if batch.added is not None and added is not None:
            added = added | {"text_embeds": follow(batch.added["text_embeds"], "pooled")}
        return replace(both, encoder_hidden_states=follow(batch.encoder_hidden_states, "text"), added=added)

    def _predict_on_average(self, batch: NoisyBatch, sample: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Returns the prediction of the averaged network, (B, C, h, w) float32.

        Args:
            batch: gives the conditions.
            sample: after the teacher's step, (B, C, h, w) float32.
            places: of the samples, (B,) int64.
        """
        assert self._trained is not None, "call it inside attach_hooks"
        timesteps = self.trajectory.to_timesteps(places)
        arguments = (sample, timesteps, batch.encoder_hidden_states)
        options = batch.unet_arguments()[1]
        predicted: torch.Tensor = functional_call(self._trained, dict(self._average), arguments, options)[0]
        return predicted.float()
