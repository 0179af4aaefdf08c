"""A UNet engine in the place of ComfyUI's `diffusion_model`. It is opened at the first call.

What an engine cannot do is refused with a message. Nothing here imports ComfyUI.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .calls import plan_calls
from .engine_loras import EngineLoras
from .folders import FAMILIES, EngineFolder, check_contents
from .hints import SamplingHints
from .library import calls, errors, runners, unet
from .whole_model import WholeModel, read_whole_model

LOG = logging.getLogger("sdcompress")
Wrapped = Callable[..., torch.Tensor]


class EngineModel(torch.nn.Module):
    """An engine as ComfyUI's `diffusion_model`. It has no parameters, so ComfyUI neither moves nor patches it.

    `loras` puts patches into its weights instead, before the next call. While `is_switching`, ComfyUI takes patches
    back to apply others, and the engine stays open.

    Args:
        folder: the engine.
        options: of the runner, such as `cuda_graph`.
        whole: the layers of the whole model, by default read from the folder. `state_dict` lists them with their
            shapes, so ComfyUI finds the layers that a LoRA is for, also those that a student does not have.
        wrapped: runs a call through the wrappers that other nodes have put around the diffusion model. It is called
            with `(run, model, options, *arguments)`.
    """

    def __init__(
        self,
        folder: EngineFolder,
        options: Mapping[str, Any] | None = None,
        whole: WholeModel | None = None,
        wrapped: Wrapped | None = None,
    ) -> None:
        super().__init__()
        self.folder, self.dtype = folder, folder.dtype
        self._options, self._wrapped = dict(options or {}), wrapped
        whole = whole or read_whole_model(folder)
        self.loras = EngineLoras(folder, whole)
        self._listed = {name: torch.empty(shape, device="meta") for name, shape in whole.shapes.items()}
        self.is_switching = False
        self._unet: Any = None
        self._device: torch.device | None = None
        self._graph_failure: str | None = None
        self._hints = SamplingHints(folder)
        self.eval()

    @property
    def is_open(self) -> bool:
        """Whether the engine is in memory."""
        return self._unet is not None

    def open(self, device: torch.device) -> Any:
        """Returns the engine for latents on `device`, after loading it if necessary.

        Raises:
            ArtifactError: it does not match its manifest.
            BackendMissing, EngineError, EngineMismatch: as in `Runner.open`.
        """
        if self._unet is None or self._device != device:
            self.close()
            check_contents(self.folder)
            where = runner_device(self.folder, device)
            on_gpu = where.type == "cuda"
            options = {name: value for name, value in self._options.items() if name != "cuda_graph" or on_gpu}
            runner = runners.open_runner(self.folder.graph, where, **options)
            self._unet, self._device = unet.EngineUNet(runner, self.folder.unet, self.folder.host), device
            LOG.info(
                "loaded the engine %s (%s, %.0f MiB) on %s",
                self.folder.name,
                runner.backend,
                self.folder.bytes / 2**20,
                runner.device,
            )
        return self._unet

    def _report_without_graph(self, runner: Any) -> None:
        """Log once why the engine runs without the CUDA graphs that the node asks for."""
        reason = getattr(runner, "graph_failure", None)
        if reason is not None and reason != self._graph_failure:
            LOG.warning("%s runs without CUDA graphs: %s", self.folder.name, reason)
        self._graph_failure = reason

    def close(self) -> None:
        """Free the engine's memory. The next call loads it again."""
        if self._unet is not None:
            self._unet.close()
            self._unet = self._device = None
            self.loras.forget()
            LOG.info("unloaded the engine %s", self.folder.name)

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Returns the prediction, (B, 4, H/8, W/8), in `x`'s dtype and on its device.

        Further keywords are ignored, as ComfyUI's own UNet ignores them.

        Args:
            x: scaled noisy latents, (B, 4, H/8, W/8), any float dtype, on any device.
            timesteps: (B,) or one for all samples.
            context: text embeddings, (B, 77·k, D).
            y: SDXL's vector, (B, V).
            control: what a ControlNet adds, or None.
            transformer_options: patches and data of other nodes.

        Raises:
            EngineError: a ControlNet, or a patch that changes the UNet's layers.
            EngineMismatch: text embeddings or latents of another family, a shape the engine was not built for, or a
                LoRA that does not fit.
        """
        options = dict(transformer_options or {})
        arguments = (x, timesteps, context, y, control, options)
        return self._run(*arguments) if self._wrapped is None else self._wrapped(self._run, self, options, *arguments)

    def _run(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None,
        y: torch.Tensor | None,
        control: Any,
        options: Mapping[str, Any],
        **_: Any,
    ) -> torch.Tensor:
        refuse_inside(control, options, self.folder)
        checked = self._check_inputs(x, context, y)
        self._hints.look(timesteps, options)
        engine = self.open(x.device)
        self.loras.apply(engine)
        times = timesteps.expand(x.shape[0])
        results = []
        for call in plan_calls(self.folder.limits, x.shape, checked):
            part = call.part
            sample, part_times = calls.take_part(x, part), calls.take_part(times, part)
            text = calls.set_tokens(calls.take_part(checked, part), call.tokens)
            added = {} if y is None else {"y": calls.take_part(y, part)}
            out = engine(sample, part_times, text, added_cond_kwargs=added, return_dict=False)[0]
            results.append(out[: part.stop - part.start])
        self._report_without_graph(engine.runner)
        return (results[0] if len(results) == 1 else torch.cat(results)).to(x.device)

    def _check_inputs(self, x: torch.Tensor, context: torch.Tensor | None, y: torch.Tensor | None) -> torch.Tensor:
        """Returns the context. Inputs of another family are refused with a message that names the family."""
        folder, family, where = self.folder, FAMILIES[self.folder.family], self.folder.graph.parent
        channels, vector = folder.unet["in_channels"], folder.unet.get("projection_class_embeddings_input_dim")
        if x.ndim != 4 or x.shape[1] != channels:
            raise errors.EngineMismatch(
                f"latents of shape {tuple(x.shape)} for an engine of {family}",
                where=where,
                expected=f"(batch, {channels}, height / 8, width / 8)",
                hint="connect an Empty Latent Image, or latents from a VAE of this family",
            )
        if context is None or context.shape[-1] != folder.context_width:
            given = "no text embeddings" if context is None else f"text embeddings {context.shape[-1]} wide"
            raise errors.EngineMismatch(
                f"{given} for an engine of {family}",
                where=where,
                expected=f"{folder.context_width} wide",
                hint=f"connect the CLIP of the {family} checkpoint that the engine was exported from",
            )
        if (y is None) != (folder.family != "sdxl") or (y is not None and y.shape[-1] != vector):
            given = "no pooled text" if y is None else f"a vector {y.shape[-1]} wide beside the text"
            raise errors.EngineMismatch(
                f"{given} for an engine of {family}",
                where=where,
                expected="none" if folder.family != "sdxl" else f"{vector} wide",
                hint=f"connect the CLIP of an {family} checkpoint, without unCLIP conditioning",
            )
        return context

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Returns the names of the whole model's weights with tensors on the meta device, which have only shapes."""
        names: dict[str, Any] = {} if destination is None else destination
        names.update({f"{prefix}{name}": value for name, value in self._listed.items()})
        return names


