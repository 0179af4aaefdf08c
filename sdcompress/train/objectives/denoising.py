"""The diffusion loss: full finetuning and LoRA."""

from __future__ import annotations

from typing import Any

import torch

from sdcompress.train.batches import NoisyBatch
from sdcompress.train.objectives.objective import Objective, weighted_mse


class Denoising(Objective):
    """The diffusion loss alone: full finetuning and LoRA (arXiv 2006.11239, equation 14)."""

    def compute_losses(self, trained: Any, batch: NoisyBatch) -> dict[str, torch.Tensor]:
        arguments, options = batch.unet_arguments()
        return {"loss": weighted_mse(trained(*arguments, **options)[0], batch.target, batch.weight)}
