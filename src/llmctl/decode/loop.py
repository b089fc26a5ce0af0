"""Generate: batches of prompts, one forward pass a token, finished rows dropped.

In: a model, prompts as token ids and sampling settings. Out: responses as they finish.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from transformers import PreTrainedTokenizerBase

from llmctl.config.sections import Loading, QuickLoading, Sampling
from llmctl.decode.forward import Forward, HuggingFaceForward
from llmctl.decode.llama import PlainModel, fast_forward
from llmctl.decode.plain import load_plain
from llmctl.decode.sampling import TokenSampler, uniform_stream
from llmctl.decode.text import TextStream, stop_ids
from llmctl.errors import DataError, ModelError
from llmctl.hardware import set_threads, usable_cores
from llmctl.models.loading import (
    context_size,
    load_causal_lm,
    load_config,
    local_folder,
    parse_dtype,
)
from llmctl.models.plain import PlainConfig, read_plain_config
from llmctl.models.quantized import LoadIn
from llmctl.runs.directory import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FinishReason = Literal["eos", "stop", "length"]
WORTH_THREADS = 3_000_000
"""Parameters times rows from which on more than one CPU thread pays."""
OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue."""

    tokens: Sequence[int]
    stream_id: int
    """Id of the sampling stream: the same (seed, id) and prompt give the same text."""
    max_new_tokens: int | None = None
    """In place of the sampling's."""


@dataclass
class Response:
    """A generated text; finished when it is handed out."""

    index: int
    """Place of its prompt."""
    tokens: list[int] = field(default_factory=list)
    """With the stop token, where one ended it."""
    text: str = ""
    finish_reason: FinishReason | None = None
    log_probs: list[float] = field(default_factory=list)
    """One a token, at the sampling temperature and before any truncation; where asked for."""


@dataclass
class _Row:
    """A response that is being generated."""

    prompt: Prompt
    response: Response
    limit: int
    ends: Mapping[int, FinishReason]
    """Tokens that end it, and why."""
    stream: TextStream | None
    on_text: OnText | None

    def append(self, token: int) -> None:
        """Append a token, and set the finish reason if it is the last."""
        response = self.response
        response.tokens.append(token)
        ended = self.ends.get(token)
        if self.stream is not None and (self.on_text or self.stream.stops) and ended is None:
            self._emit(self.stream.feed([token]))
        if self.stream is not None and self.stream.stopped:
            response.finish_reason = "stop"
        elif ended is not None:
            response.finish_reason = ended
        elif len(response.tokens) == self.limit:
            response.finish_reason = "length"
        if response.finish_reason and self.stream is not None:
            if not (self.on_text or self.stream.stops):
                self._emit(self.stream.feed(response.tokens[: -1 if ended else None]))
            self._emit(self.stream.finish())

    def _emit(self, piece: str) -> None:
        self.response.text += piece
        if piece and self.on_text:
            self.on_text(self.response.index, piece)


def choose_forward(model: PreTrainedModel | PlainModel, prompt: Sequence[int]) -> Forward:
    """The fast pass where it covers the model and agrees on this prompt, else transformers'."""
    fast = fast_forward(model, prompt)
    if fast is None:
        assert not isinstance(model, PlainModel)
        return HuggingFaceForward(model)
    return fast


def check_prompt(tokens: Sequence[int], config: PreTrainedConfig | PlainConfig, name: str) -> None:
    """Refuse a prompt that the model cannot read.

    Raises:
        DataError: it is empty, or leaves no room in the context.
        ModelError: a token that the model has no embedding for.
    """
    context, vocabulary = context_size(config), config.get_text_config().vocab_size
    if not tokens:
        raise DataError(f"{name} is empty, and the tokenizer has no BOS token to start from")
    if context is not None and len(tokens) >= context:
        raise DataError(
            f"{name} has {len(tokens):,} tokens, the model's context {context:,}: no room to write",
            hint="shorten the prompt",
        )
    if max(tokens) >= vocabulary:
        raise ModelError(
            f"{name} has token {max(tokens)}, the model's vocabulary only {vocabulary:,}: "
            "the tokenizer is another model's"
        )


def limit_new_tokens(
    tokens: Sequence[int], config: PreTrainedConfig | PlainConfig, wanted: int
) -> int:
    """Lower the number of new tokens to what the context has room for after a prompt."""
    context = context_size(config)
    return wanted if context is None else min(wanted, context - len(tokens))


