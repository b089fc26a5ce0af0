"""From what `--data` names to encoded pairs that a language model is aligned with, all checked."""

import numpy as np

from llmctl.config.stages import DpoConfig
from llmctl.console import log
from llmctl.data.examples import Example
from llmctl.data.pairs import encode_pairs
from llmctl.data.preferences import read_preferences
from llmctl.data.preferred import PreferenceData, log_preferences
from llmctl.data.responses import ResponseFormat
from llmctl.data.supervised import require_template, resolve_max_length
from llmctl.data.templates import choose_template
from llmctl.errors import DataError
from llmctl.models import load_config, load_tokenizer
from llmctl.vetting import require_causal_config


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
    added = choose_template(tokenizer, config.chat_template) if chats else []
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
