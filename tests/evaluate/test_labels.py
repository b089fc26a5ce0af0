"""Which labels a response names."""

import unicodedata

import pytest

from llmctl.evaluate.labels import named_labels
from llmctl.evaluate.scorers import is_same

LETTERS = ["A", "B", "C", "D", "E"]
ROMAN = ["I", "II", "III", "IV"]


def named(text, labels):
    return named_labels(text, labels, is_same)


@pytest.mark.parametrize(
    "text",
    [
        " a big dog ran to the park",
        "A big dog ran to the park.",
        "It ran. A dog saw it.",
        'He said\n"A dog!"',
        "Once Upon A Time",
        "An A-frame house",
        "I do not know, e.g. a dog",
        "D-Day was in 1944",
        "the U.S.A. of old",
        "Abe and Bob",
        "",
    ],
)
def test_an_article_or_a_part_of_a_word_is_no_letter(text):
    assert named(text, LETTERS) == []


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        ("a", "A"),
        (" (a) ", None),
        ("**B**", "B"),
        ("A) Paris", "A"),
        ("A. Paris", "A"),
        ("A: a dog", "A"),
        ("A\nBecause it is a dog.", "A"),
        ("(A) A dog is one.", "A"),
        ("A is right", "A"),
        ("A because it is a dog", "A"),
        ("The answer is A in this case.", "A"),
        ("I would say it is C, as a dog is", "C"),
        ("Option B seems right", "B"),
        ("答えはAです", "A"),
        ("答え\uff1a\uff22", "B"),
        ("选项D。", "D"),
    ],
)
def test_a_letter_that_stands_by_itself_is_named(text, letter):
    assert named(text, LETTERS) == ([letter] if letter else [])


def test_small_letters_may_be_labels():
    assert named("(B)", ["a", "b"]) == ["b"]
    assert named("it is a", ["a", "b"]) == ["a"]
    assert named("it is a dog", ["a", "b"]) == []


def test_roman_numerals_and_words_of_another_case():
    assert named("I think it is II", ROMAN) == ["II"]
    assert named("I.", ROMAN) == ["I"]
    assert named("So I'd say IV", ROMAN) == ["IV"]
    assert named("the civil mix", ["MIX", "CIVIL"]) == []
    assert named("it is good for us", ["IT", "US"]) == []
    assert named("It is from the US.", ["IT", "US"]) == ["US"]
    assert named("it may rain in June", ["May", "June"]) == ["June"]
    assert named("No, because it is late", ["YES", "NO"]) == ["NO"]
    assert named("clearly Positive", ["positive", "NEGATIVE"]) == ["positive"]
    assert named("clearly negative", ["positive", "NEGATIVE"]) == ["NEGATIVE"]


def test_several_labels_and_those_that_are_turned_down():
    assert named("B or C", LETTERS) == ["B", "C"]
    assert named("A or B", LETTERS) == ["A", "B"]
    assert named("B, yes, B", LETTERS) == ["B"]
    assert named("Not A, but B", LETTERS) == ["B"]
    assert named("It isn't the answer A. It's D.", LETTERS) == ["D"]
    assert named("neither B nor C", LETTERS) == []
    assert named("C rather than D", LETTERS) == ["C"]
    assert named("B. A is wrong, and D isn't an animal.", LETTERS) == ["B"]
    assert named("C) is not right. So it is E.", LETTERS) == ["E"]
    assert named("D. Some say A is right.", LETTERS) == ["D", "A"]
    assert named("positive, not negative", ["positive", "negative"]) == ["positive"]
    assert named("not hate", ["hate", "not hate"]) == ["not hate"]
    assert named("it is not hate, I think", ["hate", "not hate"]) == ["not hate"]
    assert named("very\n negative", ["negative", "very negative"]) == ["very negative"]


def test_labels_of_other_scripts_and_forms():
    assert named("これは犬です。", ["犬", "猫"]) == ["犬"]
    assert named("犬と猫です", ["犬", "猫"]) == ["犬", "猫"]
    assert named("คำตอบคือแมวครับ", ["แมว", "หมา"]) == ["แมว"]
    assert named("정답은 긍정입니다", ["긍정", "부정"]) == ["긍정"]
    assert named("ответ: кошка.", ["кошка", "кот"]) == ["кошка"]
    assert named("यह सही है", ["सही", "गलत"]) == ["सही"]
    decomposed = unicodedata.normalize("NFD", "Je dis café, voilà")
    assert named(decomposed, ["café", "thé"]) == ["café"]


def test_a_number_is_no_part_of_another():
    assert named("about 1.5 or so", ["1", "5"]) == []
    assert named("1,250 people", ["1", "250"]) == []
    assert named("the answer is 5.", ["1", "5"]) == ["5"]
    assert named("it is 5 % or -1", ["1", "5"]) == []
    assert named("I say -1 today", ["-1", "1"]) == ["-1"]
