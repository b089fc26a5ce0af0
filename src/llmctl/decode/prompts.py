"""Prompts of the user (text, files, conversations) in, the tokens that a model continues out."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llmctl.console import log
from llmctl.data.chat.render import ChatFormat, encode_text
from llmctl.data.prompts import PromptExample, read_nonblank_lines
from llmctl.data.rows import parse_row
from llmctl.data.schemas import Message
from llmctl.decode.loop import Prompt, check_prompt, limit_new_tokens
from llmctl.errors import DataError, UserError
from llmctl.numbers import counted


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
    return PromptExample(text.removesuffix("\n"), "the prompt on stdin")


def read_shots(file: Path) -> list[tuple[str, str]]:
    """Read the few-shot examples (prompt, response) of a jsonl file.

    Raises:
        DataError: unreadable, not UTF-8, empty, or a row without the two texts.
    """
    shots = []
    for number, line in read_nonblank_lines(file):
        row = parse_row(line, str(file), number)
        pair = (row.get("prompt"), row.get("response"))
        if not all(isinstance(text, str) for text in pair):
            raise DataError("an example needs `prompt` and `response`", file=file, line=number)
        shots.append((str(pair[0]), str(pair[1])))
    if not shots:
        raise DataError("no examples in this file", file=file)
    return shots


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
        """
        if isinstance(example.prompt, list):
            if self.system is not None or self.shots:
                raise UserError(f"{example.name}: --system and --shots do not go with `messages`")
            return self._format.encode_prompt(example.prompt)
        if self.chat:
            return self._format.encode_prompt(self._turns(example.prompt))
        return encode_text(self.tokenizer, self.text(example.prompt))

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


def build_prompts(
    examples: Sequence[PromptExample],
    encoder: PromptEncoder,
    shape: PreTrainedConfig,
    max_new_tokens: int,
    samples: int,
) -> list[Prompt]:
    """Encode one prompt per response: the samples of a prompt follow each other.

    Raises:
        DataError: a prompt longer than the model's context.
    """
    prompts: list[Prompt] = []
    for example in examples:
        tokens = encoder.encode(example)
        check_prompt(tokens, shape, example.name)
        limit = limit_new_tokens(tokens, shape, max_new_tokens)
        if limit < max_new_tokens:
            room = counted(limit, "new token")
            log.warning("%s: the context has room for %s only", example.name, room)
        prompts += (Prompt(tokens, len(prompts) + i) for i in range(samples))
    return prompts
