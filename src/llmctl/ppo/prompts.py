"""Prompts as a policy is given them: in its chat template, or as plain text to continue."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llmctl.config.commands import PpoConfig
from llmctl.console import log
from llmctl.data.chat.render import ChatFormat, encode_text
from llmctl.data.chat.templates import choose_template
from llmctl.data.prompts import PromptRow
from llmctl.decode.loop import check_prompt, room
from llmctl.errors import DataError, ModelError
from llmctl.ppo.trainer import Asked


class PromptFormat:
    """How prompts become tokens of one policy."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PpoConfig, clock: str | None):
        """Choose: the chat template where there is one, unless plain text is wanted.

        Raises:
            ModelError: a template whose tokens the policy does not have.
        """
        if config.chat_template is not None and (
            added := choose_template(tokenizer, config.chat_template)
        ):
            raise ModelError(
                f"the chat template needs {', '.join(added)}, which the policy has never seen",
                hint="fine-tune it with that template first: llmctl sft --chat-template",
            )
        self.tokenizer = tokenizer
        is_chat = not config.plain and tokenizer.chat_template is not None
        self.chat = ChatFormat(tokenizer, clock) if is_chat else None

    @property
    def stops(self) -> set[int]:
        """Tokens that end a turn, beside the model's EOS."""
        end = None if self.chat is None else self.chat.end_of_turn
        return set() if end is None else {end}

    def rewarded(self, row: PromptRow) -> Any:
        """The prompt as rewards see it: messages where the policy answers in a chat."""
        if self.chat is None:
            return row.text if row.is_single else list(row.prompt)
        if isinstance(row.prompt, str):
            return [{"role": "user", "content": row.prompt}]
        return list(row.prompt)

    def encode(self, row: PromptRow) -> list[int]:
        """Tokens up to where the response begins.

        Raises:
            DataError: messages, and no chat template to write them in.
            ModelError: the chat template refuses them.
        """
        if self.chat is not None:
            return self.chat.encode_prompt(self.rewarded(row))
        if not row.is_single:
            raise DataError(
                "a conversation, and this model has no chat template",
                hint="fine-tune it on conversations first, or give --chat-template",
            )
        return encode_text(self.tokenizer, row.text)


def encode_prompts(
    rows: Sequence[PromptRow],
    written: PromptFormat,
    shape: PreTrainedConfig,
    config: PpoConfig,
) -> Asked:
    """Encode every prompt that leaves room to answer.

    Raises:
        DataError: more prompts than may be skipped are empty or too long, with file and line.
        ModelError: the chat template refuses one, or the tokenizer is another model's.
    """
    kept: list[PromptRow] = []
    tokens: list[list[int]] = []
    bad = 0
    for row in rows:
        try:
            found = written.encode(row)
            check_prompt(found, shape, "the prompt")
        except DataError as error:
            error.file, error.line = row.place, row.line
            bad += 1
            if bad > config.skip_bad_rows:
                raise
            continue
        kept.append(row)
        tokens.append(found)
    if bad:
        log.warning("left out %s prompts that do not fit", f"{bad:,}")
    short = sum(room(t, shape, config.max_new_tokens) < config.max_new_tokens for t in tokens)
    if short:
        log.warning(
            "%s of %s prompts leave room for fewer than %s tokens of a response",
            *(f"{short:,}", f"{len(tokens):,}", f"{config.max_new_tokens:,}"),
        )
    return Asked(kept, tokens, [written.rewarded(row) for row in kept])
