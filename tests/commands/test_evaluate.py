"""`llmctl evaluate`: its figures by definition, its rows, comparing, resuming, and refusals."""

import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llmctl.config.commands.evaluate import EvaluateConfig
from llmctl.data.append_log import AppendLog
from llmctl.data.chat.render import ChatFormat
from llmctl.evaluate import compare, perplexity
from llmctl.evaluate.aggregate import compute_figures
from llmctl.evaluate.few_shot import FewShotFormat, choose_shots
from llmctl.evaluate.inputs import EvaluationExample
from llmctl.evaluate.scorers import Scorer, extract
from llmctl.evaluate.task import EvaluationTask, RowsInMemory, run_task
from llmctl.models.loading import load_causal_lm, load_config, load_tokenizer
from llmctl.runs.ownership import ROWS
from llmctl.training.classify import class_counts, macro_f1
from tests.processes import shown_on_a_terminal
from tests.run_files import edit_json, manifest, metrics, write_rows

TEXTS = ["The cat sees the river.", "A dog likes many stars. My friend finds a song.", "The house"]
PAIRS = [
    ("The cat", "sees the river."),
    ("A dog", "likes a red ball."),
    ("My friend", "finds a song."),
    ("The old man", "paints the house."),
    ("Our teacher", "follows the garden."),
    ("A small bird", "remembers many stars."),
]
SHORT = ("--max-new-tokens", 8, "--threads", 1)


@pytest.fixture
def texts(tmp_path):
    return write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture
def pairs(tmp_path):
    return write_rows(tmp_path / "pairs.jsonl", [{"prompt": p, "response": r} for p, r in PAIRS])


@pytest.fixture
def figures(cli):
    """Run `evaluate` and return its object."""

    def run(model, *arguments):
        result = cli("evaluate", "--model", model, "--json", *arguments)
        assert result.code == 0, result.err
        return json.loads(result.out)

    return run


def question(prompt, reference=None, line=1):
    return EvaluationExample(
        ({"role": "user", "content": prompt},), reference, None, "data.jsonl", line
    )


# Texts


