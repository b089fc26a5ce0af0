"""Encode prompts with their responses for one model, and mark the response.

In: conversations or texts. Out: an `EncodedSequence` whose `trained` marks the response, its end
included. Decoders get their chat template, encoders such as BERT the two texts that their tokenizer
joins: `[CLS] prompt [SEP] response [SEP]`.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llmctl.config.sections import ScoreAt
from llmctl.data.chat.render import ChatFormat, common_prefix, encode_text, special_token_ids
from llmctl.data.chat.templates import ending_at_turn, set_chat_template
from llmctl.data.examples import Example
from llmctl.data.tokenized import EncodedSequence
from llmctl.errors import ModelError
from llmctl.models.causality import is_encoder


def prepare_template(
    tokenizer: PreTrainedTokenizerBase, shape: PreTrainedConfig, choice: str | None
) -> list[str]:
    """Set the chosen chat template, or keep an encoder's without a choice; return the tokens added.

    Raises:
        UserError: neither a name nor a file.
    """
    if choice is None and is_encoder(shape):
        return []
    return set_chat_template(tokenizer, choice)


def end_at_turn(tokenizer: PreTrainedTokenizerBase, shape: PreTrainedConfig) -> None:
    """Have the chat template write nothing after the last turn.

    So the last token is the one that is scored, for whoever renders a conversation with it.
    """
    response_format = ResponseFormat(tokenizer, shape)
    if after := response_format.after_turn:
        tokenizer.chat_template = ending_at_turn(response_format.chat.template, after)


class ResponseFormat:
    """Encode responses after their prompts by one tokenizer, which changes no more."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        shape: PreTrainedConfig,
        clock: str | None = None,
        score_at: ScoreAt = "end-of-turn",
        flags: Collection[str] = (),
    ) -> None:
        """Take the tokenizer of a model.

        Its chat template and padding token are set; `clock` and `flags` as in `ChatFormat`.
        `score_at` says where a conversation ends.
        """
        self.tokenizer, self.chat = tokenizer, ChatFormat(tokenizer, clock, flags)
        self.score_at = score_at
        self.is_pair = is_encoder(shape) and tokenizer.chat_template is None
        self._special = special_token_ids(tokenizer)

    @cached_property
    def after_turn(self) -> str:
        """Text that the chat template writes after the end of the last turn.

        Empty without a template, and for one that refuses a question and its answer: it will refuse
        others, too.
        """
        if self.tokenizer.chat_template is None:
            return ""
        try:
            return self.chat.after_turn
        except ModelError:
            return ""

    def encode_example(self, example: Example, prompt: int) -> EncodedSequence:
        """Encode a conversation whose first `prompt` messages are the prompt, or a plain text.

        Raises:
            ModelError: the chat template refuses it.
        """
        if example.messages is not None:
            return self.encode_conversation(example.messages, prompt, example.tools)
        text = example.text or ""
        return self._single(text) if self.is_pair else self.chat.encode_text(text)

    def encode_conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        prompt: int,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        ended: bool = True,
    ) -> EncodedSequence:
        """Encode a conversation: the first `prompt` messages, and the response to them.

        Of two texts the second is the last message: how a conversation is split depends on nothing
        but itself.

        Text of the template after the response's end is left out, unless the score stands at the
        last token. A response that was cut off (not
        `ended`) loses the token that would end it, except for encoders, which have no such token.

        Raises:
            ModelError: the chat template refuses it.
        """
        if self.is_pair:
            return self._pair(_flat(messages[:-1]), _flat(messages[-1:]))
        marked: list[dict[str, Any]] = [
            {k: v for k, v in message.items() if k != "weight"}
            | ({"weight": 0} if place < prompt and message["role"] == "assistant" else {})
            for place, message in enumerate(messages)
        ]
        train_on: Any = "completion" if prompt == len(messages) - 1 else "assistant"
        sequence = self.chat.encode_conversation(marked, train_on, tools)[-1]
        end = max((k + 1 for k, counts in enumerate(sequence.trained) if counts), default=0)
        if self.score_at == "last-token" and ended:
            end = len(sequence.tokens)
        if not end:  # an empty response, in a template that ends it with nothing
            tokens = self.chat.encode_prompt(messages[:prompt], tools)
            return EncodedSequence(tokens, [False] * len(tokens), False)
        tokens, trained = sequence.tokens[:end], sequence.trained[:end]
        while not ended and trained and trained[-1] and tokens[-1] in self._special:
            tokens, trained = tokens[:-1], trained[:-1]
        return EncodedSequence(tokens, trained, ended and sequence.ends)

    def encode_text(self, prompt: str, response: str, *, ended: bool = True) -> EncodedSequence:
        """Encode a text and its continuation; EOS where it ended and the tokenizer has one."""
        if self.is_pair:
            return self._pair(prompt, response) if prompt else self._single(response)
        tokens = encode_text(self.tokenizer, prompt + response)
        start = common_prefix(tokens, encode_text(self.tokenizer, prompt))
        eos = self.tokenizer.eos_token_id
        ends = ended and eos is not None
        tokens += [int(eos)] if ends else []
        return EncodedSequence(tokens, [place >= start for place in range(len(tokens))], ends)

    def truncate_prompt(self, encoded: EncodedSequence, excess: int) -> EncodedSequence | None:
        """Remove `excess` tokens of the prompt from the left; None if it has fewer.

        A special token that it begins with stays.
        """
        head = int(bool(encoded.tokens) and encoded.tokens[0] in self._special)
        start = next((k for k, counts in enumerate(encoded.trained) if counts), len(encoded.tokens))
        if start - head < excess:
            return None
        first = head + max(0, excess)
        return EncodedSequence(
            encoded.tokens[:head] + encoded.tokens[first:],
            encoded.trained[:head] + encoded.trained[first:],
            encoded.ends,
        )

    def _single(self, text: str) -> EncodedSequence:
        """Encode a text by itself."""
        encoding = self.tokenizer(text, split_special_tokens=True)
        tokens = [int(token) for token in encoding["input_ids"]]
        return EncodedSequence(tokens, [False] * len(tokens), True)

    def _pair(self, prompt: str, response: str) -> EncodedSequence:
        """Encode two texts as the tokenizer joins them; all after the first is marked."""
        encoding = self.tokenizer(prompt, response, split_special_tokens=True)
        tokens = [int(token) for token in encoding["input_ids"]]
        sides = encoding.sequence_ids()
        start = sides.index(1) if 1 in sides else len(tokens) - 1
        return EncodedSequence(tokens, [place >= start for place in range(len(tokens))], True)


def _flat(messages: Sequence[Mapping[str, Any]]) -> str:
    """Join messages to one text: a single one as it is, several with their roles."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
