"""Perplexity of documents: their windows cut into parts, a row for each."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from llmctl.config.stages import EvaluateConfig
from llmctl.errors import DataError
from llmctl.evaluate.data import Document
from llmctl.evaluate.plan import Plan, Subject
from llmctl.evaluate.rows import Row
from llmctl.evaluate.work import Work
from llmctl.likelihood import Window, encode_documents, make_windows, window_nats

PART = 32
"""Windows of a row: a long document is done in parts, which a run can continue between."""
AT_ONCE = 16
"""Parts that are measured together."""


class _Part(NamedTuple):
    """Windows of one document that follow each other."""

    document: int
    windows: Sequence[Window]
    bytes: int


def reading(
    config: EvaluateConfig, plan: Plan, subject: Subject, load: Callable[[], PreTrainedModel]
) -> Work:
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

    return Work(len(parts), AT_ONCE, compute)


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
