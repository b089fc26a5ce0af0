"""How a question is put to one model: which examples stand before it, and its tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llmctl.console import log
from llmctl.data.chat.responses import ResponseFormat
from llmctl.data.prompts import PromptExample
from llmctl.data.schemas import Message
from llmctl.data.split import conversation_hash
from llmctl.data.tokenized import EncodedSequence
from llmctl.decode.loop import check_prompt
from llmctl.decode.prompts import Encoder
from llmctl.errors import DataError, ModelError
from llmctl.evaluate.inputs import EvaluationExample
from llmctl.models.loading import context_size

BETWEEN = "\n\n"
"""What stands between examples in plain text, and so ends a response there."""
SYSTEM = ("system", "developer")


@dataclass(frozen=True)
class FewShotPrompt:
    """A question and the examples before it."""

    question: EvaluationExample
    shots: tuple[EvaluationExample, ...]


ChooseShots = Callable[[int], list[FewShotPrompt]]
"""The questions to evaluate, with so many examples each."""


def choose_shots(
    questions: Sequence[EvaluationExample], others: Sequence[EvaluationExample] | None, count: int, seed: int
) -> list[FewShotPrompt]:
    """The questions to evaluate, each with `count` examples that do not ask what it asks.

    Args:
        questions: all rows.
        others: rows to take the examples from; None takes them from `questions`, and out of what is
            evaluated.
        count: examples for each.
        seed: chooses them.

    Raises:
        DataError: too few rows.
    """
    if not count:
        return [FewShotPrompt(question, ()) for question in questions]
    pool = list(questions if others is None else others)
    order = np.random.default_rng(seed).permutation(len(pool))
    if others is not None:
        drawn = [pool[number] for number in order]
        return [FewShotPrompt(question, _first_others(drawn, question, count)) for question in questions]
    shots = tuple(pool[number] for number in order[:count])
    taken = {_key(shot) for shot in shots}
    rest = [question for question in questions if _key(question) not in taken]
    if len(shots) < count or not rest:
        raise DataError(
            f"--shots {count}: there are only {len(pool):,} rows, and one at least must be left "
            "to evaluate",
            file=pool[0].place,
        )
    return [FewShotPrompt(question, shots) for question in rest]


def _first_others(
    drawn: Sequence[EvaluationExample], question: EvaluationExample, count: int
) -> tuple[EvaluationExample, ...]:
    mine, found = _key(question), list[EvaluationExample]()
    for shot in drawn:
        if len(found) < count and _key(shot) != mine:
            found.append(shot)
    if len(found) < count:
        raise DataError(
            f"--shots {count}: --shots-data has only {len(found):,} rows other than this one",
            file=question.place,
            line=question.line,
        )
    return tuple(found)


def _key(question: EvaluationExample) -> int:
    return conversation_hash(question.messages)


@dataclass(frozen=True)
class PromptFormat:
    """One tokenizer's way to put questions."""

    tokenizer: PreTrainedTokenizerBase
    shape: PreTrainedConfig
    chat: bool
    """Through the chat template, examples as earlier turns; else as text, with lines between."""
    system: str | None
    clock: str | None
    """What time it is for templates that write the date."""

    @cached_property
    def _format(self) -> ResponseFormat:
        return ResponseFormat(self.tokenizer, self.shape, self.clock)

    def prompt(self, asked: FewShotPrompt) -> list[int]:
        """Tokens up to where the response begins.

        Raises:
            ModelError: the chat template refuses the messages, or there is none for a conversation.
        """
        if self.chat:
            return self._format.chat.encode_prompt(self.messages(asked), asked.question.tools)
        shots = [(shot.text, shot.reference or "") for shot in asked.shots]
        ask = PromptExample(self._single(asked.question), asked.question.name)
        return Encoder(self.tokenizer, shots=shots).encode(ask)

    def reply(self, asked: FewShotPrompt) -> EncodedSequence:
        """The question and its reference, which is what is trained on in them."""
        reference = asked.question.reference or ""
        if self.chat:
            messages = self.messages(asked)
            said = {"role": "assistant", "content": reference}
            return self._format.encode_conversation(
                [*messages, said], len(messages), asked.question.tools
            )
        shots = [(shot.text, shot.reference or "") for shot in asked.shots]
        text = Encoder(self.tokenizer, shots=shots).text(self._single(asked.question))
        between = "" if text[-1:].isspace() or reference[:1].isspace() else " "
        return self._format.encode_text(text, between + reference)

    def shortened(self, encoded: EncodedSequence, most: int) -> EncodedSequence | None:
        """A reply of so many tokens at most, cut at its beginning; None where that is not enough.

        What follows the reference's end is left out.
        """
        end = _end(encoded)
        whole = EncodedSequence(encoded.tokens[:end], encoded.trained[:end], encoded.ends)
        return self._format.truncate_prompt(whole, end - most) if end > most else whole

    def messages(self, asked: FewShotPrompt) -> list[Message]:
        """The conversation: system message, examples, question."""
        system, own = self._parted(asked.question)
        turns: list[Message] = []
        for shot in asked.shots:
            said = {"role": "assistant", "content": shot.reference or ""}
            turns += [*(m for m in shot.messages if m["role"] not in SYSTEM), said]
        return [*system, *turns, *own]

    def _single(self, question: EvaluationExample) -> str:
        """The one text of a question, after the system message where there is one.

        Raises:
            ModelError: it is a conversation, which needs a chat template.
        """
        system, said = self._parted(question)
        if len(said) > 1:
            raise ModelError(
                f"{question.name} is a conversation, and "
                + (
                    "--plain puts single texts"
                    if self.tokenizer.chat_template
                    else "this model has no chat template"
                ),
                hint="use rows of one prompt and one response, or a model with a chat template",
            )
        return BETWEEN.join(str(message["content"]) for message in (*system, *said))

    def _parted(self, question: EvaluationExample) -> tuple[list[Message], list[Message]]:
        """System messages, those of the command line in place of the row's; and all others."""
        system = [m for m in question.messages if m["role"] in SYSTEM]
        if self.system is not None:
            system = [{"role": "system", "content": self.system}]
        return system, [m for m in question.messages if m["role"] not in SYSTEM]


