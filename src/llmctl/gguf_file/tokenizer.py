"""A tokenizer in the terms of GGUF: its tokens, their types, and how text is split.

llama.cpp has code of its own for this. Two of its tokenizers are written: byte-level BPE, which it
calls `gpt2`, and BPE with bytes to fall back on, as SentencePiece makes it, which it calls `llama`.
A tokenizer that llama.cpp would run otherwise than `tokenizers` does is refused.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llmctl.data.tokenizer.train import WORDS
from llmctl.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Token types, as the format numbers them."""

QWEN2 = WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {WORDS: "llama-bpe", QWEN2: "qwen2", TEKKEN: "tekken"}
"""Regular expression that cuts text into words -> llama.cpp's name for it."""

WHOLE_WORDS = ("llama-bpe", "tekken")
"""With these llama.cpp takes a word that is a token for that token, whatever the merges say."""

SPACE = "\u2581"
"""Stands for a space in SentencePiece's tokens."""

PREFIXES = {
    "never": (False, None),
    "always": (True, "text that begins with a space"),
    "first": (True, "text that begins with a space or follows a special token"),
}
"""`tokenizers`' ways to put a space before a text, and where llama.cpp's own differs."""

SUPPORTED = (
    "those that can: byte-level BPE cut into words as GPT-2, SmolLM, Llama 3, Qwen2 or Tekken do, "
    "and SentencePiece's BPE with byte fallback"
)


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer as llama.cpp reads it."""

    model: str
    pre: str
    texts: list[str]
    types: list[int]
    merges: list[str] | None = None
    scores: list[float] | None = None
    space_prefix: bool | None = None
    """Whether a space is put before a text; None where that is no question."""

    caution: str | None = None
    """Texts that llama.cpp splits otherwise all the same."""


def convert_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int) -> GgufTokenizer:
    """Convert a tokenizer into llama.cpp's terms; rows of the embedding past it become unused.

    Raises:
        ModelError: llama.cpp has no such tokenizer, or the model has no row for a token.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _unsupported(f"{type(tokenizer).__name__} has no `tokenizers` form")
    form = json.loads(tokenizer.backend_tokenizer.to_str())
    if form["model"]["type"] != "BPE":
        raise _unsupported(f"{form['model']['type']} tokens")
    last = max(tokenizer.get_vocab().values())
    if last >= rows:
        raise ModelError(f"the tokenizer has token {last:,}, the model {rows:,} rows for tokens")
    for token in form["added_tokens"]:
        odd = [name for name in ("lstrip", "rstrip", "single_word") if token[name]]
        if odd:
            raise _unsupported(f"the token {token['content']} with {odd[0]}")
    convert = _sentencepiece if form["model"]["byte_fallback"] else _byte_level
    return convert(tokenizer, form, rows)


