"""Find the labels that a response names.

A label is looked for as a word. Labels that are words of their own by another case, such as the
letters `A` and `I`, take care: the article and the pronoun are none.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llmctl.text_forms import WITHOUT_SPACES, canonical, is_mark

ROMAN = re.compile("[IVXLCDM]+")
WORDS = frozenset(
    re.findall(
        r"\w+",
        "am an and are as at be by can did do for go had has he if in is it may me my of on or she "
        "so the to up us was we who will",
    )
)
"""Common words of English that labels such as `IT`, `US` or `May` differ from by case alone."""
LETTERS = frozenset("aeiouy\u0430\u0432\u0437\u0438\u043a\u043e\u0441\u0443\u044f\u0456")
"""Letters that are words by themselves in English, French, Spanish or Russian, say."""
GOES_ON = ("is", "or", "and", "because", "since")
"""Words that may follow the letter of an answer, `A is right`, and seldom follow an article."""
NEGATED = re.compile(
    r"(?:\b(?:not|nor|neither|rather\s+than|instead\s+of)|n['\u2019]t)\s+"
    r"(?:(?:the|a|an|option|answer|label)\s+)*[^\w\s]*$",
    re.IGNORECASE,
)
"""What stands before a label that an answer turns down."""
WRONG = re.compile(
    r"\W{0,3}(?:\b(?:is|are|was)\s+(?:wrong|incorrect|not|false)\b|\b(?:is|are|was)n['\u2019]t\b)",
    re.IGNORECASE,
)
"""What stands after a label that an answer turns down."""
_SPACED = re.compile(rf"[^\W{WITHOUT_SPACES}]")
"""A letter or digit of a script that puts spaces between words."""
_HANGUL = re.compile("[\uac00-\ud7a3]")


class _Mention(NamedTuple):
    start: int
    end: int
    label: str


def named_labels(
    text: str, labels: Sequence[str], is_same: Callable[[str, str], bool]
) -> list[str]:
    """The different labels that a text names, in the order in which it does.

    A text that is a label as a whole names that one. Else every label is looked for as a word, but
    for those within a longer label and those that the text turns down (`not A`, `A is wrong`).
    """
    whole = next((label for label in labels if is_same(label, text)), None)
    if whole is not None:
        return [whole]
    text = canonical(text)
    mentions = [mention for label in labels for mention in _mentions(text, label)]
    named, reached = [], 0
    for mention in sorted(mentions, key=lambda mention: (mention.start, -mention.end)):
        if mention.start >= reached:
            reached = mention.end
            if not (NEGATED.search(text[: mention.start]) or WRONG.match(text, mention.end)):
                named.append(mention.label)
    return list(dict.fromkeys(named))


def _mentions(text: str, label: str) -> list[_Mention]:
    """Where a label stands in a text as a word."""
    parts = canonical(label).split()
    if not parts:
        return []
    flags = re.NOFLAG if _as_written(canonical(label)) else re.IGNORECASE
    mentions = [
        _Mention(*match.span(), label)
        for match in re.finditer(r"\s+".join(map(re.escape, parts)), text, flags)
    ]
    return [mention for mention in mentions if _stands_alone(text, mention)]


def _as_written(label: str) -> bool:
    """Whether only its case tells a label from a word."""
    if len(label) == 1 or ROMAN.fullmatch(label):
        return label.isupper()
    return label.lower() in WORDS and not label.islower()


def _stands_alone(text: str, mention: _Mention) -> bool:
    """Whether a mention is not a part of a word or a number, nor another word than the label."""
    start, end, _ = mention
    if _are_joined(text[start - 1 : start], text[start]):
        return False
    if not _HANGUL.match(text[end - 1]) and _are_joined(text[end - 1], text[end : end + 1]):
        return False
    if end < len(text) and is_mark(text[end]):
        return False
    if text[start].isdecimal() and re.search(r"(?:\d[.,]|[-\u2212])$", text[:start]):
        return False
    if text[end - 1].isdecimal() and re.match(r"[.,]\d|\s?%", text[end:]):
        return False
    return end - start > 1 or not _is_other_word(text, start)


def _are_joined(left: str, right: str) -> bool:
    """Whether two neighbours are letters of one word, as far as their script tells."""
    return bool(left and right and _SPACED.match(left) and _SPACED.match(right))


def _is_other_word(text: str, place: int) -> bool:
    """Whether a single letter is a part of a longer word, an article or a pronoun.

    In the middle of a sentence a capital before another word is a label, but for the pronoun `I`.
    """
    letter, before, after = text[place], text[:place], text[place + 1 :]
    if re.match(r"[-'\u2019]\w|\.\w\.", after) or re.search(r"[^\W\d][-'\u2019]$|\b\w\.$", before):
        return True
    if not letter.isalpha() or letter.lower() not in LETTERS:
        return False
    follows = re.match(rf"[^\S\r\n]+([^\W\d{WITHOUT_SPACES}]+)", after)
    if follows is None or follows[1].lower() in GOES_ON:
        return False
    begins = not before.strip() or re.search(r"[.!?\u2026]\W*$|\n\W*$", before) is not None
    return begins or letter.islower() or letter == "I" or not follows[1].islower()
