"""A runner as the `unet` of a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from .engine_module import EngineModule
from .errors import EngineMismatch
from .outputs import UNetOutput
from .progress import SILENT, Reporter
from .runners import Runner, TorchRunner


class EngineUNet(EngineModule):
    """Any runner of a UNet graph, as the `unet` of a diffusers pipeline.

    Args:
        runner, config, host: see `EngineModule`.
        fallback: returns the UNet in torch that runs shapes which the engine was not built for. It is called once, when
            the first such shape comes.
        report: gets a line when that happens.
    """

    component, needed = "unet", ("out_sample",)

    def __init__(
        self,
        runner: Runner,
        config: Mapping[str, Any],
        host: str = "diffusers",
        *,
        fallback: Callable[[], torch.nn.Module] | None = None,
        report: Reporter = SILENT,
    ) -> None:
        super().__init__(runner, config, host)
        self._fallback, self._report = fallback, report
        # In a list, so that it is no submodule: `to()` and `device` are the engine's.
        self._torch: list[TorchRunner] = []
        self._changes: tuple[Mapping[str, torch.Tensor], Hashable] = ({}, None)
        if self.config.get("addition_embed_type") == "text_time":
            # SDXL's pipeline reads this width from the module, not from its config.
            self.add_embedding = SimpleNamespace(
                linear_1=SimpleNamespace(in_features=self.config["projection_class_embeddings_input_dim"])
            )

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        *,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        return_dict: bool = True,
        **unsupported: Any,
    ) -> UNetOutput | tuple[torch.Tensor]:
        """Returns the prediction, (B, 4, H/8, W/8), on the runner's device, in `sample.dtype`.

        Args:
            sample: noisy latents, (B, 4, H/8, W/8), any float dtype.
            timestep: one number, or one for each sample, (B,).
            encoder_hidden_states: text embeddings, (B, 77·k, C).
            added_cond_kwargs: SDXL's `text_embeds` (B, C') and `time_ids` (B, 6).
            return_dict: a `UNetOutput`; without it a tuple.
            unsupported: other options of diffusers' UNet; only empty values are accepted.

        Raises:
            EngineError: an option that the graph has no input for. EngineMismatch: a shape that it does not take, and
                there is no fallback.
        """
        self.refuse(**unsupported)
        times = torch.as_tensor(timestep).reshape(-1).expand(sample.shape[0])
        added = dict(added_cond_kwargs or {})
        feeds = self.graph.feeds(sample=sample, timestep=times, encoder_hidden_states=encoder_hidden_states, **added)
        try:
            out = self.runner.infer(feeds)[self.graph.outputs["out_sample"]]
        except EngineMismatch as error:  # names, dtypes and devices are checked already, so it is a shape
            if self._fallback is None:
                raise
            out = self._in_torch(error, sample, times, encoder_hidden_states, added)
        out = out.to(sample.dtype)
        return UNetOutput(out) if return_dict else (out,)

    def set_weights(self, changes: Mapping[str, torch.Tensor], key: Hashable = None) -> None:
        """Exchange weights of the engine, and of the UNet in torch when it runs; see `Runner.set_weights`."""
        super().set_weights(changes, key)
        self._changes = changes, key

    def _in_torch(
        self,
        error: EngineMismatch,
        sample: torch.Tensor,
        times: torch.Tensor,
        context: torch.Tensor,
        added: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        if not self._torch:
            assert self._fallback is not None
            self._report.show_line(f"falling back to torch for this shape: {error}")
            self._torch.append(TorchRunner(self._fallback(), (), ()).open())
        self._torch[0].set_weights(*self._changes)
        module = self._torch[0].module
        weight = next(module.parameters())
        with torch.no_grad():
            conditions = {name: tensor.to(weight.device, weight.dtype) for name, tensor in added.items()}
            out: torch.Tensor = module(
                sample.to(weight.device, weight.dtype),
                times.to(weight.device),
                context.to(weight.device, weight.dtype),
                added_cond_kwargs=conditions,
                return_dict=False,
            )[0]
        return out.to(self.device)