def refuse_inside(control: Any, options: Mapping[str, Any], folder: EngineFolder) -> None:
    """Refuse what changes the UNet's layers, which an engine does not expose. Ignoring it would draw another picture.

    Args:
        control: what a ControlNet adds, or None.
        options: ComfyUI's `transformer_options`.
        folder: the engine.

    Raises:
        EngineError: a ControlNet or T2I adapter, or patches such as FreeU's, IP-Adapter's or GLIGEN's.
    """
    native = (
        f"use the model itself, which ComfyUI loads: sdcompress export MODEL --ldm -o {folder.name}.safetensors, into"
        " models/checkpoints"
    )
    if control is not None:
        raise errors.EngineError(
            "a ControlNet or T2I adapter adds to layers inside the UNet, and the engine has no inputs for that",
            where=folder.graph.parent,
            hint=f"take it off this model, or {native}",
        )
    patches = [(options.get(kind) or {}).items() for kind in ("patches", "patches_replace")]
    if patched := sorted({name for items in patches for name, functions in items if functions}):
        raise errors.EngineError(
            f"a node changes layers inside the UNet ({', '.join(patched)}), and an engine has fixed layers",
            where=folder.graph.parent,
            hint=f"take it off this model (FreeU, IP-Adapter, GLIGEN, Hypernetwork and such), or {native}",
        )


def runner_device(folder: EngineFolder, device: torch.device) -> torch.device:
    """Returns where the graph runs for latents on `device`: an ONNX graph on the CPU if ONNX Runtime has no CUDA."""
    if folder.graph.suffix != ".onnx" or device.type == "cpu":
        return device
    if device.type == "cuda" and runners.onnxruntime_install.missing("cuda") is None:
        return device
    LOG.warning(
        "%s runs on the CPU, because this ONNX Runtime has no CUDA: install onnxruntime-gpu, or a TensorRT engine",
        folder.name,
    )
    return torch.device("cpu")
