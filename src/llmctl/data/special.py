"""Tell the special tokens of a template from text that spells them, and encode both.

In: a tokenizer, and text that a template wrote around what people said. Out: tokens, in which
special tokens are the template's alone, and where the borders of turns fall among them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

BREAK = "\ufdd0"
"""A noncharacter of Unicode: no text carries it."""


class Specials:
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
