"""Encode preferences as pairs of tokens, for a reward model and for DPO.

In: what `--data` names, or `Preference` objects, and how a model reads them. Out: `Pairs` of flat
arrays: the chosen and the rejected sequence of each pair, and what it weighs. A pair that is too
long loses the beginning of its prompt, the same tokens on both sides, and never any of a response.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from llmctl.config.commands import DpoConfig, RewardConfig
from llmctl.console import log
from llmctl.data.chat.responses import ResponseFormat, prepare_template
from llmctl.data.chat.templates import set_chat_template
from llmctl.data.classification import configure_padding
from llmctl.data.examples import Example
from llmctl.data.preferences import EQUAL, UNDECIDED, Preference, Preferences, read_preferences
from llmctl.data.sft import require_template
from llmctl.data.tokenized import EncodedSequence, Tokenized, collect, resolve_max_length
from llmctl.errors import DataError, ModelError
from llmctl.models.causality import require_causal_config
from llmctl.models.loading import load_config, load_tokenizer

MOST_DROPPED = 0.2
"""Share of the pairs that `--truncation auto` leaves out without being asked."""


@dataclass(frozen=True)
class Pairs:
    """N pairs of sequences, whose trained tokens are those of the response."""

    chosen: Tokenized
    rejected: Tokenized
    margins: NDArray[np.float32]
    """(N,) by how much the chosen one is better, 0 where nothing says so."""
    weights: NDArray[np.float32]
    """(N,) of each pair in the loss."""
    numbers: NDArray[np.int64]
    """(N,) which preference each was made of."""
    cut: int
    """Pairs whose prompts lost their beginning."""
    dropped: int
    """Pairs left out for their length."""

    def __len__(self) -> int:
        """N."""
        return len(self.numbers)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) tokens of the longer side of each."""
        return np.maximum(self.chosen.lengths, self.rejected.lengths)

    def digest(self) -> str:
        """Hex sha256 of all that decides what is learned from them."""
        found = hashlib.sha256((self.chosen.digest() + self.rejected.digest()).encode())
        for part in (self.margins, self.weights):
            found.update(part.tobytes())
        return found.hexdigest()

    def without_margins(self) -> "Pairs":
        """The same, whatever the rows say of margins."""
        return replace(self, margins=np.zeros_like(self.margins))


def encode_pairs(
    written: ResponseFormat,
    preferences: Sequence[Preference],
    max_length: int,
    truncation: Literal["auto", "cut", "drop"],
) -> Pairs:
    """Encode every pair that fits, or that fits without the beginning of its prompt.

    Raises:
        DataError: none is left, or more than a fifth too long where that was not asked for.
        ModelError: the chat template refuses a conversation, with its file and line.
    """
    sides: list[tuple[EncodedSequence, EncodedSequence]] = []
    numbers, cut = [], 0
    for number, preference in enumerate(preferences):
        whole = _encoded(written, preference)
        excess = max(len(side.tokens) for side in whole) - max_length
        found: tuple[EncodedSequence | None, ...] = whole
        if excess > 0:
            shorter = truncation != "drop"
            found = tuple(
                written.truncate_prompt(side, excess) if shorter else None for side in whole
            )
        one, other = found
        if one is None or other is None:
            continue
        cut += excess > 0
        sides.append((one, other))
        numbers.append(number)
    dropped = len(preferences) - len(sides)
    _require_enough(len(preferences), dropped, max_length, truncation)
    kept = [preferences[number] for number in numbers]
    return Pairs(
        collect([one] for one, _ in sides),
        collect([other] for _, other in sides),
        np.array([pair.margin or 0.0 for pair in kept], np.float32),
        np.array([pair.weight for pair in kept], np.float32),
        np.array(numbers, np.int64),
        cut,
        dropped,
    )


def _encoded(
    written: ResponseFormat, preference: Preference
) -> tuple[EncodedSequence, EncodedSequence]:
    chosen, rejected = preference.sides
    try:
        return (
            written.encode_example(chosen, preference.shared),
            written.encode_example(rejected, preference.shared),
        )
    except ModelError as error:
        raise ModelError(
            error.message, file=chosen.place, line=chosen.line, hint=error.hint
        ) from None


