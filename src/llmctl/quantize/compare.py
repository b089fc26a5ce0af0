"""What a smaller model lost: both models and held-out text in, figures and samples out."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmctl.config.sections import Sampling
from llmctl.console import ProgressBar
from llmctl.decode.loop import Prompt, choose_forward, decode
from llmctl.errors import DataError, ModelError
from llmctl.evaluate.perplexity import Window, batched, make_windows, perplexity_of, window_logits
from llmctl.models.loading import context_size, stop_tokens

LONGEST = 1024
"""Tokens of a window at most, where the model would take more."""
ROUNDS = 3
"""Of timing, in turns; the median counts."""


@dataclass(frozen=True)
class Fidelity:
    """How near a model's distributions of the next token are to another's."""

    tokens: int
    perplexity_before: float
    perplexity_after: float
    kl: float
    """Mean of KL(before || after) over all positions, in nats (Kullback and Leibler, 1951)."""
    top1: float
    """Share of the positions at which both find the same token the most likely."""

    @property
    def increase(self) -> float:
        """Relative growth of the perplexity; negative where it fell."""
        return self.perplexity_after / self.perplexity_before - 1


@dataclass(frozen=True)
class Sample:
    """What both models write to a prompt, always taking the most likely token."""

    prompt: str
    before: str
    after: str


def windows_of(documents: Sequence[Sequence[int]], model: PreTrainedModel) -> list[Window]:
    """The documents in windows that do not overlap, as pretraining's validation reads them.

    Raises:
        DataError: not one token that could be predicted.
    """
    context = min(context_size(model.config) or LONGEST, LONGEST)
    windows = make_windows(documents, context=context, stride=context)
    if not windows:
        raise DataError("the text to measure on has no token that could be predicted")
    return windows


def compare(before: PreTrainedModel, after: PreTrainedModel, windows: Sequence[Window]) -> Fidelity:
    """Perplexity of both models, and the distance between their distributions.

    Raises:
        ModelError: a token that the models do not have, or logits that are not finite.
    """
    nats_before = nats_after = divergence = same = 0.0
    total = 0
    with ProgressBar("measure", sum(window.scored for window in windows), "token") as progress:
        for batch in batched(before, windows):
            logits, targets = window_logits(before, batch)
            others, _ = window_logits(after, batch)
            for name, found in (("the model's", logits), ("the smaller model's", others)):
                if not torch.isfinite(found).all():
                    raise ModelError(f"{name} logits are not finite on the text to measure on")
            nats_before += _nats(logits, targets)
            nats_after += _nats(others, targets)
            divergence += _divergence(logits, others)
            same += int((logits.argmax(-1) == others.argmax(-1)).sum())
            total += len(targets)
            progress.update(total)
    perplexity_before, perplexity_after = (
        perplexity_of(nats / total) for nats in (nats_before, nats_after)
    )
    return Fidelity(total, perplexity_before, perplexity_after, divergence / total, same / total)


def _nats(logits: Tensor, targets: Tensor) -> float:
    """Sum of -log p of the targets (N,) under logits (N, V)."""
    return float(cross_entropy(logits, targets, reduction="none").double().sum())


def _divergence(logits: Tensor, others: Tensor) -> float:
    """Sum over the rows (N, V) of KL(p || q) = sum p (log p - log q)."""
    p, q = log_softmax(logits, -1), log_softmax(others, -1)
    return float(kl_div(q, p, reduction="none", log_target=True).sum(-1).double().sum())


def write_samples(
    before: PreTrainedModel,
    after: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    tokens: int,
) -> list[Sample]:
    """Greedy continuations of the prompts by both models, side by side."""
    asked = [Prompt(prompt, row) for row, prompt in enumerate(_fitting(prompts, before, tokens))]
    greedy = Sampling(max_new_tokens=tokens, greedy=True)
    texts = []
    for model in (before, after):
        eos = stop_tokens(model, tokenizer)
        found = decode(model, asked, greedy, eos=eos, tokenizer=tokenizer)
        ordered = sorted(found, key=lambda response: response.index)
        texts.append([response.text for response in ordered])
    spoken = [tokenizer.decode(prompt.tokens) for prompt in asked]
    return [Sample(*parts) for parts in zip(spoken, *texts, strict=True)]


def time_generation(
    models: Mapping[str, PreTrainedModel], prompts: Sequence[Sequence[int]], tokens: int
) -> dict[str, float]:
    """Tokens a second that each model generates, one sequence at a time.

    The models take turns, so that what else the machine does falls on all of them.

    Args:
        models: by name.
        prompts: what to continue; the first counts.
        tokens: how many to generate each time.
    """
    first = next(iter(models.values()))
    prompt = _fitting(prompts, first, tokens)[0]
    forwards = {name: choose_forward(model, prompt) for name, model in models.items()}
    greedy = Sampling(max_new_tokens=tokens, greedy=True)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(1 + ROUNDS):
        for name, model in models.items():
            started = time.perf_counter()
            (response,) = decode(model, [Prompt(prompt, 0)], greedy, eos=(), forward=forwards[name])
            spent = time.perf_counter() - started
            if turn > 0:  # the first one warms up
                seconds[name].append(spent / len(response.tokens))
    return {name: 1 / statistics.median(each) for name, each in seconds.items()}


def _fitting(
    prompts: Sequence[Sequence[int]], model: PreTrainedModel, tokens: int
) -> list[Sequence[int]]:
    """The prompts, cut from the left where they would leave no room for so many tokens."""
    context = context_size(model.config)
    most = None if context is None else max(1, context - tokens)
    return [prompt if most is None else prompt[-most:] for prompt in islice(prompts, 3)]
