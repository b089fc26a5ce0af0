"""Render conversations and texts as tokens, the same ones for training as for use.

In: a tokenizer with a chat template, and messages as JSON has them. Out: the tokens that a model is
given to answer, or whole training sequences with a mask of what counts in the loss. What stands
before a trained turn is, token for token, what the model is given when it is to write that turn.

Special tokens are the template's alone: text that spells one is encoded as text.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from llmctl.data.chat.sandbox import render_cuts
from llmctl.data.chat.templates import TRUSTED
from llmctl.data.tokenized import EncodedSequence
from llmctl.errors import ModelError

if TYPE_CHECKING:
    from llmctl.data.examples import Example


PROBE = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."})
FIX = "choose another template: --chat-template FILE, or a name such as chatml"
TrainOn = Literal["assistant", "completion", "prompt", "all"]

BREAK = "\ufdd0"
"""A noncharacter of Unicode: no text carries it."""


class _Turn(NamedTuple):
    """A turn of the assistant in the text of a conversation, in characters."""

    begin: int
    end: int
    ends: bool
    """Whether it ends with a special token."""
    weight: bool
    """Whether it may be trained on."""


class ChatFormat:
    """How one tokenizer and its chat template make tokens of conversations.

    Text that spells a special token is encoded as text, whoever wrote it. BOS stands where the
    template puts it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, clock: str | None = None) -> None:
        """Take a tokenizer that changes no more.

        Args:
            tokenizer: with its chat template.
            clock: what time it is for templates that write the date (ISO 8601), so that a run which
                is resumed tomorrow has the same data; None for now.
        """
        self.tokenizer, self._clock = tokenizer, clock
        self._specials = SpecialTokens(tokenizer)
        self._variables = tokenizer.special_tokens_map

    @cached_property
    def template(self) -> str:
        """The chat template; texts can do without.

        Raises:
            ModelError: there is none, or there are several.
        """
        if self.tokenizer.chat_template is None:
            raise ModelError(
                "this model has no chat template", hint="drop --chat to continue plain text"
            )
        try:
            template = self.tokenizer.get_chat_template()
        except ValueError:
            raise ModelError("several chat templates, and none of them is the default") from None
        if not isinstance(template, str):
            raise ModelError("the chat template is not text")
        return template

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Tokens of a conversation, up to where the assistant's turn begins.

        Raises:
            ModelError: the template refuses these messages.
        """
        (text,) = self._render(messages, [(len(messages), True)], tools)
        return self._specials.encode([text])[0]

    def examples(
        self,
        messages: Sequence[Mapping[str, Any]],
        train_on: TrainOn,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[EncodedSequence]:
        """The training sequences of a conversation: one, if at all possible.

        Where the template writes earlier turns anew once there are later ones, or where a token
        would reach from a prompt into its answer, each turn gets a sequence of its own that begins
        with its prompt. A turn lasts to the special token that ends it, which is trained on. What
        the assistant says before any user is context, and so is a message of `weight` 0.

        Args:
            messages: the conversation.
            train_on: `assistant` every turn of the assistant, `completion` the last one, `prompt`
                all else, or `all`.
            tools: JSON schemas of what the assistant may call.

        Raises:
            ModelError: the template refuses these messages, or begins a turn of the assistant in
                another way than it asks for one.
        """
        numbers = _answers(messages)[-1 if train_on == "completion" else 0 :]
        cuts = [(i, True) for i in numbers] + [(i + 1, False) for i in numbers]
        whole_cut = (len(messages), False)
        distinct = list(dict.fromkeys([*cuts, whole_cut]))
        text_of = dict(zip(distinct, self._render(messages, distinct, tools), strict=True))
        whole, answered = text_of[whole_cut], [text_of[i + 1, False] for i in numbers]
        turns = [self._turn(text_of[i, True], text_of[i + 1, False], messages[i]) for i in numbers]
        if all(whole.startswith(text) for text in answered):
            encoded = self._sequence(whole, turns, train_on)
            if encoded is not None:
                return [encoded]
        elif train_on == "prompt":
            raise ModelError(
                "the chat template writes earlier turns anew: there is no one text of prompts",
                hint=FIX,
            )
        return self._apart(answered, whole, turns, train_on)

    def text(self, text: str) -> EncodedSequence:
        """Tokens of a plain text: BOS where the tokenizer puts it, and EOS where there is one."""
        tokens, eos = encode_text(self.tokenizer, text), self.tokenizer.eos_token_id
        if eos is not None:
            tokens.append(int(eos))
        return _encoded(tokens, [True] * len(tokens), eos is not None and len(tokens) > 1)

    def batch(
        self, examples: "Iterable[Example]", train_on: TrainOn
    ) -> Iterator[list[EncodedSequence]]:
        """The training sequences of each example.

        Raises:
            ModelError: as `examples` does, with the place of the example.
        """
        for example in examples:
            if example.messages is None:
                yield [self.text(example.text or "")]
                continue
            try:
                yield self.examples(example.messages, train_on, example.tools)
            except ModelError as error:
                raise ModelError(
                    error.message, file=example.place, line=example.line, hint=error.hint
                ) from None

    def is_rendered(self, text: str) -> bool:
        """Whether a text begins or ends with a special token, as one rendered before does."""
        inner = text.strip()
        found = self._specials.pattern.finditer(inner)
        return any(token.start() == 0 or token.end() == len(inner) for token in found)

    @cached_property
    def probe(self) -> EncodedSequence:
        """A question and its answer, to look at.

        Raises:
            ModelError: the template cannot render even that, or not so that it can be trained.
        """
        return self.examples(PROBE, "assistant")[0]

    @cached_property
    def end_of_turn(self) -> int | None:
        """Id of the special token that ends a turn of the assistant; None where there is none."""
        if self.tokenizer.chat_template is None or not self.probe.ends:
            return None
        last = max(k for k, trained in enumerate(self.probe.trained) if trained)
        return self.probe.tokens[last]

    @cached_property
    def double_bos(self) -> bool:
        """Whether conversations begin with BOS twice."""
        bos = self.tokenizer.bos_token_id
        if bos is None or self.tokenizer.chat_template is None:
            return False
        return self.probe.tokens[:2] == [bos, bos]

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        cuts: Sequence[tuple[int, bool]],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> list[str]:
        """The texts of several cuts, with a BREAK in every special token that a user spelled."""
        said = [{k: v for k, v in message.items() if k != "weight"} for message in messages]
        for name, is_used in (
            ("tools", bool(tools)),
            ("tool_calls", any(message.get("tool_calls") for message in said)),
        ):
            if is_used and name not in self.template:
                raise ModelError(f"the chat template has no place for {name}", hint=FIX)
        return render_cuts(
            self.template,
            self._specials.hide(said),
            cuts,
            self._variables,
            self._specials.hide(tools),
            clock=self._clock,
            trusted=self.template in TRUSTED,
        )

    def _turn(self, prompt: str, text: str, message: Mapping[str, Any]) -> _Turn:
        """Find the assistant's turn in a text that ends with it."""
        if not text.startswith(prompt):
            raise ModelError(
                f"the chat template asks for an answer with {_tail(prompt)} but begins one"
                f" otherwise, with {_tail(text[: len(prompt)])}: training and use would differ",
                hint=FIX,
            )
        begin, weight = len(prompt), message.get("weight") != 0
        *_, last = [begin, *(found.end() for found in self._specials.pattern.finditer(text, begin))]
        if last > begin and not text[last:].strip():
            return _Turn(begin, last, True, weight)
        content = str(message.get("content") or "")
        own, end = content[len(content.rstrip()) :], len(text.rstrip())
        end += len(own) if text.startswith(own, end) else 0
        return _Turn(begin, max(begin, end), False, weight)

    def _sequence(
        self, text: str, turns: Sequence[_Turn], train_on: TrainOn
    ) -> EncodedSequence | None:
        """One sequence of all turns; None where a token reaches over the border of one."""
        cuts = [cut for turn in turns for cut in (turn.begin, turn.end)]
        tokens, borders = self._specials.borders(text, cuts)
        trained = [train_on in ("all", "prompt")] * len(tokens)
        ends = False
        for turn, (begin, begins_clean), (end, ends_clean) in zip(
            turns, borders[::2], borders[1::2], strict=True
        ):
            counts = turn.weight and train_on != "prompt"
            if counts and not (begins_clean and ends_clean):
                return None
            trained[begin:end] = [counts] * (end - begin)
            ends = (counts and turn.ends) or (ends and not counts)
        return _encoded(tokens, trained, ends)

    def _apart(
        self, texts: Sequence[str], whole: str, turns: Sequence[_Turn], train_on: TrainOn
    ) -> list[EncodedSequence]:
        """A sequence for each turn: the tokens of its prompt, then those of what it adds."""
        found: list[EncodedSequence] = []
        for text, turn in zip(texts, turns, strict=True):
            if train_on != "all" and not turn.weight:
                continue
            tokens, begin, end = self._joined(text, turn)
            trained = [False] * len(tokens)
            if train_on == "all":
                known = shared(found[-1].tokens, tokens) if found else 0
                trained[known:] = [True] * (len(tokens) - known)
            trained[begin:end] = [turn.weight] * (end - begin)
            found.append(_encoded(tokens, trained, turn.weight and turn.ends))
        if not found or (train_on == "all" and whole != texts[-1]):
            (tokens,) = self._specials.encode([whole])
            known = shared(found[-1].tokens, tokens) if found else len(tokens)
            found.append(_encoded(tokens, [k >= known for k in range(len(tokens))], False))
        return found

    def _joined(self, text: str, turn: _Turn) -> tuple[list[int], int, int]:
        """Tokens of a text with a border before the turn, and where they begin and end it."""
        special = self._specials.pattern.search(text, turn.begin, turn.end)
        stop = special.start() if special else turn.end
        (prompt,) = self._specials.encode([text[: turn.begin]])
        (answer,) = self._specials.encode([text[turn.begin : stop]], continues=True)
        rest, ((end, _),) = self._specials.borders(
            text[stop:] if special else "", [turn.end - stop]
        )
        begin = len(prompt)
        return prompt + answer + rest, begin, begin + len(answer) + end