def plain_nats(model, tokens):
    """Of a plain forward over the whole text: the nats of all tokens but the first."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss) * (len(tokens) - 1)


def test_perplexity_is_the_exponential_of_the_mean_loss(figures, roomy, texts, tmp_path):
    found = figures(roomy, "--data", texts, "-o", tmp_path / "run", "--threads", 1)
    model = load_causal_lm(str(roomy), dtype=torch.float32)
    tokenizer = load_tokenizer(str(roomy))
    encoded = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    nats = sum(plain_nats(model, tokens) for tokens in encoded)
    tokens, size = sum(len(t) - 1 for t in encoded), sum(len(text.encode()) for text in TEXTS)
    assert (found["tokens"], found["bytes"], found["rows"]) == (tokens, size, 3)
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    rows = metrics(tmp_path / "run", ROWS)
    assert [row["line"] for row in rows] == [1, 2, 3]
    assert sum(row["nats"] for row in rows) == pytest.approx(nats, rel=1e-5)
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert [facts["role"] for facts in manifest["inputs"]] == ["model", "data"]
    assert all(re.fullmatch("[0-9a-f]{64}", facts["sha256"]) for facts in manifest["inputs"])
    assert manifest["result"] == found
    without = figures(roomy, "--data", texts, "--no-end", "--threads", 1)
    assert without["tokens"] == tokens - 3


def test_a_long_text_is_done_in_parts_that_add_up(figures, roomy, tmp_path, monkeypatch):
    text = tmp_path / "long.txt"
    text.write_text("The old man remembers a red ball. Héllo. " * 40)
    window = ("--context", 32, "--stride", 8, "--threads", 1)
    whole = figures(roomy, "--data", text, *window)
    monkeypatch.setattr(perplexity, "PART", 2)
    parted = figures(roomy, "--data", text, *window, "-o", tmp_path / "run")
    assert parted["rows"] > whole["rows"] > 1
    assert parted["bytes"] == whole["bytes"] == len(text.read_bytes())
    assert parted["tokens"] == whole["tokens"]
    assert parted["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    quick = figures(roomy, "--data", text, "--context", 32, "--stride", 32, "--threads", 1)
    assert quick["tokens"] == whole["tokens"]
    assert quick["loss"] != whole["loss"]


def test_stdout_is_the_path_or_the_figures(cli, roomy, texts, tmp_path):
    arguments = ("evaluate", "--model", roomy, "--data", texts, "--threads", 1)
    assert cli(*arguments, "-o", tmp_path / "run").out == f"{tmp_path / 'run'}\n"
    result = cli(*arguments)
    assert [line.split()[0] for line in result.out.splitlines()] == [
        *("perplexity", "loss", "bits_per_byte", "tokens", "bytes")
    ]
    assert "bits_per_byte" in result.err
    planned = cli(*arguments, "--dry-run", "-o", tmp_path / "none")
    assert "stage: evaluate" in planned.out
    assert "3 rows (documents)" in planned.err
    assert not (tmp_path / "none").exists()


def test_a_terminal_shows_the_figures_once(roomy, texts):
    command = ("evaluate", "--model", roomy, "--data", texts)
    shown = shown_on_a_terminal(*command, stderr=subprocess.STDOUT, TERM="vt100")
    assert shown.count("bits_per_byte") == 1


def test_perplexity_of_answers_is_that_of_their_tokens(figures, roomy, pairs):
    found = figures(roomy, "--data", pairs, "--threads", 1)
    model = load_causal_lm(str(roomy), dtype=torch.float32)
    chat, nats, count = ChatFormat(load_tokenizer(str(roomy))), 0.0, 0
    for prompt, response in PAIRS:
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": response},
        ]
        (encoded,) = chat.encode_conversation(messages, "completion")
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([encoded.tokens])).logits[0].double()
        for place, counts in enumerate(encoded.trained):
            if counts:
                nats -= float(torch.log_softmax(logits[place - 1], -1)[encoded.tokens[place]])
                count += 1
    assert found["tokens"] == count
    assert found["loss"] == pytest.approx(nats / count, rel=1e-4)
    assert found["bytes"] == sum(len(response) for _, response in PAIRS)


# Answers


def test_answers_are_scored_against_their_references(figures, roomy, pairs, tmp_path):
    every = ("--metrics", "rouge,bleu,chrf", "--metrics", "wer,exact,perplexity")
    first = figures(roomy, "--data", pairs, *every, *SHORT, "-o", tmp_path / "first")
    rows = metrics(tmp_path / "first", ROWS)
    assert [row["prompt"] for row in rows] == [prompt for prompt, _ in PAIRS]
    assert first["exact"] == sum(row["exact"] for row in rows) / len(rows)
    assert first["rougeL"] == pytest.approx(sum(row["rougeL"] for row in rows) / len(rows))
    errors, words = (sum(row[key] for row in rows) for key in ("word_errors", "words"))
    assert first["wer"] == errors / words
    assert words == sum(len(response.split()) for _, response in PAIRS)
    assert first["cut_share"] == sum(row["finish_reason"] == "length" for row in rows) / 6
    # what the model says is right now, but for one answer
    said = [{"prompt": row["prompt"], "response": row["response"].strip() or "."} for row in rows]
    said[2]["response"] = "something else"
    right = figures(
        roomy, "--data", write_rows(tmp_path / "said.jsonl", said), "--metrics", "exact", *SHORT
    )
    assert right["exact"] == pytest.approx(5 / 6)


def test_rows_are_the_same_twice_whatever_the_batch(figures, roomy, pairs, tmp_path):
    hot = ("--metrics", "exact", "--temperature", 1.0, "--seed", 5, *SHORT)
    for name, size in (("a", 16), ("b", 16), ("c", 1)):
        figures(roomy, "--data", pairs, *hot, "--batch-size", size, "-o", tmp_path / name)
    first, again, alone = (metrics(tmp_path / name, ROWS) for name in "abc")
    assert first == again == alone
    figures(roomy, "--data", pairs, *hot, "--seed", 6, "-o", tmp_path / "d")
    assert metrics(tmp_path / "d", ROWS) != first


def test_columns_and_limit(figures, roomy, tmp_path):
    data = write_rows(tmp_path / "qa.jsonl", [{"q": p, "a": r, "n": 1} for p, r in PAIRS])
    columns = ("--columns", "prompt=q,response=a", "--metrics", "exact", "--limit", 2)
    figures(roomy, "--data", data, *columns, *SHORT, "-o", tmp_path / "run")
    assert [row["reference"] for row in metrics(tmp_path / "run", ROWS)] == [
        r for _, r in PAIRS[:2]
    ]


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (r"#### (-?[\d,]+)", "so 3\n#### 12\nno, #### 18", "18"),
        (r"\d+", "3 and 4", "4"),
        (r"(a)|(b)", "xb", "b"),
        (r"#### (\d+)", "none", None),
    ],
)
def test_the_answer_is_the_last_match(pattern, text, answer):
    assert extract(re.compile(pattern), text) == answer


def test_exact_looks_at_the_answer_alone():
    scorer = Scorer(("exact",), re.compile(r"#### (\S+)"), ())
    assert scorer.score("I think #### 18", "9 * 2\n#### 18")["exact"] == 1.0
    nothing = {"answer": None, "expected": "18", "compared": None, "exact": 0.0}
    assert scorer.score("18", "#### 18") == nothing
    assert Scorer(("exact",), None, ()).score(" The River. ", "the  river")["exact"] == 1.0


# Scores as they are published or defined


def test_rouge_is_that_of_its_library():
    """The example of rouge-score's README."""
    scorer = Scorer(("rouge",), None, ())
    found = scorer.score(
        "The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog"
    )
    assert found["rouge1"] == pytest.approx(2 * 0.75 * 6 / 9 / (0.75 + 6 / 9))
    assert found["rougeL"] == pytest.approx(2 * 0.625 * 5 / 9 / (0.625 + 5 / 9))


