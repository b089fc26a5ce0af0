"""Train a tokenizer on text and save it as a plain Hugging Face folder.

In: an iterator of text and the wanted algorithm. Out: a `tokenizers.Tokenizer` whose ids, special
tokens and chat template AutoTokenizer reads back; transformers itself is never imported here.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer

from llmctl.data.chat.sandbox import CHATML_TEMPLATE
from llmctl.errors import DataError, UserError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, "<|im_start|>", "<|im_end|>")
UNKNOWN = "<|unk|>"
WITH_UNKNOWN = ("wordpiece", "char")

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's split of text into words, which llama.cpp knows too."""


def train_tokenizer(
    texts: Iterable[str],
    algorithm: str,
    *,
    vocab_size: int | None = None,
    text_bytes: int = 0,
    special_tokens: Sequence[str] = (),
    min_frequency: int = 2,
) -> Tokenizer:
    """Train a tokenizer on texts.

    unigram and wordpiece hold all texts, the others take them one by one. The vocabulary's size
    follows from `text_bytes` (UTF-8) where none is given; `min_frequency` is the least count of a
    merged pair (bpe, wordpiece).

    Raises:
        UserError: a special token that is empty or given twice, or a vocabulary too small.
        DataError: a vocabulary larger than the corpus allows.
    """
    specials = _specials(algorithm, special_tokens)
    size = vocab_size or default_vocab_size(text_bytes)
    if algorithm == "byte":
        tokenizer = _train_byte(specials)
    elif algorithm == "char":
        tokenizer = _train_char(texts, specials, vocab_size)
    elif algorithm == "bpe":
        tokenizer = _train_bpe(texts, specials, size, min_frequency)
    elif algorithm == "wordpiece":
        tokenizer = _train_wordpiece(list(texts), specials, size, min_frequency)
    else:
        tokenizer = _train_unigram(list(texts), specials, size, is_wanted=vocab_size is not None)
    if vocab_size is not None:
        _check_size(tokenizer.get_vocab_size(), vocab_size)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    tokenizer.encode_special_tokens = True
    _check_specials(tokenizer, special_tokens)
    return tokenizer


def default_vocab_size(text_bytes: int) -> int:
    """Power of two nearest the square root of the corpus size, from 512 to 32,768.

    >>> default_vocab_size(1_115_394)
    1024
    """
    return 1 << min(max(round(math.log2(max(text_bytes, 1)) / 2), 9), 15)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the folder that AutoTokenizer opens: tokens, their roles, and the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    specials = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        **({"unk_token": UNKNOWN} if UNKNOWN in specials else {}),
        "extra_special_tokens": [t for t in specials if t not in (BOS, EOS, PAD, UNKNOWN)],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 10**30,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHATML_TEMPLATE)


