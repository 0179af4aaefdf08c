"""Runners in the places a diffusers pipeline has for its unet, text encoders and VAE; without importing diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from .errors import EngineError, EngineMismatch, UsageError
from .progress import SILENT, Reporter
from .runners import Runner
from .signature import HOSTS


class UNetOutput(NamedTuple):
    """What diffusers calls `UNet2DConditionOutput`."""

    sample: torch.Tensor


class TextEncoderOutput(NamedTuple):
    """`last_hidden_state` (B, 77, C) and `pooler_output` (B, C)."""

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor


class TextEncoderStates(NamedTuple):
    """`TextEncoderOutput` where hidden states were asked for."""

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor
    hidden_states: HiddenStates


class TextProjectionOutput(NamedTuple):
    """What transformers calls `CLIPTextModelOutput`: `text_embeds` (B, P), and hidden states where they were asked for."""

    text_embeds: torch.Tensor
    last_hidden_state: torch.Tensor
    hidden_states: HiddenStates | None = None


class DecoderOutput(NamedTuple):
    """Pictures (B, 3, 8H, 8W) in [-1, 1]."""

    sample: torch.Tensor


class EncoderOutput(NamedTuple):
    """What diffusers calls `AutoencoderKLOutput`."""

    latent_dist: LatentDistribution


class Config(dict[str, Any]):
    """A component's config, read as a mapping or as attributes, as diffusers does both."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no {name!r}") from None


class HiddenStates(Sequence[torch.Tensor]):
    """A text encoder's hidden states, as many as it has layers and one more, of which a graph gives only the last but
    one.
    """

    def __init__(self, penultimate: torch.Tensor, layers: int, where: Any) -> None:
        self._penultimate, self._layers, self._where = penultimate, layers, where

    def __len__(self) -> int:
        return self._layers + 1

    def __getitem__(self, index: Any) -> Any:
        if index not in (-2, self._layers - 1):
            raise EngineError(
                f"hidden state {index} (clip_skip) is not in the graph of the text encoder",
                where=self._where,
                expected="-2, the last layer but one",
                hint="run this model with torch, or without clip_skip",
            )
        return self._penultimate


class LatentDistribution:
    """The diagonal Gaussian over latents that a VAE's encoder gives.

    `parameters`: means, then log-variances, (B, 2·4, H/8, W/8).
    """

    def __init__(self, parameters: torch.Tensor) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> torch.Tensor:
        """One draw, (B, 4, H/8, W/8).

        Noise comes from `generator` on its own device, or from one a sample, so a seed gives what it gives in torch.
        """
        generators = [generator] if generator is None or isinstance(generator, torch.Generator) else list(generator)
        count = self.mean.shape[0] if len(generators) == 1 else 1
        parts = [
            torch.randn(
                (count, *self.mean.shape[1:]),
                generator=one,
                device=self.mean.device if one is None else one.device,
                dtype=self.mean.dtype,
            )
            for one in generators
        ]
        return self.mean + self.std * torch.cat(parts).to(self.mean.device)

    def mode(self) -> torch.Tensor:
        """The means."""
        return self.mean


class _EngineModule(torch.nn.Module):
    """A module without parameters, because a pipeline asks its modules for their device; `to()` moves nothing, a runner
    stays where it is.
    """

    component: str
    needed: tuple[str, ...]
    """Canonical outputs without which a graph is not this component; further ones are used where it has them."""

    def __init__(self, runner: Runner, config: Mapping[str, Any], host: str = "diffusers") -> None:
        super().__init__()
        self.runner = runner.open()
        self.config = Config(config)
        self._graph = _Graph(self.runner, self.component, self.needed, host)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the graph's (float) outputs."""
        return self.runner.outputs[0].dtype

    @property
    def device(self) -> torch.device:
        return self.runner.device

    def close(self) -> None:
        """Free the engine; TensorRT-RTX keeps the kernels it compiled for the next time."""
        self.runner.close()

    def _refuse(self, **options: Any) -> None:
        for name, value in options.items():
            if value is not None and value is not False and value != {}:
                raise EngineError(
                    f"a {self.component} engine cannot take {name}: it is not part of the graph",
                    where=self.runner.path,
                    hint="run this model with torch",
                )


