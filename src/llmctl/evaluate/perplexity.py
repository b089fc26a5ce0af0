"""Measure how likely a model finds texts: documents in, windows, nats and perplexity out.

A long document is read in windows that overlap, so that every token but a document's first is
predicted once, with some of the text before it. No window spans two documents. An evaluation reads
the windows in parts, and writes a row for each.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmctl.config.commands import EvaluateConfig
from llmctl.errors import DataError, ModelError
from llmctl.evaluate.inputs import Document
from llmctl.evaluate.task import Row
from llmctl.evaluate.plan import EvaluationPlan, EvaluatedModel
from llmctl.evaluate.task import EvaluationTask

MOST_NATS = 700
"""A token: e to more than this is no float."""
BATCH_TOKENS = 1 << 14
"""Tokens of one forward pass at most, but for a single window."""
BATCH_LOGITS = 1 << 26
"""Logits of one forward pass at most: 256 MiB of float32."""

PART = 32
"""Windows of a row: a long document is done in parts, which a run can continue between."""
AT_ONCE = 16
"""Parts that are measured together."""


@dataclass(frozen=True)
class Window:
    """A stretch of a document: tokens from `scored_from` on are predicted from all before them."""

    tokens: tuple[int, ...]
    scored_from: int
    """At least 1: the first token of a window is never predicted."""

    @property
    def scored(self) -> int:
        """How many tokens are predicted."""
        return len(self.tokens) - self.scored_from


@dataclass(frozen=True)
class Likelihood:
    """What a text cost a model."""

    nats: float
    """Sum of -log p over the tokens that were predicted."""
    tokens: int
    bytes: int
    """UTF-8 bytes of the text."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, MOST_NATS))

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which models of different tokenizers have in common."""
        return self.nats / math.log(2) / self.bytes


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, end: bool = True
) -> list[list[int]]:
    """Tokens of documents, framed as in pretraining.

    A document begins with what the tokenizer puts before every text, such as BOS, or else with
    the EOS that ends the document before it, so that its first word is predicted, too. Text that
    spells a special token is encoded as text.

    Args:
        tokenizer: of the model.
        texts: one a document.
        end: put EOS after it, which is then predicted as in pretraining.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    whole = list(texts)
    rows = tokenizer(whole, split_special_tokens=True)["input_ids"] if whole else []
    frame = tokenizer("")["input_ids"]
    prefixed, suffixed = bool(frame) and frame != [eos], frame[-1:] == [eos]
    documents = []
    for row in rows:
        body = [int(token) for token in (row[:-1] if suffixed else row)]
        start = [] if prefixed else [bos if eos is None else eos]
        documents.append([*start, *body, *([eos] if end else [])])
    return [[token for token in document if token is not None] for document in documents]


