"""Render conversations and texts as tokens, the same ones for training as for generation.

In: a tokenizer with a chat template, and messages as JSON has them. Out: the tokens of a prompt to
answer, or whole training sequences with a mask of the tokens that count in the loss. The tokens
before a trained turn are exactly those that the model is given when it is to write that turn.

Special tokens are the template's alone: text that spells one is encoded as text.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from llmctl.data.bad_rows import BadRows, at_row
from llmctl.data.chat import omissions
from llmctl.data.chat.remedies import Remedies, no_template
from llmctl.data.chat.sandbox import TemplateRefusal, render_cuts
from llmctl.data.chat.templates import TRUSTED
from llmctl.data.tokenized import EncodedSequence
from llmctl.errors import DataError, ModelError

if TYPE_CHECKING:
    from llmctl.data.examples import Example


PROBE = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."})
TrainOn = Literal["assistant", "completion", "prompt", "all"]

BREAK = "\ufdd0"
"""A noncharacter of Unicode: no text carries it."""


class _Turn(NamedTuple):
    """A turn of the assistant in the text of a conversation, in characters."""

    start: int
    end: int
    is_ended: bool
    """Whether it ends with a special token."""
    is_trainable: bool
    """False where the message has `weight` 0."""


class ChatFormat:
    """Encode conversations by one tokenizer and its chat template.

    Text that spells a special token is encoded as text, whoever wrote it. BOS stands where the
    template puts it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        clock: str | None = None,
        flags: Collection[str] = (),
    ) -> None:
        """Take a tokenizer that changes no more.

        `clock` is the time (ISO 8601) for templates that write the date, so that a run which is
        resumed tomorrow has the same data; None for now. `flags` are of `remedies.py`, those that
        the command has: hints name no others.
        """
        self.tokenizer, self._clock, self._remedies = tokenizer, clock, Remedies(frozenset(flags))
        self._specials = SpecialTokens(tokenizer)
        self._variables = tokenizer.special_tokens_map
        self._known_kinds: dict[str, bool] = {}
        self._is_probing = False

    @cached_property
    def template(self) -> str:
        """The chat template; texts can do without.

        Raises:
            ModelError: there is none, or there are several.
        """
        return self._template_for(None)

    @cached_property
    def _tools_template(self) -> str:
        """The chat template of conversations with tools: some models have one of their own."""
        return self._template_for(omissions.PROBE_TOOLS)

    def _template_for(self, tools: list[Any] | None) -> str:
        if self.tokenizer.chat_template is None:
            raise no_template()
        try:
            template = self.tokenizer.get_chat_template(tools=tools)
        except ValueError:
            names = ", ".join(sorted(self.tokenizer.chat_template))
            raise ModelError(
                f"several chat templates ({names}), and none of them is called `default`",
                hint=self._remedies.one_of_several,
            ) from None
        if not isinstance(template, str):
            raise ModelError("the chat template is not text")
        return template

    def encode_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Encode what precedes an assistant's turn.

        Raises:
            DataError: the template refuses these messages, or leaves out a part of them.
            ModelError: it is broken, or has no place for a kind of part that they have.
        """
        hidden = self._specials.hide(self._prepared(messages, tools))
        (text,) = self._render(hidden, [(len(messages), True)], tools)
        self._require_whole(text, hidden)
        return self._specials.encode([text])[0]

    def encode_conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        train_on: TrainOn,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[EncodedSequence]:
        """Encode the training sequences of a conversation: one, if at all possible.

        Where the template rewrites earlier turns once there are later ones, or where a token would
        reach from a prompt into its answer, each turn gets a sequence of its own that begins with
        its prompt. A turn lasts to the special token that ends it, which is trained on. Turns of
        the assistant before any user are context, and so is a message of `weight` 0.

        `train_on`: `assistant` every turn of the assistant, `completion` the last one, `prompt` all
        else, or `all`. `tools` are JSON schemas of what the assistant may call.

        Raises:
            DataError: the template refuses these messages, leaves out a part of them, or begins a
                turn of the assistant in another way than it asks for one.
            ModelError: it does so with the simplest conversation, too.
        """
        hidden = self._specials.hide(self._prepared(messages, tools))
        answers = _assistant_turns(messages)[-1 if train_on == "completion" else 0 :]
        cuts = [cut for i in answers for cut in ((i, True), (i + 1, False))]
        whole_cut = (len(messages), False)
        rendered = self._render(hidden, list(dict.fromkeys([whole_cut, *cuts])), tools)
        whole = next(rendered)
        self._require_whole(whole, hidden)
        turns, answered = [], []
        for i in answers:
            prompt = next(rendered)
            text = whole if i + 1 == len(messages) else next(rendered)
            turns.append(self._find_turn(prompt, text, messages[i]))
            answered.append(len(text) if whole.startswith(text) else text)
        if all(isinstance(text, int) for text in answered):
            sequence = self._encode_together(whole, turns, train_on)
            if sequence is not None:
                return [sequence]
        elif train_on == "prompt":
            raise self._refusal(
                "the chat template writes earlier turns anew: there is no one text of prompts"
            )
        return self._encode_apart(answered, whole, turns, train_on)

    def encode_text(self, text: str) -> EncodedSequence:
        """Encode a plain text: BOS where the tokenizer puts it, EOS where there is one."""
        tokens, eos = encode_text(self.tokenizer, text), self.tokenizer.eos_token_id
        if eos is not None:
            tokens.append(int(eos))
        return _sequence(tokens, [True] * len(tokens), eos is not None and len(tokens) > 1)

    def encode_examples(
        self, examples: "Iterable[Example]", train_on: TrainOn, bad: BadRows
    ) -> Iterator[list[EncodedSequence]]:
        """Encode the training sequences of each example; none of one that is left out.

        `bad` counts those that cannot be rendered.

        Raises:
            DataError, ModelError: as `encode_conversation` does, with the place of the example.
        """
        for example in examples:
            if example.messages is None:
                yield [self.encode_text(example.text or "")]
                continue
            try:
                with at_row(example.place, example.line):
                    encoded = self.encode_conversation(example.messages, train_on, example.tools)
            except DataError as error:
                bad(error)
                encoded = []
            yield encoded

    @cached_property
    def probe(self) -> EncodedSequence:
        """A question and its answer, encoded to try the template.

        Raises:
            ModelError: the template cannot render even that, or not so that it can be trained.
        """
        return self.encode_conversation(PROBE, "assistant")[0]

    @cached_property
    def after_turn(self) -> str:
        """Text that the template writes after the end of the last turn, such as a line break.

        Raises:
            ModelError: the template cannot render a question and its answer.
        """
        prompt, text = self._render(PROBE, [(1, True), (2, False)], None)
        return text[self._find_turn(prompt, text, PROBE[1]).end :]

    @cached_property
    def end_of_turn(self) -> int | None:
        """Id of the special token that ends a turn of the assistant; None where there is none."""
        if self.tokenizer.chat_template is None or not self.probe.ends:
            return None
        last = max(k for k, trained in enumerate(self.probe.trained) if trained)
        return self.probe.tokens[last]

    def _prepared(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> Sequence[Mapping[str, Any]]:
        """Check that the template has a place for every kind of part; write calls as it asks for.

        Raises:
            ModelError: it never writes one of them.
        """
        kinds = omissions.kinds_of(messages)
        lacking = ["tools"] if tools and "tools" not in self._tools_template else []
        lacking += [kind for kind in kinds if not self._writes(kind)]
        if lacking:
            what = omissions.NAMES.get(lacking[0], f"`{lacking[0]}`")
            hint = self._remedies.no_place(lacking[0])
            raise ModelError(f"the chat template has no place for {what}", hint=hint)
        if "tool_calls" in kinds and self._takes_text_arguments:
            return omissions.with_text_arguments(messages)
        return messages

    @cached_property
    def _takes_text_arguments(self) -> bool:
        """Whether the template adds the arguments of a call to a text, as DeepSeek's do."""
        probe = omissions.PROBES["tool_calls"]
        if self._rendered_probe(probe) is not None:
            return False
        return self._rendered_probe(omissions.with_text_arguments(probe)) is not None

    def _writes(self, kind: str) -> bool:
        """Whether the template writes a kind of part; where it refuses it, the row is at fault."""
        if kind not in self._known_kinds:
            probe: Sequence[Mapping[str, Any]] = omissions.PROBES[kind]
            if kind in ("tool", "tool_calls") and self._takes_text_arguments:
                probe = omissions.with_text_arguments(probe)
            text = self._rendered_probe(probe)
            self._known_kinds[kind] = text is None or omissions.writes(text, kind)
        return self._known_kinds[kind]

    def _rendered_probe(self, messages: Sequence[Mapping[str, Any]]) -> str | None:
        """Render a conversation of ours; None where the template refuses it."""
        is_call = any(message.get("tool_calls") for message in messages)
        tools = omissions.PROBE_TOOLS if is_call else None
        try:
            return next(self._raw(messages, [(len(messages), False)], tools))
        except TemplateRefusal:
            return None

    def _require_whole(self, text: str, messages: Sequence[Mapping[str, Any]]) -> None:
        """Refuse messages of which the template leaves out a part.

        Raises:
            DataError: it writes the simplest conversation whole.
            ModelError: it leaves out a part of that, too.
        """
        missing = omissions.missing_part(text, messages)
        if missing is None:
            return
        probe = self._rendered_probe(PROBE)
        if probe is not None and omissions.missing_part(probe, PROBE) is not None:
            what = "the chat template does not write what is said"
            raise ModelError(what, hint=self._remedies.broken)
        raise DataError(
            f"the chat template leaves out {missing}",
            hint=self._remedies.left_out,
        )

    @cached_property
    def end_of_answer(self) -> int | None:
        """The same for use alone, where the template may ask otherwise than it begins a turn.

        Raises:
            ModelError: the template refuses even a question and its answer.
        """
        if self.tokenizer.chat_template is None:
            return None
        (text,) = self._raw(PROBE, [(len(PROBE), False)], None)
        answer = text.rfind(PROBE[-1]["content"])
        *_, last = [None, *self._specials.pattern.finditer(text, max(answer, 0))]
        if answer < 0 or last is None or text[last.end() :].strip():
            return None
        return int(self.tokenizer.convert_tokens_to_ids(last[0]))

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        cuts: Sequence[tuple[int, bool]],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> Iterator[str]:
        """Render several cuts of messages that have a BREAK in every special token spelled.

        Raises:
            DataError: the template refuses them, and renders the simplest conversation.
            ModelError: it renders not even that.
        """
        try:
            yield from self._raw(messages, cuts, tools)
        except TemplateRefusal as error:
            if self._rendered_probe(PROBE) is None:
                raise
            hint = self._remedies.refused_row(error.message, messages)
            raise DataError(error.message, hint=hint) from None

    def _raw(
        self,
        messages: Sequence[Mapping[str, Any]],
        cuts: Sequence[tuple[int, bool]],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> Iterator[str]:
        bare = [{k: v for k, v in message.items() if k != "weight"} for message in messages]
        template = self._tools_template if tools else self.template
        return render_cuts(
            template,
            bare,
            cuts,
            self._variables,
            self._specials.hide(tools),
            clock=self._clock,
            trusted=template in TRUSTED,
        )

    def _refusal(self, message: str) -> ModelError | DataError:
        """Blame the template for what it does to the simplest conversation, too; else the row."""
        if self._is_probing or not self._suits_training:
            return ModelError(message, hint=self._remedies.broken)
        return DataError(message, hint=f"{self._remedies.skip}, or {self._remedies.broken}")

    @cached_property
    def _suits_training(self) -> bool:
        """Whether the simplest conversation can be trained on."""
        self._is_probing = True
        try:
            _ = self.probe
        except ModelError:
            return False
        finally:
            self._is_probing = False
        return True

    def _find_turn(self, prompt: str, text: str, message: Mapping[str, Any]) -> _Turn:
        """Find the assistant's turn in a text that ends with it."""
        if not text.startswith(prompt):
            raise self._refusal(
                f"the chat template asks for an answer with {_tail(prompt)} but begins one"
                f" otherwise, with {_tail(text[: len(prompt)])}: training and use would differ"
            )
        start, is_trainable = len(prompt), message.get("weight") != 0
        specials = self._specials.pattern.finditer(text, start)
        *_, last = [start, *(special.end() for special in specials)]
        if last > start and not text[last:].strip():
            return _Turn(start, last, True, is_trainable)
        content = str(message.get("content") or "")
        own_space, end = content[len(content.rstrip()) :], len(text.rstrip())
        end += len(own_space) if text.startswith(own_space, end) else 0
        return _Turn(start, max(start, end), False, is_trainable)

    def _encode_together(
        self, text: str, turns: Sequence[_Turn], train_on: TrainOn
    ) -> EncodedSequence | None:
        """Encode all turns as one sequence; None where a token reaches over a turn's border."""
        cuts = [cut for turn in turns for cut in (turn.start, turn.end)]
        tokens, borders = self._specials.borders(text, cuts)
        trained = [train_on in ("all", "prompt")] * len(tokens)
        ends = False
        for turn, (start, starts_clean), (end, ends_clean) in zip(
            turns, borders[::2], borders[1::2], strict=True
        ):
            is_trained = turn.is_trainable and train_on != "prompt"
            if is_trained and not (starts_clean and ends_clean):
                return None
            trained[start:end] = [is_trained] * (end - start)
            ends = (is_trained and turn.is_ended) or (ends and not is_trained)
        return _sequence(tokens, trained, ends)

    def _encode_apart(
        self, texts: Sequence[str | int], whole: str, turns: Sequence[_Turn], train_on: TrainOn
    ) -> list[EncodedSequence]:
        """Encode a sequence for each turn: the tokens of its prompt, then those that it adds.

        Of a text with which the `whole` begins, the length is enough.
        """
        sequences: list[EncodedSequence] = []
        text = ""
        for given, turn in zip(texts, turns, strict=True):
            text = whole[:given] if isinstance(given, int) else given
            if train_on != "all" and not turn.is_trainable:
                continue
            tokens, start, end = self._encode_turn(text, turn)
            trained = [False] * len(tokens)
            if train_on == "all":
                known = common_prefix(sequences[-1].tokens, tokens) if sequences else 0
                trained[known:] = [True] * (len(tokens) - known)
            trained[start:end] = [turn.is_trainable] * (end - start)
            sequences.append(_sequence(tokens, trained, turn.is_trainable and turn.is_ended))
        if not sequences or (train_on == "all" and whole != text):
            (tokens,) = self._specials.encode([whole])
            known = common_prefix(sequences[-1].tokens, tokens) if sequences else len(tokens)
            sequences.append(_sequence(tokens, [k >= known for k in range(len(tokens))], False))
        return sequences

    def _encode_turn(self, text: str, turn: _Turn) -> tuple[list[int], int, int]:
        """Encode a text with a border before the turn; its tokens, and the turn's place in them."""
        special = self._specials.pattern.search(text, turn.start, turn.end)
        stop = special.start() if special else turn.end
        (prompt,) = self._specials.encode([text[: turn.start]])
        (answer,) = self._specials.encode([text[turn.start : stop]], continues=True)
        rest, ((end, _),) = self._specials.borders(
            text[stop:] if special else "", [turn.end - stop]
        )
        start = len(prompt)
        return prompt + answer + rest, start, start + len(answer) + end


def _sequence(tokens: list[int], trained: list[bool], ends: bool) -> EncodedSequence:
    """Leave the first token, which nothing predicts, out of the loss."""
    return EncodedSequence(
        tokens, [is_trained and k > 0 for k, is_trained in enumerate(trained)], ends
    )


def _assistant_turns(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Number the assistant's messages, from the first of a user on."""
    roles = [message["role"] for message in messages]
    first = roles.index("user") if "user" in roles else len(roles)
    return [i for i, role in enumerate(roles) if role == "assistant" and i > first]


def _tail(text: str) -> str:
    return repr(text[-24:].replace(BREAK, ""))


class SpecialTokens:
    """Encode rendered text by a tokenizer that changes no more: special tokens, and text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # Tokenizers in Python do not mark all that have a role.
        special = {
            number: token.content
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or token.content in tokenizer.all_special_tokens
        }
        self.names = tuple(special.values())
        self.pattern = any_of(self.names)
        self._ids = frozenset(special)

    def hide(self, value: Any) -> Any:
        """Copy JSON with a BREAK in every special token that its texts spell."""
        if isinstance(value, str):
            return self.pattern.sub(lambda token: "".join(c + BREAK for c in token[0]), value)
        if isinstance(value, Mapping):
            return {key: self.hide(part) for key, part in value.items()}
        return [self.hide(part) for part in value] if isinstance(value, list | tuple) else value

    def borders(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[tuple[int, bool]]]:
        """Encode a text, and count its tokens before each cut.

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
            same = common_prefix(tokens[start : start + len(tail)], tail)
            borders.append((start + same, same == len(tail)))
        return tokens, borders

    def encode(self, texts: list[str], *, continues: bool = False) -> list[list[int]]:
        """Encode texts that the template wrote: its special tokens are some, a user's are text.

        Texts that `continues` others get no space before them.
        """
        if not self.tokenizer.is_fast:
            return [self._encode_parts(text) for text in texts]
        backend = self._continuing if continues else self._backend
        return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]

    @cached_property
    def _backend(self) -> Tokenizer:
        """The tokenizer with BREAK as no character, which yet keeps a text from being special."""
        return Tokenizer.from_str(json.dumps(self._without_breaks()))

    @cached_property
    def _continuing(self) -> Tokenizer:
        """The same, without the space that it puts before a text."""
        content = self._without_breaks()
        steps = {name: _without_prefix(content[name]) for name in ("normalizer", "pre_tokenizer")}
        return Tokenizer.from_str(json.dumps(content | steps))

    def _without_breaks(self) -> dict[str, Any]:
        """The tokenizer's file, with a first step that removes BREAKs."""
        content: dict[str, Any] = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for token in content["added_tokens"]:
            token["normalized"] = token["normalized"] and not token["special"]
        remove = {"type": "Replace", "pattern": {"String": BREAK}, "content": ""}
        steps = [remove, *([content["normalizer"]] if content["normalizer"] else [])]
        content["normalizer"] = {"type": "Sequence", "normalizers": steps}
        return content | {"truncation": None, "padding": None}

    def _encode_parts(self, text: str) -> list[int]:
        """Encode by a tokenizer in Python: special tokens, and what is between them, as text."""
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


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Compile a pattern of all these tokens, the longest first."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the special tokens, whether or not they have a role."""
    added = {k for k, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added.union(tokenizer.all_special_ids))


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode a plain prompt; with BOS where the tokenizer adds it, never with EOS at the end."""
    tokens = [int(token) for token in tokenizer(text, split_special_tokens=True)["input_ids"]]
    if len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id:
        tokens.pop()
    if not text and tokenizer.bos_token_id is not None:
        return [int(tokenizer.bos_token_id)]
    return tokens


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Count the tokens that two sequences begin with in common."""
    if first == second:
        return len(first)
    pairs = zip(first, second, strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _without_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """Copy a step of a tokenizer's file so that it puts no space before a text."""
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Metaspace":
        return step | {"prepend_scheme": "never"}
    if step["type"] == "ByteLevel":
        return step | {"add_prefix_space": False}
    if step["type"] == "Sequence":
        (name,) = step.keys() - {"type"}
        kept = [_without_prefix(part) for part in step[name]]
        return step | {name: [part for part in kept if part is not None]}
    return step
