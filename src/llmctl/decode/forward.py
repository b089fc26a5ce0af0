"""One forward pass at a time: token ids in, the next token's logits out, keys and values kept.

Prompts of a batch are padded on the left, so that all rows end at the same column of the cache.
`Forward` is what the loop needs of a model; `HuggingFaceForward` gives it for every causal LM of
transformers, with adapters and quantized layers too; `llama.LlamaForward` is the fast one.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from llmctl.errors import ModelError

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


class Forward(Protocol):
    """A model with a cache of keys and values for the rows of one batch."""

    device: torch.device

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Start a batch: read the prompts, return the logits (rows, vocabulary) after each."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token (rows,) to every row, return the logits (rows, vocabulary) after it."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Row `i` of the batch becomes what row `rows[i]` was; a row may be taken many times.

        Where fewer rows remain, none moves to a higher place (`rows[i] >= i`).
        """
        ...


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad to token ids (rows, longest); also the column (rows,) in which each prompt starts."""
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    starts = [longest - len(prompt) for prompt in prompts]
    return torch.tensor(padded, device=device), torch.tensor(starts, device=device)


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether the forward pass of a model, without its adapter, takes an argument."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in signature(type(inner).forward).parameters


def learns_prompt(model: PreTrainedModel) -> bool:
    """Whether a model has an adapter of prompt tuning or the like."""
    return hasattr(model, "active_peft_config") and model.active_peft_config.is_prompt_learning


def require_cache(model: PreTrainedModel) -> None:
    """Refuse models without a cache of keys and values, such as Mamba and RWKV.

    Raises:
        ModelError: naming the architecture.
    """
    if not takes(model, "past_key_values"):
        raise ModelError(f"llmctl cannot generate with {model.config.model_type} yet")


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache of keys and values, as a model's layers want it."""
    from transformers import DynamicCache  # and all code of models

    return DynamicCache(config=model.config)


class HuggingFaceForward:
    """Any causal language model of transformers, with explicit positions and masks."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Wrap a model in eval mode; its weights are read at every call.

        Raises:
            ModelError: an adapter that gives keys and values instead of embeddings.
        """
        self.model = model
        self.device = model.device
        require_cache(model)
        self._virtual: Tensor | None = None
        if learns_prompt(model):
            # PEFT puts the learned embeddings before every input, so also before each new token.
            learned = model.get_prompt(batch_size=1)
            if not isinstance(learned, Tensor):
                raise ModelError("prefix tuning is not supported: use prompt tuning or LoRA")
            self._virtual = learned[0].to(model.dtype)
            self.model = model.get_base_model()

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `Forward.prefill`."""
        self._columns = 0
        self._is_padded = len(set(map(len, prompts))) > 1
        self._cache = new_cache(self.model)
        if self._virtual is None:
            tokens, self._starts = pad_left(prompts, self.device)
            return self._forward(tokens)
        length = len(self._virtual)
        tokens, self._starts = pad_left([[0] * length + list(p) for p in prompts], self.device)
        embeddings = self.model.get_input_embeddings()(tokens)
        for row, start in enumerate(self._starts.tolist()):
            embeddings[row, start : start + length] = self._virtual
        return self._forward(tokens, embeddings)

    def step(self, tokens: Tensor) -> Tensor:
        """See `Forward.step`."""
        return self._forward(tokens[:, None])

    def select(self, rows: Sequence[int]) -> None:
        """See `Forward.select`."""
        if not all(hasattr(layer, "batch_select_indices") for layer in self._cache.layers):
            raise ModelError(
                "this architecture's state cannot be taken apart into rows", hint="--batch-size 1"
            )
        index = torch.tensor(rows, device=self.device)
        self._cache.batch_select_indices(index)
        self._starts = self._starts[index]

    def _forward(self, tokens: Tensor, embeddings: Tensor | None = None) -> Tensor:
        first, self._columns = self._columns, self._columns + tokens.shape[1]
        columns = torch.arange(self._columns, device=self.device)
        # Without padding no mask: transformers then takes its fastest attention.
        mask = (columns >= self._starts[:, None]).long() if self._is_padded else None
        output = self.model(
            input_ids=tokens if embeddings is None else None,
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=(columns[first:] - self._starts[:, None]).clamp(min=0),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits
