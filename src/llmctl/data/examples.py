"""Read examples to fine-tune on, in any form that people keep them, and check every row.

In: what `--data` names. Out: `ExampleSet` objects, one for each name. A row's form follows from its
columns (see `layouts.py`). Everything but plain text and labelled text becomes messages.
"""

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from llmctl.console import log
from llmctl.data.conversations import (
    Message,
    check_turns,
    conversation,
    from_json,
    said,
    tools_of,
)
from llmctl.data.layouts import Layout, Row, Task, choose_layouts, layout_of
from llmctl.data.lines import json_type
from llmctl.data.records import Record, checked_text, read_records
from llmctl.data.sources import Source, find_sources
from llmctl.errors import DataError, UserError
from llmctl.files import sha256_file


@dataclass(frozen=True)
class Example:
    """A conversation, a text, or a text with its label."""

    messages: tuple[Message, ...] | None
    text: str | None
    label: str | None
    tools: list[Any] | None
    """JSON schemas of what the assistant may call."""
    place: str
    """The file, or the name of the source."""
    line: int | None

    @property
    def name(self) -> str:
        """Where it stands, as messages say it."""
        return self.place if self.line is None else f"{self.place}:{self.line}"


@dataclass(frozen=True)
class ExampleSet:
    """All examples of one `--data`."""

    name: str
    weight: float | None
    """Its share of the mixture, where shares were given."""
    examples: list[Example]
    skipped: list[str]
    """What was wrong with each row that was left out."""
    inputs: list[dict[str, Any]]
    """For the manifest."""


def read_examples(
    data: Sequence[str],
    *,
    columns: Sequence[str] = (),
    skip_bad_rows: int = 0,
    task: Task = "chat",
    role: str = "data",
) -> list[ExampleSet]:
    """Every example that `data` names, in order, each file once.

    Args:
        data: files, folders, globs, Hub ids or `builtin:tasks`, each with `=WEIGHT` or none.
        columns: roles of columns, `prompt=q,response=a`, where their names do not tell.
        skip_bad_rows: how many rows, of all sources, may be left out for their errors.
        task: what the examples are for.
        role: what the manifest calls these inputs.

    Raises:
        DataError: rows that are no examples, with file and line, or none at all.
        NetworkError: a Hub data set that cannot be reached.
        UserError: weights or columns that make no sense.
    """
    layouts = choose_layouts(columns, task)
    names = _weights(data)
    bad: list[DataError] = []

    def tolerate(error: DataError) -> None:
        bad.append(error)
        if len(bad) > skip_bad_rows:
            if skip_bad_rows:
                error.message += f" ({len(bad):,} bad rows, --skip-bad-rows {skip_bad_rows:,})"
            raise error

    sets = []
    seen: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="llmctl-") as spool:
        for name, weight in names:
            sources = [s for s in _sources(name, Path(spool)) if _identity(s) not in seen]
            if not sources and weight is None:
                continue
            if not sources:
                raise UserError(f"--data {name}: named twice, so that its weight is in doubt")
            seen.update(map(_identity, sources))
            before = len(bad)
            read = [_read(source, layouts, tolerate) for source in sources]
            examples = [example for part in read for example in part]
            inputs = [_input(role, *pair) for pair in zip(sources, read, strict=True)]
            skipped = [str(error).splitlines()[0] for error in bad[before:]]
            sets.append(ExampleSet(name, weight, examples, skipped, inputs))
    if bad:
        first = str(bad[0]).splitlines()[0]
        log.warning("left out %s rows that cannot be read, the first: %s", f"{len(bad):,}", first)
    return sets


def _weights(data: Sequence[str]) -> list[tuple[str, float | None]]:
    """Each name, and the weight that it ends with."""
    named = [_weight(name) for name in data]
    lacking = [name for name, weight in named if weight is None]
    given = [name for name, weight in named if weight is not None]
    if lacking and given:
        raise UserError(
            f"--data {lacking[0]} has no weight, but {given[0]} has one",
            hint=f"give all of them one, as in --data {lacking[0]}=0.5, or none",
        )
    return named


def _weight(name: str) -> tuple[str, float | None]:
    stem, sign, number = name.rpartition("=")
    if not sign or Path(name).expanduser().exists():
        return name, None
    try:
        weight = float(number)
    except ValueError:
        return name, None
    if not 0 < weight < math.inf:
        raise UserError(f"--data {name}: the weight {number} is not a positive number")
    return stem, weight