def fingerprint(tokenizer: Tokenizer) -> str:
    """Hex digest of everything that decides a text's ids, the same after saving and loading."""
    content = json.loads(tokenizer.to_str())
    for name in ("truncation", "padding"):
        content.pop(name, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _specials(algorithm: str, special_tokens: Sequence[str]) -> list[str]:
    unknown = [UNKNOWN] if algorithm in WITH_UNKNOWN else []
    specials = [*SPECIAL_TOKENS, *unknown, *special_tokens]
    for token in special_tokens:
        if not token.strip():
            raise UserError(f"--special-token {token!r}: expected some text")
        if specials.count(token) > 1:
            raise UserError(f"--special-token {token}: it is in the vocabulary already")
    return specials


def _check_specials(tokenizer: Tokenizer, special_tokens: Sequence[str]) -> None:
    """Refuse a special token that the model would also make out of a user's text."""
    for token in special_tokens:
        if tokenizer.token_to_id(token) in tokenizer.encode(token, add_special_tokens=False).ids:
            raise UserError(
                f"--special-token {token}: plain text would be taken for it",
                hint=f"choose one that is not a word, such as <|{token}|>",
            )


def _check_size(size: int, wanted: int) -> None:
    if size > wanted:
        raise _too_small(wanted, size)
    if size < wanted:
        raise DataError(
            f"--vocab-size {wanted:,} is larger than the corpus allows: the largest possible is "
            f"{size:,}",
            hint=f"pass --vocab-size {size} or less, more --data, or a lower --min-frequency",
        )


def _too_small(wanted: int, smallest: int) -> UserError:
    return UserError(
        f"--vocab-size {wanted:,}: the smallest possible here is {smallest:,} (special tokens, and "
        "every byte or character)"
    )


def _train_byte(specials: list[str]) -> Tokenizer:
    """Make a tokenizer of bytes: ids follow byte values after the special tokens."""
    characters = _byte_characters()
    vocab = {token: i for i, token in enumerate([*specials, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_characters() -> list[str]:
    """Map each byte value to its character in byte-level vocabularies.

    Printable Latin-1 stands for itself, the rest is shifted past it, in order (Radford et al. 2019,
    GPT-2's encoder).
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    shifted = iter(range(256, 512))
    return [chr(byte if byte in printable else next(shifted)) for byte in range(256)]


def _train_char(texts: Iterable[str], specials: list[str], vocab_size: int | None) -> Tokenizer:
    """Make a tokenizer of the corpus's characters, or the most frequent; ids by code point."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    kept = sorted(counts, key=lambda c: (-counts[c], c))
    if vocab_size is not None:
        kept = kept[: max(vocab_size - len(specials), 1)]
    vocab = {token: i for i, token in enumerate([*specials, *sorted(kept)])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token=UNKNOWN))
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _train_bpe(
    texts: Iterable[str], specials: list[str], size: int, min_frequency: int
) -> Tokenizer:
    """Train byte-level byte-pair encoding: all 256 bytes are tokens, so nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_wordpiece(
    texts: list[str], specials: list[str], size: int, min_frequency: int
) -> Tokenizer:
    """Train WordPiece as BERT has it, but with case and accents kept.

    The trainer numbers the characters that continue a word in the order of a hash table, which
    differs from run to run. So they go through training as special tokens, in order, and are then
    made ordinary.
    """
    tokenizer = Tokenizer(models.WordPiece(vocab={}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    continuing = [f"##{c}" for c in sorted(set().union(*texts)) if _continues(tokenizer, c)]
    trainer = WordPieceTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        special_tokens=[*specials, *continuing],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_added_tokens(tokenizer, specials)


def _continues(tokenizer: Tokenizer, character: str) -> bool:
    """Whether a word goes on when the character follows a letter."""
    words = tokenizer.pre_tokenizer.pre_tokenize_str(
        tokenizer.normalizer.normalize_str(f"a{character}")
    )
    return [word for word, _ in words] == [f"a{character}"]


def _with_added_tokens(tokenizer: Tokenizer, kept: list[str]) -> Tokenizer:
    """Copy a tokenizer so that only these tokens are special."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in kept]
    return Tokenizer.from_str(json.dumps(content))


def _train_unigram(
    texts: list[str], specials: list[str], size: int, *, is_wanted: bool
) -> Tokenizer:
    """Train Unigram with bytes to fall back on, so that no text is lost.

    The trainer knows no byte fallback: the 256 byte tokens go through training as special tokens
    and are then made ordinary. Unigram matches every token of its vocabulary in text; the special
    ones never win, since their score is low and their characters are all known.
    """
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    never = [*specials, *byte_tokens]
    alphabet = set("".join(never)) | set().union(*texts)
    smallest = len(never) + len(alphabet) + 1  # the trainer adds one piece before it looks
    if is_wanted and size < smallest:
        raise _too_small(size, smallest)
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+"), "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="never"),
        ]
    )
    trainer = UnigramTrainer(
        vocab_size=max(size, smallest),
        special_tokens=never,
        initial_alphabet=sorted(alphabet - {" "} | {"\u2581"}),
        unk_token=byte_tokens[0],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    content["model"]["byte_fallback"] = True
    for entry in content["model"]["vocab"][: len(never)]:
        entry[1] = -1e6
    tokenizer = _with_added_tokens(Tokenizer.from_str(json.dumps(content)), specials)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never"), decoders.Fuse()]
    )
    return tokenizer
