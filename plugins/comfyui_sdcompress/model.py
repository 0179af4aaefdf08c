"""A UNet engine in the place of ComfyUI's `diffusion_model`: called as its UNet is, opened when it is needed, and
honest about what it cannot do.

Nothing here imports ComfyUI.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .folders import FAMILIES, EngineFolder, check_contents
from .library import errors, runners, signature, unet

LOG = logging.getLogger("sdcompress")
Wrapped = Callable[..., torch.Tensor]
_TOKENS = signature.CONTEXT_TOKENS


@dataclass(frozen=True)
class Limits:
    """What one optimization profile takes, each (min, max): samples, latent height and width, tokens."""

    batch: tuple[int, int]
    height: tuple[int, int]
    width: tuple[int, int]
    tokens: tuple[int, int]

    @classmethod
    def of(cls, profile: Mapping[str, Sequence[Sequence[int]]], host: str) -> Limits:
        """From a profile of a manifest, whose inputs have the names of `host`."""
        names = signature.HOSTS[host]["unet"][0]
        least, _, most = profile[names["sample"]]
        fewest, _, longest = profile[names["encoder_hidden_states"]]
        return cls((least[0], most[0]), (least[2], most[2]), (least[3], most[3]), (fewest[1], longest[1]))

    def takes_picture(self, height: int, width: int) -> bool:
        return _within(height, self.height) and _within(width, self.width)


@dataclass(frozen=True)
class Call:
    """One call of the engine: samples from `start` to `stop`, `rows` with padding, their context of `tokens`."""

    start: int
    stop: int
    rows: int
    tokens: int


def plan_calls(limits: Sequence[Limits], sample: torch.Size, context: torch.Tensor) -> list[Call]:
    """The fewest calls that run a batch on an engine with these limits; one call as it is where nothing limits it or
    nothing helps.

    A batch that is too large is split, one that is too small is padded. A context that is too long is cut to what
    repeats in it, because ComfyUI repeats shorter prompts until all are of one length; one that is too short is
    repeated. Attention over a repeated context is that over the context.

    Args:
        sample: (B, C, H, W). context: (B, T, D).
    """
    count, tokens = sample[0], context.shape[1]
    fitting = [each for each in limits if each.takes_picture(sample[2], sample[3])]
    calls: list[Call] = []
    for start, stop, length in _groups(fitting, context) if fitting else []:
        options = [split(stop - start, each.batch) for each in fitting if _within(length, each.tokens)]
        if not options:  # the runner's own words say what it takes, and which flags build an engine that takes this
            return [Call(0, count, count, tokens)]
        best = min(options, key=lambda option: (len(option), sum(rows for _, _, rows in option)))
        calls += [Call(start + first, start + last, rows, length) for first, last, rows in best]
    return calls or [Call(0, count, count, tokens)]


def split(count: int, batch: tuple[int, int]) -> list[tuple[int, int, int]]:
    """`count` samples as (start, stop, rows) with `rows` in `batch` (min, max): as few and as equal as can be, padded
    where a part is below the least.
    """
    least, most = batch
    parts = -(-count // most)
    size = -(-count // parts)
    return [(start, min(start + size, count), max(least, min(size, count - start))) for start in range(0, count, size)]


def _groups(limits: Sequence[Limits], context: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """(start, stop, tokens) of samples that follow one another and run with the same number of tokens."""
    count, tokens = context.shape[:2]
    if any(_within(tokens, each.tokens) for each in limits):
        yield 0, count, tokens
        return
    most = max(each.tokens[1] for each in limits)
    lengths = [
        next(
            (size for size in range(part, most + 1, part) if any(_within(size, each.tokens) for each in limits)), tokens
        )
        for part in map(_period, context)
    ]
    start = 0
    for at in range(1, count + 1):
        if at == count or lengths[at] != lengths[start]:
            yield start, at, lengths[start]
            start = at


def _period(context: torch.Tensor) -> int:
    """The fewest tokens, in whole windows, of which a sample's context (T, D) is a repetition."""
    tokens = len(context)
    return next(
        (
            size
            for size in range(_TOKENS, tokens, _TOKENS)
            if tokens % size == 0 and torch.equal(context[size:], context[:-size])
        ),
        tokens,
    )


def _within(size: int, limits: tuple[int, int]) -> bool:
    return limits[0] <= size <= limits[1]


