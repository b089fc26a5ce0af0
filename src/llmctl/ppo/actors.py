"""What PPO trains, and the frozen reference beside it, as functions of a pass over episodes."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from llmctl.ppo.episodes import Pass
from llmctl.training.token_loss import handed, output_layer


class Actors(nn.Module):
    """Policy and value model, as one module: the names in it are those of a checkpoint."""

    def __init__(
        self, policy: Any, value: Any, value_head: nn.Linear, reference: Any, *, temperature: float
    ) -> None:
        """Put the models together.

        Args:
            policy: causal language model, perhaps with an adapter.
            value: body of the value model, which gives hidden states.
            value_head: from hidden states to one value.
            reference: causal language model; it is no part of this module.
            temperature: of policy and reference.
        """
        super().__init__()
        self.policy, self.value, self.value_head = policy, value, value_head
        self.temperature = temperature
        self.scale = 1.0, 0.0
        """Factor of the head's output and what is added to it: a reward model's head gives its
        scores, and values are of normalised ones."""
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._reference = [reference]

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.value_head.weight.device

    @property
    def reference(self) -> Any:
        """The policy as it began."""
        return self._reference[0]

    @property
    def vocabulary(self) -> int:
        """V, logits of a token."""
        return int(self.policy.config.get_text_config().vocab_size)

    def log_probs(self, batch: Pass) -> tuple[Tensor, Tensor]:
        """Log-probabilities (n,) of the chosen tokens under the policy, and its logits (n, V)."""
        logits = self._logits(self.policy, batch)
        return log_probs_of(logits, batch.chosen), logits

    @torch.no_grad()
    def reference_log_probs(self, batch: Pass) -> Tensor:
        """Log-probabilities (n,) of the chosen tokens under the reference."""
        return log_probs_of(self._logits(self.reference, batch), batch.chosen)

    def values(self, batch: Pass) -> Tensor:
        """Values (n,) of the states before each chosen token."""
        with self.autocast():
            states = self.value(input_ids=batch.tokens, use_cache=False).last_hidden_state
            kept = states[:, :-1].flatten(0, 1)[batch.places]
            found: Tensor = self.value_head(kept.to(self.value_head.weight.dtype))[:, 0]
        factor, shift = self.scale
        return found.float() * factor + shift

    def _logits(self, model: Any, batch: Pass) -> Tensor:
        """Logits (n, V) at the temperature, of no other positions."""
        head = output_layer(model)
        with self.autocast(), handed(head, batch.tokens.shape[1], batch.places):
            logits: Tensor = model(input_ids=batch.tokens, use_cache=False).logits[0]
        return logits.float() / self.temperature if self.temperature != 1 else logits.float()


def log_probs_of(logits: Tensor, chosen: Tensor) -> Tensor:
    """Log-probabilities (n,) of tokens (n,) from logits (n, V), without a copy of all of them."""
    return logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(-1)


def entropy_of(logits: Tensor) -> Tensor:
    """Entropies (n,) in nats of the distributions that logits (n, V) stand for."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)
