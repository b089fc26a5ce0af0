"""Texts in other Unicode forms, and words of scripts without spaces."""

import unicodedata

import pytest

from llmctl.text_forms import canonical, normalize_answer, split_letters_only, split_words


@pytest.mark.parametrize(
    ("text", "same"),
    [
        (unicodedata.normalize("NFD", "Crème brûlée"), "crème  BRÛLÉE."),
        ("\uff37\uff11\uff18", "w18"),
        ("\uff76\uff9e\uff77\uff9e", "ガギ"),
        ("東京\u3000です。", "東京 です"),
        ("सही।", "सही"),
        ("Straße", "STRASSE"),
    ],
)
def test_texts_that_read_the_same_are_the_same_answer(text, same):
    assert normalize_answer(text) == normalize_answer(same)


@pytest.mark.parametrize(
    ("text", "other"), [("x²", "x2"), ("ガキ", "カキ"), ("e.g..", "e.g"), ("①", "1")]
)
def test_texts_that_read_differently_stay_apart(text, other):
    assert normalize_answer(text) != normalize_answer(other)
    assert canonical(text) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("one  two\nthree, four.", 4),
        ("これは本です", 6),
        ("我有2本Python书。", 7),  # 我 有 2 本 Python 书 。
        ("นกบิน", 4),  # a vowel sign belongs to its letter
        ("नमस्ते दुनिया", 2),
        ("안녕 세계", 2),
        ("", 0),
    ],
)
def test_words_are_counted_in_any_script(text, count):
    assert len(split_words(text)) == count
    assert split_words(unicodedata.normalize("NFD", text)) == split_words(text)


def test_words_of_letters_only():
    assert split_letters_only("Don't stop_it, 12%!") == ["don", "t", "stop", "it", "12"]
    assert split_letters_only("Ça va? नमस्ते।") == ["ça", "va", "नमस्ते"]
    assert split_letters_only("猫と、Dog。") == ["猫", "と", "dog"]
