"""Read preferences, and part those that train from those that validate.

In: what `--data` names. Out: `Preference` objects, pairs of conversations (or plain texts) of which
one is preferred, no prompt of which is on both sides. A ranking of several responses becomes all
pairs of different rank. Errors of a row say what was found; the caller knows file and line.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import permutations, takewhile
from typing import Any, NamedTuple

from llmctl.config.finetuning import Preferred
from llmctl.data.examples import Example, checked_example, prompt_response
from llmctl.data.rows import Record, checked_text, json_type
from llmctl.data.schemas import (
    PAIR,
    Layout,
    Message,
    choose_layouts,
    conversation,
    from_json,
    parse_hh_rlhf,
    text_message,
)
from llmctl.data.sets import ItemSet, read_sets
from llmctl.data.split import Split, conversation_hash, fingerprint, split
from llmctl.errors import DataError

EQUAL, UNDECIDED = "equal", "undecided"
"""Why rows are left out that are sound: both responses are the same, or no rank tells them."""


@dataclass(frozen=True)
class Preference:
    """Two examples that answer the same prompt; both are conversations, or both plain texts."""

    chosen: Example
    rejected: Example
    shared: int
    """How many messages both begin with: the prompt; 0 for plain texts."""
    margin: float | None
    """By how much the chosen one is better, where the row says so."""
    weight: float
    """Of the pair in the loss; the pairs of one prompt's ranking weigh 1 in total."""

    @property
    def name(self) -> str:
        """Where it stands, as messages say it."""
        return self.chosen.name

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What both answer, empty for plain texts."""
        return (self.chosen.messages or ())[: self.shared]

    @property
    def sides(self) -> tuple[Example, Example]:
        """The chosen one, the rejected one."""
        return self.chosen, self.rejected


def parse_preferences(record: Record, layout: Layout, dropped: Counter[str]) -> list[Preference]:
    """The pairs of a row; why there are none is counted in `dropped`.

    A ranking's pairs weigh 1 in total, whatever their number (Ouyang et al., 2022,
    arXiv:2203.02155, equation 1).

    Raises:
        DataError: responses that are missing, blank or of no known form.
    """
    values, columns = _values(record, layout)
    if "ranks" in values:
        compared = _comparisons(values, columns)
        make = partial(_side, record, values, columns)
        read = [(make(better), make(worse)) for better, worse in compared]
    else:
        read = [parse_sides(record, layout)]
    if not read:
        dropped[UNDECIDED] += 1
        return []
    margin = _margin(values.get("margin"), columns.get("margin", ""))
    unequal = [(one, other) for one, other in read if _said(one) != _said(other)]
    if not unequal:
        dropped[EQUAL] += 1
    weight = 1 / max(1, len(unequal))
    return [Preference(one, other, _shared(one, other), margin, weight) for one, other in unequal]


def parse_sides(record: Record, layout: Layout) -> tuple[Example, Example]:
    """The chosen and the rejected response of a row, each with what it answers.

    Raises:
        DataError: one of them is missing, blank or of no known form.
    """
    values, columns = _values(record, layout)
    chosen, rejected = (
        _side(record, values, columns, _Answer(values[name], columns[name])) for name in PAIR
    )
    return chosen, rejected


def _values(record: Record, layout: Layout) -> tuple[dict[str, Any], dict[str, str]]:
    """What a row has in each role, and the columns' names."""
    columns = {**layout.more, **layout.needed}
    return {role: record.row.get(column) for role, column in columns.items()}, columns


class _Answer(NamedTuple):
    """A response as the row has it."""

    value: Any
    name: str


def _comparisons(
    values: Mapping[str, Any], columns: Mapping[str, str]
) -> list[tuple[_Answer, _Answer]]:
    """All pairs of responses of different rank, the better one first; none without a verdict."""
    responses, ranks = from_json(values["responses"]), from_json(values["ranks"])
    if ranks is None:
        return []
    for role, found in (("responses", responses), ("ranks", ranks)):
        if not isinstance(found, list):
            raise DataError(f"`{columns[role]}` is {json_type(found)}, expected a list")
    if len(responses) != len(ranks):
        raise DataError(f"{len(responses):,} responses, but {len(ranks):,} ranks")
    for place, rank in enumerate(ranks):
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise DataError(
                f"`{columns['ranks']}[{place}]` is {rank!r:.40}, expected a whole number from 1, "
                "which is the best"
            )
    if None in ranks:
        return []
    names = [f"{columns['responses']}[{place}]" for place in range(len(responses))]
    answers = list(zip(ranks, map(_Answer, responses, names), strict=True))
    return [
        (better, worse)
        for (first, better), (second, worse) in permutations(answers, 2)
        if first < second
    ]


def _side(
    record: Record, values: Mapping[str, Any], columns: Mapping[str, str], answer: _Answer
) -> Example:
    """One response with what it answers."""
    name, value = answer.name, _messages_or_text(answer.value)
    if "prompt" not in columns and not isinstance(value, list):
        text = checked_text(value, name)
        messages = parse_hh_rlhf(text, name)
        if messages is None:
            if not text.strip():
                raise DataError(f"`{name}` is empty or nothing but white space")
            return Example(None, text, None, None, record.place, record.line)
    elif isinstance(value, list):
        messages = conversation(value, name)
        is_answer = bool(messages) and messages[0]["role"] in ("assistant", "tool")
        if is_answer and "prompt" in columns:
            messages = _answered(values, columns, value, name)
        elif "prompt" in columns:
            _require_prompt(messages, values["prompt"], columns["prompt"], name)
    else:
        messages = _answered(values, columns, value, name)
    example = checked_example(record, messages, values, {**columns, "messages": name})
    if messages[-1]["role"] != "assistant":
        raise DataError(f"`{name}` ends with the {messages[-1]['role']}, expected the assistant")
    return example