class _Graph:
    """One component's graph by canonical names, whatever a host calls them."""

    def __init__(self, runner: Runner, component: str, needed: Sequence[str], host: str) -> None:
        if component not in HOSTS.get(host, {}):
            raise UsageError(f"no {component!r} in the signature {host!r}", expected=", ".join(HOSTS))
        self.runner, self.component = runner, component
        self._inputs, outputs = HOSTS[host][component]
        given = {spec.name for spec in runner.outputs}
        self._specs = {spec.name: spec for spec in runner.inputs}
        self.outputs = {name: theirs for name, theirs in outputs.items() if theirs in given}
        if not set(self._specs) <= set(self._inputs.values()) or not set(needed) <= set(self.outputs):
            found = ", ".join(spec.name for spec in (*runner.inputs, *runner.outputs))
            raise EngineMismatch(
                f"not a {component} with the {host} signature: it has {found}",
                where=runner.path,
                expected=", ".join((*self._inputs.values(), *(outputs[name] for name in needed))),
            )

    def feeds(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the runner takes, for inputs by canonical name: on its device, in its dtypes.

        Raises:
            EngineMismatch: an input that the graph has not, or one of the graph's that is not among them.
        """
        named = {self._inputs[name]: tensor for name, tensor in tensors.items() if name in self._inputs}
        odd = [name for name in tensors if self._inputs.get(name) not in self._specs]
        if odd or (lacking := set(self._specs) - set(named)):
            what = f"takes no {', '.join(odd)}" if odd else f"needs {', '.join(sorted(lacking))} too"
            raise EngineMismatch(
                f"the {self.component} graph {what}", where=self.runner.path, expected=", ".join(self._specs)
            )
        device = self.runner.device
        # From the host to a GPU without waiting: the host's copy is staged before the call returns. The other way round
        # it would not be there yet.
        return {
            name: tensor.to(device, self._specs[name].dtype, non_blocking=device.type == "cuda")
            for name, tensor in named.items()
        }

    def infer(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """The outputs by canonical name."""
        found = self.runner.infer(self.feeds(**tensors))
        return {name: found[theirs] for name, theirs in self.outputs.items()}


class EngineUNet(_EngineModule):
    """Any runner of a UNet graph, as the `unet` of a diffusers pipeline.

    Args:
        fallback: makes the UNet in torch that runs the shapes the engine was not built for; called once, and only then.
        report: is told when that happens, once.
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
        self._torch: list[
            torch.nn.Module
        ] = []  # a list, so that it is no submodule: `to()` and `device` are the engine's
        if (
            self.config.get("addition_embed_type") == "text_time"
        ):  # SDXL's pipeline reads this width off the module, not its config
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
        """The prediction, in the shape, dtype and on the device of the runner's output, cast to `sample.dtype`.

        Args:
            sample: noisy latents, (B, 4, H/8, W/8), any float dtype.
            timestep: one number, or one a sample, (B,).
            encoder_hidden_states: text embeddings, (B, 77·k, C).
            added_cond_kwargs: SDXL's `text_embeds` (B, C') and `time_ids` (B, 6).

        Raises:
            EngineError: an option that the graph has no input for. EngineMismatch: a shape it does not take, and there
                is no fallback.
        """
        self._refuse(**unsupported)
        times = torch.as_tensor(timestep).reshape(-1).expand(sample.shape[0])
        added = dict(added_cond_kwargs or {})
        feeds = self._graph.feeds(sample=sample, timestep=times, encoder_hidden_states=encoder_hidden_states, **added)
        try:
            out = self.runner.infer(feeds)[self._graph.outputs["out_sample"]]
        except EngineMismatch as error:  # names, dtypes and devices are right by now, so it is a shape
            if self._fallback is None:
                raise
            out = self._in_torch(error, sample, times, encoder_hidden_states, added)
        out = out.to(sample.dtype)
        return UNetOutput(out) if return_dict else (out,)

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
            self._report.say(f"falling back to torch for this shape: {error}")
            self._torch.append(self._fallback().eval())
        module = self._torch[0]
        held = next(module.parameters())
        with torch.no_grad():
            given = {name: tensor.to(held.device, held.dtype) for name, tensor in added.items()}
            out: torch.Tensor = module(
                sample.to(held.device, held.dtype),
                times.to(held.device),
                context.to(held.device, held.dtype),
                added_cond_kwargs=given,
                return_dict=False,
            )[0]
        return out.to(self.device)


class EngineTextEncoder(_EngineModule):
    """Any runner of a CLIP text encoder graph, as the `text_encoder` of a diffusers pipeline."""

    component, needed = "text_encoder", ("last_hidden_state", "pooled_output")

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        return_dict: bool = True,
        **unsupported: Any,
    ) -> Any:
        """Embeddings of `input_ids`, (B, 77) int64: a `TextEncoderOutput`, or `TextEncoderStates`; they unpack and
        index as tuples too, so `return_dict` changes nothing.

        Raises:
            EngineError: `attention_mask`; or `output_hidden_states` of a graph that gives none.
        """
        self._refuse(attention_mask=attention_mask, **unsupported)
        found = self._graph.infer(input_ids=input_ids)
        plain = TextEncoderOutput(found["last_hidden_state"], found["pooled_output"])
        return TextEncoderStates(*plain, self._states(found)) if output_hidden_states else plain

    def _states(self, found: Mapping[str, torch.Tensor]) -> HiddenStates:
        if "penultimate_hidden_state" not in found:
            raise EngineError(
                f"the {self.component} graph gives no hidden states: output_hidden_states has nothing to take",
                where=self.runner.path,
                hint="export it again, with its penultimate_hidden_state",
            )
        return HiddenStates(found["penultimate_hidden_state"], int(self.config["num_hidden_layers"]), self.runner.path)

    @property
    def text_model(self) -> Any:
        """Raises EngineError: clip_skip takes the layer norm from here, which is inside the graph."""
        raise EngineError(
            f"clip_skip needs the layers of the {self.component}, which are inside the graph",
            where=self.runner.path,
            hint="run this model with torch, or without clip_skip",
        )


