"""Few-shot prompts: which examples stand before a prompt, and the tokens that one model gets."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llmctl.console import log
from llmctl.data.bad_rows import BadRows, at_row
from llmctl.data.chat.remedies import SKIP_FLAG, no_template
from llmctl.data.chat.responses import ResponseFormat
from llmctl.data.prompts import PromptExample
from llmctl.data.schemas import Message
from llmctl.data.split import conversation_hash
from llmctl.data.tokenized import EncodedSequence
from llmctl.decode.loop import check_prompt
from llmctl.decode.prompts import PromptEncoder
from llmctl.errors import DataError, ModelError
from llmctl.evaluate.inputs import EvaluationExample
from llmctl.models.loading import context_size
from llmctl.numbers import counted

SEPARATOR = "\n\n"
"""Stands between examples in plain text, and so ends a response there."""
SYSTEM = ("system", "developer")


@dataclass(frozen=True)
class FewShotPrompt:
    """A row to evaluate, and the examples before it."""

    example: EvaluationExample
    shots: tuple[EvaluationExample, ...]


def without_system(row: EvaluationExample) -> EvaluationExample:
    """A row as an example has it: system messages are those of the row to evaluate."""
    return replace(row, messages=tuple(m for m in row.messages if m["role"] not in SYSTEM))


ChooseShots = Callable[[int], list[FewShotPrompt]]
"""The rows to evaluate, with so many examples each."""


def choose_shots(
    examples: Sequence[EvaluationExample],
    shots_data: Sequence[EvaluationExample] | None,
    count: int,
    seed: int,
) -> list[FewShotPrompt]:
    """Give each row to evaluate `count` examples, none of which has the same prompt.

    Without `shots_data` they are taken from the rows, and out of what is evaluated.

    Raises:
        DataError: too few rows.
    """
    if not count:
        return [FewShotPrompt(example, ()) for example in examples]
    pool = list(examples if shots_data is None else shots_data)
    order = np.random.default_rng(seed).permutation(len(pool))
    if shots_data is not None:
        shuffled = [pool[index] for index in order]
        return [FewShotPrompt(row, _first_others(shuffled, row, count)) for row in examples]
    shots = tuple(pool[index] for index in order[:count])
    hashes = {conversation_hash(shot.messages) for shot in shots}
    rest = [row for row in examples if conversation_hash(row.messages) not in hashes]
    if len(shots) < count or not rest:
        raise DataError(
            f"--shots {count}: only {counted(len(pool), 'row')} in the data, and one at least must "
            "be left to evaluate",
            file=pool[0].place,
        )
    return [FewShotPrompt(row, shots) for row in rest]


def _first_others(
    shuffled: Sequence[EvaluationExample], row: EvaluationExample, count: int
) -> tuple[EvaluationExample, ...]:
    own_hash = conversation_hash(row.messages)
    others = (shot for shot in shuffled if conversation_hash(shot.messages) != own_hash)
    shots = tuple(islice(others, count))
    if len(shots) < count:
        text = f"--shots {count}: --shots-data has only {counted(len(shots), 'other row')}"
        raise row.error(text)
    return shots


@dataclass(frozen=True)
class FewShotFormat:
    """How prompts and their examples are written for one model."""

    tokenizer: PreTrainedTokenizerBase
    shape: PreTrainedConfig
    chat: bool
    """Through the chat template, examples as earlier turns; else as text, with lines between."""
    system: str | None
    clock: str | None
    """The time for templates that write the date."""

    @cached_property
    def _format(self) -> ResponseFormat:
        return ResponseFormat(self.tokenizer, self.shape, self.clock, flags=(SKIP_FLAG,))

    @property
    def end_of_answer(self) -> int | None:
        """Id of the token that ends responses in the chat template; None in plain text."""
        return self._format.chat.end_of_answer if self.chat else None

    def encode_prompt(self, prompt: FewShotPrompt) -> list[int]:
        """Encode up to where the response begins.

        Raises:
            DataError: the chat template refuses the messages, or leaves out a part of them.
            ModelError: it has no place for a part, or there is none for a conversation. Both name
                the row's place.
        """
        row = prompt.example
        with at_row(row.place, row.line):
            if self.chat:
                return self._format.chat.encode_prompt(self.messages(prompt), row.tools)
            text = PromptExample(self._as_text(row), row.name)
            return self._text_encoder(prompt).encode(text)

    def encode_with_reference(self, prompt: FewShotPrompt) -> EncodedSequence:
        """Encode the prompt and its reference, which is marked as trained on.

        Raises:
            DataError, ModelError: as `encode_prompt` does.
        """
        row, reference = prompt.example, prompt.example.reference or ""
        with at_row(row.place, row.line):
            if self.chat:
                messages = self.messages(prompt)
                turns = [*messages, {"role": "assistant", "content": reference}]
                return self._format.encode_conversation(turns, len(messages), row.tools)
            return self._text_with_reference(prompt, reference)

    def usable(
        self, rows: Iterable[EvaluationExample], bad: BadRows, *, with_reference: bool
    ) -> list[EvaluationExample]:
        """Return the rows that this model can be asked by themselves; `bad` counts the others.

        Raises:
            DataError: more than may be skipped are refused by the template, empty or too long.
            ModelError: as `encode_prompt` does, or the tokenizer is another model's.
        """
        kept = []
        for row in rows:
            alone = FewShotPrompt(row, ())
            try:
                tokens = self.encode_prompt(alone)
                with at_row(row.place, row.line):
                    check_prompt(tokens, self.shape, "the prompt")
                if with_reference and self.chat:
                    self.encode_with_reference(alone)
            except DataError as error:
                bad(error)
            else:
                kept.append(row)
        return kept

    def _text_with_reference(self, prompt: FewShotPrompt, reference: str) -> EncodedSequence:
        text = self._text_encoder(prompt).text(self._as_text(prompt.example))
        space = "" if text[-1:].isspace() or reference[:1].isspace() else " "
        return self._format.encode_text(text, space + reference)

    def truncate(self, encoded: EncodedSequence, limit: int) -> EncodedSequence | None:
        """Cut the prompt's beginning until so many tokens are left; None where that is too little.

        What follows the reference's end is left out.
        """
        end = _reference_end(encoded)
        whole = EncodedSequence(encoded.tokens[:end], encoded.trained[:end], encoded.ends)
        return self._format.truncate_prompt(whole, end - limit) if end > limit else whole

    def messages(self, prompt: FewShotPrompt) -> list[Message]:
        """The conversation: system message, examples, prompt."""
        system, own = self._split_system(prompt.example)
        turns: list[Message] = []
        for shot in prompt.shots:
            response = {"role": "assistant", "content": shot.reference or ""}
            turns += [*without_system(shot).messages, response]
        return [*system, *turns, *own]

    def _text_encoder(self, prompt: FewShotPrompt) -> PromptEncoder:
        shots = [(shot.text, shot.reference or "") for shot in prompt.shots]
        return PromptEncoder(self.tokenizer, shots=shots)

    def _as_text(self, row: EvaluationExample) -> str:
        """A prompt's one text, after the system message where there is one.

        Raises:
            ModelError: it is a conversation, which needs a chat template.
        """
        system, turns = self._split_system(row)
        if len(turns) > 1:
            if self.tokenizer.chat_template is None:
                raise no_template()
            raise ModelError(
                "a conversation, and --plain puts single texts",
                hint="drop --plain, or use rows of one prompt and one response",
            )
        return SEPARATOR.join(str(message["content"]) for message in (*system, *turns))

    def _split_system(self, row: EvaluationExample) -> tuple[list[Message], list[Message]]:
        """System messages, those of the command line in place of the row's; and all others."""
        system = [m for m in row.messages if m["role"] in SYSTEM]
        if self.system is not None:
            system = [{"role": "system", "content": self.system}]
        return system, [m for m in row.messages if m["role"] not in SYSTEM]


