"""Read evaluation data: names of data in; documents, prompts with references or labels out."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmctl.config.commands.evaluate import GENERATED, EvaluateConfig
from llmctl.data.bad_rows import BadRows
from llmctl.data.documents import text_input
from llmctl.data.examples import Example, read_examples
from llmctl.data.prompts import PromptExample, read_prompts
from llmctl.data.rows import quote_names, read_rows
from llmctl.data.scan import read_documents
from llmctl.data.schemas import Message
from llmctl.data.sources import find_sources
from llmctl.errors import DataError

Kind = Literal["documents", "questions", "labels"]


@dataclass(frozen=True)
class Document:
    """One text."""

    text: str
    place: str
    line: int | None


@dataclass(frozen=True)
class EvaluationExample:
    """A prompt and its reference; of a labelled text, the text and its label."""

    messages: tuple[Message, ...]
    """A conversation that ends before the assistant's turn."""
    reference: str | None
    tools: list[Any] | None
    place: str
    line: int | None

    @property
    def name(self) -> str:
        """Place and line for messages."""
        return self.place if self.line is None else f"{self.place}:{self.line}"

    def error(self, message: str, hint: str | None = None) -> DataError:
        """An error of this row."""
        return DataError(message, file=self.place, line=self.line, hint=hint)

    @property
    def text(self) -> str:
        """The last message."""
        return str(self.messages[-1]["content"])

    def as_row(self) -> dict[str, Any]:
        """The columns of rows.jsonl that say what was evaluated."""
        return {
            "place": self.place,
            "line": self.line,
            "prompt": self.text,
            "reference": self.reference,
        }


@dataclass(frozen=True)
class EvaluationData:
    """All rows, of one kind."""

    kind: Kind
    documents: list[Document]
    examples: list[EvaluationExample]
    inputs: list[dict[str, Any]]
    """For the manifest."""


def read_data(config: EvaluateConfig, bad: BadRows) -> EvaluationData:
    """Read all data, as the kind that the metrics and the first row's columns tell.

    `bad` counts the rows that are left out for their errors.

    Raises:
        DataError: rows that are broken, or none; no references for a metric that needs them.
        NetworkError: a Hub data set that cannot be reached.
        UserError: columns that make no sense.
    """
    kind = _kind(config)
    if kind == "documents":
        documents, inputs = _read_documents(config, bad)
        return EvaluationData(kind, documents, [], inputs)
    with_reference = [name for name in config.metrics if name != "perplexity"]
    if config.reward_model and not config.metrics:
        prompts = read_prompts(config.data, [], 0, bad)
        examples = [_from_prompt(row) for row in prompts.train]
        return EvaluationData(kind, [], examples, prompts.inputs)
    examples, inputs = read_references(config.data, config, kind, bad, with_reference)
    return EvaluationData(kind, [], examples, inputs)


def read_references(
    names: Sequence[str],
    config: EvaluateConfig,
    kind: Kind,
    bad: BadRows,
    metrics: Sequence[str] = (),
    role: str = "data",
) -> tuple[list[EvaluationExample], list[dict[str, Any]]]:
    """Read prompts with their references or labels, and the manifest's inputs, in this role.

    Raises:
        DataError: as `read_data`.
    """
    task: Literal["classify", "chat"] = "classify" if kind == "labels" else "chat"
    sets = read_examples(names, columns=config.columns, bad=bad, task=task, role=role)
    examples = [example for data_set in sets for example in data_set.examples]
    inputs = [entry for data_set in sets for entry in data_set.inputs]
    return [_from_example(example, metrics) for example in examples], inputs


def _kind(config: EvaluateConfig) -> Kind:
    """Tell the kind of the data by the metrics and the first row."""
    columns = _first_columns(config.data)
    generated = [name for name in config.metrics if name in GENERATED]
    if columns is None and (generated or config.reward_model):
        what = f"--metrics {generated[0]}" if generated else "--reward-model"
        raise DataError(
            f"{what} is of answers to prompts, and this is plain text",
            file=config.data[0],
            hint="pass rows of `prompt` and `response`, as sft reads them",
        )
    if columns is None:
        return "documents"
    roles = {pair.split("=")[0].strip() for text in config.columns for pair in text.split(",")}
    is_labelled = {"text", "label"} <= columns and not config.columns
    if "label" in roles or (is_labelled and config.metrics != ["perplexity"]):
        return "labels"
    if generated or config.reward_model or config.columns:
        return "questions"
    return "documents" if config.text_column in columns else "questions"


def _first_columns(names: Sequence[str]) -> set[str] | None:
    """Columns of the first row, None for plain text.

    Raises:
        DataError: there is no row.
    """
    with tempfile.TemporaryDirectory(prefix="llmctl-") as spool:
        sources = find_sources(names, Path(spool))
        rows = [source for source in sources if source.kind != "text"]
        if not rows:
            return None
        first = next(iter(read_rows(rows[0])), None)
    if first is None:
        raise DataError("an empty file: no rows in it", file=rows[0].name)
    return set(first.values)


def _read_documents(
    config: EvaluateConfig, bad: BadRows
) -> tuple[list[Document], list[dict[str, Any]]]:
    documents: list[Document] = []
    with tempfile.TemporaryDirectory(prefix="llmctl-") as spool:
        sources = tuple(find_sources(config.data, Path(spool)))
        pieces: list[str] = []
        for text, place, line, is_last in read_documents(sources, config.text_column, bad):
            pieces.append(text)
            if is_last:
                documents.append(Document("".join(pieces), place, line))
                pieces = []
        inputs = [
            text_input("data", source, config.text_column, config.skip_bad_rows)
            for source in sources
        ]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise DataError("an empty file: there is no text in it", file=config.data[0])
    return documents, inputs


def _from_example(example: Example, metrics: Sequence[str]) -> EvaluationExample:
    place, line = example.place, example.line
    if example.label is not None:
        message = {"role": "user", "content": example.text or ""}
        return EvaluationExample((message,), example.label, None, place, line)
    if example.messages is None:
        wanted = quote_names(list(metrics)) if metrics else "perplexity of answers"
        raise DataError(
            f"no reference for {wanted}: this row is a text",
            file=place,
            line=line,
            hint="name the columns: --columns prompt=NAME,response=NAME",
        )
    last = max(k for k, message in enumerate(example.messages) if message["role"] == "assistant")
    reference = str(example.messages[last]["content"])
    return EvaluationExample(example.messages[:last], reference, example.tools, place, line)


def _from_prompt(row: PromptExample) -> EvaluationExample:
    return EvaluationExample(tuple(row.messages), row.answer, row.tools, row.place, row.line)
