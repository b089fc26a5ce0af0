"""Encode preferences as pairs of token sequences, for a reward model and for DPO.

In: the names of `--data`, or `Preference` objects, and the format that a model reads them in. Out:
`Pairs` of flat arrays: the chosen and the rejected sequence of each pair, and its weight. A pair
that is too long loses the beginning of its prompt, the same tokens on both sides, and never any of
a response.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llmctl.config.commands.dpo import DpoConfig
from llmctl.config.commands.reward import RewardConfig
from llmctl.console import log
from llmctl.data.audit.rules import RowRules, texts_of
from llmctl.data.bad_rows import BadRows, at_row
from llmctl.data.chat.remedies import BOTH_FLAGS
from llmctl.data.chat.responses import ResponseFormat, end_at_turn, prepare_template
from llmctl.data.chat.templates import set_chat_template
from llmctl.data.classification import configure_padding
from llmctl.data.examples import Example
from llmctl.data.preferences import (
    EQUAL,
    UNDECIDED,
    Preference,
    Preferences,
    count_shared_lines,
    read_preferences,
)
from llmctl.data.sft import require_template
from llmctl.data.tokenized import EncodedSequence, Tokenized, collect, resolve_max_length
from llmctl.errors import DataError
from llmctl.models.causality import require_causal_config
from llmctl.models.loading import load_config, load_tokenizer
from llmctl.numbers import counted

MOST_DROPPED = 0.2
"""Largest share of the pairs that `--truncation auto` leaves out."""


MOST_SHARED = 0.1
"""Largest share of the validation texts whose first lines may train without a warning."""


@dataclass(frozen=True)
class Pairs:
    """N pairs of sequences, whose trained tokens are those of the response."""

    chosen: Tokenized
    rejected: Tokenized
    margins: NDArray[np.float32]
    """(N,) by how much the chosen response is better; 0 where the data does not say."""
    weights: NDArray[np.float32]
    """(N,) of each pair in the loss."""
    numbers: NDArray[np.int64]
    """(N,) number of the preference that each was made of."""
    cut: int
    """Pairs whose prompts lost their beginning."""
    dropped: int
    """Pairs left out for their length."""
    same: int
    """Pairs left out because both sides are the same tokens, which teach nothing."""

    def __len__(self) -> int:
        """Return N."""
        return len(self.numbers)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) tokens of the longer side of each."""
        return np.maximum(self.chosen.lengths, self.rejected.lengths)

    def digest(self) -> str:
        """Return a hex sha256 of all that training depends on."""
        digest = hashlib.sha256((self.chosen.digest() + self.rejected.digest()).encode())
        for part in (self.margins, self.weights):
            digest.update(part.tobytes())
        return digest.hexdigest()


def encode_pairs(
    response_format: ResponseFormat,
    preferences: Sequence[Preference],
    max_length: int,
    truncation: Literal["auto", "cut", "drop"],
    bad: BadRows,
    rules: RowRules,
) -> Pairs:
    """Encode every pair that fits, or that fits without the beginning of its prompt.

    `bad` counts those that cannot be rendered, `rules` look at all others.

    Raises:
        DataError: none is left, or `auto` would leave out more than a fifth.
        ModelError: the chat template is broken, with the file and line of a pair.
    """
    sides: list[tuple[EncodedSequence, EncodedSequence]] = []
    numbers, count, cut, same = [], 0, 0, 0
    for number, preference in enumerate(preferences):
        pair = _encode_pair(response_format, preference, bad)
        if pair is None:
            continue
        chosen, rejected = pair
        _see(rules, preference, pair)
        if chosen.tokens == rejected.tokens:
            same += 1
            continue
        count += 1
        excess = max(len(chosen.tokens), len(rejected.tokens)) - max_length
        if excess > 0:
            if truncation == "drop":
                continue
            shorter = [response_format.truncate_prompt(s, excess) for s in (chosen, rejected)]
            if shorter[0] is None or shorter[1] is None:
                continue
            chosen, rejected = shorter[0], shorter[1]
            cut += 1
        sides.append((chosen, rejected))
        numbers.append(number)
    if preferences and not count:
        raise DataError(
            "both sides of every pair are the same tokens: there is nothing to prefer",
            file=preferences[0].chosen.place,
            hint="the chat template may leave out what tells them apart: --chat-template",
        )
    dropped = count - len(sides)
    _require_enough(count, dropped, max_length, truncation)
    kept = [preferences[number] for number in numbers]
    return Pairs(
        collect([chosen] for chosen, _ in sides),
        collect([rejected] for _, rejected in sides),
        np.array([pair.margin or 0.0 for pair in kept], np.float32),
        np.array([pair.weight for pair in kept], np.float32),
        np.array(numbers, np.int64),
        cut,
        dropped,
        same,
    )