def test_word_error_rate_is_that_of_its_library():
    """The examples of jiwer's documentation."""
    pairs = [("hello duck", "hello world"), ("this is a test", "this is a test")]
    rows = [Scorer(("wer",), None, ()).score(*pair) for pair in pairs]
    assert [row["word_errors"] / row["words"] for row in rows] == [0.5, 0.0]
    assert compute_figures(rows, ["wer"])["wer"] == pytest.approx(1 / 6)


def test_bleu_and_chrf_are_those_of_sacrebleu():
    """The sentences of its README; BLEU by its definition in plain floats."""
    said = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    right = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]
    rows = [{"response": s, "reference": r} for s, r in zip(said, right, strict=True)]
    rows = [{**row, **Scorer(("bleu", "chrf"), None, ()).score(*row.values())} for row in rows]
    found = compute_figures(rows, ["bleu", "chrf"])
    words = [re.findall(r"\w+(?:'\w+)?|\.", text) for text in (*said, *right)]
    ours, theirs = words[:3], words[3:]
    product = 1.0
    for n in range(1, 5):
        grams = [[tuple(w[i : i + n]) for i in range(len(w) - n + 1)] for w in (*ours, *theirs)]
        hits = sum(
            min(a.count(gram), b.count(gram))
            for a, b in zip(grams[:3], grams[3:], strict=True)
            for gram in set(a)
        )
        product *= hits / sum(map(len, grams[:3]))
    lengths = [sum(map(len, part)) for part in (ours, theirs)]
    penalty = min(1.0, math.exp(1 - lengths[1] / lengths[0]))
    assert found["bleu"] == pytest.approx(100 * penalty * product**0.25)
    assert rows[0]["bleu"] == pytest.approx(100)
    assert rows[0]["chrf"] == pytest.approx(100)
    assert 0 < found["chrf"] < 100


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("negative", "negative"),
        ("I say: Positive, not negative", "positive"),
        ("unpositive", None),
        ("very negative", "very negative"),
        ("nothing", None),
    ],
)
def test_the_label_is_the_text_or_the_one_that_it_names(text, label):
    scorer = Scorer(("accuracy",), None, ("positive", "negative", "very negative"))
    assert scorer.score(text, "positive")["label"] == label


def test_f1_is_the_mean_over_labels():
    draw = np.random.default_rng(0)
    right, given = draw.integers(0, 3, 50), draw.integers(0, 3, 50)
    names = ["a", "b", "c"]
    rows = [
        {"reference_label": names[r], "label": names[g], "right": float(r == g)}
        for r, g in zip(right, given, strict=True)
    ]
    counts = class_counts(torch.from_numpy(right), torch.from_numpy(given), 3)
    assert compute_figures(rows, ["f1"])["f1"] == pytest.approx(macro_f1(counts))
    missed = [{"reference_label": "a", "label": None}, {"reference_label": "a", "label": "a"}]
    assert compute_figures(missed, ["f1"])["f1"] == pytest.approx(2 / 3)


# Examples before the question


def test_examples_are_never_the_row_itself():
    rows = [question(str(k), "answer", k) for k in range(8)]
    prompts = choose_shots(rows, rows, 3, seed=1)
    for prompt in prompts:
        assert len(prompt.shots) == 3
        assert prompt.example not in prompt.shots
    assert prompts == choose_shots(rows, rows, 3, seed=1)
    assert prompts != choose_shots(rows, rows, 3, seed=2)
    held = choose_shots([*rows, question("0", "other", 9)], None, 3, seed=1)
    assert all(p.shots == held[0].shots for p in held)
    fewer = choose_shots([*rows, question("0", "other", 9)], None, 2, seed=1)
    assert fewer[0].shots == held[0].shots[:2]
    taken = {shot.text for shot in held[0].shots}
    assert taken.isdisjoint(p.example.text for p in held)
    assert taken | {p.example.text for p in held} == {str(k) for k in range(8)}


def test_examples_stand_before_the_question(roomy):
    tokenizer, shape = load_tokenizer(str(roomy)), load_config(str(roomy))
    (prompt,) = choose_shots([question("A dog")], [question("The cat", "sees.", 2)], 1, 0)
    plain = FewShotFormat(tokenizer, shape, chat=False, system=None, clock=None)
    assert tokenizer.decode(plain.encode_prompt(prompt)[1:]) == "The cat sees.\n\nA dog"
    chat = FewShotFormat(tokenizer, shape, chat=True, system="Be brief.", clock=None)
    assert chat.messages(prompt) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "The cat"},
        {"role": "assistant", "content": "sees."},
        {"role": "user", "content": "A dog"},
    ]
    reply = chat.encode_with_reference(prompt).tokens
    assert reply[: len(chat.encode_prompt(prompt))] == chat.encode_prompt(prompt)


def test_examples_that_do_not_fit_are_refused_with_how_many_do(cli, roomy, pairs, tmp_path):
    more = write_rows(
        tmp_path / "shots.jsonl",
        [{"prompt": f"{p} {k}", "response": r} for k in range(4) for p, r in PAIRS],
    )
    asked = ("evaluate", "--model", roomy, "--data", pairs, "--metrics", "exact", *SHORT)
    refused = cli(*asked, "--shots", 20, "--shots-data", more)
    assert refused.code == 3
    assert "--shots 20 do not fit" in refused.err
    fitting = int(re.search(r"(\d+) fit: --shots", refused.err)[1])
    assert fitting > 0
    again = cli(*asked, "--shots", fitting, "--shots-data", more, "-o", tmp_path / "run")
    assert again.code == 0, again.err
    assert cli(*asked, "--shots", fitting + 1, "--shots-data", more).code == 3
    assert json.loads((tmp_path / "run/manifest.json").read_text())["inputs"][-1]["role"] == "shots"