def require_room_to_answer(
    few_shot_format: FewShotFormat, choose: ChooseShots, shots: int, new_tokens: int
) -> None:
    """Refuse examples that leave no room to answer, and say where it is little.

    Raises:
        DataError: with the number of examples that do.
    """
    shape, prompts = few_shot_format.shape, choose(shots)
    context = context_size(shape)
    longest, length = prompts[0].example, 0
    for prompt in prompts:
        tokens = few_shot_format.encode_prompt(prompt)
        if len(tokens) > length:
            longest, length = prompt.example, len(tokens)
    if context is None or length + new_tokens <= context:
        return
    if not shots:
        log.warning(
            "%s: the context has room for %s only",
            longest.name,
            counted(context - length, "new token"),
        )
        return

    def fits(prompt: FewShotPrompt) -> bool:
        return len(few_shot_format.encode_prompt(prompt)) + new_tokens <= context

    raise longest.error(
        f"--shots {shots} do not fit: {length:,} tokens and {new_tokens:,} new ones are more than "
        f"the model's context of {context:,}",
        _fewer_shots(choose, shots, fits, "a smaller --max-new-tokens"),
    )


def require_whole_references(
    few_shot_format: FewShotFormat, choose: ChooseShots, shots: int, context: int
) -> None:
    """Refuse examples that would be cut off where `context` tokens are read with the reference.



    Raises:
        DataError: with the number of examples that fit.
    """

    def length(prompt: FewShotPrompt) -> int:
        encoded = few_shot_format.encode_with_reference(prompt)
        return _reference_end(encoded) - 1  # the last token is predicted, and not read

    longest = max(choose(shots), key=length)
    if length(longest) <= context:
        return
    raise longest.example.error(
        f"--shots {shots} do not fit: with its reference the question takes "
        f"{length(longest):,} tokens, and {context:,} are read at a time",
        _fewer_shots(choose, shots, lambda p: length(p) <= context, "a larger --context"),
    )


def _reference_end(encoded: EncodedSequence) -> int:
    """Tokens up to the reference's last."""
    return max((k + 1 for k, counts in enumerate(encoded.trained) if counts), default=0)


def _fewer_shots(
    choose: ChooseShots, shots: int, fits: Callable[[FewShotPrompt], bool], remedy: str
) -> str:
    """A hint with the largest number of examples that fits."""
    for count in range(shots - 1, -1, -1):
        if all(map(fits, choose(count))):
            return f"{count} fit: --shots {count}, or {remedy}"
    return f"not even 0 fit: use {remedy}, or a model of longer context"
