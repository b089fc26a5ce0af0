"""A conversation with a model: its history, the part of it that fits the context, the next reply.

In: messages of the user. Out: replies, piece by piece, and rows of `messages` for fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from transformers import PreTrainedTokenizerBase

from llmctl.config.sections import Sampling
from llmctl.console import log
from llmctl.data.audit.rules import RowRules
from llmctl.data.chat.render import ChatFormat
from llmctl.data.schemas import Message
from llmctl.decode.forward import Forward
from llmctl.decode.loop import FinishReason, Prompt, check_prompt, decode
from llmctl.decode.terminal import ReplyInterrupt
from llmctl.errors import DataError, ModelError, OutputError, UserError
from llmctl.files import json_line, replace_file, writing
from llmctl.hardware import memory_errors
from llmctl.models.loading import context_size, stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from llmctl.decode.llama import PlainModel
    from llmctl.models.plain import PlainConfig

OnPiece = Callable[[str], None]


@dataclass(frozen=True)
class Reply:
    """A message of the user and the model's reply to it."""

    prompt: str
    text: str
    finish_reason: FinishReason | Literal["interrupted"]


@dataclass(frozen=True)
class ContextWindow:
    """The context of a model, and the part of it that a reply may take."""

    tokenizer: PreTrainedTokenizerBase
    context: int
    """Tokens of history and reply at most."""
    max_reply: int
    """Tokens of a reply at most; room for half the context is always enough."""

    def encode(self, system: str | None, turns: list[Reply], text: str) -> list[int]:
        """Tokens of the chat template, up to where the next reply begins."""
        conversation = [*messages(system, turns), {"role": "user", "content": text}]
        return self._format.encode_prompt(conversation)

    @property
    def end_of_answer(self) -> int | None:
        """Id of the token with which the template ends a reply; None where it has none."""
        return self._format.end_of_answer

    @cached_property
    def _format(self) -> ChatFormat:
        return ChatFormat(self.tokenizer)

    def leaves_room(self, tokens: list[int]) -> bool:
        """Whether a whole reply fits after these tokens."""
        return len(tokens) + min(self.max_reply, self.context // 2) <= self.context


def chat_window(
    tokenizer: PreTrainedTokenizerBase,
    shape: PreTrainedConfig | PlainConfig,
    context: int | None,
    system: str | None,
    max_new_tokens: int,
) -> ContextWindow:
    """The context window of a model whose chat template works.

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
    limit = context_size(shape)
    if context is not None and limit is not None and context > limit:
        raise UserError(f"--context {context:,}: the model's context is {limit:,}")
    size = context or limit or 1 << 62
    window = ContextWindow(tokenizer, size, max_new_tokens)
    tokens = window.encode(system, [], "Hi")
    check_prompt(tokens, shape, "the system message" if system else "the chat template")
    if len(tokens) >= size:
        raise DataError(f"--context {size:,}: the chat template takes {len(tokens):,} tokens")
    return window


def messages(system: str | None, turns: list[Reply]) -> list[Message]:
    """A conversation as a row of `messages`, which sft reads."""
    history = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        history.append({"role": "user", "content": turn.prompt})
        history.append({"role": "assistant", "content": turn.text})
    return history


@dataclass
class Conversation:
    """The state of a conversation. Replies depend on the seed and the messages before them."""

    model: PreTrainedModel | PlainModel
    forward: Forward
    window: ContextWindow
    sampling: Sampling
    seed: int
    system: str | None = None
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext
    """Within it a `ReplyInterrupt` may end a reply."""
    turns: list[Reply] = field(default_factory=list)
    replies: int = 0
    """Generated so far: each has a sampling stream of its own, so that a second try differs."""
    dropped: int = 0
    """Oldest turns that no longer fit the context."""
    has_warned: bool = False
    """Whether it was said that special tokens are text in messages."""

    def send(self, text: str, on_piece: OnPiece) -> Reply:
        """Answer a message; an interrupted reply is kept as far as it came.

        Raises:
            DataError: a message too long for the context; no message is kept after an error.
        """
        if not self.has_warned:
            rules = RowRules(self.window.tokenizer)
            rules.see([text], None, None, in_turns=True)
            rules.warn_in_use(chat=True)
            self.has_warned = bool(rules.spelled)
        reply = self._generate(self.turns, text, on_piece)
        if reply.text or reply.finish_reason != "interrupted":
            self.turns.append(reply)
        return reply

    def retry(self, on_piece: OnPiece) -> Reply:
        """Answer the last message anew.

        Raises:
            UserError: there is no message yet.
        """
        self._require_turns("answer anew")
        if self.sampling.greedy or self.sampling.temperature == 0:
            log.warning("the reply will be the same: nothing is sampled at temperature 0")
        reply = self._generate(self.turns[:-1], self.turns[-1].prompt, on_piece)
        if reply.text or reply.finish_reason != "interrupted":
            self.turns[-1] = reply
        return reply

    def undo(self) -> Reply:
        """Drop the last message and its reply, and return them.

        Raises:
            UserError: nothing was said yet.
        """
        self._require_turns("undo")
        return self.turns.pop()

    def clear(self) -> None:
        """Drop all turns; the system message stays."""
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
            replace_file(path, f"{json_line(row)}\n".encode())

    def _require_turns(self, purpose: str) -> None:
        if not self.turns:
            raise UserError(f"nothing to {purpose}: nothing was said yet")

    def _generate(self, before: list[Reply], text: str, on_piece: OnPiece) -> Reply:
        pieces: list[str] = []

        def on_text(_: int, piece: str) -> None:
            pieces.append(piece)
            on_piece(piece)

        try:
            with self.interruptible(), memory_errors(batch_size=1):
                tokens = self._encode_fitting(before, text)
                limit = min(self.sampling.max_new_tokens, self.window.context - len(tokens))
                prompt = Prompt(tokens, self.replies, limit)
                self.replies += 1
                (response,) = decode(
                    self.model,
                    [prompt],
                    self.sampling,
                    eos=stop_tokens(self.model, self.window.tokenizer, self.window.end_of_answer),
                    forward=self.forward,
                    seed=self.seed,
                    tokenizer=self.window.tokenizer,
                    on_text=on_text,
                )
        except ReplyInterrupt:
            return Reply(text, "".join(pieces), "interrupted")
        assert response.finish_reason is not None
        return Reply(text, response.text, response.finish_reason)

    def _encode_fitting(self, before: list[Reply], text: str) -> list[int]:
        """Encode the message after as many of the last turns as fit.

        Raises:
            DataError: the message does not fit by itself.
        """
        first = min(self.dropped, len(before))
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
        if first and not self.dropped:
            log.warning("the context is full: the model forgets the oldest exchanges")
        self.dropped = first
        return tokens