def _answered(
    values: Mapping[str, Any], columns: Mapping[str, str], response: Any, name: str
) -> list[Message]:
    asked = {**values, "prompt": _messages_or_text(values["prompt"]), "response": response}
    return prompt_response(asked, {**columns, "response": name})


def _messages_or_text(value: Any) -> Any:
    """Messages that a column of text spells in JSON; all else as it is."""
    found = from_json(value)
    is_messages = isinstance(found, list) and all(isinstance(item, dict) for item in found)
    return found if is_messages and found else value


def _require_prompt(messages: list[Message], prompt: Any, column: str, name: str) -> None:
    """Refuse a whole conversation that is about something else than the row's prompt."""
    prompt = _messages_or_text(prompt)
    asked = (
        conversation(prompt, column)
        if isinstance(prompt, list)
        else [text_message("user", prompt, column)]
    )
    texts = [message["content"].strip() for message in messages]
    if any(message["content"].strip() not in texts for message in asked):
        raise DataError(f"`{name}` is a whole conversation, and `{column}` is not in it")


def _said(example: Example) -> Any:
    return example.text if example.messages is None else example.messages


def _shared(chosen: Example, rejected: Example) -> int:
    """How many messages both begin with; what comes next is the assistant's on both sides."""
    if chosen.messages is None or rejected.messages is None:
        if chosen.messages is not rejected.messages:
            raise DataError("one response is a conversation, the other a plain text")
        return 0
    ours, theirs = chosen.messages, rejected.messages
    same = (one == other for one, other in zip(ours, theirs, strict=False))
    shared = len(list(takewhile(bool, same)))
    shared = min(shared, len(ours) - 1, len(theirs) - 1)
    if any(messages[shared]["role"] != "assistant" for messages in (ours, theirs)):
        raise DataError("the two responses answer different prompts")
    return shared


def _margin(value: Any, name: str) -> float | None:
    """By how much the chosen response is better."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"`{name}` is {value!r:.40}, expected a number")
    if value < 0:
        raise DataError(
            f"`{name}` is {value:g}: the chosen response would be the worse one",
            hint="swap the two, or leave the row out",
        )
    return float(value)


@dataclass(frozen=True)
class Preferences:
    """All preferences of a run."""

    split: Split[Preference]
    dropped: dict[str, int]
    """Rows left out that are sound: responses that are the same, rankings without a verdict."""

    @property
    def train(self) -> list[Preference]:
        """What to learn from."""
        return self.split.train

    @property
    def val(self) -> list[Preference]:
        """What validates; none of its prompts trains, unless it comes from elsewhere."""
        return self.split.val

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        trained = set(map(prompt_hash, self.train))
        both = Counter(_pair_hash(pair) for pair in (*self.train, *self.val))
        return {
            "pairs": len(self.train) + len(self.val),
            "train_pairs": len(self.train),
            "val_pairs": len(self.val),
            "prompts": len(trained | set(map(prompt_hash, self.val))),
            "margins": sum(pair.margin is not None for pair in self.train),
            **{f"dropped_{why}": count for why, count in self.dropped.items()},
            "skipped": self.split.skipped,
            "duplicates": both.total() - len(both),
            "contradictions": sum(found[::-1] in both for found in both) // 2,
            "shared_prompts": sum(prompt_hash(pair) in trained for pair in self.val),
        }


def read_preferences(config: Preferred, data: list[str], seed: int) -> Preferences:
    """Read everything, and hold out what validates: whole prompts with all their pairs.

    Args:
        config: says how to read, and what to hold out.
        data: names of the preferences, with weights or none.
        seed: chooses pairs, where weights leave some out.

    Raises:
        DataError: rows that are no preferences, nothing left on one of the sides, or a pair that
            both trains and validates.
        NetworkError: a Hub data set that cannot be reached.
        UserError: weights or columns that make no sense.
    """
    layouts = choose_layouts(config.columns, "preferences")
    dropped = Counter({EQUAL: 0, UNDECIDED: 0})

    def read(names: list[str], role: str) -> list[ItemSet[Preference]]:
        make = partial(parse_preferences, dropped=dropped)
        return read_sets(names, layouts, make, skip_bad_rows=config.skip_bad_rows, role=role)

    found = split(config, data, seed, read, prompt_hash)
    if not found.train:
        raise DataError(
            f"no preference to learn from: {dropped[EQUAL]:,} rows have equal responses, "
            f"{dropped[UNDECIDED]:,} no verdict",
            file=data[0],
        )
    _require_apart(found)
    return Preferences(found, dict(dropped))


def prompt_hash(pair: Preference) -> int:
    """What tells prompts apart, but for case, white space and sentence marks."""
    return conversation_hash(pair.prompt) if pair.shared else fingerprint(pair.chosen)


def _pair_hash(pair: Preference) -> tuple[int, int]:
    return fingerprint(pair.chosen), fingerprint(pair.rejected)


def _require_apart(found: Split[Preference]) -> None:
    known = {_pair_hash(pair): pair for pair in found.val}
    both = [pair for pair in found.train if known and _pair_hash(pair) in known]
    if both:
        first = both[0].chosen
        raise DataError(
            f"this pair also validates ({known[_pair_hash(both[0])].name}), and so do "
            f"{len(both) - 1:,} others",
            file=first.place,
            line=first.line,
            hint="a validation set must be new to the model: take them out of one of the two",
        )
