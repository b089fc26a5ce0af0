"""Encode text fast, and to exactly the ids that the `tokenizers` library gives.

fastokens is some 50 times as fast as `tokenizers` on byte-level BPE. It is used where it knows the
tokenizer, and a share of its work is done again with `tokenizers` and compared. Characters are
looked up in a table. Everything else goes through `tokenizers`.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llmctl.data.tokenizer.train import WORDS
from llmctl.models.tokenizer_file import TORTURE

FlatIds = tuple[NDArray[np.uint32], NDArray[np.int64]]
"""The ids of all texts one after the other, and the number of ids of each text."""

EncodeTexts = Callable[[list[str]], FlatIds]
CutPoints = Literal["anywhere", "words", "spaces", "marks", "nowhere"]
"""At marks, the space before a piece is left out: the tokenizer puts a mark before every text."""

PIECE_CHARACTERS = 1 << 15
RUN_CHARACTERS = 1 << 21
"""Longest stretch without a cut point: merging pairs within it takes memory by its length."""

CHECK_EVERY = 1 << 24
"""Characters between two comparisons with `tokenizers`."""

CHECK_CHARACTERS = 1 << 14


MARK = "\u2581"
MARKS = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": MARK},
        {"type": "Replace", "pattern": {"String": " "}, "content": MARK},
    ],
}
"""Normalizer of Llama 2's tokenizer, and of those made like it."""


class Mismatch(Exception):
    """The fast encoder gave other ids than `tokenizers`."""


@dataclass(frozen=True)
class TokenizerEncoder:
    """An encoding function, and where it lets a long text be cut without changing an id."""

    encode: EncodeTexts
    cuts: CutPoints


def fastest_encoder(
    tokenizer: Tokenizer, *, sample: str = "", plain: bool = False
) -> TokenizerEncoder:
    """Choose the fastest exact encoder of a tokenizer; ids of the text alone, without bos or eos.

    The tokenizer has `encode_special_tokens` set. Cutting is tried on `sample`, some of the corpus,
    where the tokenizer is not a known one; `plain` wants `tokenizers` in any case.
    """
    content = json.loads(tokenizer.to_str())
    cuts = _cut_points(tokenizer, content, sample)
    if content["model"]["type"] == "WordLevel" and cuts == "anywhere":
        return TokenizerEncoder(_character_encoder(content["model"]), cuts)
    fast = None if plain else _fastokens_encoder(tokenizer)
    return TokenizerEncoder(fast or _tokenizers_encoder(tokenizer), cuts)


