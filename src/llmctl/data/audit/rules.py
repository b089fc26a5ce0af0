"""Rules on rows of text that every command that reads them keeps, and who keeps which.

In: the texts of rows, and their tokens. Out: findings: errors refuse a run, warnings do not. Rules
on what is trained and how it ends are of training alone (`checks.py`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from llmctl.console import log
from llmctl.data.chat.omissions import leaves
from llmctl.data.chat.render import SpecialTokens, any_of
from llmctl.data.chat.templates import TEMPLATE_TOKENS
from llmctl.data.rendered import INSTRUCTION, TURN_TOKENS, frame_of
from llmctl.data.schemas import REASONING
from llmctl.data.tokenizer.lost import MOST_LOST, LostCharacters
from llmctl.errors import DataError
from llmctl.numbers import counted

MOST_UNKNOWN, MANY_UNKNOWN = 0.2, 0.01
"""Shares of unknown tokens: above the first the text is not the tokenizer's language at all; above
the second a script or symbol is missing, which stray characters do not explain."""
MOST_RENDERED = 0.1
"""Share of rows that may talk of special tokens; above it, a template was applied before."""
SAID_BESIDE = (*REASONING, "tool_calls")
"""Keys of a message that hold what the model reads or writes beside the content."""


@dataclass(frozen=True)
class AuditFinding:
    """An error or an oddity of rows."""

    level: Literal["error", "warning"]
    name: str
    """Key for programs."""
    message: str
    hint: str
    """The fix."""
    file: str | None = None
    line: int | None = None


class RowRules:
    """Rows of one run, held against the rules on texts and tokens.

    Special tokens are the tokenizer's, and those of well-known templates, which the tokenizer may
    not have; in turns also the marks of Llama 2's, which are text elsewhere.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        embedding_rows: int | None = None,
        added: Iterable[str] = (),
        noun: str = "row",
    ) -> None:
        """Take the tokenizer, which changes no more.

        `added` are tokens for which a model of `embedding_rows` is yet to get embeddings.
        """
        self._tokenizer, self._noun = tokenizer, noun
        known = (name for names in TEMPLATE_TOKENS.values() for name in names)
        names = {*SpecialTokens(tokenizer).names, *known, *TURN_TOKENS}
        self._specials, self._beginnings = any_of(names), {name[0] for name in names if name}
        self.unknown_token = unknown_token(tokenizer)
        self._embedding_rows = embedding_rows
        self._added = frozenset(map(int, tokenizer.convert_tokens_to_ids(list(added))))
        self.lost = LostCharacters(tokenizer.backend_tokenizer if tokenizer.is_fast else None)
        self.rows = self.rendered = self.tokens = self.unknown = self.doubled = self.foreign = 0
        self.spelled: dict[str, None] = {}
        """Special tokens that stand in texts as letters."""
        self._first: dict[str, tuple[str | None, int | None]] = {}

    def see(
        self,
        texts: Iterable[str],
        place: str | None,
        line: int | None,
        tokens: Iterable[Sequence[int]] = (),
        *,
        in_turns: bool = False,
    ) -> None:
        """Count the texts of a row, and the sequences of tokens that it became.

        `in_turns` says that the chat template puts them into turns.
        """
        self.rows += 1
        here = place, line
        is_rendered = False
        for text in texts:
            may_spell = any(letter in text for letter in self._beginnings)  # a quicker search
            names, inner = self._specials.findall(text) if may_spell else [], text.strip()
            names = names or frame_of(inner)
            if in_turns and not names:
                names = [n for n in INSTRUCTION if inner.startswith(n) or inner.endswith(n)]
            self.spelled.update(dict.fromkeys(names))
            is_rendered = is_rendered or any(
                inner.startswith(name) or inner.endswith(name) for name in names
            )
            if self.lost.add(text):
                self._first.setdefault("lost", here)
        self.rendered += is_rendered
        if is_rendered:
            self._first.setdefault("rendered", here)
        for sequence in tokens:
            self._count(sequence, here)

    def _count(self, tokens: Sequence[int], here: tuple[str | None, int | None]) -> None:
        self.tokens += len(tokens)
        if self.unknown_token is not None:
            self.unknown += tokens.count(self.unknown_token)
        bos = self._tokenizer.bos_token_id
        if bos is not None and list(tokens[:2]) == [bos, bos]:
            self.doubled += 1
            self._first.setdefault("double_bos", here)
        rows = self._embedding_rows
        if rows is not None and any(t >= rows and t not in self._added for t in tokens):
            self.foreign += 1
            self._first.setdefault("beyond_embedding", here)

    def findings(self) -> Iterator[AuditFinding]:
        """Yield what the rows break."""
        if self.rendered:
            many = self.rendered > MOST_RENDERED * self.rows
            yield self._finding(
                "error" if many else "warning",
                "rendered",
                f"special tokens, as letters, begin or end texts: {self.rendered:,} of "
                f"{counted(self.rows, self._noun)}",
                "take these tokens out (they are put where they belong), and give turns as"
                " `messages`",
            )
        if self.lost.lost:
            yield self._finding(
                "error" if self.lost.share > MOST_LOST else "warning",
                "lost",
                self.lost.message(),
                "use a model whose tokenizer has every byte, or knows the script of this text",
            )
        unknown = self.unknown / max(1, self.tokens)
        if unknown > MANY_UNKNOWN:
            yield unknown_finding(unknown)
        if self.doubled:
            yield self._finding(
                "error",
                "double_bos",
                f"BOS twice at the beginning of {counted(self.doubled, 'sequence')}",
                "take bos_token out of the chat template, or choose another: --chat-template NAME",
            )
        if self.foreign:
            yield self._finding(
                "error",
                "beyond_embedding",
                f"token ids that the model has no embedding for ({self._embedding_rows:,} rows) in "
                f"{counted(self.foreign, 'sequence')}: the tokenizer is another model's",
                "put the model's own tokenizer into its folder",
            )

    def warn_in_use(self, *, chat: bool) -> None:
        """Say once what a prompt loses, or spells in vain; nothing is refused."""
        if self.spelled:
            names = ", ".join(list(self.spelled)[:3])
            has_flag = not chat and self._tokenizer.chat_template is not None
            more = "; --chat puts a prompt into the template" if has_flag else ""
            log.warning("the prompt spells special tokens (%s), which are text here%s", names, more)
        if self.lost.lost:
            log.warning("%s", self.lost.message())

    def _finding(
        self, level: Literal["error", "warning"], name: str, message: str, hint: str
    ) -> AuditFinding:
        return AuditFinding(level, name, message, hint, *self._first[name])

    def enforce(self) -> None:
        """Warn of what the rows break, and raise a DataError for the first error."""
        for finding in self.findings():
            if finding.level == "error":
                raise DataError(
                    finding.message, file=finding.file, line=finding.line, hint=finding.hint
                )
            place = "" if finding.file is None else f"{finding.file}: "
            if finding.file is not None and finding.line is not None:
                place = f"{finding.file}:{finding.line}: "
            log.warning("%s%s", place, finding.message)