class EngineModel(torch.nn.Module):
    """An engine as ComfyUI's `diffusion_model`. It has no parameters: ComfyUI moves and patches nothing of it.

    Args:
        folder: what to open.
        options: of the runner, such as `cuda_graph`.
        names: LDM names of the UNet's weights, without prefix. `state_dict` lists them, empty, so that ComfyUI's
            loaders find what a LoRA or another model has for this one, and whoever applies it can be refused instead of
            ignored.
        wrapped: how a call goes through the wrappers that other nodes have put around the diffusion model: `(run,
            model, options, *arguments)`.
    """

    def __init__(
        self,
        folder: EngineFolder,
        options: Mapping[str, Any] | None = None,
        names: Sequence[str] = (),
        wrapped: Wrapped | None = None,
    ) -> None:
        super().__init__()
        self.folder, self.dtype = folder, folder.dtype
        self._options, self._names, self._wrapped = dict(options or {}), tuple(names), wrapped
        self._limits = [Limits.of(profile, folder.host) for profile in folder.profiles]
        self._unet: Any = None
        self._device: torch.device | None = None
        self._graph_failure: str | None = None
        self.eval()

    @property
    def is_open(self) -> bool:
        """Whether the engine is in memory."""
        return self._unet is not None

    def open(self, device: torch.device) -> Any:
        """The engine, loaded where it was not, for latents on `device`.

        Raises:
            ArtifactError: it is not what its manifest says. BackendMissing, EngineError, EngineMismatch: as
                `Runner.open`.
        """
        if self._unet is None or self._device != device:
            self.close()
            check_contents(self.folder)
            where = runner_device(self.folder, device)
            options = {
                name: value for name, value in self._options.items() if name != "cuda_graph" or where.type == "cuda"
            }
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
        """Free the engine's memory; the next call loads it again."""
        if self._unet is not None:
            self._unet.close()
            self._unet = self._device = None
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
        """The prediction, (B, 4, H/8, W/8), in `x`'s dtype and on its device.

        Further keywords are those that ComfyUI's own UNet ignores too.

        Args:
            x: scaled noisy latents, (B, 4, H/8, W/8). timesteps: (B,). context: text embeddings, (B, 77·k, D). y:
                SDXL's vector, (B, V).
            control: what a ControlNet adds. transformer_options: patches of other nodes, and what they want to know.

        Raises:
            EngineError: a ControlNet, or a patch that reaches into the UNet. EngineMismatch: text embeddings or latents
                of another family, or a shape the engine was not built for.
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
        checked = self._checked(x, context, y)
        engine = self.open(x.device)
        parts = []
        for call in plan_calls(self._limits, x.shape, checked):
            sample, times = (_rows(tensor, call) for tensor in (x, timesteps.expand(x.shape[0])))
            added = {} if y is None else {"y": _rows(y, call)}
            text = _lengthened(_rows(checked, call), call.tokens)
            parts.append(
                engine(sample, times, text, added_cond_kwargs=added, return_dict=False)[0][: call.stop - call.start]
            )
        self._report_without_graph(engine.runner)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(x.device)

    def _checked(self, x: torch.Tensor, context: torch.Tensor | None, y: torch.Tensor | None) -> torch.Tensor:
        """The context; inputs of another family are refused by name, before shapes are."""
        folder, family = self.folder, FAMILIES[self.folder.family]
        where, channels, vector = (
            folder.graph.parent,
            folder.unet["in_channels"],
            folder.unet.get("projection_class_embeddings_input_dim"),
        )
        if x.ndim != 4 or x.shape[1] != channels:
            raise errors.EngineMismatch(
                f"latents of shape {tuple(x.shape)} for an engine of {family}",
                where=where,
                expected=f"(batch, {channels}, height / 8, width / 8)",
                hint="an Empty Latent Image, or a VAE of this family; no inpainting model",
            )
        if context is None or context.shape[-1] != folder.context_width:
            given = "no text embeddings" if context is None else f"text embeddings {context.shape[-1]} wide"
            raise errors.EngineMismatch(
                f"{given} for an engine of {family}",
                where=where,
                expected=f"{folder.context_width} wide",
                hint=f"connect the CLIP of the {family} checkpoint that the engine was made from",
            )
        if (y is None) != (folder.family != "sdxl") or (y is not None and y.shape[-1] != vector):
            given = "no pooled text" if y is None else f"a vector {y.shape[-1]} wide beside the text"
            raise errors.EngineMismatch(
                f"{given} for an engine of {family}",
                where=where,
                expected="none" if folder.family != "sdxl" else f"{vector} wide",
                hint=f"the CLIP of a {family} checkpoint, and no unCLIP conditioning",
            )
        return context

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Names of the UNet's weights, each with an empty tensor: they are inside the engine."""
        found: dict[str, Any] = {} if destination is None else destination
        found.update({f"{prefix}{name}": torch.empty(0) for name in self._names})
        return found


def refuse_inside(control: Any, options: Mapping[str, Any], folder: EngineFolder) -> None:
    """Refuse what reaches into the UNet's layers, which are closed in an engine: ignoring it would make another picture
    than the one asked for.

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
    held = sorted(
        {name for kind in ("patches", "patches_replace") for name, found in (options.get(kind) or {}).items() if found}
    )
    if held:
        raise errors.EngineError(
            f"a node changes layers inside the UNet ({', '.join(held)}), and an engine's cannot be changed",
            where=folder.graph.parent,
            hint=f"take it off this model (FreeU, IP-Adapter, GLIGEN, Hypernetwork and such), or {native}",
        )


def runner_device(folder: EngineFolder, device: torch.device) -> torch.device:
    """Where the graph runs for latents on `device`: there, but an ONNX graph on the CPU where ONNX Runtime has no CUDA."""
    if folder.graph.suffix != ".onnx" or device.type == "cpu":
        return device
    import onnxruntime

    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return device
    LOG.warning(
        "%s runs on the CPU, as this ONNX Runtime has no CUDA: install onnxruntime-gpu, or a TensorRT engine",
        folder.name,
    )
    return torch.device("cpu")


def _rows(tensor: torch.Tensor, call: Call) -> torch.Tensor:
    """The samples of a call, the last of them again where it is padded."""
    part = tensor[call.start : call.stop]
    missing = call.rows - len(part)
    return torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part


def _lengthened(context: torch.Tensor, tokens: int) -> torch.Tensor:
    """A context (B, T, D) of `tokens`: its beginning, or itself repeated."""
    return (
        context[:, :tokens]
        if tokens <= context.shape[1]
        else context.repeat(1, -(-tokens // context.shape[1]), 1)[:, :tokens]
    )
