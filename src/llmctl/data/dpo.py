"""From what `--data` names to encoded pairs that a language model is aligned with, all checked."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llmctl.config.stages import DpoConfig
from llmctl.console import log
from llmctl.data.examples import Example
from llmctl.data.pairs import Pairs, encode_pairs
from llmctl.data.preferences import Preferences, read_preferences
from llmctl.data.rendering import ChatFormat
from llmctl.data.responses import ResponseFormat, is_encoder
from llmctl.data.supervised import require_template, resolve_max_length
from llmctl.data.templates import choose_template
from llmctl.errors import DataError, ModelError
from llmctl.models import load_config, load_tokenizer


@dataclass(frozen=True)
class PairData:
    """Pairs to learn from, encoded for one language model."""

    train: Pairs
    val: Pairs | None
    preferences: Preferences
    chat: ChatFormat
    max_length: int
    embedding_rows: int
    """Rows of the model's embedding, before tokens were added."""
    added_tokens: tuple[str, ...]
    """Special tokens that the chat template needs and the tokenizer lacked."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, its chat template set."""
        return self.chat.tokenizer

    @property
    def has_conversations(self) -> bool:
        """Whether any pair is one; plain text needs no chat template."""
        pairs = (*self.preferences.train, *self.preferences.val)
        return any(pair.chosen.messages is not None for pair in pairs)

    @property
    def end_of_turn(self) -> int | None:
        """The token that ends a turn, where there are conversations."""
        return self.chat.end_of_turn if self.has_conversations else None

    @property
    def asked(self) -> list[Example]:
        """A validation pair of each prompt, the preferred side of it."""
        first = {str(pair.prompt): pair.chosen for pair in reversed(self.preferences.val)}
        return list(reversed(first.values()))

    @property
    def same(self) -> int:
        """Training pairs whose two sides are the same tokens, from which nothing can be learned."""
        chosen, rejected = self.train.chosen, self.train.rejected
        return sum(
            np.array_equal(chosen.sequence(number)[0], rejected.sequence(number)[0])
            for number in range(len(self.train))
        )

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        lengths = np.concatenate([self.train.chosen.lengths, self.train.rejected.lengths])
        return {
            **self.preferences.facts(),
            "tokens_median": float(np.median(lengths)),
            "tokens_max": int(lengths.max()),
            "cut": self.train.cut,
            "dropped_length": self.train.dropped,
            "same_tokens": self.same,
        }


def load_pairs(config: DpoConfig, clock: str | None = None) -> PairData:
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
    if is_encoder(shape):
        raise ModelError(
            f"{shape.model_type} reads a text from both sides: it is no causal language model",
            file=config.model,
            hint="use a decoder; an encoder can become a reward model",
        )
    max_length = resolve_max_length(config.max_length, shape)
    found = read_preferences(config, config.data, config.seed)
    chats = any(pair.chosen.messages is not None for pair in (*found.train, *found.val))
    added = choose_template(tokenizer, config.chat_template) if chats else []
    written = ResponseFormat(tokenizer, shape, clock)
    if chats and config.chat_template:
        require_template(written.chat, config.chat_template)
    train = encode_pairs(written, found.train, max_length, config.truncation)
    val = encode_pairs(written, found.val, max_length, config.truncation) if found.val else None
    rows = int(shape.get_text_config().vocab_size)
    data = PairData(train, val, found, written.chat, max_length, rows, tuple(added))
    if data.same == len(train):
        raise DataError(
            "both sides of every pair are the same tokens: there is nothing to prefer",
            file=config.data[0],
            hint="the chat template may leave out what tells them apart: --chat-template",
        )
    return data


def log_pairs(data: PairData) -> None:
    """Say in two lines what there is to learn from, and warn of what is odd."""
    facts = data.facts()
    log.info(
        "%s pairs to learn from, %s to validate, of %s prompts; left out: %s with equal responses, "
        "%s without a verdict, %s too long",
        f"{len(data.train):,}",
        f"{0 if data.val is None else len(data.val):,}",
        f"{facts['prompts']:,}",
        f"{facts['dropped_equal']:,}",
        f"{facts['dropped_undecided']:,}",
        f"{facts['dropped_length']:,}",
    )
    log.info(
        "tokens: median %g, longest %s; %s prompts cut at the left to fit %s",
        facts["tokens_median"],
        f"{facts['tokens_max']:,}",
        f"{facts['cut']:,}",
        f"{data.max_length:,}",
    )
    for count, what in (
        (facts["contradictions"], "pairs stand in both orders"),
        (facts["duplicates"], "pairs stand there more than once"),
        (facts["shared_prompts"], "validation pairs have a prompt that is also trained on"),
        (facts["same_tokens"], "pairs are the same tokens on both sides and teach nothing"),
        (facts["margins"], "pairs have a margin, which this loss has no place for: not used"),
    ):
        if count:
            log.warning("%s %s", f"{count:,}", what)
    if data.added_tokens:
        log.warning(
            "the chat template adds %s, which the model has never seen: fine-tune it on "
            "conversations first (llmctl sft)",
            ", ".join(data.added_tokens),
        )
