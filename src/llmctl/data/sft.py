"""Load examples for supervised fine-tuning.

In: the names of `--data`. Out: `SftData`, training and validation sequences for one model, and
counts for the audit. Read, split, then mix, then encode: held-out examples are never repeated in
training, or packed with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmctl.config.commands.audit import AuditConfig
from llmctl.config.commands.sft import SftConfig
from llmctl.data.audit.rules import RowRules, texts_of
from llmctl.data.bad_rows import BadRows
from llmctl.data.chat.remedies import BOTH_FLAGS
from llmctl.data.chat.render import ChatFormat
from llmctl.data.chat.templates import set_chat_template
from llmctl.data.examples import Example
from llmctl.data.split import count_duplicates, count_shared_prompts, find_overlap, read_split
from llmctl.data.tokenized import Tokenized, collect, resolve_max_length
from llmctl.errors import ModelError
from llmctl.models.loading import load_config, load_tokenizer


@dataclass(frozen=True)
class SftData:
    """Examples to fine-tune on, encoded for one model."""

    train: Tokenized
    val: Tokenized | None
    train_examples: Sequence[Example]
    val_examples: Sequence[Example]
    format: ChatFormat
    max_length: int
    embedding_rows: int
    """Rows of the model's embedding, before tokens were added."""
    added_tokens: tuple[str, ...]
    """Special tokens that the chat template needs and the tokenizer lacked."""
    has_conversations: bool
    """Whether any example is one; plain text needs no chat template."""
    bad: BadRows
    """Rows that were left out for their errors, and columns that were not read."""
    duplicates: int
    """Rows near-equal to an earlier one: but for case, white space and punctuation."""
    overlap: tuple[str, ...]
    """Names of training examples that are in the validation data too."""
    shared_prompts: int
    """Validation prompts that training has with another answer."""
    dropped: int
    """Sequences left out for their length."""
    inputs: list[dict[str, Any]]
    """Files and their hashes, for the manifest."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, its chat template set."""
        return self.format.tokenizer

    @property
    def end_of_turn(self) -> int | None:
        """The token that ends a turn, where there are conversations."""
        return self.format.end_of_turn if self.has_conversations else None

    @property
    def row_count(self) -> int:
        """Rows that were read, both sides together."""
        return len(self.train_examples) + len(self.val_examples)

    def row_rules(self) -> RowRules:
        """Hold the texts of all rows against the rules on them."""
        rules = RowRules(self.tokenizer)
        for example in (*self.train_examples, *self.val_examples):
            texts = texts_of(example.messages, example.text, tools=example.tools)
            rules.see(texts, example.place, example.line, in_turns=example.messages is not None)
        return rules

    def example_of(self, sequence: int) -> Example:
        """Example that a training sequence was made of."""
        return self.train_examples[int(self.train.rows[sequence])]


def load_sft_data(
    config: SftConfig | AuditConfig, reserved: int = 0, clock: str | None = None
) -> SftData:
    """Read, split and encode the examples.

    Virtual tokens take `reserved` positions of the model. `clock` is the time for chat templates
    that write the date; None for now.

    Raises:
        DataError: rows that are broken, or nothing to train on.
        ModelError: no tokenizer, or a chat template that is broken.
        UserError: more positions asked for than the model has.
    """
    model, tokenizer = load_config(config.model), load_tokenizer(config.model)
    max_length = resolve_max_length(config.max_length, model, reserved)
    bad = BadRows(config.skip_bad_rows)
    split = read_split(config, config.data, config.seed, bad)
    train, val = split.train, split.val
    has_chats = any(example.messages is not None for example in (*train, *val))
    added = set_chat_template(tokenizer, config.chat_template) if has_chats else []
    chat = ChatFormat(tokenizer, clock, BOTH_FLAGS)
    if has_chats and config.chat_template:
        require_template(chat, config.chat_template)
    whole = collect(chat.encode_examples(train, config.train_on, bad))
    whole_val = collect(chat.encode_examples(val, config.train_on, bad)) if val else None
    bad.report()
    truncation: Any = "drop" if config.truncation == "drop" else "cut"
    truncated = whole.truncated(max_length, truncation)
    return SftData(
        train=truncated,
        val=None if whole_val is None else whole_val.truncated(max_length, truncation),
        train_examples=train,
        val_examples=val,
        format=chat,
        max_length=max_length,
        embedding_rows=int(model.get_text_config().vocab_size),
        added_tokens=tuple(added),
        has_conversations=has_chats,
        bad=bad,
        duplicates=count_duplicates([*train, *val]),
        overlap=tuple(ours.name for ours, _ in find_overlap(train, val)),
        shared_prompts=count_shared_prompts(train, val),
        dropped=len(whole) - len(truncated),
        inputs=split.inputs,
    )


def require_template(chat: ChatFormat, choice: str) -> None:
    """Raise a ModelError for a template that cannot render the simplest conversation."""
    try:
        _ = chat.probe
    except ModelError as error:
        raise ModelError(error.message, file=choice, hint="mend the template") from None
