"""Read preferences, and split them into training and validation.

In: the names of `--data`. Out: `Preference` objects, pairs of conversations (or plain texts) of
which one is preferred; no prompt is in both splits. A ranking of several responses becomes all
pairs of different rank. Errors of a row say what is wrong; the caller adds file and line.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations, takewhile
from typing import Any, NamedTuple

import numpy as np

from llmctl.config.finetuning import Preferred
from llmctl.data.bad_rows import BadRows
from llmctl.data.examples import Example, checked_example, prompt_response
from llmctl.data.rendered import prompt_of_text
from llmctl.data.rows import SourceRow, checked_text, json_type
from llmctl.data.schemas import (
    PAIR,
    Layout,
    Message,
    choose_layouts,
    conversation,
    from_json,
    messages_or_text,
    parse_hh_rlhf,
)
from llmctl.data.sets import ItemSet, read_sets
from llmctl.data.split import Split, conversation_hash, fingerprint, split
from llmctl.errors import DataError
from llmctl.numbers import counted

LARGEST = float(np.finfo(np.float32).max)
"""What a margin may be: losses are computed in float32."""

LEAST_SHARE = 1 / 2
"""Part of two texts from which on words that both begin with are their prompt, and no chance."""

FEW_PROMPTS = 10
"""Prompts, at most, that a line of theirs begins on average, if it is no preamble."""

EQUAL, UNDECIDED = "equal", "undecided"
"""Reasons to leave out a sound row: both responses are the same, or no rank tells them apart."""


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt, each with it; both are conversations, or both plain texts."""

    chosen: Example
    rejected: Example
    shared: int
    """Messages of the prompt, with which both begin; 0 for plain texts."""
    margin: float | None
    """By how much the chosen response is better, where the row says."""
    weight: float
    """Weight of the pair in the loss; the pairs of one ranking weigh 1 in total."""

    @property
    def name(self) -> str:
        """Its place, for messages."""
        return self.chosen.name

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The prompt, empty for plain texts."""
        return (self.chosen.messages or ())[: self.shared]

    @property
    def sides(self) -> tuple[Example, Example]:
        """The chosen and the rejected response."""
        return self.chosen, self.rejected


def parse_preferences(record: SourceRow, layout: Layout, dropped: Counter[str]) -> list[Preference]:
    """Make the pairs of a row; count in `dropped` why there are none.

    A ranking's pairs weigh 1 in total, whatever their number (Ouyang et al., 2022,
    arXiv:2203.02155, equation 1).

    Raises:
        DataError: responses that are missing, blank or of no known form.
    """
    values, columns = _values(record, layout)
    if "ranks" in values:
        make = partial(_side, record, values, columns)
        pairs = [(make(better), make(worse)) for better, worse in _comparisons(values, columns)]
    else:
        pairs = [parse_sides(record, layout)]
    if not pairs:
        dropped[UNDECIDED] += 1
        return []
    margin = _margin(values.get("margin"), columns.get("margin", ""))
    unequal = [(a, b) for a, b in pairs if (a.text, a.messages) != (b.text, b.messages)]
    if not unequal:
        dropped[EQUAL] += 1
    weight = 1 / max(1, len(unequal))
    return [
        Preference(chosen, rejected, _shared(chosen, rejected), margin, weight)
        for chosen, rejected in unequal
    ]


def parse_sides(record: SourceRow, layout: Layout) -> tuple[Example, Example]:
    """Read the chosen and the rejected response of a row, each with its prompt.

    Raises:
        DataError: one of them is missing, blank or of no known form.
    """
    values, columns = _values(record, layout)
    chosen, rejected = (
        _side(record, values, columns, _Response(values[name], columns[name])) for name in PAIR
    )
    return chosen, rejected


def _values(record: SourceRow, layout: Layout) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the value and the column of each role in a row."""
    columns = layout.columns(record.values)
    values = {role: record.values.get(column) for role, column in columns.items()}
    if "chosen" in columns and "prompt" in columns and _begins_chosen(values, columns):
        del values["prompt"], columns["prompt"]
    return values, columns