def _sources(name: str, spool: Path) -> list[Source]:
    """What a name stands for; plain text beside rows, such as a folder's README, is left out."""
    found = find_sources([name], spool)
    rows = [source for source in found if source.kind != "text"]
    if not rows:
        raise DataError(
            "plain text, which has no rows of examples",
            file=found[0].name,
            hint="pass jsonl, json, csv or parquet; plain text is for llmctl pretrain",
        )
    if len(rows) < len(found):
        log.info("%s: left out %d files of plain text", name, len(found) - len(rows))
    return rows


def _read(
    source: Source, layouts: tuple[Layout, ...], tolerate: Callable[[DataError], None]
) -> list[Example]:
    """The examples of a source, all in the layout of its first row."""
    examples: list[Example] = []
    layout, first, is_empty = None, None, True

    def skip(error: DataError) -> None:
        nonlocal is_empty
        is_empty = False
        tolerate(error)

    for record in read_records(source, on_bad=skip):
        is_empty = False
        try:
            found = layout_of(record.row, layouts, layout, first)
            examples.append(_example(record, found))
        except DataError as error:
            error.file, error.line = record.place, record.line
            tolerate(error)
        else:
            layout, first = found, first or record.line
    if not examples:
        what = "an empty file: no rows in it" if is_empty else "no row of it can be read"
        raise DataError(what, file=source.name)
    return examples


def _example(record: Record, layout: Layout) -> Example:
    row, needed = record.row, layout.needed
    if "text" in needed:
        text = checked_text(row[needed["text"]], needed["text"])
        if not text.strip():
            raise DataError(f"`{needed['text']}` is empty or nothing but white space")
        label = _label(row[needed["label"]], needed["label"]) if "label" in needed else None
        return Example(None, text, label, None, record.place, record.line)
    columns = {**layout.more, **needed}
    values = {role: row.get(column) for role, column in columns.items()}
    if "messages" in needed:
        messages = conversation(values["messages"], columns["messages"])
    else:
        messages = _turns(values, columns)
    check_turns(messages, columns.get("messages") or columns["prompt"])
    system = values.get("system")
    if system is not None and checked_text(system, columns["system"]).strip():
        if messages[0]["role"] in ("system", "developer"):
            raise DataError(f"`{columns['system']}` beside a message of the system: which counts?")
        messages.insert(0, {"role": "system", "content": system})
    tools = tools_of(values.get("tools"), "tools")
    return Example(tuple(messages), None, None, tools, record.place, record.line)


def _turns(values: Row, columns: dict[str, str]) -> list[Message]:
    """The conversation of a prompt and its response, each a text or a list of messages."""
    prompt, extra = values["prompt"], values.get("input")
    if extra is not None and checked_text(extra, columns["input"]).strip():
        prompt = f"{checked_text(prompt, columns['prompt'])}\n\n{extra}"
    return [
        *_history(values.get("history")),
        *_said("user", prompt, columns["prompt"]),
        *_said("assistant", values["response"], columns["response"]),
    ]


def _said(role: str, value: Any, name: str) -> list[Message]:
    return conversation(value, name) if isinstance(value, list) else [said(role, value, name)]


def _history(value: Any) -> list[Message]:
    """Earlier turns, as pairs of what was asked and answered."""
    pairs = from_json(value) or []
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise DataError(f"`history` is {json_type(pairs)}, expected a list of pairs")
    roles = ("user", "assistant")
    return [
        said(role, text, "history")
        for pair in pairs
        for role, text in zip(roles, pair, strict=True)
    ]


def _label(value: Any, name: str) -> str:
    """A label as text."""
    if isinstance(value, bool | int):
        return json.dumps(value)
    label = checked_text(value, name).strip()
    if not label:
        raise DataError(f"`{name}` is empty")
    return label


def _identity(source: Source) -> str:
    """What tells a source from all others, however it is spelled."""
    return source.name if source.path is None else str(source.path.resolve())


def _input(role: str, source: Source, examples: Sequence[Example]) -> dict[str, Any]:
    """What a source was: the hash of its file or rows, or its commit on the Hub."""
    entry = {"role": role, "path": source.name}
    if source.revision is not None:
        return {**entry, "sha256": None, "revision": source.revision}
    if source.path is not None:
        return {**entry, "sha256": sha256_file(source.path)}
    rows = json.dumps([example.messages for example in examples])
    return {**entry, "sha256": sha256(rows.encode()).hexdigest()}
