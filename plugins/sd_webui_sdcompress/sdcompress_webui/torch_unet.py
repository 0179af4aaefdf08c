"""A Stable Diffusion UNet in plain torch, whole or with blocks removed. Its structure follows from its weights' names.

It runs the calls that an engine cannot serve. The host's own UNet cannot do that for a student, because it has the
checkpoint's blocks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from sdcompress_engines.errors import ModelError
from torch.nn import functional

Deltas = Callable[[str, torch.Tensor], "tuple[torch.Tensor | None, torch.Tensor | None]"]
"""LDM's layer name and weight → what a LoRA adds to weight and bias, in any dtype, on the weight's device, or None."""


class TorchUNet:
    """A UNet that predicts noise or velocity.

    Args:
        weights: LDM name → tensor, in any float dtype.
        config: diffusers' config of this UNet, for heads and norm groups, which the weights do not show.
        device: where it runs.
        dtype: of the weights and of the arithmetic. Group norms run in float32.

    Raises:
        ModelError: the weights are not those of a UNet with this config.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self._weights = {name: value.to(self.device, dtype) for name, value in weights.items()}
        self._groups, self._eps = int(config.get("norm_num_groups") or 32), float(config.get("norm_eps") or 1e-5)
        levels = len(config["block_out_channels"])
        heads = config.get("num_attention_heads") or config.get("attention_head_dim") or 8
        self._heads = [int(count) for count in heads] if isinstance(heads, (list, tuple)) else [int(heads)] * levels
        self._numbered = _numbered(weights)
        self._inputs, self._outputs, self._middle = (
            self._numbered.get(name, []) for name in ("input_blocks", "output_blocks", "middle_block")
        )
        self._patched: tuple[Hashable, dict[str, torch.Tensor]] = ((), {})
        width = weights.get("input_blocks.0.0.weight", torch.empty(0))
        if (
            not self._inputs
            or not self._outputs
            or width.ndim != 4
            or width.shape[:2] != (config["block_out_channels"][0], config["in_channels"])
        ):
            raise ModelError(
                "the weights are not those of this UNet",
                expected=(
                    f"its first convolution from {config['in_channels']} to {config['block_out_channels'][0]} channels"
                ),
            )
        if 1 + sum(f"input_blocks.{number}.0.op.weight" in weights for number in self._inputs) != levels:
            raise ModelError("the weights are not those of this UNet", expected=f"{levels} levels")

    @torch.no_grad()
    def patch(self, key: Hashable, deltas: Deltas | None) -> None:
        """Add changes to the original weights for the calls that follow.

        Args:
            key: equal for equal changes. With the current key nothing is done.
            deltas: what to add to each layer, or None for the original weights.
        """
        if self._patched[0] == key:
            return
        changed: dict[str, torch.Tensor] = {}
        if deltas is not None:
            for name, weight in self._weights.items():
                if not name.endswith(".weight"):
                    continue
                layer = name.removesuffix(".weight")
                more, bias = deltas(layer, weight)
                if more is not None:
                    changed[name] = weight + more.to(weight).reshape(weight.shape)
                if bias is not None:
                    held = self._weights.get(f"{layer}.bias")
                    changed[f"{layer}.bias"] = bias.to(weight) if held is None else held + bias.to(held)
        self._patched = (key, changed)

    @torch.no_grad()
    def __call__(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, y: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the prediction, (B, 4, H/8, W/8), on the UNet's device in its dtype.

        Args:
            x: noisy latents, (B, C, H/8, W/8), of any size.
            timesteps: (B,).
            context: text embeddings, (B, tokens, width).
            y: SDXL's added vector, (B, width).
        """
        with torch.autocast(self.device.type, enabled=False):  # a host's autocast would change the precision
            x, context = x.to(self.device, self.dtype), context.to(self.device, self.dtype)
            embedding = self._embed(
                "time_embed",
                _sinusoid(timesteps.to(self.device).expand(len(x)), self._weight("time_embed.0.weight").shape[1]).to(
                    self.dtype
                ),
            )
            if y is not None:
                embedding = embedding + self._embed("label_emb.0", y.to(self.device, self.dtype))
            level, skips = 0, []
            for number in self._inputs:
                base = f"input_blocks.{number}"
                if f"{base}.0.op.weight" in self._weights:
                    level += 1
                x = self._block(base, x, embedding, context, level)
                skips.append(x)
            if self._middle:
                x = self._block("middle_block", x, embedding, context, level)
            for number in self._outputs:
                base, skip = f"output_blocks.{number}", skips.pop()
                if x.shape[-2:] != skip.shape[-2:]:  # a size that does not halve evenly: the WebUIs resize it so too
                    x = functional.interpolate(x, skip.shape[-2:], mode="nearest")
                x = self._block(base, torch.cat([x, skip], dim=1), embedding, context, level)
                if any(f"{base}.{at}.conv.weight" in self._weights for at in (1, 2)):
                    level -= 1
            return self._conv("out.2", functional.silu(self._norm("out.0", x, self._eps)), padding=1)

    def _weight(self, name: str) -> torch.Tensor:
        return self._patched[1].get(name, self._weights[name])

    def _bias(self, name: str) -> torch.Tensor | None:
        key = f"{name}.bias"
        return self._patched[1].get(key, self._weights.get(key))

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight(f"{name}.weight"), self._bias(name))

    def _conv(self, name: str, x: torch.Tensor, padding: int, stride: int = 1) -> torch.Tensor:
        return functional.conv2d(x, self._weight(f"{name}.weight"), self._bias(name), stride, padding)

    def _norm(self, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        """Group norm in float32, as in LDM."""
        bias = self._bias(name)
        return functional.group_norm(
            x.float(), self._groups, self._weight(f"{name}.weight").float(), None if bias is None else bias.float(), eps
        ).to(x.dtype)

    def _layer_norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], self._weight(f"{name}.weight"), self._bias(name))

    def _embed(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self._linear(f"{name}.2", functional.silu(self._linear(f"{name}.0", x)))

    def _block(
        self, base: str, x: torch.Tensor, embedding: torch.Tensor, context: torch.Tensor, level: int
    ) -> torch.Tensor:
        """Run the parts of one numbered block in their order."""
        for part in self._numbered[base]:
            name = f"{base}.{part}"
            if f"{name}.in_layers.0.weight" in self._weights:
                x = self._resnet(name, x, embedding)
            elif f"{name}.proj_in.weight" in self._weights:
                x = self._attentions(name, x, context, level)
            elif f"{name}.op.weight" in self._weights:
                x = self._conv(f"{name}.op", x, padding=1, stride=2)
            elif f"{name}.conv.weight" in self._weights:
                x = self._conv(f"{name}.conv", functional.interpolate(x, scale_factor=2.0, mode="nearest"), padding=1)
            else:
                x = self._conv(name, x, padding=1)
        return x

    def _resnet(self, name: str, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        inner = self._conv(
            f"{name}.in_layers.2", functional.silu(self._norm(f"{name}.in_layers.0", x, self._eps)), padding=1
        )
        inner = inner + self._linear(f"{name}.emb_layers.1", functional.silu(embedding))[:, :, None, None]
        inner = self._conv(
            f"{name}.out_layers.3", functional.silu(self._norm(f"{name}.out_layers.0", inner, self._eps)), padding=1
        )
        return inner + (
            self._conv(f"{name}.skip_connection", x, padding=0)
            if f"{name}.skip_connection.weight" in self._weights
            else x
        )

    def _attentions(self, name: str, x: torch.Tensor, context: torch.Tensor, level: int) -> torch.Tensor:
        """Run a spatial transformer. SD1 projects into it by 1×1 convolutions, SD2 and SDXL by linear layers."""
        batch, _, height, width = x.shape
        inner, by_conv = self._norm(f"{name}.norm", x, 1e-6), self._weight(f"{name}.proj_in.weight").ndim == 4
        if by_conv:
            inner = self._conv(f"{name}.proj_in", inner, padding=0)
        inner = inner.flatten(2).transpose(1, 2)
        if not by_conv:
            inner = self._linear(f"{name}.proj_in", inner)
        for number in self._numbered[f"{name}.transformer_blocks"]:
            block = f"{name}.transformer_blocks.{number}"
            normed = self._layer_norm(f"{block}.norm1", inner)
            inner = inner + self._attention(f"{block}.attn1", normed, normed, self._heads[level])
            inner = inner + self._attention(
                f"{block}.attn2", self._layer_norm(f"{block}.norm2", inner), context, self._heads[level]
            )
            value, gate = self._linear(f"{block}.ff.net.0.proj", self._layer_norm(f"{block}.norm3", inner)).chunk(
                2, dim=-1
            )
            inner = inner + self._linear(f"{block}.ff.net.2", value * functional.gelu(gate))
        if not by_conv:
            inner = self._linear(f"{name}.proj_out", inner)
        inner = inner.transpose(1, 2).reshape(batch, -1, height, width)
        return x + (self._conv(f"{name}.proj_out", inner, padding=0) if by_conv else inner)

    def _attention(self, name: str, x: torch.Tensor, context: torch.Tensor, heads: int) -> torch.Tensor:
        query, key, value = (
            self._linear(f"{name}.to_{letter}", source).unflatten(-1, (heads, -1)).transpose(1, 2)
            for letter, source in (("q", x), ("k", context), ("v", context))
        )
        return self._linear(
            f"{name}.to_out.0", functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        )


def _sinusoid(timesteps: torch.Tensor, width: int) -> torch.Tensor:
    """Returns cosines, then sines, of the timesteps at `width`/2 frequencies, (B, width), float32."""
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(width // 2, device=timesteps.device, dtype=torch.float32) / (width // 2)
    )
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _numbered(weights: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    """Returns prefix → the numbers that follow it in the weights' names, in ascending order."""
    numbered: dict[str, set[int]] = {}
    for name in weights:
        for match in re.finditer(r"\.(\d+)(?=\.)", name):
            numbered.setdefault(name[: match.start()], set()).add(int(match[1]))
    return {base: sorted(numbers) for base, numbers in numbered.items()}
