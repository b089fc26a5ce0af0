"""Scores of responses in any script and form, and of answers that are numbers."""

import json
import re
import unicodedata

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from llmctl.decode.loop import Response
from llmctl.evaluate.aggregate import compute_figures, count_comparisons
from llmctl.evaluate.scorers import Scorer
from llmctl.ppo.rules import Sample, find_rule
from tests.run_files import write_rows

EVERY = ("rouge", "bleu", "chrf", "wer", "exact")
ALIKE = [
    "今日は天気がとてもいいです。",
    "我们明天去北京看长城。",
    "ฉันรักประเทศไทยมาก",
    "Сегодня хорошая погода, правда?",
]


def figures(pairs, metrics):
    scorer = Scorer(tuple(metrics), None, ())
    rows = [{"response": s, "reference": r, **scorer.score(s, r)} for s, r in pairs]
    return compute_figures(rows, metrics)


def distance(one, other):
    """Edits between two sequences, by the recurrence of Levenshtein."""
    before = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        now = [i]
        for j, b in enumerate(other, start=1):
            now.append(min(before[j] + 1, now[-1] + 1, before[j - 1] + (a != b)))
        before = now
    return before[-1]


@pytest.mark.parametrize("text", ALIKE)
def test_equal_texts_of_any_script_have_full_marks(text):
    found = figures([(unicodedata.normalize("NFD", text), text)], EVERY)
    assert found["rouge1"] == found["rouge2"] == found["rougeL"] == found["exact"] == 1
    assert found["bleu"] == pytest.approx(100)
    assert found["chrf"] == pytest.approx(100)
    assert found["wer"] == 0


def test_a_text_without_spaces_is_compared_by_its_letters():
    said, right = "今日は雨です", "今日は晴れです"
    found = figures([(said, right)], ("rouge", "wer"))
    # 今 日 は で す of 6 and 7; runs of two: 今日 日は です of 5 and 6
    assert found["rouge1"] == pytest.approx(2 * 5 / (6 + 7))
    assert found["rouge2"] == pytest.approx(2 * 3 / (5 + 6))
    assert found["wer"] == pytest.approx(distance(said, right) / 7)


def test_words_of_other_alphabets_are_words():
    found = figures([("красный дом", "красный сад")], ("rouge", "wer"))
    assert found["rouge1"] == found["wer"] == 0.5
    assert figures([("un\ndeux", "un deux")], ("wer",))["wer"] == 0


def test_rouge_of_ascii_is_that_of_its_library():
    pairs = [
        ("The quick_brown fox, 12 times!", "the quick brown foxes - 12.5 times"),
        ("a b c d e", "e d c b a"),
    ]
    for said, right in pairs:
        library = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(right, said)
        ours = Scorer(("rouge",), None, ()).score(said, right)
        assert ours == {kind: score.fmeasure for kind, score in library.items()}


def test_bleu_is_that_of_the_tokenizers_that_sacrebleu_has_for_a_script():
    chinese = [
        ("我们今天去北京看了长城\uff0c很美。", "我们明天去北京看长城\uff0c非常美。"),
        ("他有3只猫和2只狗。", "他养了3只猫、2只狗。"),
    ]
    japanese = [("今日は天気がいいですよ", "今日の天気はとてもいいです")]
    for pairs, tokenize in ((chinese, "zh"), (japanese, "char")):
        said, right = zip(*pairs, strict=True)
        expected = BLEU(tokenize=tokenize).corpus_score(list(said), [list(right)]).score
        assert 0 < expected < 100
        assert figures(pairs, ("bleu",))["bleu"] == pytest.approx(expected)
    western = [("It's 3.5% more, isn't it?", "It was 3.5 % more, wasn't it?")]
    expected = BLEU().corpus_score([western[0][0]], [[western[0][1]]]).score
    assert figures(western, ("bleu",))["bleu"] == pytest.approx(expected)


NUMBERS = [
    ("2125", "2,125", True),
    ("18,", "18", True),
    ("18.", "18", True),
    ("18.00", "18", True),
    ("$18", "18", True),
    ("-$1,000.50", "\N{MINUS SIGN}1000.5", True),
    ("+7", "7.", True),
    (".5", "0.50", True),
    ("-0", "0", True),
    ("50%", "50.0%", True),
    ("\uff11\uff18", "18", True),
    ("12345678901234567890123.0", "12345678901234567890123", True),
    ("12345678901234567890123", "12345678901234567890124", False),
    ("50%", "50", False),
    ("50%", "0.5", False),
    ("18", "-18", False),
    ("1.80", "18", False),
    ("2.125", "2,125", False),
]
TEXTS = [("1,2", "12"), ("18 apples", "18"), ("1 8", "18"), ("$5%", "5"), ("1e3", "1000")]
TEXTS += [("18..", "18"), ("--5", "5"), ("", "0"), ("\N{EURO SIGN}18", "18"), ("1,00", "100")]


