"""A conversation with a model: its history, what of it fits the context, and the next reply.

In: what the user says. Out: replies, piece by piece, and rows of `messages` for fine-tuning.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmctl.config.sections import Sampling
from llmctl.console import log
from llmctl.data.schemas import Message
from llmctl.decode.forward import Forward
from llmctl.decode.loop import FinishReason, Prompt, check_prompt, decode
from llmctl.decode.prompts import encode_chat
from llmctl.decode.terminal import ReplyInterrupt
from llmctl.errors import DataError, ModelError, OutputError, UserError
from llmctl.files import replace_file, writing
from llmctl.hardware import memory_errors
from llmctl.models.loading import context_size, stop_tokens

OnPiece = Callable[[str], None]


@dataclass(frozen=True)
class Reply:
    """What the model answered."""

    prompt: str
    """The message it answers."""
    text: str
    finish_reason: FinishReason | Literal["interrupted"]


@dataclass(frozen=True)
class ContextWindow:
    """What a model sees of a conversation: tokens that leave it room to reply."""

    tokenizer: PreTrainedTokenizerBase
    context: int
    """Tokens of history and reply at most."""
    reply: int
    """Tokens that a reply may take; half the context is always enough."""

    def encode(self, system: str | None, turns: list[Reply], text: str) -> list[int]:
        """Tokens of the chat template, up to where the next reply begins."""
        return encode_chat(
            self.tokenizer, [*messages(system, turns), {"role": "user", "content": text}]
        )

    def leaves_room(self, tokens: list[int]) -> bool:
        """Whether a whole reply fits after these tokens."""
        return len(tokens) + min(self.reply, self.context // 2) <= self.context


def chat_window(
    tokenizer: PreTrainedTokenizerBase,
    shape: PreTrainedConfig,
    context: int | None,
    system: str | None,
    max_new_tokens: int,
) -> ContextWindow:
    """The window of a model, once its chat template was seen to work.

    Raises:
        ModelError: no chat template, one that refuses the system message, or another model's.
        DataError: the system message alone fills the context.
        UserError: `context` is more than the model has.
    """
    if tokenizer.chat_template is None:
        raise ModelError(
            "this model has no chat template: it continues text, but does not answer",
            hint="use llmctl generate, or fine-tune it on conversations with llmctl sft",
        )
    there = context_size(shape)
    if context is not None and there is not None and context > there:
        raise UserError(f"--context {context:,}: the model's context is {there:,}")
    size = context or there or 1 << 62
    found = ContextWindow(tokenizer, size, max_new_tokens)
    tokens = found.encode(system, [], "Hi")
    check_prompt(tokens, shape, "the system message" if system else "the chat template")
    if len(tokens) >= size:
        raise DataError(f"--context {size:,}: the chat template takes {len(tokens):,} tokens")
    return found


def messages(system: str | None, turns: list[Reply]) -> list[Message]:
    """A conversation as fine-tuning reads it."""
    found = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        found.append({"role": "user", "content": turn.prompt})
        found.append({"role": "assistant", "content": turn.text})
    return found


@dataclass
class Conversation:
    """The state of a conversation. Its replies depend on the seed and what was asked before."""

    model: PreTrainedModel
    forward: Forward
    window: ContextWindow
    sampling: Sampling
    seed: int
    system: str | None = None
    stoppable: Callable[[], AbstractContextManager[None]] = nullcontext
    """Within it a `ReplyInterrupt` may end a reply."""
    turns: list[Reply] = field(default_factory=list)
    """What was said and answered."""
    replies: int = 0
    """Ever asked for: each has noise of its own, so that a second try differs."""
    forgotten: int = 0
    """Oldest turns that no longer fit the context."""

    def say(self, text: str, on_piece: OnPiece) -> Reply:
        """Answer a message; a reply that was stopped counts as far as it came.

        Raises:
            DataError: a message too long for the context. It is not kept, as with every error.
        """
        reply = self._answer(self.turns, text, on_piece)
        if reply.text or reply.finish_reason != "interrupted":
            self.turns.append(reply)
        return reply

    def retry(self, on_piece: OnPiece) -> Reply:
        """Answer the last message anew.

        Raises:
            UserError: nothing was said yet.
        """
        self._require_turns("answer anew")
        if self.sampling.greedy or self.sampling.temperature == 0:
            log.warning("the reply will be the same: nothing is sampled at temperature 0")
        reply = self._answer(self.turns[:-1], self.turns[-1].prompt, on_piece)
        if reply.text or reply.finish_reason != "interrupted":
            self.turns[-1] = reply
        return reply

    def undo(self) -> Reply:
        """Take the last exchange back, and return it.

        Raises:
            UserError: nothing was said yet.
        """
        self._require_turns("undo")
        return self.turns.pop()

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.turns = []

    def set_system(self, system: str | None) -> None:
        """Change the system message, from the next reply on.

        Raises:
            ModelError: the chat template takes no system message.
            DataError: it leaves no room in the context.
        """
        tokens = self.window.encode(system, [], "")
        if not self.window.leaves_room(tokens):
            raise DataError(f"a system message of {len(tokens):,} tokens leaves no room to talk")
        self.system = system

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the whole conversation as one row of `messages`.

        Raises:
            UserError: nothing was said yet.
            OutputError: the file exists, or cannot be written.
            ResourceError: the disk is full.
        """
        self._require_turns("save")
        if path.exists() and not (overwrite and path.is_file()):
            raise OutputError("exists already", file=path, hint="save under another name")
        if not path.absolute().parent.is_dir():
            raise OutputError("no such directory", file=path.parent)
        row = {"messages": messages(self.system, self.turns)}
        with writing(path):
            replace_file(path, f"{json.dumps(row, ensure_ascii=False)}\n".encode())

    def _require_turns(self, purpose: str) -> None:
        if not self.turns:
            raise UserError(f"nothing to {purpose}: nothing was said yet")

    def _answer(self, before: list[Reply], text: str, on_piece: OnPiece) -> Reply:
        pieces: list[str] = []

        def on_text(_: int, piece: str) -> None:
            pieces.append(piece)
            on_piece(piece)

        try:
            with self.stoppable(), memory_errors(batch_size=1):
                tokens = self._fit(before, text)
                room = min(self.sampling.max_new_tokens, self.window.context - len(tokens))
                prompt = Prompt(tokens, self.replies, room)
                self.replies += 1
                (response,) = decode(
                    self.model,
                    [prompt],
                    self.sampling,
                    eos=stop_tokens(self.model, self.window.tokenizer),
                    forward=self.forward,
                    seed=self.seed,
                    tokenizer=self.window.tokenizer,
                    on_text=on_text,
                )
        except ReplyInterrupt:
            return Reply(text, "".join(pieces), "interrupted")
        assert response.finish_reason is not None
        return Reply(text, response.text, response.finish_reason)

    def _fit(self, before: list[Reply], text: str) -> list[int]:
        """Tokens of the message after as much of the history as fits, from its end.

        Raises:
            DataError: the message does not fit by itself.
        """
        first = min(self.forgotten, len(before))
        tokens = self.window.encode(self.system, before[first:], text)
        while first < len(before) and not self.window.leaves_room(tokens):
            first += 1
            tokens = self.window.encode(self.system, before[first:], text)
        if len(tokens) >= self.window.context:
            raise DataError(
                f"the message takes {len(tokens):,} tokens with its template, "
                f"the context has {self.window.context:,}",
                hint="say it in fewer words",
            )
        if first and not self.forgotten:
            log.warning("the context is full: the model forgets the oldest exchanges")
        self.forgotten = first
        return tokens