def _begins_chosen(values: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
    """Whether the prompt is the chosen conversation, or the beginning of it, with an answer.

    So rows have it that tell the whole conversation in `messages`, too.
    """
    prompt, chosen = (messages_or_text(values[r], columns[r]) for r in ("prompt", "chosen"))
    if not isinstance(prompt, list) or not isinstance(chosen, list):
        return False
    turns = conversation(prompt, columns["prompt"])
    begins = conversation(chosen, columns["chosen"])[: len(turns)] == turns
    return begins and bool(turns) and turns[-1]["role"] == "assistant"


class _Response(NamedTuple):
    """A response as the row has it."""

    value: Any
    name: str


def _comparisons(
    values: Mapping[str, Any], columns: Mapping[str, str]
) -> list[tuple[_Response, _Response]]:
    """List all pairs of responses of different rank, the better one first; none without ranks."""
    responses, ranks = from_json(values["responses"]), from_json(values["ranks"])
    if ranks is None:
        return []
    for role, value in (("responses", responses), ("ranks", ranks)):
        if not isinstance(value, list):
            raise DataError(f"`{columns[role]}` is {json_type(value)}, expected a list")
    if len(responses) != len(ranks):
        raise DataError(f"{counted(len(responses), 'response')}, but {counted(len(ranks), 'rank')}")
    for place, rank in enumerate(ranks):
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise DataError(
                f"`{columns['ranks']}[{place}]` is {rank!r:.40}, expected a whole number from 1, "
                "which is the best"
            )
    if None in ranks:
        return []
    names = [f"{columns['responses']}[{place}]" for place in range(len(responses))]
    ranked = list(zip(ranks, map(_Response, responses, names), strict=True))
    return [
        (better, worse)
        for (first, better), (second, worse) in permutations(ranked, 2)
        if first < second
    ]


def _side(
    record: SourceRow, values: Mapping[str, Any], columns: Mapping[str, str], response: _Response
) -> Example:
    """Make an example of one response and its prompt."""
    name = response.name
    value = messages_or_text(response.value, name)
    if "prompt" in columns:
        messages = prompt_response({**values, "response": value}, {**columns, "response": name})
    elif isinstance(value, list):
        messages = conversation(value, name)
    else:
        text = checked_text(value, name)
        turns = parse_hh_rlhf(text, name)
        if turns is None:
            if not text.strip():
                raise DataError(f"`{name}` is empty or nothing but white space")
            return Example(None, text, None, None, record.place, record.line)
        messages = turns
    example = checked_example(record, messages, values, {**columns, "messages": name})
    if messages[-1]["role"] != "assistant":
        raise DataError(f"`{name}` ends with the {messages[-1]['role']}, expected the assistant")
    return example


def _shared(chosen: Example, rejected: Example) -> int:
    """Count the messages that both begin with; the next one is the assistant's in both."""
    if chosen.messages is None or rejected.messages is None:
        if chosen.messages is not rejected.messages:
            raise DataError("one response is a conversation, the other a plain text")
        return 0
    both = (chosen.messages, rejected.messages)
    same = (turn == other for turn, other in zip(*both, strict=False))
    shared = min(len(list(takewhile(bool, same))), *(len(messages) - 1 for messages in both))
    if any(messages[shared]["role"] != "assistant" for messages in both):
        raise DataError("the two responses answer different prompts")
    return shared


def _margin(value: Any, name: str) -> float | None:
    """Check the margin of a row, which may be an integer of any size."""
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or value != value:  # NaN
        raise DataError(f"`{name}` is {value!r:.40}, expected a number")
    if value < 0:
        raise DataError(
            f"`{name}` is {value!r:.40}: the chosen response would be the worse one",
            hint="swap the two, or leave the row out",
        )
    if value > LARGEST:
        raise DataError(
            f"`{name}` is {value!r:.40}, expected a number of at most {LARGEST:.2g}",
            hint="scores, which it is a difference of, are numbers such as 1.5",
        )
    return float(value)


@dataclass(frozen=True)
class Preferences(Split[Preference]):
    """All preferences of a run; no prompt is in both splits, unless it comes from `--val-data`."""

    dropped: dict[str, int]
    """Sound rows left out, by reason: equal responses, rankings without a verdict."""

    @property
    def has_chats(self) -> bool:
        """Whether any pair is of conversations."""
        return any(pair.shared for pair in (*self.train, *self.val))

    def statistics(self) -> dict[str, Any]:
        """Count pairs, prompts and what is odd, for the manifest."""
        trained = set(map(prompt_hash, self.train))
        hashes = Counter(_pair_hash(pair) for pair in (*self.train, *self.val))
        return {
            "pairs": len(self.train) + len(self.val),
            "train_pairs": len(self.train),
            "val_pairs": len(self.val),
            "prompts": len(trained | set(map(prompt_hash, self.val))),
            "margins": sum(pair.margin is not None for pair in self.train),
            **{f"dropped_{why}": count for why, count in self.dropped.items()},
            "duplicates": hashes.total() - len(hashes),
            "contradictions": sum(a != b and (b, a) in hashes for a, b in hashes) // 2,
            "shared_prompts": sum(prompt_hash(pair) in trained for pair in self.val),
        }


def read_preferences(
    config: Preferred, data: list[str], seed: int, bad: BadRows | None = None
) -> Preferences:
    """Read all preferences, and hold out whole prompts with all their pairs for validation.

    Where weights leave some pairs out, `seed` chooses them; `bad` counts rows left out.

    Raises:
        DataError: rows that are no preferences, an empty split, or a pair that
            both trains and validates.
        NetworkError: a Hub data set that cannot be reached.
        UserError: weights or columns that make no sense.
    """
    layouts = choose_layouts(config.columns, "preferences")
    dropped = Counter({EQUAL: 0, UNDECIDED: 0})
    bad = BadRows(config.skip_bad_rows) if bad is None else bad

    def read(names: list[str], role: str) -> list[ItemSet[Preference]]:
        make = partial(parse_preferences, dropped=dropped)
        return read_sets(names, layouts, make, bad=bad, role=role)

    preferences = split(config, data, seed, read, prompt_hash)
    if not preferences.train:
        raise DataError(
            f"no preference to learn from: {counted(dropped[EQUAL], 'row has', 'rows have')} equal "
            f"responses, {dropped[UNDECIDED]:,} no verdict",
            file=data[0],
        )
    _require_disjoint(preferences)
    return Preferences(preferences.train, preferences.val, preferences.sets, dict(dropped))


def prompt_hash(pair: Preference) -> int:
    """Hash a prompt, but for case, white space and sentence marks.

    The prompt of two texts is what they begin with in common, up to the mark of the response in a
    well-known form of rendered text, else up to the end of a line, else of a word where it is no
    small part of them.
    """
    if pair.shared:
        return conversation_hash(pair.prompt)
    common = _common_beginning(pair)
    words = common[: common.rfind(" ") + 1]
    if len(words) < LEAST_SHARE * min(len(side.text or "") for side in pair.sides):
        words = ""
    prompt = (prompt_of_text(common) or "".join(_lines(common)) or words).strip()
    return fingerprint(replace(pair.chosen, text=prompt) if prompt else pair.chosen)


def count_shared_lines(train: Sequence[Preference], val: Sequence[Preference]) -> int:
    """Count validation texts whose first lines may be a prompt that trains, too.

    Lines that both responses begin with are taken for their prompt's. First lines that many prompts
    have in common are a preamble.
    """
    parts = [[_unmarked_lines(pair) for pair in pairs] for pairs in (train, val)]
    whole = {tuple(lines) for part in parts for lines in part}
    for depth in range(1, max(map(len, whole), default=0)):
        longer = [{tuple(lines[:depth]) for lines in part if len(lines) > depth} for part in parts]
        prompts = sum(len(lines) > depth for lines in whole)
        if prompts <= FEW_PROMPTS * len(longer[0] | longer[1]):
            return sum(
                tuple(lines[:depth]) in longer[0] for lines in parts[1] if len(lines) > depth
            )
    return 0


def _unmarked_lines(pair: Preference) -> list[str]:
    """List the lines that two texts begin with, where no mark of a response stands in them."""
    common = _common_beginning(pair)
    return [] if prompt_of_text(common) else _lines(common)


def _common_beginning(pair: Preference) -> str:
    """Return what two texts begin with; nothing of conversations."""
    chosen, rejected = (side.text or "" for side in pair.sides)
    same = (a == b for a, b in zip(chosen, rejected, strict=False))
    return chosen[: len(list(takewhile(bool, same)))]


def _lines(text: str) -> list[str]:
    """List the lines of a text that end, their ends included."""
    return text[: text.rfind("\n") + 1].splitlines(keepends=True)


def _pair_hash(pair: Preference) -> tuple[int, int]:
    return fingerprint(pair.chosen), fingerprint(pair.rejected)


def _require_disjoint(preferences: Split[Preference]) -> None:
    """Refuse pairs that both train and validate."""
    known = {_pair_hash(pair): pair for pair in preferences.val}
    both = [pair for pair in preferences.train if known and _pair_hash(pair) in known]
    if both:
        first = both[0].chosen
        raise DataError(
            f"this pair also validates ({known[_pair_hash(both[0])].name}), one of "
            f"{counted(len(both), 'such pair')}",
            file=first.place,
            line=first.line,
            hint="a validation set must be new to the model: take them out of one of the two",
        )