class EngineTextEncoderWithProjection(EngineTextEncoder):
    """Any runner of SDXL's second text encoder, as the `text_encoder_2` of a diffusers pipeline."""

    component, needed = "text_encoder_2", ("text_embeds", "last_hidden_state")

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        return_dict: bool = True,
        **unsupported: Any,
    ) -> Any:
        """As `EngineTextEncoder`, with the projected embedding of the whole text first."""
        self._refuse(attention_mask=attention_mask, **unsupported)
        found = self._graph.infer(input_ids=input_ids)
        return TextProjectionOutput(
            found["text_embeds"], found["last_hidden_state"], self._states(found) if output_hidden_states else None
        )


class EngineVaeDecoder(_EngineModule):
    """Any runner of a VAE decoder graph, as the `vae` of a diffusers pipeline; with one of the encoder too, of an
    image-to-image one.

    `force_upcast` is off in its config: the precision is the graph's, and a pipeline that wants fp32 would look for
    weights to cast.
    """

    component, needed = "vae_decoder", ("sample",)

    def __init__(
        self, runner: Runner, config: Mapping[str, Any], host: str = "diffusers", *, encoder: Runner | None = None
    ) -> None:
        super().__init__(runner, {**config, "force_upcast": False}, host)
        self._encoder = None if encoder is None else _Graph(encoder.open(), "vae_encoder", ("latent_parameters",), host)

    def close(self) -> None:
        super().close()
        if self._encoder is not None:
            self._encoder.runner.close()

    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Pictures of unscaled latents `z` (already divided by `scaling_factor`), (B, 4, H/8, W/8) → (B, 3, H, W), in
        `z.dtype`.
        """
        out = self._graph.infer(latent_sample=z)["sample"].to(z.dtype)
        return DecoderOutput(out) if return_dict else (out,)

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> EncoderOutput | tuple[LatentDistribution]:
        """The distribution of unscaled latents of pictures `x`, (B, 3, H, W) in [-1, 1], in `x.dtype`.

        Raises:
            EngineError: there is no encoder.
        """
        if self._encoder is None:
            raise EngineError(
                "this VAE has a decoder only",
                where=self.runner.path,
                hint="export the vae_encoder too, or encode with torch",
            )
        found = LatentDistribution(self._encoder.infer(sample=x)["latent_parameters"].to(x.dtype))
        return EncoderOutput(found) if return_dict else (found,)
