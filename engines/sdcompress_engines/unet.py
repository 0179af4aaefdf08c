"""Runners in the places a diffusers pipeline has for its unet, text encoder and VAE; without importing diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from .errors import EngineError, EngineMismatch
from .runners import Runner
from .signature import HOSTS


class UNetOutput(NamedTuple):
    """What diffusers calls `UNet2DConditionOutput`."""

    sample: torch.Tensor


class TextEncoderOutput(NamedTuple):
    """`last_hidden_state` (B, 77, C) and `pooler_output` (B, C)."""

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor


class DecoderOutput(NamedTuple):
    """Pictures (B, 3, 8H, 8W) in [-1, 1]."""

    sample: torch.Tensor


class Config(dict[str, Any]):
    """A component's config, read as a mapping or as attributes, as diffusers does both."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no {name!r}") from None


class _EngineModule(torch.nn.Module):
    """A module without parameters, because a pipeline asks its modules for their device; `to()` moves nothing, a runner stays where it is."""

    component: str

    def __init__(self, runner: Runner, config: Mapping[str, Any], host: str = "diffusers") -> None:
        super().__init__()
        self.runner = runner.open()
        self.config = Config(config)
        self._inputs, self._outputs = HOSTS[host][self.component]
        self._specs = {spec.name: spec for spec in runner.inputs}
        expected = set(self._inputs.values())
        if not set(self._specs) <= expected or any(name not in {spec.name for spec in runner.outputs} for name in self._outputs.values()):
            found = ", ".join(spec.name for spec in (*runner.inputs, *runner.outputs))
            raise EngineMismatch(f"not a {self.component} with the {host} signature: it has {found}", where=runner.path, expected=", ".join((*self._inputs.values(), *self._outputs.values())))
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the graph's (float) outputs."""
        return self.runner.outputs[0].dtype

    @property
    def device(self) -> torch.device:
        return self.runner.device

    def _infer(self, **tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs in canonical order, for inputs by canonical name, cast to what the graph takes."""
        feeds = {}
        for name, tensor in tensors.items():
            spec = self._specs.get(self._inputs[name])
            if spec is None:
                raise EngineMismatch(f"the {self.component} graph takes no {name}", where=self.runner.path, expected=", ".join(self._specs))
            feeds[spec.name] = tensor.to(self.device, spec.dtype)
        found = self.runner.infer(feeds)
        return tuple(found[name] for name in self._outputs.values())

    def _refuse(self, **options: Any) -> None:
        for name, value in options.items():
            if value is not None and value is not False and value != {}:
                raise EngineError(f"a {self.component} engine cannot take {name}: it is not part of the graph", where=self.runner.path, hint="run this model with torch")


class EngineUNet(_EngineModule):
    """Any runner of a UNet graph, as the `unet` of a diffusers pipeline."""

    component = "unet"

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
        """The prediction, in the shape, dtype and on the device of the runner's output, cast to `sample.dtype`.

        Args:
            sample: noisy latents, (B, 4, H/8, W/8), any float dtype.
            timestep: one number, or one a sample, (B,).
            encoder_hidden_states: text embeddings, (B, 77·k, C).
            added_cond_kwargs: SDXL's `text_embeds` (B, C') and `time_ids` (B, 6).

        Raises:
            EngineError: an option that the graph has no input for. EngineMismatch: a shape it does not take.
        """
        self._refuse(**unsupported)
        times = torch.as_tensor(timestep).reshape(-1).expand(sample.shape[0])
        (out,) = self._infer(sample=sample, timestep=times, encoder_hidden_states=encoder_hidden_states, **(added_cond_kwargs or {}))
        out = out.to(sample.dtype)
        return UNetOutput(out) if return_dict else (out,)


class EngineTextEncoder(_EngineModule):
    """Any runner of a CLIP text encoder graph, as the `text_encoder` of a diffusers pipeline."""

    component = "text_encoder"

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, return_dict: bool = True, **unsupported: Any) -> TextEncoderOutput:
        """Embeddings of `input_ids`, (B, 77) int64; the output unpacks and indexes as a tuple too, so `return_dict` changes nothing.

        Raises:
            EngineError: `attention_mask`, `output_hidden_states` (`clip_skip`): the graph has neither.
        """
        self._refuse(attention_mask=attention_mask, **unsupported)
        return TextEncoderOutput(*self._infer(input_ids=input_ids))


class EngineVaeDecoder(_EngineModule):
    """Any runner of a VAE decoder graph, as the `vae` of a diffusers text-to-image pipeline."""

    component = "vae_decoder"

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None) -> DecoderOutput | tuple[torch.Tensor]:
        """Pictures of unscaled latents `z` (already divided by `scaling_factor`), (B, 4, H/8, W/8) → (B, 3, H, W), in `z.dtype`."""
        (out,) = self._infer(latent_sample=z)
        out = out.to(z.dtype)
        return DecoderOutput(out) if return_dict else (out,)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Raises EngineError: only the decoder is exported."""
        raise EngineError("this VAE has a decoder only", where=self.runner.path, hint="encode with torch")
