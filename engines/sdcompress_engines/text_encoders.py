"""Runners as the `text_encoder` and `text_encoder_2` of a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .engine_module import EngineModule
from .errors import EngineError
from .outputs import HiddenStates, TextEncoderOutput, TextEncoderStates, TextProjectionOutput


class EngineTextEncoder(EngineModule):
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
        """Returns the embeddings of tokens: a `TextEncoderOutput`, or `TextEncoderStates`.

        Args:
            input_ids: tokens, (B, 77), int64.
            attention_mask: must be None.
            output_hidden_states: return hidden states too.
            return_dict: without effect, as the results are tuples with names.
            unsupported: other options of the encoder; only empty values are accepted.

        Raises:
            EngineError: `attention_mask` or another option has a value; or the graph gives no hidden states.
        """
        self.refuse(attention_mask=attention_mask, **unsupported)
        found = self.graph.infer(input_ids=input_ids)
        plain = TextEncoderOutput(found["last_hidden_state"], found["pooled_output"])
        return TextEncoderStates(*plain, self._states(found)) if output_hidden_states else plain

    def _states(self, found: Mapping[str, torch.Tensor]) -> HiddenStates:
        if "penultimate_hidden_state" not in found:
            raise EngineError(
                f"the {self.component} graph gives no hidden states: output_hidden_states has nothing to return",
                where=self.runner.path,
                hint="export it again: sdcompress export MODEL -o DIR",
            )
        return HiddenStates(found["penultimate_hidden_state"], int(self.config["num_hidden_layers"]), self.runner.path)

    @property
    def text_model(self) -> Any:
        """Raises EngineError: clip_skip looks for the final layer norm here, and that is inside the graph."""
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
        """Returns a `TextProjectionOutput`, whose first field is the projected embedding of the whole text, (B, P).

        Args:
            input_ids, attention_mask, output_hidden_states, return_dict, unsupported: as of `EngineTextEncoder`.

        Raises:
            EngineError: as `EngineTextEncoder.forward`.
        """
        self.refuse(attention_mask=attention_mask, **unsupported)
        found = self.graph.infer(input_ids=input_ids)
        return TextProjectionOutput(
            found["text_embeds"], found["last_hidden_state"], self._states(found) if output_hidden_states else None
        )
