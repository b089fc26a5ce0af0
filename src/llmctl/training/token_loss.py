"""The loss over the tokens that count, without logits of the others.

A model's own forward pass is run unchanged, but its output layer is handed only the positions whose
next token is trained on: in a chat most are not, and with a large vocabulary their logits are most
of the memory and a good part of the time.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from llmctl.errors import ModelError, UserError

OURS = ("labels", "places", "tokens", "weight")
"""Keys of a batch that the model is not given."""
CHUNK_LOGITS = 1 << 23
"""Logits that are held at once when the loss is chunked: 32 MB in float32."""


class TokenLosses(NamedTuple):
    """The N tokens that count, one by one."""

    losses: Tensor
    """(N,) nats, with gradients."""
    correct: Tensor
    """How many were the most likely token."""
    balance: Tensor | None
    """Weighted balancing loss of a mixture of experts, a mean over the batch."""


@dataclass(frozen=True)
class TokenLoss:
    """Cross-entropy of the trained tokens of a model."""

    head: nn.Module
    """The model's output layer, wherever that is inside."""
    config: PreTrainedConfig
    """The model's."""
    chunked: bool
    """Hold the logits of a few positions at a time, and compute them twice."""

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> TokenLosses:
        """Cross-entropy of each trained token.

        The model is a causal one, perhaps wrapped (adapter, DDP, FSDP). The batch is as
        `SequenceRows` makes it: `input_ids` and `labels` (B, L), `places` (N,), and what else the
        model takes.
        """
        inputs = {name: value for name, value in batch.items() if name not in OURS}
        length, places = batch["labels"].shape[1], batch["places"]
        wanted = batch["labels"][:, 1:].flatten()[places]
        with handed(self.head, length, places, chunked=self.chunked) as kept:
            output = model(**inputs, use_cache=False)
        logits, balance = output.logits, router_loss(self.config, output)
        if not self.chunked:
            return TokenLosses(*_nll(logits[0], wanted), balance)
        size = max(1, CHUNK_LOGITS // logits.shape[-1])
        nothing = logits.float().sum() * 0
        right = torch.zeros((), dtype=torch.long, device=logits.device)
        losses = []

        def project(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
            return _nll(self.head(states), wanted)

        for states, some in zip(torch.split(kept[0], size), torch.split(wanted, size), strict=True):
            loss, correct = checkpoint(project, states, some, use_reentrant=False)
            losses.append(loss)
            right = right + correct
        return TokenLosses(torch.cat(losses) + nothing, right, balance)


def token_loss_of(model: Any, *, chunked: bool) -> TokenLoss:
    """The loss of a model that is not wrapped yet; raise a ModelError without an output layer."""
    return TokenLoss(output_layer(model), model.config, chunked)


def router_loss(config: PreTrainedConfig, output: Any) -> Tensor | None:
    """Weighted balancing loss of a mixture of experts, where its configuration asks for one.

    A mean over the batch (Fedus et al., 2021, arXiv:2101.03961, equation 4).
    """
    balance = getattr(output, "aux_loss", None)
    if balance is None:
        return None
    weighted: Tensor = config.get_text_config().router_aux_loss_coef * balance
    return weighted


def output_layer(model: Any) -> nn.Module:
    """The layer that makes logits; raise a ModelError where there is none."""
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError("this model has no output layer to train on")
    return head  # type: ignore[no-any-return]


@torch.no_grad()
def require_chunkable(model: nn.Module, loss: TokenLoss, batch: Mapping[str, Any]) -> None:
    """Raise a UserError where the model changes its logits after the output layer."""
    whole, chunks = (
        replace(loss, chunked=chunked)(model, batch).losses.sum() for chunked in (False, True)
    )
    if not torch.allclose(whole, chunks, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"--chunked-loss gives {float(chunks):g} where this model gives {float(whole):g}: it "
            "changes its logits after the output layer",
            hint="drop --chunked-loss",
        )


def _nll(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (N,) and number of right guesses of logits (N, V)."""
    losses = cross_entropy(logits.float(), wanted, reduction="none")
    return losses, (logits.detach().argmax(-1) == wanted).sum()


@contextmanager
def handed(
    head: nn.Module, length: int, places: Tensor, *, chunked: bool = False
) -> Iterator[list[Tensor]]:
    """Hand the output layer the hidden states (N, H) of these places of B x (L - 1) only.

    Chunked, they are put into the list that is yielded, and the layer gets a single one. The places
    are known beforehand: to look for them here would wait for the GPU.
    """
    kept: list[Tensor] = []

    def select(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states, *rest = arguments
        first = states.shape[1] - length  # of the text, after virtual tokens
        chosen = states[:, first:-1].flatten(0, 1)[places]
        if chunked:
            kept.append(chosen)
            chosen = states[0, -1:]
        return (chosen[None], *rest)

    handle = head.register_forward_pre_hook(select)
    try:
        yield kept
    finally:
        handle.remove()