def _tokenizers_encoder(tokenizer: Tokenizer) -> EncodeTexts:
    def encode(texts: list[str]) -> FlatIds:
        rows = [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.array([len(row) for row in rows], np.int64)
        flat = np.fromiter((i for row in rows for i in row), np.uint32, count=int(lengths.sum()))
        return flat, lengths

    return encode


def _fastokens_encoder(tokenizer: Tokenizer) -> EncodeTexts | None:
    """Encode with fastokens and compare now and then; None where it is not installed or unable."""
    try:
        import fastokens  # absent where it has no wheel

        fast = fastokens.Tokenizer.from_json_str(tokenizer.to_str())
    except (ImportError, ValueError):
        return None
    unchecked, slow = CHECK_EVERY, _tokenizers_encoder(tokenizer)

    def encode(texts: list[str]) -> FlatIds:
        nonlocal unchecked
        try:
            raw, offsets = fast.encode_batch_flat(texts, split_special_tokens=True)
        except ValueError:  # a byte without a token, which `tokenizers` drops
            return slow(texts)
        flat = np.frombuffer(raw, "<u4")
        stops = np.frombuffer(offsets, "<u8").astype(np.int64)
        unchecked += sum(map(len, texts))
        if unchecked >= CHECK_EVERY:
            unchecked = 0
            _compare(tokenizer, texts, flat, stops)
        return flat, np.diff(stops)

    return encode


def _compare(
    tokenizer: Tokenizer, texts: list[str], flat: NDArray[np.uint32], stops: NDArray[np.int64]
) -> None:
    """Encode the first few texts again with `tokenizers`; raise a Mismatch where an id differs."""
    few, characters = 0, 0
    while few < len(texts) and (few == 0 or characters + len(texts[few]) <= CHECK_CHARACTERS):
        characters += len(texts[few])
        few += 1
    rows = tokenizer.encode_batch_fast(texts[:few], add_special_tokens=False)
    for text, row, start, stop in zip(texts, rows, stops, stops[1:], strict=False):
        if row.ids != flat[start:stop].tolist():
            raise Mismatch(text)


def _character_encoder(model: dict[str, dict[str, int]]) -> EncodeTexts:
    """Encode one id per character, by a table over code points."""
    vocab, unknown = model["vocab"], model["vocab"][str(model["unk_token"])]
    table = np.full(0x110000, unknown, np.uint32)
    for token, number in vocab.items():
        if len(token) == 1:
            table[ord(token)] = number

    def encode(texts: list[str]) -> FlatIds:
        points = np.frombuffer("".join(texts).encode("utf-32-le"), "<u4")
        return table[points], np.array([len(text) for text in texts], np.int64)

    return encode


def _cut_points(tokenizer: Tokenizer, content: dict[str, object], sample: str) -> CutPoints:
    """Find where a text can be cut so that the ids of the parts are those of the whole.

    Known from the split itself: Llama 3's and GPT-2's words never hold a space after another
    character, nor anything after a single line's end. Otherwise tried on a sample.
    """
    split, model = content["pre_tokenizer"], content["model"]
    assert isinstance(model, dict)
    ordinary = [t for t in tokenizer.get_added_tokens_decoder().values() if not t.special]
    if content["normalizer"] is None and not ordinary:
        if split in (_pattern(r"[\s\S]"), _byte_level(False)) and not model.get("merges"):
            return "anywhere"
        llama = {"type": "Sequence", "pretokenizers": [_pattern(WORDS), _byte_level(False)]}
        if split in (llama, _byte_level(True)):
            return "words"
    if content["normalizer"] == MARKS and split is None and not ordinary and _is_marked(model):
        return "marks"
    text = TORTURE + sample[:PIECE_CHARACTERS]
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = tokenizer.encode_batch_fast(
        re.split(r"(?<=\S)(?= \S)", text), add_special_tokens=False
    )
    spaced = any(t.rstrip or " " in t.content[1:] for t in ordinary)
    joined = [i for piece in pieces for i in piece.ids]
    return "spaces" if joined == whole and not spaced else "nowhere"


def _is_marked(model: dict[str, Any]) -> bool:
    """Whether a model has the mark, and no token with one after another character.

    Then no merge reaches over a space into the word before it.
    """
    is_whole = model["type"] == "BPE" and MARK in model["vocab"]
    return is_whole and not any(re.search(f"[^{MARK}]{MARK}", token) for token in model["vocab"])


def _pattern(regex: str) -> dict[str, object]:
    return {
        "type": "Split",
        "pattern": {"Regex": regex},
        "behavior": "Isolated",
        "invert": False,
    }


def _byte_level(use_regex: bool) -> dict[str, object]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


class RunTooLong(Exception):
    """A stretch of text without a cut point exceeds the limit."""


class Cutter:
    """Cut a document that comes in stretches into pieces of bounded length."""

    def __init__(self, cuts: CutPoints | Literal["softly"], size: int | None = None) -> None:
        """Start with an empty document.

        Cutting softly is at words where there are any, else anywhere.
        """
        self.cuts, self.size = cuts, size or PIECE_CHARACTERS
        self._rest = ""
        self._searched = 0

    def feed(self, text: str, is_last: bool) -> Iterator[str]:
        """Yield the pieces that are ready; together they are the document. The last may be empty.

        Cut at marks they are so with a space between two.

        Raises:
            RunTooLong: more than `RUN_CHARACTERS` without a cut point.
        """
        rest = self._rest + text if self._rest else text
        if is_last and len(rest) <= self.size:
            self._rest, self._searched = "", 0
            yield rest
            return
        start, searched = 0, self._searched
        while len(rest) - start > self.size:
            cut = self._cut(rest, start, searched)
            if cut is None:
                searched = len(rest) - start - 2
                break
            yield rest[start:cut]
            start, searched = cut + (self.cuts == "marks"), 0
        self._rest, self._searched = ("", 0) if is_last else (rest[start:], searched)
        if len(rest) - start > RUN_CHARACTERS:
            raise RunTooLong
        if is_last:
            yield rest[start:]

    def _cut(self, text: str, start: int, searched: int) -> int | None:
        """Find the last cut point within a piece's length, else the first one after `searched`."""
        stop = start + self.size
        if self.cuts == "anywhere":
            return stop
        if self.cuts == "nowhere":
            return None
        pattern = _CUTS.get(self.cuts, _WORD_CUT)
        if searched == 0:
            near = text.rfind(" ", start + 1, stop)
            while near > start:
                if pattern.match(text, near):
                    return near
                near = text.rfind(" ", start + 1, near)
        if self.cuts == "softly":
            return stop
        cut = pattern.search(text, start + max(searched, 1))
        return cut.start() if cut else None


_SPACE_CUT = re.compile(r"(?<=\S)(?= \S)")
_WORD_CUT = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")
_CUTS = {"spaces": _SPACE_CUT, "marks": re.compile(rf"(?<=[^\s{MARK}])(?= [^\s{MARK}])")}