def unknown_finding(share: float) -> AuditFinding:
    """Build the finding on a share of unknown tokens."""
    return AuditFinding(
        "error" if share > MOST_UNKNOWN else "warning",
        "unknown",
        f"{percent(share)} of the tokens are unknown to the tokenizer",
        "use a model whose tokenizer knows the characters of this text",
    )


def unknown_token(tokenizer: PreTrainedTokenizerBase, stops: Iterable[int] = ()) -> int | None:
    """Id of the token for what the tokenizer cannot write, and for nothing else.

    Byte-level tokenizers write everything, and often call their only special token unknown too.
    """
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, *stops)
    return None if tokenizer.unk_token_id in others else tokenizer.unk_token_id


def texts_of(
    messages: Iterable[Mapping[str, Any]] | None, *others: str | None, tools: Any = None
) -> list[str]:
    """List the texts of a row: what its messages say, think and call, others, and its tools."""
    texts = [message.get("content") for message in messages or ()]
    for message in messages or ():
        if not message.keys().isdisjoint(SAID_BESIDE):
            texts += leaves([message.get(key) for key in SAID_BESIDE])
    return [text for text in (*texts, *others, *leaves(tools)) if isinstance(text, str)]


def percent(share: float) -> str:
    """Format a share in percent."""
    return f"{100 * share:.1f} %"
