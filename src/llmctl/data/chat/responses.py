"""A response and what it answers as the tokens that one model reads, and where the response stands.

In: conversations or texts. Out: `EncodedSequence` sequences whose `trained` marks the response, its end
included. Decoders get their chat template, encoders such as BERT the two texts that their tokenizer
joins: `[CLS] prompt [SEP] response [SEP]`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llmctl.data.chat.render import ChatFormat, encode_text, shared
from llmctl.data.chat.templates import set_chat_template
from llmctl.data.examples import Example
from llmctl.data.tokenized import EncodedSequence
from llmctl.models.causality import is_encoder


def prepare_template(
    tokenizer: PreTrainedTokenizerBase, shape: PreTrainedConfig, choice: str | None
) -> list[str]:
    """Give the tokenizer the chat template that was chosen; encoders do without one of ours.

    Returns:
        The special tokens added to it.

    Raises:
        UserError: neither a name nor a file.
    """
    if choice is None and is_encoder(shape):
        return []
    return set_chat_template(tokenizer, choice)


class ResponseFormat:
    """How one tokenizer, which changes no more, writes a response after its prompt."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        shape: PreTrainedConfig,
        clock: str | None = None,
    ) -> None:
        """Take the tokenizer of a model.

        Args:
            tokenizer: its chat template and padding token set.
            shape: the model's configuration.
            clock: what time it is for templates that write the date, as `ChatFormat` has it.
        """
        self.tokenizer, self.chat = tokenizer, ChatFormat(tokenizer, clock)
        self.is_pair = is_encoder(shape) and tokenizer.chat_template is None
        self._special = {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        } | set(tokenizer.all_special_ids)

    def example(self, example: Example, prompt: int) -> EncodedSequence:
        """A whole conversation of which the first `prompt` messages are answered, or a plain text.

        Raises:
            ModelError: the chat template refuses it.
        """
        if example.messages is not None:
            return self.conversation(example.messages, prompt, example.tools)
        text = example.text or ""
        return self._single(text) if self.is_pair else self.chat.encode_text(text)

    def conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        prompt: int,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        ended: bool = True,
    ) -> EncodedSequence:
        """A conversation of which the first messages, `prompt` of them, are answered by the rest.

        What a template writes after the response's end is left out. A response that was cut off
        (not `ended`) loses the token that would end it, but for encoders, which have no such thing.

        Raises:
            ModelError: the chat template refuses it.
        """
        if self.is_pair:
            return self._pair(_flat(messages[:prompt]), _flat(messages[prompt:]))
        marked: list[dict[str, Any]] = [
            {k: v for k, v in message.items() if k != "weight"}
            | ({"weight": 0} if place < prompt and message["role"] == "assistant" else {})
            for place, message in enumerate(messages)
        ]
        train_on: Any = "completion" if prompt == len(messages) - 1 else "assistant"
        found = self.chat.encode_conversation(marked, train_on, tools)[-1]
        end = max((k + 1 for k, counts in enumerate(found.trained) if counts), default=0)
        if not end:  # a response that says nothing, in a template that ends it with nothing
            tokens = self.chat.encode_prompt(messages[:prompt], tools)
            return EncodedSequence(tokens, [False] * len(tokens), False)
        tokens, trained = found.tokens[:end], found.trained[:end]
        while not ended and trained and trained[-1] and tokens[-1] in self._special:
            tokens, trained = tokens[:-1], trained[:-1]
        return EncodedSequence(tokens, trained, ended and found.ends)

    def text(self, prompt: str, response: str, *, ended: bool = True) -> EncodedSequence:
        """A text and how it goes on; EOS after it where it ended and the tokenizer has one."""
        if self.is_pair:
            return self._pair(prompt, response) if prompt else self._single(response)
        tokens = encode_text(self.tokenizer, prompt + response)
        begin = shared(tokens, encode_text(self.tokenizer, prompt))
        eos = self.tokenizer.eos_token_id
        ends = ended and eos is not None
        tokens += [int(eos)] if ends else []
        return EncodedSequence(tokens, [place >= begin for place in range(len(tokens))], ends)

    def shortened(self, encoded: EncodedSequence, excess: int) -> EncodedSequence | None:
        """The sequence without so many tokens of its prompt, from the left; None if it has fewer.

        A special token that it begins with stays.
        """
        head = int(bool(encoded.tokens) and encoded.tokens[0] in self._special)
        begin = next((k for k, counts in enumerate(encoded.trained) if counts), len(encoded.tokens))
        if begin - head < excess:
            return None
        first = head + max(0, excess)
        return EncodedSequence(
            encoded.tokens[:head] + encoded.tokens[first:],
            encoded.trained[:head] + encoded.trained[first:],
            encoded.ends,
        )

    def _single(self, text: str) -> EncodedSequence:
        """A text by itself, as the tokenizer writes it."""
        found = self.tokenizer(text, split_special_tokens=True)
        tokens = [int(token) for token in found["input_ids"]]
        return EncodedSequence(tokens, [False] * len(tokens), True)

    def _pair(self, prompt: str, response: str) -> EncodedSequence:
        """Two texts as the tokenizer joins them; what follows the first text's end is trained."""
        found = self.tokenizer(prompt, response, split_special_tokens=True)
        tokens = [int(token) for token in found["input_ids"]]
        sides = found.sequence_ids()
        begin = sides.index(1) if 1 in sides else len(tokens) - 1
        return EncodedSequence(tokens, [place >= begin for place in range(len(tokens))], True)


def _flat(messages: Sequence[Mapping[str, Any]]) -> str:
    """Messages as one text: a single one as it is, several with who says them."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