@pytest.mark.parametrize(("answer", "reference", "same"), NUMBERS)
def test_answers_that_are_numbers_are_compared_as_numbers(answer, reference, same):
    scorer = Scorer(("exact", "accuracy"), re.compile("<(.*)>"), (reference, "other"))
    scores = scorer.score(f"so <{answer}>", f"<{reference}>")
    assert scores["compared"] == "numbers"
    assert scores["exact"] == scores["right"] == float(same)
    whole = Scorer(("exact",), None, ()).score(answer, reference)
    assert "compared" not in whole
    if (answer, reference) != ("18.", "18"):  # a full stop at the end never counts
        assert whole["exact"] == float(answer.replace("\uff11\uff18", "18") == reference)


@pytest.mark.parametrize(("answer", "reference"), TEXTS)
def test_answers_that_are_more_than_numbers_are_compared_as_text(answer, reference):
    scorer = Scorer(("exact",), re.compile("<(.*)>"), ())
    scores = scorer.score(f"<{answer}>", f"<{reference}>")
    assert (scores["compared"], scores["exact"]) == ("text", 0.0)
    assert scorer.score(f"<{answer}>", f"<{answer}>")["exact"] == 1.0


def test_comparisons_are_counted():
    scorer = Scorer(("exact",), re.compile("<(.*)>"), ())
    pairs = [("<1>", "<1.0>"), ("<x>", "<1>"), ("<2>", "<3>"), ("none", "<4>")]
    rows = [scorer.score(*pair) for pair in pairs]
    assert count_comparisons(rows) == {"numbers": 2, "text": 1}
    assert count_comparisons([{"exact": 1.0}] * 3) == {"text": 3}


@pytest.fixture
def say(monkeypatch):
    """Let the model respond with these texts."""

    def script(*texts):
        def generate(config, evaluated, few_shot_format, model, prompts, first):
            return [
                Response(number, text=texts[number], finish_reason="stop")
                for number in range(first, first + len(prompts))
            ]

        monkeypatch.setattr("llmctl.evaluate.generation_task._generate", generate)

    return script


def test_the_summary_names_the_comparison(cli, base, tmp_path, say):
    rows = [{"prompt": "q", "response": f"so\n#### {n}"} for n in ("2,125", "18", "x7", "9")]
    data = write_rows(tmp_path / "q.jsonl", rows)
    say("#### 2125", "#### 18, so he has 18.", "#### X7", "nothing")
    asked = ("evaluate", "--model", base, "--data", data, "--metrics", "exact", "--threads", 1)
    asked = (*asked, "--max-new-tokens", 4)
    result = cli(*asked, "--answer-regex", r"#### (\S+)", "--json")
    found = json.loads(result.out)
    assert found["exact"] == 0.75
    assert found["comparison"] == {"numbers": 2, "text": 1}
    assert "answers were compared with their references, 2 as numbers and 1 as text" in result.err
    whole = json.loads(cli(*asked, "--json").out)
    assert (whole["exact"], whole["comparison"]) == (0.0, {"text": 4})


def test_responses_that_name_several_labels_are_counted(cli, base, tmp_path, say):
    rows = [{"prompt": "q", "response": label} for label in "ABCB"]
    data = write_rows(tmp_path / "q.jsonl", rows)
    say(" a dog. She ran", "A or B", "C", "Not A, but B")
    asked = ("evaluate", "--model", base, "--data", data, "--metrics", "accuracy")
    asked = (*asked, "--labels", "A,B,C", "--max-new-tokens", 4, "--threads", 1)
    result = cli(*asked, "--json", "-o", tmp_path / "run", "--require", "ambiguous_share<0.2")
    assert result.code == 8
    found = json.loads((tmp_path / "run/manifest.json").read_text())["result"]
    assert (found["accuracy"], found["ambiguous_share"]) == (0.5, 0.25)
    written = (tmp_path / "run/rows.jsonl").read_text().splitlines()
    assert [json.loads(row)["label"] for row in written] == [None, None, "C", "B"]


def test_rules_of_rewards_read_any_script():
    def score(rule, response, reference=None):
        return find_rule(rule)([Sample("?", response, reference, "a.jsonl:1")])[0]

    assert score("exact", unicodedata.normalize("NFD", "Café。"), "café") == 1
    assert score("exact", "\uff14\uff12", "42") == 1
    assert score("length:6", "これは本です") == 0
    assert score("length:12", "これは本です") == pytest.approx(-0.5)
    # 8 runs of three letters, 4 of them different
    assert score("repetition", "はいはいはいはいそう") == pytest.approx(4 / 8 - 1)
    assert score("repetition", "はい はい。") == pytest.approx(0)