def _encoded(tokens: list[int], trained: list[bool], ends: bool) -> EncodedSequence:
    """A sequence whose first token, which nothing predicts, is not trained on."""
    return EncodedSequence(
        tokens, [is_trained and k > 0 for k, is_trained in enumerate(trained)], ends
    )


def _answers(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of the assistant's messages, from the first of a user on."""
    roles = [message["role"] for message in messages]
    first = roles.index("user") if "user" in roles else len(roles)
    return [i for i, role in enumerate(roles) if role == "assistant" and i > first]


def _tail(text: str) -> str:
    return repr(text[-24:].replace(BREAK, ""))


class SpecialTokens:
    """The special tokens of one tokenizer, which changes no more."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # Tokenizers in Python do not mark all that have a role.
        special = {
            number: token.content
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or token.content in tokenizer.all_special_tokens
        }
        names = sorted(special.values(), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._ids = frozenset(special)

    def hide(self, value: Any) -> Any:
        """The same JSON, with a BREAK in every special token that its texts spell."""
        if isinstance(value, str):
            return self.pattern.sub(lambda found: "".join(c + BREAK for c in found[0]), value)
        if isinstance(value, Mapping):
            return {key: self.hide(part) for key, part in value.items()}
        return [self.hide(part) for part in value] if isinstance(value, list | tuple) else value

    def borders(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[tuple[int, bool]]]:
        """Tokens of a text, and how many of them stand before each cut.

        Text after a special token is encoded by itself, so that only what stands between the last
        one and a cut is encoded again.

        Returns:
            The tokens; for each cut, how many tokens before it are those of the text before it, and
            whether they are all of them, rather than that a token reaches over the cut.
        """
        marks = list(self.pattern.finditer(text))
        before = [sum(mark.end() <= cut for mark in marks) for cut in cuts]
        starts = [marks[count - 1].start() if count else 0 for count in before]
        tokens, *tails = self.encode([text, *map(text.__getitem__, map(slice, starts, cuts))])
        places = [k for k, token in enumerate(tokens) if token in self._ids]
        if len(places) != len(marks):  # unknown characters gave `unk_token`
            before = [0] * len(cuts)
            tails = self.encode([text[:cut] for cut in cuts])
        borders = []
        for count, tail in zip(before, tails, strict=True):
            start = places[count - 1] if count else 0
            same = shared(tokens[start : start + len(tail)], tail)
            borders.append((start + same, same == len(tail)))
        return tokens, borders

    def encode(self, texts: list[str], *, continues: bool = False) -> list[list[int]]:
        """Tokens of texts that the template wrote: its special tokens are some, a user's are text.

        Args:
            texts: as rendered.
            continues: they stand after other text, and get no space before them.
        """
        if not self.tokenizer.is_fast:
            return [self._parts(text) for text in texts]
        backend = self._continuing if continues else self._backend
        return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]

    @cached_property
    def _backend(self) -> Tokenizer:
        """The tokenizer, to which a BREAK is no character, but keeps a special token from being."""
        return Tokenizer.from_str(json.dumps(self._described()))

    @cached_property
    def _continuing(self) -> Tokenizer:
        """The same, without the space that it puts before a text."""
        return Tokenizer.from_str(json.dumps(_without_prefix(self._described())))

    def _described(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for token in content["added_tokens"]:
            token["normalized"] = token["normalized"] and not token["special"]
        forget = {"type": "Replace", "pattern": {"String": BREAK}, "content": ""}
        steps = [forget, *([content["normalizer"]] if content["normalizer"] else [])]
        content["normalizer"] = {"type": "Sequence", "normalizers": steps}
        return content | {"truncation": None, "padding": None}

    def _parts(self, text: str) -> list[int]:
        """The same for a tokenizer in Python: special tokens, and what is between them, as text."""
        if BREAK not in text:
            return [int(t) for t in self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        tokens: list[int] = []
        names = [*self.pattern.findall(text), ""]
        for part, name in zip(self.pattern.split(text), names, strict=True):
            plain = part.replace(BREAK, "")
            encoded = self.tokenizer(plain, add_special_tokens=False, split_special_tokens=True)
            tokens += [int(token) for token in encoded["input_ids"]]
            if name:
                tokens.append(int(self.tokenizer.convert_tokens_to_ids(name)))
        return tokens


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a plain prompt; with BOS where the tokenizer adds it, never with EOS at the end."""
    tokens = [int(token) for token in tokenizer(text, split_special_tokens=True)["input_ids"]]
    if len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id:
        tokens.pop()
    if not text and tokenizer.bos_token_id is not None:
        return [int(tokenizer.bos_token_id)]
    return tokens


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    if one == other:
        return len(one)
    pairs = zip(one, other, strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _without_prefix(content: dict[str, Any]) -> dict[str, Any]:
    steps = {name: _prefixless(content[name]) for name in ("normalizer", "pre_tokenizer")}
    return content | steps


def _prefixless(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A step of a tokenizer, as its file has it, that puts no space before a text."""
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Metaspace":
        return step | {"prepend_scheme": "never"}
    if step["type"] == "ByteLevel":
        return step | {"add_prefix_space": False}
    if step["type"] == "Sequence":
        (name,) = step.keys() - {"type"}
        kept = [_prefixless(part) for part in step[name]]
        return step | {name: [part for part in kept if part is not None]}
    return step
