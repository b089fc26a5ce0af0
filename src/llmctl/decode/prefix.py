"""A forward pass for conversations: the prefix shared with the last prompt stays in the cache.

In: the growing prompt of one conversation. Out: logits, as from `forward.HuggingFaceForward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmctl.data.chat.render import common_prefix
from llmctl.decode.forward import (
    Forward,
    HuggingFaceForward,
    learns_prompt,
    new_cache,
    require_cache,
)
from llmctl.decode.llama import PlainModel, fast_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PrefixForward:
    """See `forward.Forward`; for one row, whose keys and values stay after its reply."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Wrap a model in eval mode, which keeps keys and values of all tokens in every layer."""
        self.model = model
        self.device = model.device
        self._cache = new_cache(model)
        self._read: list[int] = []
        """Tokens whose keys and values are in the cache."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Keep the cache of the shared prefix, crop the rest, read the new tokens."""
        (prompt,) = prompts
        kept = common_prefix(self._read, prompt[:-1])
        if kept == 0:
            self._cache = new_cache(self.model)
        elif kept < len(self._read):
            self._cache.crop(kept - len(self._read))
        self._read = list(prompt[:kept])
        return self._forward(list(prompt[kept:]))

    def step(self, tokens: Tensor) -> Tensor:
        """See `Forward.step`."""
        return self._forward(tokens.tolist())

    def select(self, rows: Sequence[int]) -> None:
        """See `Forward.select`; there is one row, and nothing to move."""
        assert list(rows) == [0]

    def _forward(self, tokens: list[int]) -> Tensor:
        before, self._read = self._read, []  # an interrupt leaves some layers longer than others
        first, last = len(before), len(before) + len(tokens)
        output = self.model(
            input_ids=torch.tensor([tokens], device=self.device),
            position_ids=torch.arange(first, last, device=self.device)[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._read = before + tokens
        logits: Tensor = output.logits[:, -1]
        return logits


def conversation_forward(model: PreTrainedModel | PlainModel, prompt: Sequence[int]) -> Forward:
    """Choose the forward pass for a conversation: with a kept prefix where the model allows it.

    Small models take the fast pass, though it reads every prompt anew: it is faster all the same.
    """
    if fast := fast_forward(model, prompt):
        return fast
    assert not isinstance(model, PlainModel)
    require_cache(model)
    layers = new_cache(model).layers
    keeps_all = all(type(layer).__name__ == "DynamicLayer" for layer in layers)  # no sliding window
    return (
        PrefixForward(model)
        if keeps_all and not learns_prompt(model)
        else HuggingFaceForward(model)
    )