def adds_bos_eos(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts bos before a text, and eos after it.

    Raises:
        ModelError: it puts something else there.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for head, tail in (([], []), ([bos], []), ([bos], [eos]), ([], [eos])):
        if framed == [*head, *plain, *tail]:
            return bool(head), bool(tail)
    raise _unsupported("other tokens than bos and eos put around a text")


def _byte_level(
    tokenizer: PreTrainedTokenizerFast, form: dict[str, Any], rows: int
) -> GgufTokenizer:
    model, normalizer = form["model"], form["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _unsupported(f"text normalized by {normalizer['type']}")
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise _unsupported("tokens with a prefix or suffix of their own inside words")
    if not model["merges"]:
        raise _unsupported("bytes without merges")
    pre = _word_split(form["pre_tokenizer"])
    added = {token["content"] for token in form["added_tokens"]}
    if model["ignore_merges"] != (pre in WHOLE_WORDS):
        by_merges = {**form, "model": {**model, "ignore_merges": False}}
        merge = Tokenizer.from_str(json.dumps(by_merges)).model.tokenize
        whole = (text for text in model["vocab"] if text not in added)
        if lost := next((text for text in whole if len(merge(text)) != 1), None):
            raise _unsupported(f"the token {lost!r}, which no merges make (ignore_merges)")
    texts, types = _texts_and_types(tokenizer, form, rows)
    return GgufTokenizer(
        "gpt2",
        pre,
        texts,
        types,
        merges=[" ".join(pair) for pair in _merge_pairs(model)],
        caution="text that is not in Unicode's form NFC" if normalizer else None,
    )


def _sentencepiece(
    tokenizer: PreTrainedTokenizerFast, form: dict[str, Any], rows: int
) -> GgufTokenizer:
    vocab: dict[str, int] = form["model"]["vocab"]
    if missing := [name for name in map("<0x{:02X}>".format, range(256)) if name not in vocab]:
        raise _unsupported(f"byte fallback without a token {missing[0]}")
    if form["model"]["ignore_merges"]:
        raise _unsupported("byte fallback with ignore_merges")
    prefix, caution = _space_prefix(form)
    texts, types = _texts_and_types(tokenizer, form, rows)
    for index, text in enumerate(texts):
        if re.fullmatch("<0x[0-9A-F]{2}>", text):
            types[index] = BYTE
        elif types[index] == USER_DEFINED:
            texts[index] = text.replace(SPACE, " ")
    if tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = UNKNOWN
    pieces = [text for text, kind in zip(texts, types, strict=True) if kind == NORMAL]
    scores = _scores(_merge_pairs(form["model"]), pieces)
    return GgufTokenizer(
        "llama",
        "default",
        texts,
        types,
        scores=[scores.get(text, 0.0) for text in texts],
        space_prefix=prefix,
        caution=caution,
    )


def _texts_and_types(
    tokenizer: PreTrainedTokenizerFast, form: dict[str, Any], rows: int
) -> tuple[list[str], list[int]]:
    """Text and type of every row; rows without a token are unused."""
    texts, types = [f"[PAD{row}]" for row in range(rows)], [UNUSED] * rows
    for text, token in tokenizer.get_vocab().items():
        texts[token], types[token] = text, NORMAL
    for added in form["added_tokens"]:
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return texts, types


def _merge_pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    return [(left, right) for left, right in model["merges"]]


def _word_split(pre_tokenizer: dict[str, Any] | None) -> str:
    """llama.cpp's name for the way in which text is split into words.

    Its own converter looks up the hash of how a tokenizer encodes a certain text; the tokenizer's
    parts say the same of any vocabulary, also of one that nobody has seen before.
    """
    if pre_tokenizer is None:
        raise _unsupported("text that is not cut into words")
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return "gpt-2"
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            return "smollm"
        case [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if regex in SPLITS:
            return SPLITS[regex]
    raise _unsupported(f"text cut into words by {json.dumps(pre_tokenizer)[:200]}")


def _space_prefix(form: dict[str, Any]) -> tuple[bool, str | None]:
    """Whether a space is put before a text, and the texts where llama.cpp differs.

    Raises:
        ModelError: something else is done to the text.
    """
    normalizer, pre_tokenizer = form["normalizer"], form["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    match steps, pre_tokenizer:
        case [{"type": "Prepend", "prepend": "\u2581"}, last], None if last == spaces:
            return True, None
        case [last], None if last == spaces:
            return False, None
        case [], {"type": "Metaspace", "replacement": "\u2581", "split": False}:
            return PREFIXES[pre_tokenizer["prepend_scheme"]]
    raise _unsupported("byte fallback with other normalizers than those for spaces")


def _scores(merges: Sequence[tuple[str, str]], pieces: Sequence[str]) -> dict[str, float]:
    """A score per merged token: llama.cpp joins the neighbours that make the token scored best.

    It asks for no list of merges: any two neighbours that together are a token may be joined. So
    the list must hold all such pairs, those of one token beside each other.

    Raises:
        ModelError: it does not, and text would be cut otherwise.
    """
    known = set(pieces)
    scores: dict[str, float] = {}
    made: dict[str, set[tuple[str, str]]] = {}
    before = None
    for left, right in merges:
        token = left + right
        if token != before and token in scores:
            raise _unsupported(f"merges that make {token!r} at different ranks")
        scores.setdefault(token, -1.0 - len(scores))
        made.setdefault(token, set()).add((left, right))
        before = token
    for text in pieces:
        parts = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        pairs = {pair for pair in parts if known.issuperset(pair)}
        if pairs != made.get(text, set()):
            raise _unsupported(f"the token {text!r}, which not all of its parts are merged to")
    return scores


def _unsupported(feature: str) -> ModelError:
    return ModelError(f"llama.cpp has no tokenizer like this one: {feature}", hint=SUPPORTED)
