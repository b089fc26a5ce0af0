"""Prompts of the user (text, files, conversations) in, the tokens that a model continues out."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from llmctl.console import log
from llmctl.data.audit.rules import RowRules, texts_of
from llmctl.data.bad_rows import BadRows, at_row
from llmctl.data.chat.render import ChatFormat, encode_text
from llmctl.data.prompts import PromptExample
from llmctl.data.rows import SourceRow, checked_text
from llmctl.data.schemas import Layout, Message
from llmctl.data.sets import read_sets
from llmctl.decode.loop import Prompt, check_prompt, limit_new_tokens
from llmctl.errors import DataError, ModelError, UserError
from llmctl.numbers import counted

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llmctl.models.plain import PlainConfig


def read_stdin() -> PromptExample:
    """Read all of stdin as one prompt, without the newline at its end.

    Raises:
        UserError: stdin is a terminal: nothing is piped in.
        DataError: not UTF-8.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError(
            "nothing to continue", hint='pass --prompt "Once upon a time", or pipe text to stdin'
        )
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start}", file="stdin") from None
    return PromptExample(text.removesuffix("\n"), "stdin")


def read_shots(file: Path) -> list[tuple[str, str]]:
    """Read the few-shot examples, rows of `prompt` and `response`, of a file.

    Raises:
        DataError: unreadable, not UTF-8, empty, or a row without the two texts.
    """
    layout = Layout({"prompt": "prompt", "response": "response"}, {})

    def parse(record: SourceRow, _: Layout) -> list[tuple[str, str]]:
        return [
            (
                checked_text(record.values["prompt"], "prompt"),
                checked_text(record.values["response"], "response"),
            )
        ]

    bad = BadRows()
    try:
        (shots,) = read_sets([str(file)], (layout,), parse, bad=bad)
    except DataError as error:
        error.hint = "an example is a row of `prompt` and `response`"
        raise
    bad.report()
    return shots.examples


@dataclass(frozen=True)
class PromptEncoder:
    """Encodes prompts as plain text, or in the model's chat template."""

    tokenizer: PreTrainedTokenizerBase
    chat: bool = False
    system: str | None = None
    shots: Sequence[tuple[str, str]] = ()

    def encode(self, example: PromptExample) -> list[int]:
        """Encode a prompt with its few-shot examples before it.

        Text that spells a special token is encoded as text; BOS is put once, where the tokenizer
        or the template puts it, and alone for an empty prompt.

        Raises:
            UserError: a conversation, beside --system or few-shot examples.
            DataError: the chat template refuses it, or leaves out a part.
            ModelError: the template has no place for a part, or there is none for a conversation.
        """
        if not example.is_text:
            if self.system is not None or self.shots:
                what = "a conversation, with which --system and --shots do not go"
                raise UserError(f"{example.name}: {what}")
            return self._format.encode_prompt(example.messages, example.tools)
        assert isinstance(example.prompt, str)
        if self.chat:
            return self._format.encode_prompt(self._turns(example.prompt))
        return encode_text(self.tokenizer, self.text(example.prompt))

    def require_template(self) -> None:
        """Refuse to chat without a template.

        Raises:
            ModelError: there is none, or there are several.
        """
        if not self.chat:
            return
        if self.tokenizer.chat_template is None:
            raise ModelError(
                "this model has no chat template", hint="drop --chat to continue plain text"
            )
        _ = self._format.template

    def end_of_answer(self, examples: Sequence[PromptExample]) -> int | None:
        """Id of the token that ends the answers, where the template asks for any of these."""
        if not self.chat and not any(isinstance(example.prompt, list) for example in examples):
            return None
        try:
            return self._format.end_of_answer
        except ModelError as error:
            log.warning("where answers end is not known: %s", error.message)
            return None

    @cached_property
    def _format(self) -> ChatFormat:
        return ChatFormat(self.tokenizer)

    def _turns(self, prompt: str) -> list[Message]:
        turns = [] if self.system is None else [{"role": "system", "content": self.system}]
        for text, response in self.shots:
            turns.append({"role": "user", "content": text})
            turns.append({"role": "assistant", "content": response})
        return [*turns, {"role": "user", "content": prompt}]

    def text(self, prompt: str) -> str:
        """Join examples, `prompt response` each, and the prompt with blank lines between them."""
        examples = [
            text + ("" if text[-1:].isspace() or response[:1].isspace() else " ") + response
            for text, response in self.shots
        ]
        return "\n\n".join([*examples, prompt])


def answers_in_template(tokenizer: PreTrainedTokenizerBase, eos: Collection[int]) -> bool:
    """Whether a model was made to be asked in its chat template.

    Base models may have one, too, but do not end what they write (`eos`) as it ends an answer.
    """
    try:
        return ChatFormat(tokenizer).end_of_answer in eos
    except ModelError:
        return False


def build_prompts(
    examples: Sequence[PromptExample],
    encoder: PromptEncoder,
    shape: PreTrainedConfig | PlainConfig,
    max_new_tokens: int,
    samples: int,
) -> list[Prompt]:
    """Encode one prompt per response: the samples of a prompt follow each other.

    Raises:
        DataError: a prompt longer than the model's context, or that the template refuses.
        ModelError: no chat template, or one without a place for a part; both name the prompt.
    """
    encoder.require_template()
    prompts: list[Prompt] = []
    rules = RowRules(encoder.tokenizer)
    for example in examples:
        with at_row(example.place, example.line):
            tokens = encoder.encode(example)
            check_prompt(tokens, shape, "the prompt")
        in_turns = encoder.chat or not example.is_text
        texts = texts_of(example.messages, tools=example.tools)
        rules.see(texts, None, None, in_turns=in_turns)
        limit = limit_new_tokens(tokens, shape, max_new_tokens)
        if limit < max_new_tokens:
            room = counted(limit, "new token")
            log.warning("%s: the context has room for %s only", example.name, room)
        prompts += (Prompt(tokens, len(prompts) + i) for i in range(samples))
    rules.warn_in_use(chat=encoder.chat)
    return prompts