def _require_enough(count: int, dropped: int, max_length: int, truncation: str) -> None:
    if dropped == count > 0:
        raise DataError(
            f"every pair has more than {max_length:,} tokens: none is left",
            hint="raise --max-length",
        )
    if truncation == "auto" and dropped > MOST_DROPPED * count:
        raise DataError(
            f"{dropped:,} of {count:,} pairs have responses that do not fit into {max_length:,} "
            "tokens",
            hint="raise --max-length, or leave them out: --truncation drop",
        )


@dataclass(frozen=True)
class PreferenceData:
    """Pairs to learn from, encoded for one model."""

    train: Pairs
    val: Pairs | None
    preferences: Preferences
    written: ResponseFormat
    max_length: int
    embedding_rows: int
    """Rows of the model's embedding, before tokens were added."""
    added_tokens: tuple[str, ...]
    """Special tokens that the chat template needs and the tokenizer lacked."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, its chat template and a padding token of its own set."""
        return self.written.tokenizer

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """Files and their hashes, for the manifest."""
        return self.preferences.split.inputs

    @property
    def held_out(self) -> list[str]:
        """Where the validation pairs stand."""
        return [pair.name for pair in self.preferences.val]

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        lengths = np.concatenate([self.train.chosen.lengths, self.train.rejected.lengths])
        return {
            **self.preferences.facts(),
            "tokens_median": float(np.median(lengths)),
            "tokens_max": int(lengths.max()),
            "cut": self.train.cut,
            "dropped_length": self.train.dropped,
        }


def load_preferences(config: RewardConfig, clock: str | None = None) -> PreferenceData:
    """Read, check and encode everything.

    Args:
        config: says what and how.
        clock: what time it is for chat templates that write the date; None for now.

    Raises:
        DataError: rows that are broken, nothing to learn from, or tokens that the model lacks.
        ModelError: no tokenizer, or a chat template that is broken.
        UserError: more positions asked for than the model has.
    """
    shape, tokenizer = load_config(config.model), load_tokenizer(config.model)
    max_length = resolve_max_length(config.max_length, shape, tokenizer=tokenizer)
    found = read_preferences(config, config.data, config.seed)
    pairs = [*found.train, *found.val]
    chats = any(pair.shared for pair in pairs)
    added = prepare_template(tokenizer, shape, config.chat_template) if chats else []
    configure_padding(tokenizer, max_length)
    written = ResponseFormat(tokenizer, shape, clock)
    train = encode_pairs(written, found.train, max_length, config.truncation)
    val = encode_pairs(written, found.val, max_length, config.truncation) if found.val else None
    data = PreferenceData(
        train if config.margin else train.without_margins(),
        val,
        found,
        written,
        max_length,
        embedding_rows=int(shape.get_text_config().vocab_size),
        added_tokens=tuple(added),
    )
    _require_known(train, found.train, data)
    if val is not None:
        _require_known(val, found.val, data)
    return data


def log_preferences(data: PreferenceData) -> None:
    """Say in two lines what there is to learn from, and warn of what is odd."""
    facts = data.facts()
    log.info(
        "%s pairs to train on, %s to validate; %s prompts; rows left out: %s with equal responses, "
        "%s without a verdict",
        f"{len(data.train):,}",
        f"{0 if data.val is None else len(data.val):,}",
        f"{facts['prompts']:,}",
        f"{facts[f'dropped_{EQUAL}']:,}",
        f"{facts[f'dropped_{UNDECIDED}']:,}",
    )
    log.info(
        "tokens: median %g, longest %s; %s prompts cut to fit %s, %s pairs left out; %s duplicates",
        facts["tokens_median"],
        f"{facts['tokens_max']:,}",
        f"{facts['cut']:,}",
        f"{data.max_length:,}",
        f"{facts['dropped_length']:,}",
        f"{facts['duplicates']:,}",
    )
    if facts["contradictions"]:
        log.warning("%s pairs stand in both orders", f"{facts['contradictions']:,}")
    if facts["shared_prompts"]:
        log.warning("%s validation pairs have a prompt that also trains", facts["shared_prompts"])


