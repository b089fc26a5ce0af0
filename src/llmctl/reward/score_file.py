"""Score a file: rows of prompts and responses in, the same rows with their scores out.

A row holds `prompt` and `response` (as `generate` writes them, with `finish_reason`), `messages`,
`text`, or a pair with `chosen` and `rejected`. A prompt that is text is a user's turn where the
reward model has a chat template, as it was in training, and else the beginning of a text.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from llmctl import hardware
from llmctl.config.commands import RewardConfig
from llmctl.console import ProgressBar, show_recipes
from llmctl.data.preferences import parse_sides
from llmctl.data.rows import Record, checked_text, quote_names, read_records
from llmctl.data.schemas import PAIR_LAYOUTS, Message, conversation, from_json, match_layout
from llmctl.data.sources import find_sources
from llmctl.data.tokenized import EncodedSequence
from llmctl.decode.output import open_rows
from llmctl.errors import DataError
from llmctl.files import check_out
from llmctl.reward.model import Exchange, RewardModel, load_reward_model

AT_ONCE = 2048
"""Rows that are scored before the next ones are read."""


def score_file(config: RewardConfig) -> dict[str, Any] | None:
    """Write each row with its score, to a file or to stdout; what was written, where to a file.

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
        records = [record for source in sources for record in read_records(source)]
    if not records:
        raise DataError("an empty file: no rows in it", file=config.score)
    model = load_reward_model(config.model, device=hardware.pick_device(config.device))
    read = [_encoded(model, record, has_turns=model.has_turns) for record in records]
    if config.dry_run:
        return show_recipes([("reward", config)], {"rows": len(records)}, as_json=config.as_json)
    total = 0.0
    with (
        open_rows(config.out, as_json=True) as emit,
        ProgressBar("score", len(records), "row") as progress,
        hardware.memory_errors(config.batch_size),
    ):
        for start in range(0, len(records), AT_ONCE):
            some = read[start : start + AT_ONCE]
            texts = [text for row in some for text in row.values()]
            scores = iter(model.score_encoded(texts, batch_size=config.batch_size or 32).tolist())
            for record, row in zip(records[start : start + AT_ONCE], some, strict=True):
                found = {name: next(scores) for name in row}
                total += sum(found.values()) / len(found)
                emit(json.loads(json.dumps({**record.row, **found}, default=str)))
            progress.update(start + len(some))
    if config.out is None:
        return None
    facts = {"rows": len(records), "score_mean": total / len(records)}
    return {"stage": "reward", "out": str(config.out), "model": config.model, **facts}


def _encoded(model: RewardModel, record: Record, *, has_turns: bool) -> dict[str, EncodedSequence]:
    """The texts of a row that get a score each, by its name."""
    try:
        found = exchanges_of(record, has_turns=has_turns)
        return {name: model.encoded(exchange) for name, exchange in found.items()}
    except DataError as error:
        error.file, error.line = record.place, record.line
        raise


def exchanges_of(record: Record, *, has_turns: bool) -> dict[str, Exchange]:
    """What a row asks to be scored, by the name of its score.

    Args:
        record: the row.
        has_turns: a prompt that is text is a user's turn.

    Raises:
        DataError: nothing in it can be scored.
    """
    row = record.row
    if {"chosen", "rejected"} <= row.keys():
        sides = parse_sides(record, match_layout(row, PAIR_LAYOUTS, None, None))
        return {
            f"score_{name}": _answered(list(side.messages), "messages")
            if side.messages is not None
            else Exchange("", side.text or "")
            for name, side in zip(("chosen", "rejected"), sides, strict=True)
        }
    if {"prompt", "response"} <= row.keys():
        response = checked_text(row["response"], "response")
        prompt = _prompt(row["prompt"], has_turns=has_turns)
        return {"score": Exchange(prompt, response, row.get("finish_reason") != "length")}
    if "messages" in row:
        return {"score": _answered(conversation(row["messages"], "messages"), "messages")}
    if "text" in row:
        return {"score": Exchange("", checked_text(row["text"], "text"))}
    raise DataError(
        f"nothing to score in these columns: {quote_names(list(row))}",
        hint="it takes `prompt` + `response`, `messages`, `text`, or `chosen` + `rejected`",
    )


def _prompt(value: Any, *, has_turns: bool) -> str | list[Message]:
    spelled = from_json(value)
    if isinstance(spelled, list) and spelled and all(isinstance(item, dict) for item in spelled):
        return conversation(spelled, "prompt")
    text = checked_text(value, "prompt")
    return [{"role": "user", "content": text}] if has_turns and text else text


def _answered(messages: list[Message], name: str) -> Exchange:
    """A conversation as a prompt and the assistant's last turn."""
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError(f"`{name}` does not end with the assistant: there is nothing to score")
    return Exchange(messages[:-1], str(messages[-1]["content"]))
