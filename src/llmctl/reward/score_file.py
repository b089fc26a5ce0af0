"""Score a file: rows of prompts and responses in, the same rows with their scores out.

A row is one that `sft` or `reward` trains on, read as they read it; beside a `response`, as
`generate` writes it, stands its `finish_reason`. A prompt that is text is a user's turn where the
reward model has a chat template, as it was in training, and else the beginning of a text.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmctl import hardware
from llmctl.config.commands.reward import RewardConfig
from llmctl.console import ProgressBar, show_recipe
from llmctl.data.audit.rules import RowRules, texts_of
from llmctl.data.bad_rows import BadRows
from llmctl.data.examples import (
    Example,
    checked_example,
    join_input,
    prompt_messages,
    prompt_response,
)
from llmctl.data.preferences import parse_sides
from llmctl.data.rows import SourceRow, checked_text, read_rows
from llmctl.data.schemas import (
    LAYOUTS,
    PAIR,
    PAIR_LAYOUTS,
    Message,
    Row,
    conversation,
    layout_of,
    messages_or_text,
    parse_tools,
)
from llmctl.data.sources import find_sources
from llmctl.data.tokenized import EncodedSequence
from llmctl.decode.output import open_rows
from llmctl.errors import DataError, ModelError
from llmctl.files import check_out
from llmctl.reward.model import PromptResponse, RewardModel, load_reward_model

AT_ONCE = 2048
"""Rows that are scored before the next ones are read."""

FINISHED = {"finish_reason": ("finish_reason",)}
"""Column of how a response ended, beside those that training reads."""

TAKEN = "it takes `prompt` + `response`, `messages`, `text`, or `chosen` + `rejected`"
ROW_LAYOUTS = (
    *PAIR_LAYOUTS,
    *(
        replace(layout, more={**layout.more, **FINISHED}) if "response" in layout.needed else layout
        for layout in LAYOUTS["chat"]
    ),
)


def score_file(config: RewardConfig) -> dict[str, Any] | None:
    """Write each row with its score to a file, and return a summary; or to stdout.

    Raises:
        DataError: a row that cannot be scored, with its file and line.
        ModelError: no reward model.
        OutputError: the output file exists, or cannot be written.
    """
    assert config.score is not None
    check_out(config.out, overwrite=config.overwrite)
    hardware.set_threads(config.threads)
    with tempfile.TemporaryDirectory(prefix="llmctl-") as spool:
        sources = find_sources([str(config.score)], Path(spool))
        records = [record for source in sources for record in read_rows(source)]
    if not records:
        raise DataError("an empty file: no rows in it", file=config.score)
    device = hardware.pick_device(config.device)
    model = load_reward_model(config.model, device=device, score_at=config.score_at)
    rules, bad = RowRules(model.response_format.tokenizer), BadRows()
    encoded = [_encode(model, record, rules, bad) for record in records]
    bad.report()
    rules.enforce()
    if config.dry_run:
        return show_recipe("reward", config, {"rows": len(records)})
    total = 0.0
    with (
        open_rows(config.out, as_json=True) as emit,
        ProgressBar("score", len(records), "row") as progress,
        hardware.memory_errors(config.batch_size),
    ):
        for start in range(0, len(records), AT_ONCE):
            batch = encoded[start : start + AT_ONCE]
            texts = [text for row in batch for text in row.values()]
            scores = iter(model.score_encoded(texts, batch_size=config.batch_size or 32).tolist())
            for record, row in zip(records[start : start + AT_ONCE], batch, strict=True):
                row_scores = {name: next(scores) for name in row}
                total += sum(row_scores.values()) / len(row_scores)
                emit(_json_values({**record.values, **row_scores}))
            progress.update(start + len(batch))
    if config.out is None:
        return None
    return {
        "stage": "reward",
        "out": str(config.out),
        "model": config.model,
        "rows": len(records),
        "score_at": model.score_at,
        "score_mean": total / len(records),
    }


def _json_values(row: Row) -> Row:
    """Return a row as JSON can hold it: a time as text, what is no number as null."""
    values = json.loads(json.dumps(row, default=str), parse_constant=lambda _: None)
    assert isinstance(values, dict)
    return values


def _encode(
    model: RewardModel, record: SourceRow, rules: RowRules, bad: BadRows
) -> dict[str, EncodedSequence]:
    """The texts of a row to score, encoded, by the names of their scores."""
    try:
        samples = samples_of(record, has_turns=model.has_turns)
        encoded = {name: model.encode(sample) for name, sample in samples.items()}
    except (DataError, ModelError) as error:
        error.file, error.line = record.place, record.line
        raise
    layout = layout_of(record.values, ROW_LAYOUTS, "nothing to score", TAKEN)
    bad.note_unread(layout.unread(layout.flat(record.values)))
    texts = [text for sample in samples.values() for text in _texts(sample)]
    tokens = [row.tokens for row in encoded.values()]
    in_turns = model.tokenizer.chat_template is not None and "text" not in layout.needed
    rules.see(texts, record.place, record.line, tokens, in_turns=in_turns)
    return encoded


def _texts(sample: PromptResponse | Example) -> list[str]:
    if isinstance(sample, Example):
        return texts_of(sample.messages, sample.text, tools=sample.tools)
    if isinstance(sample.prompt, str):
        return [sample.prompt, sample.response]
    return texts_of(sample.prompt, sample.response, tools=sample.tools)


def samples_of(record: SourceRow, *, has_turns: bool) -> dict[str, PromptResponse | Example]:
    """The texts of a row to score, by the names of their scores, read as training reads them.

    With `has_turns` a prompt that is text is a user's turn.

    Raises:
        DataError: nothing in it can be scored.
    """
    layout = layout_of(record.values, ROW_LAYOUTS, "nothing to score", TAKEN)
    record = record._replace(values=layout.flat(record.values))
    row, needed = record.values, layout.needed
    if needed.keys() >= PAIR.keys():
        sides = parse_sides(record, layout)
        return {f"score_{name}": side for name, side in zip(PAIR, sides, strict=True)}
    if "text" in needed:
        return {"score": PromptResponse("", checked_text(row["text"], "text"))}
    columns = layout.columns(row)
    values = {role: row.get(column) for role, column in columns.items()}
    if "messages" not in needed:
        return {"score": _response(record, values, columns, has_turns=has_turns)}
    messages = conversation(values["messages"], columns["messages"])
    return {"score": _conversation(record, messages, values, columns)}


def _conversation(
    record: SourceRow,
    messages: list[Message],
    values: Mapping[str, Any],
    columns: Mapping[str, str],
) -> Example:
    """A conversation whose last message is the response to score."""
    if messages and messages[-1]["role"] != "assistant":
        name = columns.get("messages") or columns["response"]
        raise DataError(f"`{name}` does not end with the assistant: there is nothing to score")
    return checked_example(record, messages, values, columns)


def _response(
    record: SourceRow, values: Mapping[str, Any], columns: Mapping[str, str], *, has_turns: bool
) -> PromptResponse | Example:
    """A response after its prompt, each a text or messages; a text may have been cut off."""
    response = messages_or_text(values["response"], columns["response"])
    if isinstance(response, list):
        return _conversation(record, prompt_response(values, columns), values, columns)
    text = checked_text(response, columns["response"])
    has_ended = values["finish_reason"] != "length"
    prompt = messages_or_text(values["prompt"], columns["prompt"])
    turns = next((columns[role] for role in ("system", "history") if values.get(role)), None)
    if isinstance(prompt, str) and not (has_turns and (prompt or turns)):
        if turns is not None:
            raise DataError(f"`{turns}` goes with turns, and this reward model reads plain texts")
        tools = parse_tools(values["tools"], columns["tools"])
        return PromptResponse(join_input(values, columns), text, has_ended, tools)
    answer = {"role": "assistant", "content": text}
    messages = [*prompt_messages(values, columns), answer]
    example = _conversation(record, messages, values, columns)
    if has_ended:
        return example
    return PromptResponse(list(example.messages or ())[:-1], text, False, example.tools)