def _require_known(encoded: Pairs, preferences: list[Preference], data: PreferenceData) -> None:
    """Refuse tokens that the model has no embedding for, and texts that hold the padding token."""
    tokenizer, rows = data.tokenizer, data.embedding_rows
    new = tokenizer.convert_tokens_to_ids(list(data.added_tokens))
    for side in (encoded.chosen, encoded.rejected):
        unknown = (side.tokens >= rows) & ~np.isin(side.tokens, new)
        bad = np.flatnonzero((side.tokens == tokenizer.pad_token_id) | unknown)
        if len(bad):
            number = int(np.searchsorted(side.starts, bad[0], side="right")) - 1
            example = preferences[int(encoded.numbers[number])].chosen
            token = int(side.tokens[bad[0]])
            raise DataError(
                f"a token id of {token:,}, and the model has only {rows:,} embeddings: the "
                "tokenizer is another model's"
                if token >= rows
                else f"this pair holds {tokenizer.pad_token}, the padding",
                file=example.place,
                line=example.line,
            )


def load_pairs(config: DpoConfig, clock: str | None = None) -> PreferenceData:
    """Read, check and encode everything.

    Args:
        config: says what and how.
        clock: what time it is for chat templates that write the date; None for now.

    Raises:
        DataError: rows that are broken, or nothing to learn from.
        ModelError: an encoder, no tokenizer, or a chat template that is broken.
        UserError: more positions asked for than the model has.
    """
    shape, tokenizer = load_config(config.model), load_tokenizer(config.model)
    require_causal_config(shape, config.model)
    max_length = resolve_max_length(config.max_length, shape)
    found = read_preferences(config, config.data, config.seed)
    chats = any(pair.shared for pair in (*found.train, *found.val))
    added = set_chat_template(tokenizer, config.chat_template) if chats else []
    written = ResponseFormat(tokenizer, shape, clock)
    if chats and config.chat_template:
        require_template(written.chat, config.chat_template)
    train = encode_pairs(written, found.train, max_length, config.truncation)
    val = encode_pairs(written, found.val, max_length, config.truncation) if found.val else None
    rows = int(shape.get_text_config().vocab_size)
    data = PreferenceData(train, val, found, written, max_length, rows, tuple(added))
    if same_tokens(data) == len(train):
        raise DataError(
            "both sides of every pair are the same tokens: there is nothing to prefer",
            file=config.data[0],
            hint="the chat template may leave out what tells them apart: --chat-template",
        )
    return data


def log_pairs(data: PreferenceData) -> None:
    """Say what there is to learn from, and warn of what is odd."""
    log_preferences(data)
    for count, what in (
        (same_tokens(data), "pairs are the same tokens on both sides and teach nothing"),
        (
            data.preferences.facts()["margins"],
            "pairs have a margin, which this loss has no place for: not used",
        ),
    ):
        if count:
            log.warning("%s %s", f"{count:,}", what)
    if data.added_tokens:
        log.warning(
            "the chat template adds %s, which the model has never seen: fine-tune it on "
            "conversations first (llmctl sft)",
            ", ".join(data.added_tokens),
        )


def same_tokens(data: PreferenceData) -> int:
    """Training pairs whose two sides are the same tokens, from which nothing can be learned."""
    chosen, rejected = data.train.chosen, data.train.rejected
    return sum(
        np.array_equal(chosen.sequence(number)[0], rejected.sequence(number)[0])
        for number in range(len(data.train))
    )


def end_of_turn(data: PreferenceData) -> int | None:
    """The token that ends a turn, where there are conversations."""
    pairs = (*data.preferences.train, *data.preferences.val)
    return data.written.chat.end_of_turn if any(pair.shared for pair in pairs) else None


def asked(data: PreferenceData) -> list[Example]:
    """A validation pair of each prompt, the preferred side of it."""
    first = {str(pair.prompt): pair.chosen for pair in reversed(data.preferences.val)}
    return list(reversed(first.values()))
