"""From what `--data` names to training and validation sequences, with all that the audit asks for.

Read, split, then mix, then encode: nothing that is held out is ever repeated or packed with what is
trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llmctl.config.commands import AuditConfig, SftConfig
from llmctl.data.chat.render import ChatFormat
from llmctl.data.chat.templates import set_chat_template
from llmctl.data.examples import Example
from llmctl.data.split import duplicates, overlap, read_split, shared_prompts
from llmctl.data.tokenized import Tokenized, collect
from llmctl.errors import ModelError, UserError
from llmctl.models.loading import context_size, load_config, load_tokenizer

SHORTEST = 8
"""Positions that virtual tokens must leave for the text."""
LONGEST = 2048
"""Tokens of an example at most, where the model would take more and nothing else was asked for."""


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
    skipped: int
    """Rows that could not be read."""
    duplicates: int
    """Rows that say, but for case and punctuation, what an earlier one says."""
    overlap: tuple[str, ...]
    """Places of training examples that also stand in the validation data."""
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
    def examples(self) -> int:
        """Rows that were read, both sides together."""
        return len(self.train_examples) + len(self.val_examples)

    @property
    def rendered(self) -> list[Example]:
        """Training examples in which a text begins or ends with a special token, spelled out."""
        return [
            example
            for example in self.train_examples
            if any(self.format.is_rendered(text) for text in _texts(example))
        ]

    def place(self, sequence: int) -> str:
        """File and line of the example that a training sequence was made of."""
        example = self.train_examples[int(self.train.rows[sequence])]
        return str(example.name)


def load_sft_data(
    config: SftConfig | AuditConfig, reserved: int = 0, clock: str | None = None
) -> SftData:
    """Read and encode everything.

    Args:
        config: says what and how.
        reserved: positions of the model that virtual tokens take.
        clock: what time it is for chat templates that write the date; None for now.

    Raises:
        DataError: rows that are broken, or nothing to train on.
        ModelError: no tokenizer, or a chat template that is broken.
        UserError: more positions asked for than the model has.
    """
    shape, tokenizer = load_config(config.model), load_tokenizer(config.model)
    max_length = resolve_max_length(config.max_length, shape, reserved)
    split = read_split(config, config.data, config.seed)
    train, val = split.train, split.val
    chats = any(example.messages is not None for example in (*train, *val))
    added = set_chat_template(tokenizer, config.chat_template) if chats else []
    chat = ChatFormat(tokenizer, clock)
    if chats and config.chat_template:
        require_template(chat, config.chat_template)
    encoded = collect(chat.encode_examples(train, config.train_on))
    held_out = collect(chat.encode_examples(val, config.train_on)) if val else None
    cut: Any = "drop" if config.truncation == "drop" else "cut"
    shortened = encoded.truncated(max_length, cut)
    return SftData(
        train=shortened,
        val=None if held_out is None else held_out.truncated(max_length, cut),
        train_examples=train,
        val_examples=val,
        format=chat,
        max_length=max_length,
        embedding_rows=int(shape.get_text_config().vocab_size),
        added_tokens=tuple(added),
        has_conversations=chats,
        skipped=split.skipped,
        duplicates=duplicates([*train, *val]),
        overlap=tuple(ours.name for ours, _ in overlap(train, val)),
        shared_prompts=shared_prompts(train, val),
        dropped=len(encoded) - len(shortened),
        inputs=split.inputs,
    )


def _texts(example: Example) -> list[str]:
    """All that is said in an example."""
    said = [message.get("content") for message in example.messages or ()]
    return [text for text in (*said, example.text) if isinstance(text, str)]


def require_template(chat: ChatFormat, choice: str) -> None:
    """Refuse a template that renders not even the simplest conversation.

    Raises:
        ModelError: naming it.
    """
    try:
        _ = chat.probe
    except ModelError as error:
        raise ModelError(error.message, file=choice, hint="mend the template") from None


def resolve_max_length(wanted: int | None, shape: PreTrainedConfig, reserved: int = 0) -> int:
    """Tokens of a sequence at most: what was asked for, else what the model takes.

    Raises:
        UserError: more than the model has room for beside so many reserved positions.
    """
    context = context_size(shape)
    most = LONGEST if context is None else context - reserved
    if most < SHORTEST:
        raise UserError(f"--prompt-tuning {reserved:,}: the model has {context:,} positions")
    if wanted is not None and context is not None and wanted > most:
        taken = f", of which virtual tokens take {reserved}" if reserved else ""
        raise UserError(f"--max-length {wanted:,}: the model has {context:,} positions{taken}")
    return wanted or min(most, LONGEST)
