"""The diffusion loss: full finetuning and LoRA."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from sdcompress.train.batches import NoisyBatch
from sdcompress.train.objectives.objective import weighted_mse


class Denoising:
    """The diffusion loss alone: full finetuning and LoRA (arXiv 2006.11239, equation 14)."""

    hooked: tuple[list[str], list[str]] = ([], [])

    def attached(self, trained: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def losses(self, trained: Any, batch: NoisyBatch) -> dict[str, torch.Tensor]:
        arguments, options = batch.arguments()
        return {"loss": weighted_mse(trained(*arguments, **options)[0], batch.target, batch.weight)}
