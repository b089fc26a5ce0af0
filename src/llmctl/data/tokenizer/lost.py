"""Find the characters that a tokenizer has no token for, and drops without a word.

In: a tokenizer, and text. Out: how many characters of it are lost. BPE without an unknown token
leaves out what its alphabet lacks: bytes that a byte-level one was trained without (SmolLM2's lacks
21 of 256), or characters of another script.
"""

import json
from collections.abc import Sequence
from functools import cached_property

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from llmctl.errors import DataError

MOST_LOST = 0.2
"""Share of lost characters above which text is not the tokenizer's language at all."""


class LostCharacters:
    """What a tokenizer loses of texts, counted."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """Take a tokenizer of `tokenizers`; others have tokens of their own for the unknown."""
        self.lost = self.characters = 0
        self.example = ""
        """One that was lost."""
        self._tokenizer = tokenizer
        self._known: dict[str, bool] = {}

    @cached_property
    def _loses(self) -> bool:
        """Whether the tokenizer leaves out what it does not know."""
        model = None if self._tokenizer is None else self._tokenizer.model
        return isinstance(model, BPE) and model.unk_token is None and not model.byte_fallback

    @cached_property
    def _bytes(self) -> bytes | None:
        """Bytes without a token, of a byte-level tokenizer."""
        assert self._tokenizer is not None
        steps = (self._tokenizer.pre_tokenizer, self._tokenizer.normalizer)
        if not any(step is not None and b"ByteLevel" in step.__getstate__() for step in steps):
            return None
        return bytes(
            value
            for value, name in _byte_names().items()
            if self._tokenizer.token_to_id(name) is None
        )

    def add(self, text: str) -> int:
        """Count a text; return how many of its characters are lost."""
        self.characters += len(text)
        if not self._loses:
            return 0
        missing = self._lost_of(text)
        self.lost += len(missing)
        self.example = self.example or (missing[0] if missing else "")
        return len(missing)

    def add_all(self, texts: Sequence[str]) -> int | None:
        """Count texts, all at once where nothing is lost; the number of the first that loses."""
        if not self._loses or not self._lost_of("".join(texts)):
            self.characters += sum(map(len, texts))
            return None
        lost = [self.add(text) for text in texts]
        return next((number for number, count in enumerate(lost) if count), None)

    def _lost_of(self, text: str) -> list[str]:
        if self._bytes is not None:
            raw = text.encode()
            if not self._bytes or len(raw.translate(None, self._bytes)) == len(raw):
                return []
            return [c for c in text if any(value in self._bytes for value in c.encode())]
        assert self._tokenizer is not None
        normalizer = self._tokenizer.normalizer
        shown = text if normalizer is None else normalizer.normalize_str(text)
        return [c for c in shown if not c.isspace() and not self._is_known(c)]

    def _is_known(self, character: str) -> bool:
        if character not in self._known:
            assert self._tokenizer is not None
            model = self._tokenizer.model
            assert isinstance(model, BPE)
            forms = (
                character,
                character + (model.end_of_word_suffix or ""),
                (model.continuing_subword_prefix or "") + character,
            )
            found = (self._tokenizer.token_to_id(form) is not None for form in forms)
            self._known[character] = any(found)
        return self._known[character]

    @property
    def share(self) -> float:
        """Lost characters of all."""
        return self.lost / max(1, self.characters)

    def message(self) -> str:
        """Say how many are lost."""
        shown = json.dumps(self.example)
        return (
            f"{self.lost:,} of {self.characters:,} characters have no token and are lost, "
            f"such as {shown}"
        )

    def refuse(self, most: float, place: str | None, line: int | None) -> None:
        """Raise a DataError where more than this share is lost; the first stands at the place."""
        if self.share > most:
            raise DataError(
                self.message(),
                file=place,
                line=line,
                hint="use a tokenizer that has every byte, or knows the script of this text",
            )


def _byte_names() -> dict[int, str]:
    """The character that stands for each byte in byte-level vocabularies.

    Printable bytes stand for themselves, the others are numbered from U+0100 (Radford et al., 2019,
    GPT-2's encoder).
    """
    alphabet = frozenset(ByteLevel.alphabet())
    names = {value: chr(value) for value in range(256) if chr(value) in alphabet}
    others = (value for value in range(256) if value not in names)
    return names | {value: chr(256 + number) for number, value in enumerate(others)}
