"""Hold a tokenizer to its tokenizer.json: the same text gives the same ids, every time.

In: a folder's tokenizer.json, and what a library made of the folder. Out: how far the two agree.
Nothing here imports transformers.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer

from llmctl.console import log
from llmctl.errors import ModelError

PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Names in tokenizer_config.json that take tokenizer.json as it is."""
TORTURE = (
    "Hello world,  it's  2024!\tTabs\tand\nlines\r\nand\u00a0spaces \u3000 here.   \n\n  x\n y\n"
    "\n\nz "
    "caf\u00e9 e\u0301 \u4e2d\u6587 \u0442\u0435\u0441\u0442 \U0001f468\u200d\U0001f469 'LL 'tis "
    "don't ##x a_b <|eos|> <s> [SEP] 1234567 a\x1cb \x85 \u2028 end\n"
)
"""A text on which tokenizers differ that split, normalise or fall back in different ways."""


WORD = re.compile("(\u2581|\u0120|##)?[A-Za-z]+")
"""A token that is letters, with the mark of a space or of a word's middle."""
Agreement = Literal["same", "spaced", "other"]
MOST_TOKENS = 4000
"""Tokens of a vocabulary that are tried."""


def read_tokenizer(file: Path) -> Tokenizer:
    """Read a tokenizer.json as it is.

    Raises:
        ModelError: it is not a tokenizer.
    """
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"not a tokenizer: {error}", file=file) from None


def switch_off_dropout(tokenizer: Tokenizer, folder: Path) -> bool:
    """Switch the dropout of merges off (Provilkov et al., 2020), and say so.

    With it a text has other tokens every time that it is encoded.

    Returns:
        Whether it was on.
    """
    dropout = getattr(tokenizer.model, "dropout", None)
    if not dropout:
        return False
    log.warning("%s: its tokenizer drops %g of the merges at random: switched off", folder, dropout)
    tokenizer.model.dropout = None
    return True


def compare_with_file(folder: Path, encode: Callable[[str], list[int]]) -> Agreement:
    """Compare a tokenizer's ids with those of the folder's tokenizer.json.

    The text is `TORTURE` and what the vocabulary holds beyond words. `encode` gives the ids of a
    text alone, and takes special tokens in it for text.

    Returns:
        Whether they are the `same`, or `spaced` in another way and the same without the tokens
        that are but white space, or `other` ones.
    """
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if hasattr(tokenizer.model, "dropout"):
        tokenizer.model.dropout = None
    text = TORTURE + " ".join(_odd_tokens(tokenizer))
    expected, ids = tokenizer.encode(text, add_special_tokens=False).ids, encode(text)
    if ids == expected:
        return "same"
    blank = {i for i in {*ids, *expected} if not tokenizer.decode([i], False).strip()}
    is_spaced = [i for i in ids if i not in blank] == [i for i in expected if i not in blank]
    return "spaced" if is_spaced else "other"


def _odd_tokens(tokenizer: Tokenizer) -> list[str]:
    """Texts of tokens that are more than a word: what splits otherwise breaks some of them up."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    odd = sorted(number for token, number in vocabulary.items() if not WORD.fullmatch(token))
    texts = (tokenizer.decode([number]) for number in odd[:: 1 + len(odd) // MOST_TOKENS])
    return [text for text in texts if "\N{REPLACEMENT CHARACTER}" not in text]
