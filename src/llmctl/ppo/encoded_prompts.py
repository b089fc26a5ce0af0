"""Prompts as a policy and its rewards see them: rows in, token ids and texts or messages out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llmctl.config.commands.ppo import PpoConfig
from llmctl.console import log
from llmctl.data.audit.rules import RowRules, texts_of
from llmctl.data.bad_rows import BadRows, at_row
from llmctl.data.chat.remedies import BOTH_FLAGS
from llmctl.data.chat.render import ChatFormat, encode_text
from llmctl.data.chat.templates import set_chat_template
from llmctl.data.prompts import PromptExample
from llmctl.decode.loop import check_prompt, limit_new_tokens
from llmctl.errors import DataError, ModelError
from llmctl.numbers import counted
from llmctl.ppo.rules import Sample


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts as rows, as token ids, and as rewards see them."""

    rows: Sequence[PromptExample]
    tokens: Sequence[list[int]]
    reward_prompts: Sequence[Any]
    """Texts, or lists of messages."""

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.rows)

    def samples(self, indices: Sequence[int], responses: Sequence[str]) -> list[Sample]:
        """Join prompts, by their indices, and a response to each."""
        return [
            Sample(self.reward_prompts[i], response, self.rows[i].answer, self.rows[i].name)
            for i, response in zip(indices, responses, strict=True)
        ]


class PromptFormat:
    """How prompts become tokens of one policy."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PpoConfig, clock: str | None):
        """Choose the chat template where there is one, unless plain text is wanted.

        Raises:
            ModelError: a template whose tokens the policy does not have.
        """
        if config.chat_template is not None and (
            added := set_chat_template(tokenizer, config.chat_template)
        ):
            raise ModelError(
                f"the chat template needs {', '.join(added)}, which the policy has never seen",
                hint="fine-tune it with that template first: llmctl sft --chat-template",
            )
        self.tokenizer = tokenizer
        is_chat = not config.plain and tokenizer.chat_template is not None
        self.chat = ChatFormat(tokenizer, clock, BOTH_FLAGS) if is_chat else None

    @property
    def end_of_turn(self) -> int | None:
        """Token that ends a turn, beside the model's EOS."""
        return None if self.chat is None else self.chat.end_of_turn

    def reward_prompt(self, row: PromptExample) -> Any:
        """The prompt for rewards: messages where the policy answers in a chat."""
        return row.text if self.chat is None and row.is_single else row.messages

    def encode(self, row: PromptExample) -> list[int]:
        """Tokens up to where the response begins.

        Raises:
            DataError: messages that the chat template refuses, or none to render them with.
            ModelError: the chat template has no place for a part of them.
        """
        if self.chat is not None:
            return self.chat.encode_prompt(row.messages, row.tools)
        if not row.is_single:
            if self.tokenizer.chat_template is not None:
                what = "a conversation, and --plain puts single texts"
                raise DataError(what, hint="drop --plain")
            raise DataError(
                "a conversation, and this model has no chat template",
                hint="fine-tune it on conversations first, or give --chat-template",
            )
        return encode_text(self.tokenizer, row.text)


def encode_prompts(
    rows: Sequence[PromptExample],
    prompt_format: PromptFormat,
    model_config: PreTrainedConfig,
    config: PpoConfig,
    bad: BadRows,
    rules: RowRules,
) -> EncodedPrompts:
    """Encode every prompt that leaves room for a response; `bad` counts the others.

    `rules` look at those that are kept.

    Raises:
        DataError: more prompts than may be skipped are empty or too long, with file and line.
        ModelError: the chat template has no place for a part of one, or the tokenizer is another
            model's; with file and line, too.
    """
    kept: list[PromptExample] = []
    encoded: list[list[int]] = []
    for row in rows:
        try:
            with at_row(row.place, row.line):
                tokens = prompt_format.encode(row)
                check_prompt(tokens, model_config, "the prompt")
        except DataError as error:
            bad(error)
            continue
        kept.append(row)
        encoded.append(tokens)
        in_turns = prompt_format.chat is not None
        texts = texts_of(row.messages, tools=row.tools)
        rules.see(texts, row.place, row.line, [tokens], in_turns=in_turns)
    wanted = config.max_new_tokens
    short = sum(limit_new_tokens(tokens, model_config, wanted) < wanted for tokens in encoded)
    if short:
        log.warning(
            "%s of %s leave room for fewer than %s of a response",
            *(f"{short:,}", counted(len(encoded), "prompt"), counted(wanted, "token")),
        )
    return EncodedPrompts(kept, encoded, [prompt_format.reward_prompt(row) for row in kept])