def test_examples_are_not_cut_off_for_perplexity(cli, roomy, pairs):
    """A window that holds the question alone would measure it without its examples."""
    asked = ("evaluate", "--model", roomy, "--data", pairs, "--shots", 2, "--threads", 1)
    whole = cli(*asked)
    assert whole.code == 0, whole.err
    refused = cli(*asked, "--context", 60)
    assert refused.code == 3
    assert "--shots 2 do not fit" in refused.err
    assert "0 fit: --shots 0, or a larger --context" in refused.err
    length = int(re.search(r"takes (\d+) tokens", refused.err)[1])
    assert "\n1 fit: --shots 1" in cli(*asked, "--context", length - 1).err
    assert cli(*asked, "--context", length).code == 0


# Labels


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    rows = [
        {"text": f"{who} {what}", "label": "cat" if who == "The cat" else "dog"}
        for who in ("The cat", "A dog")
        for what in ("sees the river.", "likes a song.", "finds many stars.", "paints.", "follows.")
    ]
    return write_rows(tmp_path_factory.mktemp("labels") / "labels.jsonl", rows)


@pytest.fixture(scope="module", params=[(), ("--lora",)], ids=["full", "adapter"])
def classifier(request, cli, roomy, labelled, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "classifier"
    steps = ("--max-steps", 12, "--batch-size", 4, "--lr", 5e-3, "--val-size", 0, "--threads", 1)
    tuned = ("sft", "--task", "classify", "--model", roomy, "--data", labelled, *steps)
    result = cli(*tuned, *request.param, "-o", out)
    assert result.code == 0, result.err
    return out


def test_a_classifier_is_judged_as_used(figures, classifier, labelled, tmp_path):
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification

    found = figures(classifier, "--data", labelled, "--threads", 1, "-o", tmp_path / "run")
    folder = classifier / "model"
    kind = AutoModelForSequenceClassification
    if not folder.exists():
        folder, kind = classifier / "adapter", AutoPeftModelForSequenceClassification
    options = {} if kind is AutoModelForSequenceClassification else {"num_labels": 2}
    model, tokenizer = kind.from_pretrained(folder, **options).eval(), load_tokenizer(str(folder))
    if options:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    right = 0
    for row in metrics(tmp_path / "run", ROWS):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokenizer(row["prompt"])["input_ids"]])).logits
        label = ("cat", "dog")[int(logits.argmax())]
        assert row["label"] == label
        assert row["probability"] == pytest.approx(float(logits.softmax(-1).max()), rel=1e-4)
        right += label == row["reference"]
    assert found["accuracy"] == right / 10
    assert found["accuracy"] >= 0.8, "it learned"
    assert 0 < found["f1"] <= 1


def test_a_writer_is_judged_by_the_labels_that_it_names(figures, roomy, labelled, tmp_path):
    found = figures(roomy, "--data", labelled, *SHORT, "--shots", 2, "-o", tmp_path / "run")
    rows = metrics(tmp_path / "run", ROWS)
    assert len(rows) == 8
    assert found["accuracy"] == sum(row["label"] == row["reference"] for row in rows) / 8
    for row in rows:
        named = [label for label in ("cat", "dog") if re.search(rf"\b{label}\b", row["response"])]
        assert row["label"] == (named[0] if len(named) == 1 else None)


# Two models


def test_two_models_on_the_same_texts(figures, roomy, base, texts, tmp_path):
    one, other = (
        figures(m, "--data", texts, "--context", 32, "--threads", 1) for m in (roomy, base)
    )
    both = ("--compare", base, "--context", 32, "--threads", 1)
    found = figures(roomy, "--data", texts, *both, "-o", tmp_path / "run")
    assert found["loss"] == one["loss"]
    assert found["compare"]["loss"] == other["loss"]
    for name in ("loss", "bits_per_byte"):
        apart = found["differences"][name]
        assert apart["difference"] == pytest.approx(one[name] - other[name])
        assert apart["low"] <= apart["difference"] <= apart["high"]
    assert [row["side"] for row in metrics(tmp_path / "run", ROWS)] == ["model"] * 3 + [
        "compare"
    ] * 3
    assert figures(roomy, "--data", texts, *both)["differences"] == found["differences"]


def test_a_model_does_not_differ_from_itself(figures, roomy, pairs):
    found = figures(roomy, "--data", pairs, "--metrics", "rouge", "--compare", roomy, *SHORT)
    nothing = {"difference": 0.0, "low": 0.0, "high": 0.0}
    assert found["differences"] == dict.fromkeys(("rouge1", "rouge2", "rougeL"), nothing)