def require_room_to_answer(asking: PromptFormat, choose: ChooseShots, shots: int, new_tokens: int) -> None:
    """Refuse prompts that leave no room to answer, and examples that do not fit.

    Args:
        asking: how questions are put.
        choose: the questions with so many examples each.
        shots: examples that are wanted.
        new_tokens: that a response may take.

    Raises:
        DataError: with the number of examples that do.
    """
    context, asked = context_size(asking.shape), choose(shots)
    tightest, length = asked[0], 0
    for one in asked:
        tokens = asking.prompt(one)
        if not shots:
            check_prompt(tokens, asking.shape, one.question.name)
        if len(tokens) > length:
            tightest, length = one, len(tokens)
    if context is None or length + new_tokens <= context:
        return
    if not shots:
        log.warning(
            "%s: the context has room for %d new tokens only",
            *(tightest.question.name, context - length),
        )
        return
    raise DataError(
        f"--shots {shots} do not fit: {length:,} tokens and {new_tokens:,} new ones are more than "
        f"the model's context of {context:,}",
        file=tightest.question.place,
        line=tightest.question.line,
        hint=_fitting(
            choose,
            shots,
            lambda one: len(asking.prompt(one)) + new_tokens <= context,
            "a smaller --max-new-tokens",
        ),
    )


def require_whole_references(asking: PromptFormat, choose: ChooseShots, shots: int, context: int) -> None:
    """Refuse examples that would be cut off where references are read after them.

    Args:
        asking: how questions are put.
        choose: the questions with so many examples each.
        shots: examples that are wanted.
        context: tokens that are read at a time.

    Raises:
        DataError: with the number of examples that fit.
    """

    def length(one: FewShotPrompt) -> int:
        return _end(asking.reply(one)) - 1  # the last token is predicted, and not read

    longest = max(choose(shots), key=length)
    if length(longest) <= context:
        return
    raise DataError(
        f"--shots {shots} do not fit: with its reference the question takes "
        f"{length(longest):,} tokens, and {context:,} are read at a time",
        file=longest.question.place,
        line=longest.question.line,
        hint=_fitting(choose, shots, lambda one: length(one) <= context, "a larger --context"),
    )


def _end(encoded: EncodedSequence) -> int:
    """Tokens up to the last that counts."""
    return max((k + 1 for k, counts in enumerate(encoded.trained) if counts), default=0)


def _fitting(choose: ChooseShots, shots: int, fits: Callable[[FewShotPrompt], bool], other: str) -> str:
    for count in range(shots - 1, -1, -1):
        if all(map(fits, choose(count))):
            return f"{count} fit: --shots {count}, or {other}"
    return f"not even 0 fit: use {other}, or a model of longer context"
