"""Compare a model and its smaller copy: both and held-out text in; figures, samples, speed out."""

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

MAX_CONTEXT = 1024
"""Tokens of a window at most, where the model would take more."""
ROUNDS = 3
"""Timed rounds, of which the median counts."""


@dataclass(frozen=True)
class Fidelity:
    """How near a smaller model's next-token distributions are to the original's."""

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


def measurement_windows(documents: Sequence[Sequence[int]], model: PreTrainedModel) -> list[Window]:
    """Cut documents into windows that do not overlap, as in pretraining's validation.

    Raises:
        DataError: no token that could be predicted.
    """
    context = min(context_size(model.config) or MAX_CONTEXT, MAX_CONTEXT)
    windows = make_windows(documents, context=context, stride=context)
    if not windows:
        raise DataError("the text to measure on has no token that could be predicted")
    return windows


def measure_fidelity(
    before: PreTrainedModel, after: PreTrainedModel, windows: Sequence[Window]
) -> Fidelity:
    """Measure the perplexity of both models, and the distance between their distributions.

    Raises:
        ModelError: a token that the models do not have, or logits that are not finite.
    """
    nats_before = nats_after = divergence = agreeing = 0.0
    total = 0
    with ProgressBar("measure", sum(window.scored for window in windows), "token") as progress:
        for batch in batched(before, windows):
            logits_before, targets = window_logits(before, batch)
            logits_after, _ = window_logits(after, batch)
            for name, logits in (
                ("the model's", logits_before),
                ("the smaller model's", logits_after),
            ):
                if not torch.isfinite(logits).all():
                    raise ModelError(f"{name} logits are not finite on the text to measure on")
            nats_before += _nats(logits_before, targets)
            nats_after += _nats(logits_after, targets)
            divergence += _divergence(logits_before, logits_after)
            agreeing += int((logits_before.argmax(-1) == logits_after.argmax(-1)).sum())
            total += len(targets)
            progress.update(total)
    perplexity_before, perplexity_after = (
        perplexity_of(nats / total) for nats in (nats_before, nats_after)
    )
    return Fidelity(
        total, perplexity_before, perplexity_after, divergence / total, agreeing / total
    )


def _nats(logits: Tensor, targets: Tensor) -> float:
    """Sum of -log p of the targets (N,) under logits (N, V)."""
    return float(cross_entropy(logits, targets, reduction="none").double().sum())


def _divergence(logits_before: Tensor, logits_after: Tensor) -> float:
    """Sum over the rows (N, V) of KL(p || q) = sum p (log p - log q)."""
    p, q = log_softmax(logits_before, -1), log_softmax(logits_after, -1)
    return float(kl_div(q, p, reduction="none", log_target=True).sum(-1).double().sum())


def generate_samples(
    before: PreTrainedModel,
    after: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    end_of_answer: int | None = None,
) -> list[dict[str, str]]:
    """Continue the prompts greedily with both models: texts `prompt`, `before` and `after`.

    What ends a response of either model ends these, and `end_of_answer`.
    """
    encoded = [
        Prompt(prompt, row) for row, prompt in enumerate(_fit_prompts(prompts, before, tokens))
    ]
    greedy = Sampling(max_new_tokens=tokens, greedy=True)
    continuations = []
    for model in (before, after):
        eos = stop_tokens(model, tokenizer, end_of_answer)
        responses = decode(model, encoded, greedy, eos=eos, tokenizer=tokenizer)
        ordered = sorted(responses, key=lambda response: response.index)
        continuations.append([response.text for response in ordered])
    prompt_texts = [tokenizer.decode(prompt.tokens) for prompt in encoded]
    names = ("prompt", "before", "after")
    rows = zip(prompt_texts, *continuations, strict=True)
    return [dict(zip(names, texts, strict=True)) for texts in rows]


def time_generation(
    models: Mapping[str, PreTrainedModel], prompts: Sequence[Sequence[int]], tokens: int
) -> dict[str, float]:
    """Measure tokens a second of each model, one sequence at a time.

    The models take turns, so that other load of the machine falls on all of them, in continuing
    the first prompt by so many tokens.
    """
    first = next(iter(models.values()))
    prompt = _fit_prompts(prompts, first, tokens)[0]
    forwards = {name: choose_forward(model, prompt) for name, model in models.items()}
    greedy = Sampling(max_new_tokens=tokens, greedy=True)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(1 + ROUNDS):
        for name, model in models.items():
            started = time.perf_counter()
            (response,) = decode(model, [Prompt(prompt, 0)], greedy, eos=(), forward=forwards[name])
            elapsed = time.perf_counter() - started
            if turn > 0:  # the first one warms up
                seconds[name].append(elapsed / len(response.tokens))
    return {name: 1 / statistics.median(times) for name, times in seconds.items()}


def _fit_prompts(
    prompts: Sequence[Sequence[int]], model: PreTrainedModel, tokens: int
) -> list[Sequence[int]]:
    """The first prompts, cut from the left to leave room for so many tokens."""
    context = context_size(model.config)
    room = None if context is None else max(1, context - tokens)
    return [prompt if room is None else prompt[-room:] for prompt in islice(prompts, 3)]
