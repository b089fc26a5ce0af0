"""Forms of a text that read the same, and its words in any script: of evaluation and reward rules.

In: texts as they were written. Out: one Unicode form of each, and the words to count and compare.
"""

import re
import unicodedata

WITHOUT_SPACES = (
    "\u0e00-\u0fff"  # Thai, Lao, Tibetan
    "\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff"  # Myanmar
    "\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf"  # Khmer, Tai Le, New Tai Lue, Tai Tham
    "\u2e80-\u2fff"  # radicals of Han
    "\u3001-\u312f\u31a0-\u31ff"  # punctuation, kana, Bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf\uf900-\ufaff"  # Han, Yi
    "\U0001aff0-\U0001b16f\U00020000-\U0003ffff"  # kana and Han beyond the first plane
    "\ufe00-\ufe0f\U000e0100-\U000e01ef"  # variants of the letter before
)
"""Characters of scripts that put no space between words, for a class of a regular expression."""
_RUN = re.compile(f"[{WITHOUT_SPACES}]+")
_WIDTHS = {
    code: chr(int(unicodedata.decomposition(chr(code)).split()[1], 16))
    for code in (0x3000, *range(0xFF01, 0xFFEF))
    if unicodedata.decomposition(chr(code)).startswith(("<wide>", "<narrow>"))
}
FULL_STOPS = (".", "\u3002", "\u0964", "\u06d4")
"""Those of Latin and its like, of Chinese and Japanese, of Hindi, of Urdu."""


def canonical(text: str) -> str:
    """Compose letters with their marks (NFC), and give full-width and half-width ones their own.

    Other compatible characters stay apart: `x²` is not `x2`.
    """
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", text.translate(_WIDTHS))


def normalize_answer(text: str) -> str:
    """Remove Unicode form, case, superfluous white space and a full stop at the end."""
    words = " ".join(canonical(canonical(text).casefold()).split())
    return words[:-1].rstrip() if words.endswith(FULL_STOPS) else words


def is_mark(letter: str) -> bool:
    """Whether a character belongs to the letter before it, such as an accent or a vowel sign."""
    return unicodedata.category(letter)[0] == "M"


def separate(text: str) -> str:
    """Put spaces around the letters of scripts that have none between words, in canonical form.

    Words of these scripts are not to be told without a dictionary, so a letter with its marks
    stands for one, as in the tokenizers of Chinese of sacrebleu and of multilingual BERT.
    """

    def split(run: re.Match[str]) -> str:
        letters = (letter if is_mark(letter) else f" {letter}" for letter in run[0])
        return f"{''.join(letters)} "

    text = canonical(text)
    return text if text.isascii() else _RUN.sub(split, text)


def split_words(text: str) -> list[str]:
    """Split at white space, and between letters of scripts that put none between words."""
    return separate(text).split()


def split_letters_only(text: str) -> list[str]:
    """Split into words in lower case, of letters, marks and digits alone, whatever the script."""
    kept = (
        letter if unicodedata.category(letter)[0] in "LMN" else " "
        for letter in separate(text).lower()
    )
    return "".join(kept).split()
