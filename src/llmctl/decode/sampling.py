"""Sample the next token from logits: penalties, truncation, and random numbers of each row's own.

The conventions and their order are Hugging Face's: repetition penalty, temperature, top-k, top-p,
min-p. Every truncation keeps the tokens whose probability reaches some threshold, so one sort of
the probabilities, without their indices, serves them all.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llmctl.config.sections import Sampling


def uniform_stream(seed: int, stream_id: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1) for the positions of one row, whatever else is sampled.

    Philox is a counter-based generator (Salmon et al. 2011): (seed, stream_id) is its key.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, stream_id]))
    return torch.from_numpy(generator.random(count, dtype=np.float32))


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens less likely that were seen (Keskar et al., 2019, arXiv:1909.05858, section 4.1).

    Positive logits are divided as in the paper, negative ones multiplied as in transformers.

    Args:
        logits: (rows, vocabulary).
        seen: the same shape, true for tokens of the prompt and the response so far.
        penalty: above 1 discourages, below 1 encourages repetition.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def truncate(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (rows, vocabulary) with those of excluded tokens set to 0, not renormalized.

    top-k keeps the k most likely tokens; top-p the fewest most likely ones that hold p of what
    top-k left, so the one that crosses p is kept; min-p those at least p times the likeliest.
    """
    vocabulary = probabilities.shape[-1]
    top_k = min(sampling.top_k or vocabulary, vocabulary)
    threshold = probabilities.amax(-1, keepdim=True) * sampling.min_p
    if top_k < vocabulary or sampling.top_p < 1:
        kept = _descending(probabilities)[:, :top_k]
        mass = kept.cumsum(-1)
        count = (mass - kept < sampling.top_p * mass[:, -1:]).sum(-1, keepdim=True)
        threshold = threshold.maximum(kept.gather(-1, count - 1))
    return probabilities.masked_fill(probabilities < threshold, 0.0)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """The token (rows,) where the cumulated weights (rows, vocabulary) pass uniform (rows,)."""
    mass = weights.cumsum(-1)
    total = mass[:, -1:]
    target = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(mass, target, right=True)[:, 0]


class TokenSampler:
    """Samples tokens for the rows of one batch, which all started together."""

    def __init__(
        self,
        sampling: Sampling,
        prompts: Sequence[Sequence[int]],
        uniforms: Sequence[Tensor],
        vocabulary: int,
        device: torch.device,
        record_log_probs: bool = False,
    ) -> None:
        """Take each row's prompt and its uniform numbers, one per token to come."""
        self.sampling = sampling
        self.is_greedy = sampling.greedy or sampling.temperature == 0
        self._step = 0
        longest = max(map(len, uniforms))
        self._log_probs = (
            torch.zeros(len(uniforms), longest, device=device) if record_log_probs else None
        )
        self._uniforms = torch.zeros(0, 0)
        if not self.is_greedy:
            padded = torch.nn.utils.rnn.pad_sequence(list(uniforms), batch_first=True)
            self._uniforms = padded.to(device)
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=device)
            for row, prompt in enumerate(prompts):
                self._seen[row, torch.tensor(list(prompt), device=device)] = True

    def sample(self, logits: Tensor) -> Tensor:
        """Sample the next token (rows,) from logits (rows, vocabulary)."""
        if self._seen is not None:
            logits = penalize(logits.float(), self._seen, self.sampling.repetition_penalty)
        if self.is_greedy:
            tokens = logits.argmax(-1)
        else:
            probabilities = (logits.float() / self.sampling.temperature).softmax(-1)
            tokens = draw(truncate(probabilities, self.sampling), self._uniforms[:, self._step])
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        if self._log_probs is not None:
            self._log_probs[:, self._step] = self._score(logits, tokens)
        self._step += 1
        return tokens

    def log_probs_of(self, row: int) -> list[float]:
        """The log-probabilities of a row's tokens so far, where they are recorded."""
        if self._log_probs is None:
            return []
        scores: list[float] = self._log_probs[row, : self._step].tolist()
        return scores

    def _score(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Log-probabilities (rows,) of tokens at the sampling temperature, nothing truncated."""
        temperature = 1.0 if self.is_greedy else self.sampling.temperature
        scaled = logits.float() / temperature
        return scaled.gather(1, tokens[:, None])[:, 0] - scaled.logsumexp(-1)

    def select(self, rows: Sequence[int]) -> None:
        """Row `i` becomes what row `rows[i]` was."""
        if not self.is_greedy:
            self._uniforms = self._uniforms[list(rows)]
        if self._seen is not None:
            self._seen = self._seen[list(rows)]
        if self._log_probs is not None:
            self._log_probs = self._log_probs[list(rows)]


def _descending(values: Tensor) -> Tensor:
    """Sorted rows; on a CPU by numpy, whose vector sort is many times as fast as torch's."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), -1)).flip(-1)
    return values.sort(-1, descending=True).values
