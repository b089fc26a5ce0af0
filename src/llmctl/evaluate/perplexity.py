"""Perplexity: documents in; windows over them, and the nats that a model spends on each, out.

A long document is read in windows that overlap, so that every token but a document's first is
predicted once, with some of the text before it. No window spans two documents. An evaluation reads
the windows in parts, and writes a row for each.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmctl.config.commands.evaluate import EvaluateConfig
from llmctl.decode.forward import takes
from llmctl.errors import DataError, ModelError
from llmctl.evaluate.inputs import Document
from llmctl.evaluate.prepare import EvaluatedModel, EvaluationPlan
from llmctl.evaluate.task import EvaluationTask, Row

MAX_LOSS = 700
"""Nats per token: e to more than this overflows a float."""
BATCH_TOKENS = 1 << 14
"""Tokens of one forward pass at most, but for a single window."""
BATCH_LOGITS = 1 << 26
"""Logits of one forward pass at most: 256 MiB of float32."""

PART = 32
"""Windows of a row: a long document has several, between which a run can resume."""
AT_ONCE = 16
"""Rows that are computed together."""


@dataclass(frozen=True)
class Window:
    """A stretch of a document: tokens from `scored_from` on are predicted from all before them."""

    tokens: tuple[int, ...]
    scored_from: int
    """At least 1: the first token of a window is never predicted."""

    @property
    def scored(self) -> int:
        """Number of tokens that are predicted."""
        return len(self.tokens) - self.scored_from


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, end: bool = True
) -> list[list[int]]:
    """Encode documents with BOS and EOS as in pretraining.

    A document begins with what the tokenizer puts before every text, such as BOS, or else with
    the EOS that ends the document before it, so that its first word is predicted, too. Text that
    spells a special token is encoded as text. With `end` EOS stands after it, and is predicted.
    """
    batch, eos = list(texts), tokenizer.eos_token_id
    rows = tokenizer(batch, split_special_tokens=True)["input_ids"] if batch else []
    put_before, is_ended = text_frame(tokenizer)
    start = [] if put_before else document_start(tokenizer)
    close = [int(eos)] if end and eos is not None else []
    bodies = [[int(token) for token in (row[:-1] if is_ended else row)] for row in rows]
    return [[*start, *body, *close] for body in bodies]


def text_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], bool]:
    """The tokens that a tokenizer puts before every text, and whether it puts EOS after."""
    frame = [int(token) for token in tokenizer("")["input_ids"]]
    is_ended = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    return (frame[:-1] if is_ended else frame), is_ended


def document_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens from which a document's first word is predicted; none without BOS and EOS."""
    put_before, _ = text_frame(tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    before = bos if eos is None else eos
    return put_before or ([] if before is None else [int(before)])


def make_windows(
    documents: Iterable[Sequence[int]], *, context: int, stride: int | None = None
) -> list[Window]:
    """Cut documents into windows: each token but a document's first is scored exactly once.

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
    logits, targets = zip(*parts, strict=True)
    return torch.cat(logits), torch.cat(targets)


def window_nats(model: PreTrainedModel, windows: Sequence[Window]) -> list[float]:
    """The nats (sums of -log p, in float64) that each window's scored tokens cost.

    Raises:
        ModelError: a token that the model does not have.
    """
    order = sorted(range(len(windows)), key=lambda index: len(windows[index].tokens))
    nats = [0.0] * len(windows)
    indices = iter(order)
    for batch in batched(model, [windows[index] for index in order]):
        logits, targets = _forward(model, batch)
        losses = cross_entropy(logits, targets, reduction="none").cpu().double()
        parts = torch.split(losses, [window.scored for window in batch])
        for part in parts:
            nats[next(indices)] = float(part.sum())
    return nats


def perplexity_of(loss: float) -> float:
    """The exponential of a loss in nats per token."""
    return math.exp(min(loss, MAX_LOSS))


def batched(model: PreTrainedModel, windows: Sequence[Window]) -> Iterator[list[Window]]:
    """Batch the windows so that their logits fit the memory, one at least in each."""
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
        input_ids=torch.tensor(rows, device=model.device),
        use_cache=False,
        **({"logits_to_keep": kept} if takes(model, "logits_to_keep") else {}),
    )
    first = length - kept
    logits = output.logits[:, -kept:]
    scored = [
        logits[row, window.scored_from - 1 - first : len(window.tokens) - 1 - first]
        for row, window in enumerate(batch)
    ]
    targets = [token for window in batch for token in window.tokens[window.scored_from :]]
    return torch.cat(scored).float(), torch.tensor(targets, device=model.device)


class _Part(NamedTuple):
    """Windows of one document that follow each other."""

    document: int
    windows: Sequence[Window]
    bytes: int


def perplexity_task(
    config: EvaluateConfig,
    plan: EvaluationPlan,
    evaluated: EvaluatedModel,
    load: Callable[[], PreTrainedModel],
) -> EvaluationTask:
    """The task of measuring the perplexity of documents.

    Raises:
        DataError: a document of no tokens.
    """
    documents = plan.data.documents[: config.limit]
    context, stride = evaluated.context_and_stride(config)
    texts = [document.text for document in documents]
    encoded = encode_documents(evaluated.tokenizer, texts, end=config.end)
    parts = [
        part
        for number, (document, tokens) in enumerate(zip(documents, encoded, strict=True))
        for part in _parts(number, document, make_windows([tokens], context=context, stride=stride))
    ]

    def compute(units: range) -> list[Row]:
        chosen = [parts[number] for number in units]
        nats = iter(window_nats(load(), [window for part in chosen for window in part.windows]))
        return [
            {
                "document": part.document,
                "place": documents[part.document].place,
                "line": documents[part.document].line,
                "nats": sum(islice(nats, len(part.windows))),
                "tokens": sum(window.scored for window in part.windows),
                "bytes": part.bytes,
            }
            for part in chosen
        ]

    return EvaluationTask(len(parts), AT_ONCE, compute)


def _parts(number: int, document: Document, windows: list[Window]) -> list[_Part]:
    """A document's windows in parts, with its bytes divided among them by tokens."""
    if not windows:
        raise DataError("a text of no tokens", file=document.place, line=document.line)
    size, total = len(document.text.encode()), sum(window.scored for window in windows)
    parts, tokens_done, bytes_done = [], 0, 0
    for start in range(0, len(windows), PART):
        chosen = windows[start : start + PART]
        tokens_done += sum(window.scored for window in chosen)
        share = size * tokens_done // total - bytes_done
        bytes_done += share
        parts.append(_Part(number, chosen, share))
    return parts