def decode(
    model: PreTrainedModel | PlainModel,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    eos: Collection[int],
    forward: Forward | None = None,
    seed: int = 0,
    batch_size: int = 64,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_text: OnText | None = None,
    log_probs: bool = False,
) -> Iterator[Response]:
    """Continue every prompt; responses come as they finish, not in the order of the prompts.

    Prompts of like length share a batch, so that little is padded, and equal ones a prefill.

    Args:
        model: any causal language model, in eval mode.
        prompts: token ids, with BOS where the model wants it.
        sampling: how to choose tokens, how many, and the stop strings.
        eos: tokens that end a response.
        forward: how to run the model; by default chosen here.
        seed: of sampling; a prompt's stream depends on this and its id alone.
        batch_size: most rows at once.
        tokenizer: decodes, and finds stop strings; None leaves texts empty, and stops at none.
        on_text: called with the prompt's index and each new piece of its text.
        log_probs: record them.

    Raises:
        DataError: a prompt that leaves no room in the context.
        ModelError: a token that the model does not have.
        UserError: a stop string that no text can hold.
    """
    stops = stop_ids(tokenizer, sampling.stop) if tokenizer else ()
    ends: dict[int, FinishReason] = {**dict.fromkeys(eos, "eos"), **dict.fromkeys(stops, "stop")}
    rows = []
    for index, prompt in enumerate(prompts):
        check_prompt(prompt.tokens, model.config, f"prompt {index + 1}")
        stream = TextStream(tokenizer, prompt.tokens, sampling.stop) if tokenizer else None
        wanted = prompt.max_new_tokens or sampling.max_new_tokens
        limit = limit_new_tokens(prompt.tokens, model.config, wanted)
        rows.append(_Row(prompt, Response(index), limit, ends, stream, on_text))
    if not rows:
        return
    forward = forward or choose_forward(model, prompts[0].tokens)
    rows.sort(key=lambda row: len(row.prompt.tokens))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        sampler = TokenSampler(
            sampling,
            [row.prompt.tokens for row in batch],
            [uniform_stream(seed, row.prompt.stream_id, row.limit) for row in batch],
            vocabulary=model.config.get_text_config().vocab_size,
            device=model.device,
            record_log_probs=log_probs,
        )
        for row in _decode_batch(forward, sampler, batch):
            yield row.response


@torch.inference_mode()
def _decode_batch(forward: Forward, sampler: TokenSampler, rows: Sequence[_Row]) -> Iterator[_Row]:
    """Generate one batch; each row is yielded when it finishes, and leaves the batch."""
    prompts = [tuple(row.prompt.tokens) for row in rows]
    distinct = list(dict.fromkeys(prompts))
    logits = forward.prefill(distinct)
    if len(distinct) < len(prompts):
        indices = [distinct.index(prompt) for prompt in prompts]
        forward.select(indices)
        logits = logits[indices]
    while True:
        tokens = sampler.sample(logits)
        for row, token in zip(rows, tokens.tolist(), strict=True):  # the one wait for the device
            row.append(token)
        if any(row.response.finish_reason for row in rows):
            for index, row in enumerate(rows):
                if row.response.finish_reason:
                    row.response.log_probs = sampler.log_probs_of(index)
                    yield row
            indices = _remaining(rows)
            if not indices:
                return
            rows, tokens = [rows[index] for index in indices], tokens[indices]
            forward.select(indices)
            sampler.select(indices)
        logits = forward.step(tokens)


def _remaining(rows: Sequence[_Row]) -> list[int]:
    """Indices of the unfinished rows; the last ones fill the gaps, so that few have to move."""
    indices = list(range(len(rows)))
    index = 0
    while index < len(indices):
        if rows[indices[index]].response.finish_reason is None:
            index += 1
            continue
        last = indices.pop()
        if index < len(indices):
            indices[index] = last
    return indices


def best_threads(parameters: int, rows: int, cores: int) -> int:
    """CPU threads for a batch: a small product ends before a second thread has woken."""
    return cores if parameters * rows >= WORTH_THREADS else 1


def config_for_generation(config: QuickLoading) -> PreTrainedConfig | PlainConfig:
    """Configuration of the model to use, read without transformers where that will do.

    Raises:
        ModelError: there is none, it is broken, or it wants to run code of its own.
    """
    if not (config.load_in_8bit or config.load_in_4bit or config.check):
        plain = read_plain_config(local_folder(resolve_model(config.model)))
        if plain is not None:
            return plain
    return load_config(config.model)


def load_for_generation(
    reference: str,
    config: Loading,
    shape: PreTrainedConfig | PlainConfig,
    *,
    device: str,
    rows: int,
) -> PreTrainedModel | PlainModel:
    """Load the model of a run, a folder or a Hub id, and set the threads for batches of `rows`.

    A model whose configuration is plain is loaded without transformers' code of models.

    Raises:
        ModelError: it is broken, not trusted, or no language model.
        NetworkError: a Hub id that cannot be had.
    """
    load_in: LoadIn = "8bit" if config.load_in_8bit else "4bit" if config.load_in_4bit else "full"
    dtype = parse_dtype(config.dtype, device, shape.dtype)
    model: PreTrainedModel | PlainModel | None = None
    if isinstance(shape, PlainConfig):
        model = load_plain(shape, dtype=dtype, device=device)
    model = model or load_causal_lm(reference, dtype=dtype, device=device, load_in=load_in)
    set_threads(config.threads or best_threads(model.num_parameters(), rows, usable_cores()))
    return model