def test_the_interval_is_that_of_a_plain_bootstrap():
    """Rows are drawn in pairs: what both have in common does not widen the interval."""
    draw = np.random.default_rng(0)
    common, gain = draw.normal(0, 10, 200), draw.normal(0.5, 1, 200)
    ones = np.ones(200)
    found = compare.difference(
        np.stack([common + gain, ones], 1), np.stack([common, ones], 1), seed=3
    )
    drawn = np.sort([gain[draw.integers(0, 200, 200)].mean() for _ in range(4000)])
    assert found["difference"] == pytest.approx(gain.mean())
    assert found["low"] == pytest.approx(drawn[100], abs=0.02)
    assert found["high"] == pytest.approx(drawn[3900], abs=0.02)
    few = compare.difference(ones[:1, None].repeat(2, 1), ones[:1, None].repeat(2, 1), 0)
    assert few == {"difference": 0.0, "low": None, "high": None}


def test_documents_of_several_parts_are_drawn_whole():
    ours = [{"document": d, "nats": 1.0, "tokens": 2, "bytes": 3} for d in (0, 0, 1)]
    theirs = [{"document": d, "nats": 1.0, "tokens": 5, "bytes": 3} for d in (0, 1)]
    one, other = compare.pair_rows(ours, theirs)
    assert [row["nats"] for row in one] == [2.0, 1.0]
    assert len(other) == 2


def test_losses_by_the_token_are_compared_of_one_tokenizer_only(
    cli, figures, roomy, corpus, texts, tmp_path
):
    shape = ("--layers", 1, "--hidden", 16, "--heads", 1, "--context", 32, "--batch-size", 2)
    made = cli("tokenize", "--data", corpus, "--vocab-size", 280, "-o", tmp_path / "tok")
    assert made.code == 0, made.err
    other = ("--tokens", tmp_path / "tok", *shape, "--max-steps", 1, "--threads", 1)
    made = cli("pretrain", *other, "-o", tmp_path / "other")
    assert made.code == 0, made.err
    found = figures(roomy, "--data", texts, "--compare", tmp_path / "other", "--threads", 1)
    assert found["tokens"] != found["compare"]["tokens"]
    assert set(found["differences"]) == {"bits_per_byte"}


