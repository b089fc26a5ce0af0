"""From what `--data` names to encoded pairs that a reward model learns from, all of it checked."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llmctl.config.stages import RewardConfig
from llmctl.console import log
from llmctl.data.labelled import fit_tokenizer, length_limit
from llmctl.data.pairs import Pairs, encode_pairs
from llmctl.data.preference_rows import EQUAL, UNDECIDED, Preference
from llmctl.data.preferences import Preferences, read_preferences
from llmctl.data.responses import ResponseFormat, prepare_template
from llmctl.errors import DataError
from llmctl.models import load_config, load_tokenizer


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
    max_length = length_limit(config.max_length, shape, tokenizer)
    found = read_preferences(config, config.data, config.seed)
    pairs = [*found.train, *found.val]
    chats = any(pair.shared for pair in pairs)
    added = prepare_template(tokenizer, shape, config.chat_template) if chats else []
    fit_tokenizer(tokenizer, max_length)
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