def _see(
    rules: RowRules, preference: Preference, pair: tuple[EncodedSequence, EncodedSequence]
) -> None:
    """Hold a pair against the rules on rows."""
    chosen, rejected = preference.sides
    texts = texts_of(chosen.messages, chosen.text, tools=chosen.tools)
    texts += texts_of((rejected.messages or ())[preference.shared :], rejected.text)
    tokens = [side.tokens for side in pair]
    rules.see(texts, chosen.place, chosen.line, tokens, in_turns=chosen.messages is not None)


def _encode_pair(
    response_format: ResponseFormat, preference: Preference, bad: BadRows
) -> tuple[EncodedSequence, EncodedSequence] | None:
    """Encode both sides; None where the pair is left out for its errors."""
    chosen, rejected = preference.sides
    try:
        with at_row(chosen.place, chosen.line):
            return (
                response_format.encode_example(chosen, preference.shared),
                response_format.encode_example(rejected, preference.shared),
            )
    except DataError as error:
        bad(error)
        return None


def _require_enough(count: int, dropped: int, max_length: int, truncation: str) -> None:
    if dropped == count > 0:
        raise DataError(
            f"every pair has more than {max_length:,} tokens: none is left",
            hint="raise --max-length",
        )
    if truncation == "auto" and dropped > MOST_DROPPED * count:
        raise DataError(
            f"{dropped:,} of {counted(count, 'pair')} have responses that do not fit into "
            f"{max_length:,} tokens",
            hint="raise --max-length, or leave them out: --truncation drop",
        )


@dataclass(frozen=True)
class PreferenceData:
    """Pairs to train on, encoded for one model."""

    train: Pairs
    val: Pairs | None
    preferences: Preferences
    response_format: ResponseFormat
    max_length: int
    embedding_rows: int
    """Rows of the model's embedding, before tokens were added."""
    added_tokens: tuple[str, ...]
    """Special tokens that the chat template needs and the tokenizer lacked."""
    bad: BadRows
    """Rows left out for their errors."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with its chat template and, for a reward model, a padding token."""
        return self.response_format.tokenizer

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """Files and their hashes, for the manifest."""
        return self.preferences.inputs

    @property
    def held_out(self) -> list[str]:
        """Places of the validation pairs."""
        return [pair.name for pair in self.preferences.val]

    @property
    def end_of_turn(self) -> int | None:
        """The token that ends a turn; None where there are no conversations."""
        return self.response_format.chat.end_of_turn if self.preferences.has_chats else None

    def val_prompts(self) -> list[Example]:
        """Return the chosen example of one validation pair for each prompt."""
        first = {str(pair.prompt): pair.chosen for pair in reversed(self.preferences.val)}
        return list(reversed(first.values()))

    def statistics(self) -> dict[str, Any]:
        """Count pairs and tokens, for the manifest."""
        lengths = np.concatenate([self.train.chosen.lengths, self.train.rejected.lengths])
        return {
            **self.preferences.statistics(),
            "tokens_median": float(np.median(lengths)),
            "tokens_max": int(lengths.max()),
            "cut": self.train.cut,
            "dropped_length": self.train.dropped,
            "dropped_same_tokens": self.train.same + (self.val.same if self.val else 0),
            "skipped": self.bad.count,
        }


def load_reward_data(config: RewardConfig, clock: str | None = None) -> PreferenceData:
    """Read, check and encode preferences for a reward model.

    `clock` is the time for chat templates that write the date; None for now.

    Raises:
        DataError: rows that are broken, nothing to learn from, or tokens that the model lacks.
        ModelError: no tokenizer, or a chat template that is broken.
        UserError: `--max-length` over the model's positions.
    """
    model_config, tokenizer = load_config(config.model), load_tokenizer(config.model)
    max_length = resolve_max_length(config.max_length, model_config, tokenizer=tokenizer)
    bad = BadRows(config.skip_bad_rows)
    preferences = read_preferences(config, config.data, config.seed, bad)
    added = (
        prepare_template(tokenizer, model_config, config.chat_template)
        if preferences.has_chats
        else []
    )
    configure_padding(tokenizer, max_length)
    end_at_turn(tokenizer, model_config)
    response_format = ResponseFormat(tokenizer, model_config, clock, flags=BOTH_FLAGS)
    data = _encode(config, preferences, response_format, max_length, model_config, added, bad)
    _require_no_padding(data.train, preferences.train, data)
    if data.val is not None:
        _require_no_padding(data.val, preferences.val, data)
    if config.margin:
        return data
    no_margins = np.zeros_like(data.train.margins)
    return replace(data, train=replace(data.train, margins=no_margins))