def test_a_reward_model_judges(cli, figures, roomy, base, pairs, tmp_path):
    steps = ("--max-steps", 3, "--batch-size", 2, "--val-size", 0, "--threads", 1)
    trained = cli(
        *("reward", "--model", roomy, "--data", "builtin:preferences", *steps),
        *("-o", tmp_path / "judge"),
    )
    assert trained.code == 0, trained.err
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": p} for p, _ in PAIRS])
    judged = ("--reward-model", tmp_path / "judge", "--plain", *SHORT)
    found = figures(roomy, "--data", prompts, *judged, "--compare", base, "-o", tmp_path / "run")
    sides = [
        [r["reward"] for r in metrics(tmp_path / "run", ROWS) if r["side"] == side]
        for side in ("model", "compare")
    ]
    wins = sum((a > b) + 0.5 * (a == b) for a, b in zip(*sides, strict=True))
    assert found["win_rate"] == pytest.approx(wins / 6)
    assert found["win_rate_low"] < found["win_rate"] < found["win_rate_high"]
    assert found["reward"] == pytest.approx(sum(sides[0]) / 6)
    assert found["differences"]["reward"]["difference"] == pytest.approx(
        (sum(sides[0]) - sum(sides[1])) / 6
    )
    refused = cli("evaluate", "--model", tmp_path / "judge", "--data", pairs)
    assert refused.code == 4
    assert "reward model" in refused.err
    assert manifest(tmp_path / "run")["score_at"] == "end-of-turn"

    foreign = shutil.copytree(tmp_path / "judge/model", tmp_path / "foreign")
    judge = AutoTokenizer.from_pretrained(foreign)
    judge.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    judge.save_pretrained(foreign)
    edit_json(foreign / "config.json", score_at=None)
    scorer = AutoModelForSequenceClassification.from_pretrained(foreign)
    for flags, said, end in (((), True, ""), (("--score-at", "last-token"), False, "\n")):
        out = tmp_path / f"judged{len(flags)}"
        stops = [word for letter in "aeinorst. " for word in ("--stop", letter)]
        options = ("--reward-model", foreign, "--plain", *SHORT, *stops, *flags, "-o", out)
        done = cli("evaluate", "--model", roomy, "--data", prompts, *options)
        assert (done.code, "--score-at last-token" in done.err) == (0, said), done.err
        assert manifest(out)["score_at"] == ("last-token" if flags else "end-of-turn")
        row = next(row for row in metrics(out, ROWS) if row["finish_reason"] != "length")
        turns = f"user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n{row['response']}"
        text = f"<|im_start|>{turns}<|im_end|>{end}"
        inputs = judge(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert row["reward"] == pytest.approx(scorer(inputs).logits.item(), rel=1e-3)
    refused = cli("evaluate", "--model", roomy, "--data", pairs, "--score-at", "last-token")
    assert (refused.code, "goes with --reward-model" in refused.err) == (2, True)


# Benchmarks


@pytest.fixture
def benchmark(tmp_path):
    """A multiple-choice task of lm-eval, and one that generates, on local data."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"q": p, "choices": [r, "xyzzy qux."], "gold": 0} for p, r in PAIRS]
    data = write_rows(tmp_path / "choices.jsonl", rows)
    common = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        "test_split: test\ndoc_to_text: '{{q}}'\n"
    )
    (folder / "pick.yaml").write_text(
        f"task: pick\n{common}output_type: multiple_choice\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n"
    )
    (folder / "say.yaml").write_text(
        f"task: say\n{common}output_type: generate_until\ndoc_to_target: '{{{{choices[0]}}}}'\n"
        "generation_kwargs: {max_gen_toks: 4, until: ['.']}\n"
        "metric_list:\n  - metric: exact_match\n"
    )
    return folder


@pytest.mark.slow  # importing lm-eval takes seconds
@pytest.mark.filterwarnings("ignore")
def test_tasks_are_those_of_lm_eval(cli, figures, roomy, benchmark, tmp_path, monkeypatch):
    run = ("--tasks", "pick,say", "--task-path", benchmark, "--plain", "--threads", 1)
    found = figures(roomy, *run, "--compare", roomy, "-o", tmp_path / "run")
    model, tokenizer = load_causal_lm(str(roomy), dtype=torch.float32), load_tokenizer(str(roomy))

    def cost(prompt, answer):
        both = torch.tensor([tokenizer(f"{prompt} {answer}")["input_ids"]])
        start = len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logs = torch.log_softmax(model(input_ids=both).logits[0].double(), -1)
        return sum(float(logs[i - 1, both[0, i]]) for i in range(start, both.shape[1]))

    right = sum(cost(p, r) > cost(p, "xyzzy qux.") for p, r in PAIRS)
    assert found["pick/acc"] == right / 6 > 0.5
    assert "say/exact_match" in found
    assert found["differences"]["pick/acc"]["difference"] == 0.0
    samples = metrics(tmp_path / "run", "samples.jsonl")
    assert {sample["task"] for sample in samples} == {"pick", "say"}
    assert len(samples) == 24
    append = AppendLog.append

    def stopping(self, row):
        if row["task"] == "say":
            raise KeyboardInterrupt
        append(self, row)

    monkeypatch.setattr(AppendLog, "append", stopping)
    stopped = cli("evaluate", "--model", roomy, *run, "--compare", roomy, "-o", tmp_path / "part")
    monkeypatch.setattr(AppendLog, "append", append)
    assert stopped.code == 130
    again = figures(roomy, *run, "--compare", roomy, "-o", tmp_path / "part", "--resume")
    assert {**again, "out": None} == {**found, "out": None}
    for name in (ROWS, "samples.jsonl"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    gated = cli(
        *("evaluate", "--model", roomy, "--tasks", "pick", "--task-path", benchmark, "--plain"),
        *("--limit", 2, "--threads", 1, "--require", "pick/acc>1"),
    )
    assert gated.code == 8


@pytest.mark.slow  # importing lm-eval takes seconds
@pytest.mark.filterwarnings("ignore")
def test_a_task_that_is_not_there_is_refused(cli, roomy, benchmark, monkeypatch):
    import lm_eval.tasks

    whole = lm_eval.tasks.TaskManager  # which takes half a minute to index thousands of files

    def of_folder(**options):
        return whole(include_path=options["include_path"], include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", of_folder)
    result = cli("evaluate", "--model", roomy, "--tasks", "pikk", "--task-path", benchmark)
    assert result.code == 2
    assert "lm-eval knows no such task" in result.err
    assert "did you mean" in result.err


# Rows that a chat template refuses

ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def strict(roomy, tmp_path):
    """The model with a template that wants roles to alternate."""
    shutil.copytree(roomy / "model", tmp_path / "strict")
    (tmp_path / "strict" / "chat_template.jinja").write_text(ALTERNATING)
    return tmp_path / "strict"


@pytest.fixture
def chats(tmp_path):
    """Conversations, of which the third has two turns of the user in a row."""
    rows = [[{"role": "user", "content": p}, {"role": "assistant", "content": r}] for p, r in PAIRS]
    rows[2].insert(0, {"role": "user", "content": "Well."})
    return write_rows(tmp_path / "chats.jsonl", [{"messages": row} for row in rows])


@pytest.mark.parametrize("metrics", ["perplexity", "exact", "perplexity,exact"])
def test_a_row_that_one_of_two_models_refuses_is_left_out_of_both(
    cli, figures, roomy, strict, chats, metrics
):
    run = ("--data", chats, "--metrics", metrics, "--max-new-tokens", 2, "--threads", 1)
    both = (*run, "--compare", strict)
    found = figures(roomy, *both, "--skip-bad-rows", 1)
    kept = [line for n, line in enumerate(chats.read_text().splitlines(keepends=True)) if n != 2]
    (chats.parent / "kept.jsonl").write_text("".join(kept))
    expected = figures(roomy, "--data", chats.parent / "kept.jsonl", *both[2:])
    assert (found["rows"], found["compare"]) == (5, expected["compare"])
    assert found == expected
    refused = cli("evaluate", "--model", roomy, *both, "--dry-run")
    assert refused.code == 3
    assert f"{chats}:3: the chat template refuses these messages: roles must" in refused.err
    assert "--chat-template" not in refused.err
    assert figures(roomy, *run)["rows"] == 6


def test_examples_and_references_that_it_refuses_are_placed(cli, strict, pairs, chats, tmp_path):
    run = ("evaluate", "--model", strict, "--data", pairs, "--metrics", "exact", *SHORT)
    run = (*run, "--dry-run")
    shots = ("--shots", 1, "--shots-data", chats)
    refused = cli(*run, *shots)
    assert refused.code == 3
    assert f"{chats}:3: the chat template refuses" in refused.err
    assert cli(*run, *shots, "--skip-bad-rows", 1).code == 0
    (strict / "chat_template.jinja").write_text(
        ALTERNATING.replace("{{ m.content }}", "{{ m.content.split('#')[0] }}")
    )
    lossy = write_rows(tmp_path / "lossy.jsonl", [{"prompt": "a", "response": "b # c"}])
    run = ("evaluate", "--model", strict, "--data", lossy, "--dry-run")
    refused = cli(*run, "--metrics", "perplexity")
    assert refused.code == 3
    assert f"{lossy}:1: the chat template leaves out the content of message 2" in refused.err
    assert cli(*run, "--metrics", "exact").code == 0
    left = cli(*run, "--metrics", "perplexity", "--skip-bad-rows", 1)
    assert (left.code, "no row is left to evaluate" in left.err) == (3, True), left.err


def test_a_prompt_that_is_too_long_is_a_bad_row(cli, figures, roomy, tmp_path):
    rows = [{"prompt": "The cat sees " * n, "response": "it."} for n in (1, 200, 2)]
    file = write_rows(tmp_path / "long.jsonl", rows)
    run = ("--data", file, "--metrics", "exact", "--max-new-tokens", 2, "--threads", 1)
    refused = cli("evaluate", "--model", roomy, *run)
    assert refused.code == 3
    assert f"{file}:2: the prompt has " in refused.err
    assert figures(roomy, *run, "--skip-bad-rows", 1)["rows"] == 2


# Resuming


@pytest.mark.parametrize("after", [1, 4, 7])
def test_a_run_that_was_stopped_ends_the_same(
    cli, figures, roomy, base, pairs, tmp_path, after, monkeypatch
):
    run = ("--data", pairs, "--metrics", "exact,rouge", "--temperature", 1.0, *SHORT)
    run = (*run, "--compare", base, "--plain", "--batch-size", 4)
    whole = figures(roomy, *run, "-o", tmp_path / "whole")
    append, count = AppendLog.append, 0

    def stopping(self, row):
        nonlocal count
        if count == after:
            raise KeyboardInterrupt
        count += 1
        append(self, row)

    monkeypatch.setattr(AppendLog, "append", stopping)
    stopped = cli("evaluate", "--model", roomy, *run, "-o", tmp_path / "part")
    monkeypatch.setattr(AppendLog, "append", append)
    assert stopped.code == 130
    status = json.loads((tmp_path / "part/status.json").read_text())
    assert (status["state"], status["resumable"]) == ("preempted", True)
    assert len(metrics(tmp_path / "part", ROWS)) == after
    with (tmp_path / "part" / ROWS).open("a") as file:
        file.write('{"side": "mod')  # a kill in the middle of a row
    again = figures(roomy, *run, "-o", tmp_path / "part", "--resume")
    assert (tmp_path / "part" / ROWS).read_bytes() == (tmp_path / "whole" / ROWS).read_bytes()
    assert {**again, "out": None} == {**whole, "out": None}
    finished = cli("evaluate", "--model", roomy, *run, "-o", tmp_path / "part", "--resume")
    assert finished.code == 0
    assert "already complete" in finished.err


def test_a_chunk_is_always_the_same_units():
    """What shares a batch may change a last bit: a chunk that was cut off is computed whole."""
    held, asked = RowsInMemory(), list[range]()

    def compute(units):
        asked.append(units)
        return [{"number": number} for number in units]

    for number in range(6):
        held.append({"side": "model", "row": number, "number": number})
    rows = run_task(EvaluationTask(11, 4, compute), "model", held, "")
    assert asked == [range(4, 8), range(8, 11)]
    assert [row["number"] for row in rows] == [row["row"] for row in rows] == list(range(11))


def test_a_run_is_not_resumed_as_another(cli, roomy, pairs, tmp_path):
    run = ("evaluate", "--model", roomy, "--data", pairs, "--metrics", "exact", *SHORT)
    failed = cli(*run, "-o", tmp_path / "run", "--require", "exact>2")
    assert failed.code == 8
    assert "exact is 0, required > 2" in failed.err
    rows = (tmp_path / "run" / ROWS).read_bytes()
    other = cli(*run, "-o", tmp_path / "run", "--resume", "--seed", 1)
    assert other.code == 4
    assert "seed: 0 -> 1" in other.err
    assert (tmp_path / "run" / ROWS).read_bytes() == rows
    lower = cli(*run, "-o", tmp_path / "run", "--resume", "--require", "exact<2")
    assert lower.code == 0, lower.err
    assert (tmp_path / "run" / ROWS).read_bytes() == rows
    anew = cli(*run, "-o", tmp_path / "run", "--overwrite")
    assert anew.code == 0, anew.err
    assert (tmp_path / "run" / ROWS).read_bytes() == rows


# Refusals


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "give --data"),
        (("--data", "a.txt", "--tasks", "x"), 2, "one of them"),
        (("--data", "pairs.jsonl", "--metrics", "rogue"), 2, "did you mean rouge?"),
        (("--data", "pairs.jsonl", "--answer-regex", "("), 2, "no regular expression"),
        (("--data", "pairs.jsonl", "--require", "exact"), 2, "expected FIGURE>=NUMBER"),
        (("--data", "pairs.jsonl", "--metrics", "exact", "--require", "exat>1"), 2, "mean exact?"),
        (("--data", "pairs.jsonl", "--resume"), 2, "--resume goes with --out"),
        (("--data", "pairs.jsonl", "--shots-data", "x"), 2, "--shots-data goes with --shots"),
        (("--data", "a.txt", "--task-path", "x"), 2, "--task-path goes with --tasks"),
        (("--tasks", "x", "--metrics", "exact"), 2, "--metrics goes with --data"),
        (("--tasks", "x", "--temperature", 1), 2, "--temperature goes with --data"),
        (("--data", "a.txt", "--context", 500), 2, "the model has 128 positions"),
        (("--data", "a.txt", "--context", 8, "--stride", 9), 2, "more than --context 8"),
        (("--data", "a.txt", "--shots", 2), 2, "--shots goes with questions"),
        (("--data", "pairs.jsonl", "--answer-regex", "x"), 2, "goes with --metrics exact, acc"),
        (("--data", "pairs.jsonl", "--labels", "a"), 2, "goes with --metrics accuracy, f1"),
        (("--data", "pairs.jsonl", "--stride", 4), 2, "--stride goes with texts"),
        (("--data", "pairs.jsonl", "--no-end"), 2, "--no-end goes with texts"),
        (
            ("--data", "pairs.jsonl", "--metrics", "exact", "--context", 9),
            2,
            "--context goes with --metrics perplexity",
        ),
        (("--data", "none.txt"), 3, "no such file"),
        (("--data", "blank.txt"), 3, "no text in it"),
        (("--data", "blank.jsonl"), 3, "no rows in it"),
        (("--data", "a.txt", "--metrics", "rouge"), 3, "this is plain text"),
        (("--data", "texts.jsonl", "--metrics", "rouge"), 3, "no reference for `rouge`"),
        (("--data", "pairs.jsonl", "--shots", 6), 3, "only 6 rows in the data"),
        (
            ("--data", "pairs.jsonl", "--metrics", "exact", "--answer-regex", "#"),
            3,
            "pairs.jsonl:1: --answer-regex finds no answer",
        ),
        (
            ("--data", "pairs.jsonl", "--metrics", "accuracy", "--labels", "a,b"),
            3,
            "none of --labels a,b",
        ),
        (("--tasks", "x", "--task-path", "none"), 3, "no such folder of tasks"),
    ],
)
def test_refusals(cli, roomy, texts, pairs, tmp_path, monkeypatch, arguments, code, message):
    (tmp_path / "a.txt").write_text("The cat.")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "blank.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    result = cli("evaluate", "--model", roomy, *arguments, "--threads", 1)
    assert (result.code, result.out) == (code, "")
    assert message in result.err
    assert len(result.err.strip().splitlines()) <= 3


def test_a_library_that_is_missing_is_named_with_its_extra(cli, roomy, pairs, monkeypatch):
    monkeypatch.setattr("llmctl.errors.find_spec", lambda name: None)
    result = cli("evaluate", "--model", roomy, "--data", pairs, "--metrics", "exact,rouge")
    assert result.code == 5
    assert "needs rouge-score" in result.err
    assert 'pip install "llmctl[evaluate]"' in result.err
    tasks = cli("evaluate", "--model", roomy, "--tasks", "mmlu")
    assert tasks.code == 5
    assert 'pip install "llmctl[lm-eval]"' in tasks.err


def test_an_encoder_without_a_head_is_refused(cli, roomy, texts, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=320, intermediate_size=16, **shape)).save_pretrained(
        tmp_path / "bert"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(roomy / "model" / name, tmp_path / "bert" / name)
    result = cli("evaluate", "--model", tmp_path / "bert", "--data", texts)
    assert result.code == 4
    assert "has no head to judge" in result.err


def test_nothing_is_left_where_it_failed_before_the_first_row(cli, roomy, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 3}\n')
    result = cli(
        "evaluate", "--model", roomy, "--data", tmp_path / "a.jsonl", "-o", tmp_path / "run"
    )
    assert result.code == 3
    assert "a.jsonl:1: `text` is a number" in result.err
    assert not (tmp_path / "run").exists()


def test_greedy_is_the_default():
    assert EvaluateConfig(model="m", data=["a"]).temperature == 0