def make_windows(
    documents: Iterable[Sequence[int]], *, context: int, stride: int | None = None
) -> list[Window]:
    """Windows over documents: each token but a document's first is scored exactly once.

    A model reads at most `context` tokens at a time. A window begins `stride` tokens after the one
    before it and scores what that one did not reach; half the context by default, so that all but
    the first tokens of a document have at least that much before them (as in transformers' page on
    the perplexity of models of fixed length). A stride of the whole context is the quickest, and
    what pretraining's validation does.
    """
    step = stride or max(1, context // 2)
    assert 1 <= step <= context
    windows = []
    for document in documents:
        tokens, scored = tuple(document), 1
        for begin in range(0, len(tokens), step):
            if scored >= len(tokens):
                break
            part = tokens[begin : begin + context + 1]
            windows.append(Window(part, scored - begin))
            scored = begin + len(part)
    return windows


def window_logits(model: PreTrainedModel, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Logits and targets of all scored positions, in the order of the windows.

    Args:
        model: a causal language model in eval mode.
        windows: the logits of all of them are held at once: use `batched`.

    Returns:
        Logits (N, V) in float32 and targets (N,), on the model's device.

    Raises:
        ModelError: a token that the model does not have.
    """
    parts = [_forward(model, batch) for batch in batched(model, windows)]
    return torch.cat([logits for logits, _ in parts]), torch.cat([found for _, found in parts])


def window_nats(model: PreTrainedModel, windows: Sequence[Window]) -> list[float]:
    """The nats (sums of -log p, in float64) that each window's scored tokens cost.

    Raises:
        ModelError: a token that the model does not have.
    """
    order = sorted(range(len(windows)), key=lambda place: len(windows[place].tokens))
    nats = [0.0] * len(windows)
    places = iter(order)
    for batch in batched(model, [windows[place] for place in order]):
        logits, targets = _forward(model, batch)
        each = cross_entropy(logits, targets, reduction="none").cpu().double()
        parts = torch.split(each, [window.scored for window in batch])
        for part in parts:
            nats[next(places)] = float(part.sum())
    return nats


def measure(model: PreTrainedModel, windows: Sequence[Window], *, bytes: int) -> Likelihood:
    """The likelihood of the text that the windows stand for.

    Args:
        model: a causal language model in eval mode.
        windows: of one or many documents.
        bytes: UTF-8 bytes of their text.

    Raises:
        ModelError: a token that the model does not have.
    """
    nats = math.fsum(window_nats(model, windows))
    return Likelihood(nats, sum(window.scored for window in windows), bytes)


def batched(model: PreTrainedModel, windows: Sequence[Window]) -> Iterator[list[Window]]:
    """The windows in batches whose logits fit the memory, one at least in each."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    limit = min(BATCH_TOKENS, max(1, BATCH_LOGITS // vocabulary))
    batch: list[Window] = []
    longest = 0
    for window in windows:
        longest = max(longest, len(window.tokens))
        if batch and longest * (len(batch) + 1) > limit:
            yield batch
            batch, longest = [], len(window.tokens)
        batch.append(window)
    if batch:
        yield batch


@torch.inference_mode()
def _forward(model: PreTrainedModel, batch: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Logits and targets of one batch.

    Padding stands at the right: attention is causal, so what is scored does not see it.
    """
    embeddings = model.get_input_embeddings().weight.shape[0]
    if (most := max(token for window in batch for token in window.tokens)) >= embeddings:
        raise ModelError(
            f"the text has token {most}, the model only {embeddings:,} embeddings: "
            "the tokenizer is another model's"
        )
    length = max(len(window.tokens) for window in batch) - 1
    rows = [[*window.tokens[:-1], *[0] * (length + 1 - len(window.tokens))] for window in batch]
    kept = length + 1 - min(window.scored_from for window in batch)
    output = model(
        input_ids=torch.tensor(rows, device=model.device), use_cache=False, **_keeping(model, kept)
    )
    first = length - kept
    logits = output.logits[:, -kept:]
    scored = [
        logits[row, window.scored_from - 1 - first : len(window.tokens) - 1 - first]
        for row, window in enumerate(batch)
    ]
    targets = [token for window in batch for token in window.tokens[window.scored_from :]]
    return torch.cat(scored).float(), torch.tensor(targets, device=model.device)


def _keeping(model: Any, kept: int) -> dict[str, int]:
    """Have only the last logits computed, where a model can."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    can = "logits_to_keep" in signature(type(inner).forward).parameters
    return {"logits_to_keep": kept} if can else {}


class _Part(NamedTuple):
    """Windows of one document that follow each other."""

    document: int
    windows: Sequence[Window]
    bytes: int


def perplexity_task(
    config: EvaluateConfig, plan: EvaluationPlan, subject: EvaluatedModel, load: Callable[[], PreTrainedModel]
) -> EvaluationTask:
    """The work of measuring how likely a model finds documents.

    Raises:
        DataError: a document of no tokens.
    """
    documents = plan.data.documents[: config.limit]
    context, stride = subject.window(config)
    texts = [document.text for document in documents]
    encoded = encode_documents(subject.tokenizer, texts, end=config.end)
    parts = [
        part
        for number, (document, tokens) in enumerate(zip(documents, encoded, strict=True))
        for part in _parts(number, document, make_windows([tokens], context=context, stride=stride))
    ]

    def compute(units: range) -> list[Row]:
        some = [parts[number] for number in units]
        nats = iter(window_nats(load(), [window for part in some for window in part.windows]))
        return [
            _row(documents[part.document], part, [next(nats) for _ in part.windows])
            for part in some
        ]

    return EvaluationTask(len(parts), AT_ONCE, compute)


def _parts(number: int, document: Document, windows: list[Window]) -> list[_Part]:
    """A document's windows, and its bytes shared out among them by tokens."""
    if not windows:
        raise DataError("a text of no tokens", file=document.place, line=document.line)
    size, total = len(document.text.encode()), sum(window.scored for window in windows)
    parts, done, given = [], 0, 0
    for start in range(0, len(windows), PART):
        some = windows[start : start + PART]
        done += sum(window.scored for window in some)
        share = size * done // total - given
        given += share
        parts.append(_Part(number, some, share))
    return parts


def _row(document: Document, part: _Part, nats: list[float]) -> dict[str, Any]:
    return {
        "document": part.document,
        "place": document.place,
        "line": document.line,
        "nats": sum(nats),
        "tokens": sum(window.scored for window in part.windows),
        "bytes": part.bytes,
    }