def load_dpo_data(config: DpoConfig, clock: str | None = None) -> PreferenceData:
    """Read, check and encode preferences for DPO.

    `clock` is as in `load_reward_data`.

    Raises:
        DataError: rows that are broken, or nothing to learn from.
        ModelError: an encoder, no tokenizer, or a chat template that is broken.
        UserError: `--max-length` over the model's positions.
    """
    model_config, tokenizer = load_config(config.model), load_tokenizer(config.model)
    require_causal_config(model_config, config.model)
    max_length = resolve_max_length(config.max_length, model_config)
    bad = BadRows(config.skip_bad_rows)
    preferences = read_preferences(config, config.data, config.seed, bad)
    chats = preferences.has_chats
    added = set_chat_template(tokenizer, config.chat_template) if chats else []
    response_format = ResponseFormat(tokenizer, model_config, clock, flags=BOTH_FLAGS)
    if chats and config.chat_template:
        require_template(response_format.chat, config.chat_template)
    return _encode(config, preferences, response_format, max_length, model_config, added, bad)


def _encode(
    config: RewardConfig | DpoConfig,
    preferences: Preferences,
    response_format: ResponseFormat,
    max_length: int,
    model_config: PreTrainedConfig,
    added: Sequence[str],
    bad: BadRows,
) -> PreferenceData:
    """Encode the pairs of both splits, and hold them against the rules on rows."""
    embedding_rows = int(model_config.get_text_config().vocab_size)
    rules = RowRules(
        response_format.tokenizer, embedding_rows=embedding_rows, added=added, noun="pair"
    )
    encode = partial(
        encode_pairs, max_length=max_length, truncation=config.truncation, bad=bad, rules=rules
    )
    train = encode(response_format, preferences.train)
    val = encode(response_format, preferences.val) if preferences.val else None
    bad.report()
    rules.enforce()
    return PreferenceData(
        train,
        val,
        preferences,
        response_format,
        max_length,
        embedding_rows,
        added_tokens=tuple(added),
        bad=bad,
    )


def _require_no_padding(
    encoded: Pairs, preferences: list[Preference], data: PreferenceData
) -> None:
    """Refuse texts that hold the padding token, before which a classifier would look."""
    for side in (encoded.chosen, encoded.rejected):
        places = np.flatnonzero(side.tokens == data.tokenizer.pad_token_id)
        if len(places):
            number = side.sequence_of(int(places[0]))
            example = preferences[int(encoded.numbers[number])].chosen
            raise DataError(
                f"this pair holds {data.tokenizer.pad_token}, the padding",
                file=example.place,
                line=example.line,
            )


def log_reward_data(data: PreferenceData) -> None:
    """Log the numbers of pairs and tokens in two lines, and warn of what is odd."""
    statistics = data.statistics()
    log.info(
        "%s to train on, %s to validate; %s; rows left out: %s with equal responses, "
        "%s without a verdict",
        counted(len(data.train), "pair"),
        f"{0 if data.val is None else len(data.val):,}",
        counted(statistics["prompts"], "prompt"),
        f"{statistics[f'dropped_{EQUAL}']:,}",
        f"{statistics[f'dropped_{UNDECIDED}']:,}",
    )
    log.info(
        "tokens: median %g, longest %s; %s cut to fit %s, %s left out; %s",
        statistics["tokens_median"],
        f"{statistics['tokens_max']:,}",
        counted(statistics["cut"], "prompt"),
        f"{data.max_length:,}",
        counted(statistics["dropped_length"], "pair"),
        counted(statistics["duplicates"], "duplicate"),
    )
    if same := statistics["dropped_same_tokens"]:
        pairs = counted(same, "pair of", "pairs of")
        log.warning("left out %s the same tokens on both sides", pairs)
    if contradictions := statistics["contradictions"]:
        log.warning("%s in both orders", counted(contradictions, "pair stands", "pairs stand"))
    if shared := statistics["shared_prompts"]:
        pairs = counted(shared, "validation pair has", "validation pairs have")
        log.warning("%s a prompt that also trains", pairs)
    shared = count_shared_lines(data.preferences.train, data.preferences.val)
    if shared > MOST_SHARED * len(data.preferences.val):
        texts = counted(shared, "validation text begins", "validation texts begin")
        log.warning(
            "%s with lines that other texts train on: where these are the prompt, it is on both "
            "sides; give it a column, `prompt`, or pass --val-data",
            texts,
        )


def log_dpo_data(data: PreferenceData) -> None:
    """Log what `log_reward_data` does, and warn of what DPO cannot use."""
    log_reward_data(data)
    if margins := data.preferences.statistics()["margins"]:
        log.warning(
            "%s a margin, which this loss has no place for: not used",
            counted(margins, "pair has", "pairs have"),
        )
    if data.added_tokens:
        log.warning(
            "the chat template adds %s, which the model has never seen: fine-tune it on "
            "conversations first (llmctl sft)",
            ", ".join(data.added_tokens),
        )
