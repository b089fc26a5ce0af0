"""`llmctl reward`: it learns, its result scores the same anywhere, and bad input is refused."""

import datetime
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from llmctl.errors import ModelError
from llmctl.models.adapters import WEIGHTS
from llmctl.models.loading import load_tokenizer
from llmctl.reward.model import PromptResponse, load_reward_model
from llmctl.training import reward
from llmctl.training.reward import preference_loss
from llmctl.training.reward_report import (
    PairScores,
    calibration_error,
    reliability,
    report,
    spearman,
)
from tests.conftest import flags
from tests.data.test_preferences import tokenizer
from tests.processes import run_llmctl
from tests.run_files import cut_off, manifest, metrics, read_rows, rows_in, write_rows

QUICK = {"batch_size": 8, "threads": 1, "precision": "fp32", "seed": 3, "val_size": 24}
GOOD, BAD, FILLER = ["Hello", "there"], ["What", "?"], ["Hi", "."]


@pytest.fixture
def train(cli):
    def run(model, data, out, **more):
        data = data if isinstance(data, list) else [data]
        return cli("reward", *flags({"model": model, "data": data, **QUICK, **more}), "-o", out)

    return run


def rows(count, seed=0):
    """Prompts of which the good answer has a good word, wherever, and any length."""
    draw = random.Random(seed)

    def answer(word):
        body = [draw.choice(FILLER) for _ in range(draw.randint(1, 6))]
        body.insert(draw.randint(0, len(body)), draw.choice(word))
        return " ".join(body)

    return [
        {
            "prompt": " ".join(draw.choice(FILLER) for _ in range(draw.randint(1, 8))) + f" {n}",
            "chosen": answer(GOOD),
            "rejected": answer(BAD),
        }
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows(200))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A bare encoder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bases") / "bert"
    found = tokenizer("bert")
    found.save_pretrained(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    room = {"intermediate_size": 64, "max_position_embeddings": 48}
    BertModel(BertConfig(vocab_size=len(found), **shape, **room)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny decoder that knows nothing, whose tokenizer has no chat template."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bases") / "llama"
    found = tokenizer("llama")
    found.save_pretrained(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    room = {"intermediate_size": 64, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(found), **shape, **room)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapted(cli, llama, data, tmp_path_factory):
    """A LoRA run, merged too."""
    out = tmp_path_factory.mktemp("runs") / "adapted"
    settings = {"model": llama, "data": [data], **QUICK, "lora": True, "merge": True}
    result = cli("reward", *flags({**settings, "lr": 1e-2, "max_steps": 40}), "--json", "-o", out)
    assert result.code == 0, result.err
    return out, json.loads(result.out)


# --- it learns


def test_it_learns_courtesy_that_length_does_not_tell(cli, roomy, tmp_path):
    out = tmp_path / "run"
    settings = {**QUICK, "max_steps": 40, "lr": 5e-3, "eval_every": 20, "val_size": 100}
    settings = {"model": roomy, "data": ["builtin:preferences"], **settings}
    result = cli("reward", *flags(settings), "--json", "-o", out)
    assert result.code == 0, result.err
    said = json.loads(result.out)
    assert said["val_accuracy"] >= 0.95
    assert said["val_accuracy_interval"][0] > said["val_longer_wins_interval"][1]
    assert 0.4 < said["val_longer_wins"] < 0.6
    assert abs(said["val_length_correlation"]) < 0.5
    assert "the longer response wins" in result.err
    assert "warning" not in result.err
    found = [row for row in metrics(out) if "loss" in row]
    assert found[-1]["loss"] < found[0]["loss"] / 2
    facts = manifest(out)
    assert len(facts["report"]["reliability"]) == 10
    assert facts["report"]["score_std"] > 0.5
    assert facts["inputs"][1]["path"] == "builtin:preferences"
    scorer = load_reward_model(str(out))
    asked = [{"role": "user", "content": "What is 3 + 4?"}]
    kind, rude = scorer.score(
        [
            PromptResponse(asked, "Gladly! 7. I hope that helps."),
            PromptResponse(asked, "7. Now go away."),
        ]
    ).tolist()
    assert kind > rude
    model = AutoModelForSequenceClassification.from_pretrained(out / "model")
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == AutoTokenizer.from_pretrained(out / "model").pad_token_id
    assert model.config.pad_token_id != model.config.eos_token_id


def test_an_encoder_learns_and_is_told_the_two_texts(train, bert, data, tmp_path):
    result = train(bert, data, tmp_path / "run", max_steps=60, lr=5e-3, json=True)
    assert result.code == 0, result.err
    assert json.loads(result.out)["val_accuracy"] >= 0.95
    scorer = load_reward_model(str(tmp_path / "run"))
    assert (scorer.response_format.is_pair, scorer.uses_token_types) == (True, True)
    good, bad = scorer.score(
        [PromptResponse("Hi", "Hi Hello ."), PromptResponse("Hi", "Hi What .")]
    ).tolist()
    assert good > bad


def test_an_adapter_scores_the_same_in_a_fresh_process_and_merged(adapted, tmp_path):
    out, said = adapted
    assert said["val_accuracy"] >= 0.95
    assert said["merge_difference"] < 1e-3
    assert said["trained_parameters"] < said["parameters"]
    assert any("score" in name for name in load_file(out / "adapter" / WEIGHTS))
    code = (
        "import sys; from llmctl.reward.model import *\n"
        "asked = [{'role': 'user', 'content': 'Hi'}]\n"
        "for name in sys.argv[1:]:\n"
        "    model = load_reward_model(name)\n"
        "    samples = [PromptResponse(asked, text) for text in ('Hello .', 'What ?')]\n"
        "    print(*model.score(samples).tolist())"
    )
    folders = [str(out / name) for name in ("adapter", "model")]
    ran = subprocess.run(
        [sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True
    )
    told = [[float(part) for part in line.split()] for line in ran.stdout.splitlines()]
    assert told[0] == pytest.approx(told[1], rel=1e-3)
    assert told[0][0] > told[0][1] + 0.5


def test_merging_later_gives_the_same_model(cli, adapted, tmp_path):
    out, _ = adapted
    result = cli("merge", "--model", out / "adapter", "-o", tmp_path / "merged")
    assert result.code == 0, result.err
    ours, theirs = (
        load_file(run / "model/model.safetensors") for run in (tmp_path / "merged", out)
    )
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight)
    assert load_reward_model(str(tmp_path / "merged")).max_length == 64


def test_a_result_that_scores_otherwise_once_loaded_is_refused(
    train, llama, data, tmp_path, monkeypatch
):
    """What PEFT does where the head is not among what it saves: another head is loaded."""

    def forgetful(folder, **how):
        found = load_reward_model(folder, **how)
        torch.nn.init.normal_(found.model.score.weight)
        return found

    monkeypatch.setattr(reward, "load_reward_model", forgetful)
    result = train(llama, data, tmp_path / "run", max_steps=3)
    assert result.code == 4
    assert "loaded again, this model gives scores that differ by" in result.err


def test_the_best_checkpoint_is_the_result_and_its_figures_are_by_definition(
    train, llama, tmp_path
):
    """There is nothing to learn in these pairs, and so the last checkpoint is not the best."""
    draw = random.Random(2)
    found = [
        {**row, "rejected": " ".join(draw.choice(FILLER + GOOD) for _ in range(4))}
        for row in rows(120)
    ]
    found = [{**r, "chosen": " ".join(draw.choice(FILLER + GOOD) for _ in range(4))} for r in found]
    path = write_rows(tmp_path / "noise.jsonl", found)
    out = tmp_path / "run"
    result = train(llama, path, out, max_steps=40, lr=1e-2, val_size=40, eval_every=5, json=True)
    assert result.code == 0, result.err
    assert "may be no better than a coin" in result.err
    said = json.loads(result.out)
    best = min((r for r in metrics(out) if "val_loss" in r), key=lambda row: row["val_loss"])
    assert (said["best_step"], said["val_loss"]) == (best["step"], best["val_loss"])
    assert best["step"] < 40
    scorer = load_reward_model(str(out))
    losses, right, apart = [], [], []
    for place in manifest(out)["held_out"]:
        row = found[int(place.rsplit(":", 1)[1]) - 1]
        asked = [{"role": "user", "content": row["prompt"]}]
        one, other = (
            float(scorer.score([PromptResponse(asked, row[side])])[0])
            for side in ("chosen", "rejected")
        )
        losses.append(math.log(1 + math.exp(other - one)))
        right.append(one > other)
        apart.append(one - other)
    assert said["val_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert said["val_accuracy"] == pytest.approx(np.mean(right))
    assert said["val_margin"] == pytest.approx(np.mean(apart), rel=1e-3, abs=1e-5)


# --- the loss


def test_published_values_of_the_pairwise_loss():
    """torchtune, tests/torchtune/rlhf/loss/test_dpo_loss.py: -log sigmoid of 0, 1 and 2."""
    for apart, wanted in ((0.0, 0.693147), (1.0, 0.313262), (2.0, 0.126928)):
        one = preference_loss(torch.tensor([apart]), torch.tensor([0.0]))
        assert float(one) == pytest.approx(wanted, abs=1e-6)
        both = preference_loss(torch.tensor([1.0 + apart]), torch.tensor([1.0]))
        assert float(both) == pytest.approx(wanted, abs=1e-6)


def test_margin_weight_and_centering_by_definition():
    chosen, rejected = [1.5, -0.3, 0.2], [0.5, 0.4, -1.0]
    margin, weight, center = [0.0, 0.7, 1.5], [1.0, 0.2, 0.5], 0.05
    wanted = sum(
        w * (math.log(1 + math.exp(-(c - r - m))) + center * (c + r) ** 2)
        for c, r, m, w in zip(chosen, rejected, margin, weight, strict=True)
    )
    found = preference_loss(*map(torch.tensor, (chosen, rejected, margin, weight)), center)
    assert float(found) == pytest.approx(wanted, rel=1e-6)


def first_loss(run):
    return next(row["loss"] for row in metrics(run) if "loss" in row)


STILL = {"max_steps": 1, "lr": 1e-12, "val_size": 0, "seed": 3}


def test_a_step_is_the_weighted_mean_of_all_its_pairs(train, llama, tmp_path):
    """A ranking's pairs weigh 1 together, beside a pair that has a margin; in plain floats."""
    answers = ["Hello .", "Hi .", "What ?", "there"]
    ranked = {"prompt": "Hi", "responses": answers, "ranks": [1, 2, 2, 3]}
    pairs = [
        {"prompt": "Hi there", "chosen": "Hello .", "rejected": "What ?", "margin": 2.0},
        {"prompt": "What ?", "chosen": "there", "rejected": "Hi", "margin": 0.0},
    ]
    one, other = (
        write_rows(tmp_path / f"{n}.jsonl", r) for n, r in (("a", [ranked]), ("b", pairs))
    )
    more = {**STILL, "batch_size": 7, "center_rewards": 0.1}
    result = train(llama, [one, other], tmp_path / "run", **more)
    assert result.code == 0, result.err
    scorer = load_reward_model(str(tmp_path / "run"))

    def score(prompt, answer):
        return float(
            scorer.score([PromptResponse([{"role": "user", "content": prompt}], answer)])[0]
        )

    told = [("Hi", answers[0], a, 0.2, 0.0) for a in answers[1:]]
    told += [("Hi", a, answers[3], 0.2, 0.0) for a in answers[1:3]]
    told += [(p["prompt"], p["chosen"], p["rejected"], 1.0, p["margin"]) for p in pairs]
    total = 0.0
    for prompt, chosen, rejected, weight, margin in told:
        c, r = score(prompt, chosen), score(prompt, rejected)
        total += weight * (math.log(1 + math.exp(-(c - r - margin))) + 0.1 * (c + r) ** 2)
    assert first_loss(tmp_path / "run") == pytest.approx(total / 3, rel=1e-4)
    for name, how in (("cut", {"batch_size": 1, "grad_accum": 7}), ("off", {"margin": False})):
        result = train(llama, [one, other], tmp_path / name, **{**more, **how})
        assert result.code == 0, result.err
    assert first_loss(tmp_path / "cut") == pytest.approx(total / 3, rel=1e-4)
    assert first_loss(tmp_path / "off") < first_loss(tmp_path / "run") - 0.3


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_accumulation_equals_a_larger_batch(train, request, data, tmp_path, kind):
    base = request.getfixturevalue(kind)
    for name, size, passes in (("one", 8, 1), ("four", 2, 4)):
        more = {"batch_size": size, "grad_accum": passes, "max_steps": 2, "lr": 1e-3}
        result = train(base, data, tmp_path / name, **more)
        assert result.code == 0, result.err
    one, four = metrics(tmp_path / "one"), metrics(tmp_path / "four")
    for key in ("loss", "grad_norm", "accuracy", "val_loss", "val_accuracy", "val_margin"):
        ours, theirs = ([row[key] for row in found if key in row] for found in (one, four))
        assert ours == pytest.approx(theirs, rel=1e-4)
    weights = [load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "four")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-4, atol=5e-5)


@pytest.mark.slow
def test_two_processes_train_the_same_model_as_one_with_twice_the_batch(llama, data, tmp_path):
    common = {"model": llama, "data": [data], **QUICK, "max_steps": 3, "lr": 1e-3}
    runs = {"one": {"batch_size": 8}, "two": {"batch_size": 4, "processes": 2}}
    for name, more in runs.items():
        ran = run_llmctl("reward", *flags({**common, **more}), "-o", tmp_path / name)
        assert ran.returncode == 0, ran.stderr
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    for key in ("loss", "grad_norm", "val_loss", "val_accuracy"):
        ours, theirs = ([row[key] for row in found if key in row] for found in (one, two))
        assert ours == pytest.approx(theirs, rel=1e-4)
    weights = [load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-4, atol=5e-5)


# --- reliability


@pytest.mark.parametrize("way", [{}, {"lora": True, "lora_dropout": 0.1}], ids=["full", "lora"])
def test_resume_ends_in_the_same_bits(train, llama, data, tmp_path, way):
    steps = {"max_steps": 6, "save_every": 2, "eval_every": 3, "keep": 9, **way}
    whole, again = tmp_path / "whole", tmp_path / "again"
    result = train(llama, data, whole, **steps)
    assert result.code == 0, result.err
    name = "adapter/adapter_model" if way else "model/model"
    for step in (2, 3):
        cut_off(whole, again, step)
        result = train(llama, data, again, **steps, resume=True)
        assert result.code == 0, result.err
        assert f"checkpoint-{step}" in result.err
        ours, theirs = (load_file(run / f"{name}.safetensors") for run in (again, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert metrics(again)[-1]["val_loss"] == metrics(whole)[-1]["val_loss"]
    result = train(llama, data, again, **{**steps, "center_rewards": 0.1}, resume=True)
    assert result.code == 0, "a finished run is left as it is"
    (again / "status.json").write_text('{"state": "running"}')
    result = train(llama, data, again, **{**steps, "center_rewards": 0.1}, resume=True)
    assert (result.code, "center_rewards" in result.err) == (4, True), result.err


@pytest.mark.slow
def test_a_signal_leaves_a_run_that_resumes_to_the_same_bits(cli, llama, data, tmp_path):
    settings = {"model": llama, "data": [data], **QUICK, "max_steps": 120, "save_every": 40}
    settings |= {"eval_every": 60, "lr": 1e-3}
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "llmctl", "reward", *map(str, flags(settings)), "-o"]
    running = subprocess.Popen([*command, str(out)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 143, err
    for folder, more in ((out, ["--resume"]), (tmp_path / "whole", [])):
        result = cli("reward", *flags(settings), "-o", folder, *more)
        assert result.code == 0, result.err
    ours, theirs = (load_file(run / "model/model.safetensors") for run in (out, tmp_path / "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_loss_that_is_not_finite_ends_the_run(train, llama, data, tmp_path):
    result = train(llama, data, tmp_path / "run", max_steps=20, lr=1e30, max_grad_norm=0)
    assert result.code == 7, result.err


# --- the report


def test_the_wilson_interval_by_definition():
    """The ends are where the share lies 1.96 standard errors of the end itself away."""
    from llmctl.training.reward_report import CONFIDENCE, wilson

    for right, count in ((120, 150), (50, 100), (3, 7)):
        for end in wilson(right, count):
            error = math.sqrt(end * (1 - end) / count)
            assert abs(end - right / count) == pytest.approx(CONFIDENCE * error, rel=1e-6)
    assert wilson(10, 10)[1] == pytest.approx(1)
    assert wilson(0, 10)[0] == pytest.approx(0)


def test_calibration_by_hand():
    """Differences of 0, 0, log 3 (sure to 0.75) three times right and once wrong, and 5 wrong."""
    log3 = math.log(3)
    apart = np.array([0, 0, log3, log3, log3, -log3 * 1.0001, -5.0])
    bins = reliability(apart, np.ones(7))
    assert [row["weight"] for row in bins] == [2, 0, 0, 0, 0, 4, 0, 0, 0, 1]
    assert bins[0]["accuracy"] == bins[0]["confidence"] == 0.5
    assert bins[5]["accuracy"] == 0.75
    sure = 1 / (1 + math.exp(-5))
    wanted = (4 * abs(0.75 - bins[5]["confidence"]) + sure) / 7
    assert calibration_error(bins) == pytest.approx(wanted)


def test_rank_correlation_by_hand():
    assert spearman(np.array([1.0, 2, 9]), np.array([5.0, 6, 7])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2, 9]), np.array([7.0, 6, 5])) == pytest.approx(-1)
    # ranks 1 2.5 2.5 4 and 1 3 2 4: covariance 4.5 of sqrt(4.5 * 5)
    found = spearman(np.array([1.0, 2, 2, 3]), np.array([1.0, 3, 2, 4]))
    assert found == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman(np.ones(3), np.arange(3.0)) == 0


def test_a_score_that_follows_length_is_warned_of(caplog):
    from llmctl.console import log
    from llmctl.training.reward_report import log_report

    long, short = np.arange(20.0) + 30, np.arange(20.0)
    found = report(PairScores(long / 10, short / 10, np.ones(20), long, short))
    assert (found["accuracy"], found["longer_wins"]) == (1, 1)
    log.propagate = True
    with caplog.at_level("WARNING", "llmctl"):
        log_report(found)
    assert "no better than choosing the longer response" in caplog.text
    assert "a policy trained with them will write longer ones" in caplog.text
    assert "a coin" not in caplog.text


def test_a_ranking_counts_as_one_observation():
    ten = np.ones(10)
    found = report(PairScores(ten, 0 * ten, ten / 10, ten, ten))
    alone = report(PairScores(ten[:1], 0 * ten[:1], ten[:1], ten[:1], ten[:1]))
    assert found["accuracy_interval"] == pytest.approx(alone["accuracy_interval"])


# --- scoring files


def card_score(folder, monkeypatch):
    """What the lines of a model card give; and the names they use."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    code = code.replace("Hi, and hello.", "Hi Hello .")  # words that these tokenizers know
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(code, names)
    return names["score"]


@pytest.mark.parametrize("way", [{}, {"lora": True, "merge": True}], ids=["full", "lora"])
def test_transformers_scores_a_conversation_by_the_lines_of_the_card(
    cli, train, roomy, tmp_path, monkeypatch, way
):
    """Ours, and by transformers alone: the template in the folder ends where the score stands."""
    out = tmp_path / "run"
    result = train(roomy, "builtin:preferences", out, max_steps=3, lr=1e-2, val_size=8, **way)
    assert result.code == 0, result.err
    assert manifest(out)["score_at"] == "end-of-turn"
    row = write_rows(tmp_path / "row.jsonl", [{"prompt": "Hi", "response": "Hello."}])
    result = cli("reward", "--score", row, "--model", out)
    assert result.code == 0, result.err
    assert "warning" not in result.err, "nothing is open about it"
    (scored,) = rows_in(result.out)
    for name in ("model", "adapter") if way else ("model",):
        folder = out / name
        assert json.loads((folder / "config.json").read_text())["score_at"] == "end-of-turn"
        assert card_score(folder, monkeypatch) == pytest.approx(scored["score"], rel=1e-4)
    found = AutoTokenizer.from_pretrained(out / "model")
    asked = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    assert found.apply_chat_template(asked, tokenize=False).endswith("Hello.<|im_end|>")
    again = train(out, "builtin:preferences", tmp_path / "more", max_steps=1, val_size=8)
    assert again.code == 0, again.err
    other = AutoTokenizer.from_pretrained(tmp_path / "more/model")
    assert other.chat_template == found.chat_template


@pytest.mark.parametrize("way", ["pairs", "texts"])
def test_the_card_of_a_model_without_turns_scores_pairs_or_texts(
    cli, train, bert, llama, tmp_path, monkeypatch, way
):
    given = [{"prompt": "Hi", "response": "Hello ."}, {"text": "Hi Hello ."}]
    model, data = bert, rows(40)
    if way == "texts":
        model = llama
        data = [{"chosen": row["chosen"], "rejected": row["rejected"]} for row in data]
    path = write_rows(tmp_path / "data.jsonl", data)
    result = train(model, path, tmp_path / "run", max_steps=8, lr=1e-2, val_size=0)
    assert result.code == 0, result.err
    file = write_rows(tmp_path / "row.jsonl", given)
    pair, text = rows_in(cli("reward", "--score", file, "--model", tmp_path / "run").out)
    wanted = pair if way == "pairs" else text
    folder = tmp_path / "run/model"
    assert card_score(folder, monkeypatch) == pytest.approx(wanted["score"], rel=1e-4)


def test_an_encoder_scores_a_conversation_as_it_was_trained_on_it(cli, bert, tmp_path):
    """Pairs that part before their last turn: the means of the report are those of the file."""
    torch.manual_seed(0)
    shape = BertConfig.from_pretrained(bert, initializer_range=0.5)  # every token tells
    folder = tmp_path / "loud"
    AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    BertModel(shape).save_pretrained(folder)

    def conversation(*texts):
        roles = ("user", "assistant", "user", "assistant")
        return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]

    draw = random.Random(1)

    def row(number):
        words = [" ".join(draw.choice(GOOD + BAD + FILLER) for _ in range(3)) for _ in range(5)]
        asked = f"Hi {number}"
        return {
            "chosen": conversation(asked, words[0], words[1], f"Hello {words[2]}"),
            "rejected": conversation(asked, words[3], "What ?", words[4]),
        }

    train_file = write_rows(tmp_path / "train.jsonl", [row(n) for n in range(40)])
    val_file = write_rows(tmp_path / "val.jsonl", [row(n) for n in range(100, 120)])
    more = {"val_data": [val_file], "max_steps": 4, "lr": 1e-4}
    settings = {name: value for name, value in QUICK.items() if name != "val_size"}
    settings = {"model": folder, "data": [train_file], **settings, **more}
    result = cli("reward", *flags(settings), "-o", tmp_path / "run")
    assert result.code == 0, result.err
    report = manifest(tmp_path / "run")["report"]
    scored = rows_in(cli("reward", "--score", val_file, "--model", tmp_path / "run").out)
    for side in ("chosen", "rejected"):
        mean = sum(row[f"score_{side}"] for row in scored) / len(scored)
        assert report[side]["mean"] == pytest.approx(mean, abs=1e-5)
        assert report[side]["std"] > 1e-2


def test_a_file_is_scored_row_by_row(cli, adapted, tmp_path):
    out, _ = adapted
    asked = {"role": "user", "content": "Hi"}
    given = [
        {"prompt": "Hi", "response": "Hello .", "finish_reason": "eos", "seed": 0},
        {"prompt": "Hi", "response": "Hello .", "finish_reason": "length"},
        {"messages": [asked, {"role": "assistant", "content": "Hello ."}]},
        {"prompt": [asked], "response": "Hello ."},
        {"text": "Hi there"},
        {"prompt": "Hi", "chosen": "Hello .", "rejected": "What ?"},
    ]
    path = write_rows(tmp_path / "texts.jsonl", given)
    result = cli("reward", "--score", path, "--model", out)
    assert result.code == 0, result.err
    told = rows_in(result.out)
    assert [{k: v for k, v in row.items() if "score" not in k} for row in told] == given
    scorer = load_reward_model(str(out))
    whole, cut, text = scorer.score(
        [
            PromptResponse([asked], "Hello ."),
            PromptResponse([asked], "Hello .", ended=False),
            PromptResponse("", "Hi there"),
        ]
    ).tolist()
    found = [row.get("score", row.get("score_chosen")) for row in told]
    assert found == pytest.approx([whole, cut, whole, whole, text, whole], rel=1e-4)
    assert told[-1]["score_rejected"] < told[-1]["score_chosen"]
    file = tmp_path / "scored.jsonl"
    result = cli("reward", "--score", path, "--model", out, "-o", file, "--json")
    assert result.code == 0, result.err
    said = json.loads(result.out)
    assert (said["rows"], said["out"]) == (6, str(file))
    assert said["score_at"] == "end-of-turn"
    assert read_rows(file) == told
    result = cli("reward", "--score", path, "--model", out, "-o", file)
    assert (result.code, "the output file exists" in result.err) == (3, True)


def test_columns_that_are_not_scored_are_written_as_json_has_them(cli, adapted, tmp_path):
    """Half a surrogate pair, in a key and in a value, is escaped: UTF-8 cannot hold it."""
    out, _ = adapted
    row = {"prompt": "Hi", "response": "Hello .", "\ud83d": "x", "note": ["\udc00", "é"]}
    path, file = write_rows(tmp_path / "texts.jsonl", [row]), tmp_path / "scored.jsonl"
    arguments = ["reward", "--model", out, "--score", path]
    ran = subprocess.run([sys.executable, "-m", "llmctl", *arguments], capture_output=True)
    assert ran.returncode == 0, ran.stderr
    assert b"columns not read: `\\ud83d`, `note`" in ran.stderr
    result = cli(*arguments, "-o", file)
    assert result.code == 0, result.err
    for written in (ran.stdout, file.read_bytes()):
        assert '"\\ud83d": "x", "note": ["\\udc00", "é"], "score": ' in written.decode()
        found = json.loads(written)
        assert {key: found[key] for key in row} == row


def test_times_and_what_is_no_number_are_written_as_json(cli, adapted, tmp_path):
    out, _ = adapted
    table = pyarrow.table(
        {
            "prompt": ["Hi"],
            "response": ["Hello ."],
            "share": [float("nan")],
            "at": [datetime.datetime(2026, 1, 2, 3, 4)],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    result = cli("reward", "--score", tmp_path / "a.parquet", "--model", out)
    assert result.code == 0, result.err
    row = json.loads(result.out, parse_constant=pytest.fail)
    assert (row["share"], row["at"]) == (None, "2026-01-02 03:04:00")


def test_what_cannot_be_scored_is_refused(cli, adapted, llama, tmp_path):
    out, _ = adapted
    fine = {"prompt": "Hi", "response": "Hello ."}
    for bad, code, said in (
        ({"question": "Hi"}, 3, "nothing to score in these columns: `question`"),
        ({"prompt": "Hi", "response": None}, 3, "`response` is null, expected text"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, 3, "does not end with the assistant"),
        ({"prompt": "Hi", "response": "Hi " * 99}, 3, "has more tokens than the 64"),
    ):
        path = write_rows(tmp_path / "bad.jsonl", [fine, bad])
        result = cli("reward", "--score", path, "--model", out)
        assert (result.code, result.out) == (code, ""), result.err
        assert f"{path}:2: " in result.err
        assert said in result.err
    path = write_rows(tmp_path / "fine.jsonl", [fine])
    result = cli("reward", "--score", path, "--model", llama)
    assert (result.code, "LlamaForCausalLM has no head that scores" in result.err) == (4, True)
    result = cli("reward", "--score", path, "--model", out, "--lr", 1)
    assert (result.code, "--lr does not go with --score" in result.err) == (2, True)
    result = cli("reward", "--score", tmp_path / "none.jsonl", "--model", out)
    assert (result.code, "no such file" in result.err) == (3, True)


# --- bad input


def test_bad_data_is_refused_with_its_line(train, llama, tmp_path):
    fine = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    for bad, said in (
        ({"prompt": "Hi", "chosen": "a"}, "no column `rejected`; there is `prompt`, `chosen`"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "`prompt` is empty"),
    ):
        path = write_rows(tmp_path / "bad.jsonl", [fine, bad])
        result = train(llama, path, tmp_path / "run")
        assert (result.code, f"{path}:2: {said}" in result.err) == (3, True), result.err
    path = write_rows(
        tmp_path / "r.jsonl", [{"prompt": "Hi", "responses": ["a", "b"], "ranks": [1]}]
    )
    result = train(llama, path, tmp_path / "run")
    assert (result.code, f"{path}:1: 2 responses, but 1 rank" in result.err) == (3, True)
    assert not (tmp_path / "run").exists()


def test_lines_that_may_be_prompts_on_both_sides_are_warned_of(train, llama, tmp_path):
    words = ["Hi", "Hello", "there", "What"]
    given = [
        {side: f"{a} {b} ?\n{c} .\n{word}" for side, word in (("chosen", "Hi"), ("rejected", "?"))}
        for a in words
        for b in words
        for c in words[:3]
    ]
    path = write_rows(tmp_path / "texts.jsonl", given)
    result = train(llama, path, tmp_path / "run", val_size=6, max_steps=1)
    assert result.code == 0, result.err
    assert "6 validation texts begin with lines that other texts train on" in result.err


def test_models_that_cannot_become_one_are_refused(train, llama, data, adapted, tmp_path):
    three = tmp_path / "three"
    LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=12,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=3,
        )
    ).save_pretrained(three)
    load_tokenizer(str(llama)).save_pretrained(three)
    result = train(three, data, tmp_path / "run")
    assert (result.code, "tells 3 labels apart" in result.err) == (4, True)
    result = train(adapted[0] / "adapter", data, tmp_path / "run")
    assert (result.code, "this model is an adapter" in result.err) == (4, True)
    other = shutil.copytree(llama, tmp_path / "mamba")
    shape = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**shape, "model_type": "mamba"}))
    result = train(other, data, tmp_path / "run")
    assert (result.code, "no classifier of the architecture mamba" in result.err) == (4, True)


def test_a_reward_model_is_trained_further(train, adapted, data, tmp_path):
    result = train(adapted[0], data, tmp_path / "more", max_steps=1, lr=1e-9, json=True)
    assert result.code == 0, result.err
    assert json.loads(result.out)["val_accuracy"] >= 0.95


def test_flags_that_do_not_go_together(cli, llama, data, tmp_path):
    for more, said in (
        ([], "--data is required: jsonl, json, csv, parquet, a Hub id or builtin:preferences"),
        (["--data", data, "--lora-r", 4], "--lora-r goes with --lora"),
        (["--data", data, "--max-steps", 3, "--epochs", 1], "--max-steps or --epochs"),
        (["--data", data, "--center-rewards", -1], "--center-rewards"),
        (["--data", data, "--score-at", "last-token"], "--score-at goes with --score"),
        (["--score", data, "--score-at", "somewhere"], "--score-at"),
    ):
        result = cli("reward", "--model", llama, *more, "-o", tmp_path / "run")
        assert (result.code, said in result.err) == (2, True), result.err


def test_a_dry_run_checks_and_writes_nothing(train, llama, data, tmp_path):
    result = train(llama, data, tmp_path / "run", dry_run=True)
    assert result.code == 0, result.err
    assert "stage: reward" in result.out
    assert "score:" not in result.out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("way", [{}, {"lora": True, "merge": True}], ids=["full", "lora"])
def test_what_was_trained_in_bf16_scores_in_float32(train, llama, data, tmp_path, way):
    """Without held-out pairs, of which it says so."""
    more = {"max_steps": 20, "lr": 1e-2, "precision": "bf16", "val_size": 0, **way}
    result = train(llama, data, tmp_path / "run", **more)
    assert result.code == 0, result.err
    assert "nothing says how good this reward model is" in result.err


def test_the_largest_batch_is_found(train, llama, data, tmp_path):
    result = train(llama, data, tmp_path / "run", find_batch_size=True, max_steps=1)
    assert result.code == 0, result.err
    assert "batch size 8 of 8 fits" in result.err


def test_a_language_model_is_no_scorer(llama):
    with pytest.raises(ModelError, match="has no head that scores"):
        load_reward_model(str(llama))


def test_pairs_of_the_same_tokens_are_left_out(cli, llama, tmp_path):
    """The template trims, so that a pair which differs in white space alone has nothing to say."""
    template = tmp_path / "trim.jinja"
    template.write_text("{% for m in messages %}{{ m.content | trim }} {% endfor %}")
    asked = ["Hi " * k for k in range(1, 5)]
    same = [{"prompt": text, "chosen": "Hello .", "rejected": "Hello . "} for text in asked]
    good = [{"prompt": text, "chosen": "Hello .", "rejected": "What ?"} for text in asked]
    run = ("reward", "--model", llama, "--chat-template", template, "--val-size", 0, "--dry-run")
    out = ("-o", tmp_path / "run")
    some = cli(*run, "--data", write_rows(tmp_path / "some.jsonl", same[:1] + good), *out)
    assert some.code == 0, some.err
    assert "left out 1 pair of the same tokens on both sides" in some.err
    assert "4 pairs to train on" in some.err
    none = cli(*run, "--data", write_rows(tmp_path / "none.jsonl", same), *out)
    assert none.code == 3
    assert "both sides of every pair are the same tokens" in none.err
