"""`llmctl dpo`: its figures are those of the papers, it learns, resumes, and refuses."""

import json
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from llmctl.config.commands.dpo import DpoConfig
from llmctl.data.builtin import named_preferences
from llmctl.data.chat.templates import read_template
from llmctl.data.preference_pairs import load_dpo_data
from llmctl.files import sha256_file
from llmctl.training import dpo
from llmctl.training.dpo import ComparedPairRows, DpoLoss, is_displaced, log_probabilities
from llmctl.training.token_loss import token_loss_of
from tests.processes import run_llmctl
from tests.run_files import cut_off, logged, metrics, read_rows, write_rows

TEMPLATE_TOKENS = ["[PAD]", "[UNK]", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
RUN = ("--batch-size", 8, "--precision", "fp32", "--threads", 1, "--seed", 3, "--samples", 0)
QUICK = (*RUN, "--max-steps", 4, "--log-every", 1, "--lr", 1e-3)
LORA = ("--lora", "--lora-r", 4)


def preferences(seed):
    return named_preferences(f"builtin:preferences:{seed}")


def words(path):
    """A tokenizer of whole words that knows all of `builtin:preferences`, with ChatML."""
    split = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    said = [text for seed in (0, 1) for row in preferences(seed) for text in row.values()]
    known = {word for text in said for word, _ in split.pre_tokenize_str(text)}
    vocabulary = [*TEMPLATE_TOKENS, *sorted(known | {"user", "assistant", "system"})]
    inner = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="[UNK]",
        pad_token="[PAD]",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=TEMPLATE_TOKENS[4:],
    )
    tokenizer.chat_template = read_template("chatml")
    tokenizer.save_pretrained(path)
    return len(vocabulary)


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """A LLaMA and a GPT-2 with dropout wherever there can be some, and a BERT; nothing learned."""
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    size = {kind: words(root / kind) for kind in ("llama", "gpt2", "bert")}["llama"]
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            intermediate_size=64,
            max_position_embeddings=128,
            bos_token_id=2,
            eos_token_id=3,
            attention_dropout=0.3,
            **SMALL,
        )
    ).save_pretrained(root / "llama")
    GPT2LMHeadModel(
        GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=128)
    ).save_pretrained(root / "gpt2")
    BertForMaskedLM(BertConfig(vocab_size=size, intermediate_size=32, **SMALL)).save_pretrained(
        root / "bert"
    )
    return root


@pytest.fixture(scope="session")
def base(bases):
    return bases / "llama"


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Polite and curt answers."""
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", preferences(0)[:96])


@pytest.fixture(scope="session")
def ranked(tmp_path_factory):
    """Three answers to a question, ranked, some of them equally."""
    draw, rows = random.Random(1), []
    for one, two in zip(preferences(0)[100:124], preferences(1)[:24], strict=True):
        answers = [one["chosen"], one["rejected"], two["rejected"]]
        ranks = [1, 2, draw.choice((2, 3))]
        rows.append({"prompt": one["prompt"], "responses": answers, "ranks": ranks})
    return write_rows(tmp_path_factory.mktemp("ranked") / "ranked.jsonl", rows)


def digest(run):
    names = ("model/model.safetensors", "adapter/adapter_model.safetensors")
    return next(sha256_file(run / name) for name in names if (run / name).exists())


# --- mathematics


@pytest.mark.parametrize(("margin", "loss"), [(0, 0.693147), (1, 0.313262), (2, 0.126928)])
def test_published_losses(margin, loss):
    """Of torchtune: tests/torchtune/rlhf/loss/test_dpo_loss.py."""
    found = DpoLoss("sigmoid", 1.0).losses(torch.tensor([float(margin)]), torch.zeros(1))
    assert float(found) == pytest.approx(loss, abs=1e-6)


def test_losses_are_those_of_the_papers():
    """By definition, in plain floats: log-probabilities of two responses by both models."""
    draw = random.Random(0)
    for _ in range(20):
        own, other = ([-draw.uniform(1, 50) for _ in range(2)] for _ in range(2))
        lengths, beta, wrong = (draw.randint(1, 9), draw.randint(1, 9)), draw.uniform(0.01, 1), 0.2
        gains = [a - b for a, b in zip(own, other, strict=True)]
        margin = beta * (gains[0] - gains[1])
        right, flipped = (math.log1p(math.exp(-sign * margin)) for sign in (1, -1))
        means = [gain / length for gain, length in zip(gains, lengths, strict=True)]
        wanted = {
            DpoLoss("sigmoid", beta): right,
            DpoLoss("sigmoid", beta, wrong): (1 - wrong) * right + wrong * flipped,
            DpoLoss("ipo", beta): (means[0] - means[1] - 1 / (2 * beta)) ** 2,
        }
        for objective, loss in wanted.items():
            rewards = objective.rewards(
                torch.tensor(gains, dtype=torch.double), torch.tensor(lengths)
            )
            assert float(objective.losses(*rewards)) == pytest.approx(loss, rel=1e-6)


def test_only_a_long_and_large_fall_is_a_displacement():
    assert is_displaced([0, -0.02, -0.04, -0.06])
    assert not is_displaced([0, -0.01, -0.02, -0.03])
    assert not is_displaced([0, -0.3, -0.2, -0.4])
    assert not is_displaced([-0.2, -0.3, -0.4])


def settings(base, *data, **more):
    return DpoConfig(model=str(base), data=[str(name) for name in data], **more)


def test_log_probabilities_are_of_the_response_alone_whatever_pads_it(base, pairs):
    """By definition, from all logits of each sequence by itself; the padding is poisoned."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    data = load_dpo_data(settings(base, pairs, val_size=0))
    found, token_loss = [], token_loss_of(model, chunked=False)
    for pad in (0, 40):
        batch = ComparedPairRows(data.train, pad).batch([3, 0, 11])
        assert (batch["input_ids"] == pad).any()
        with torch.no_grad():
            found.append(log_probabilities(model, token_loss, batch)[0])
    torch.testing.assert_close(*found, rtol=0, atol=0)
    sides = [data.train.chosen] * 3 + [data.train.rejected] * 3
    for ours, side, number in zip(found[0], sides, [3, 0, 11] * 2, strict=True):
        tokens, trained = side.sequence(number)
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
        logits = torch.log_softmax(logits.double(), -1)
        wanted = sum(float(logits[at - 1, tokens[at]]) for at in range(len(tokens)) if trained[at])
        assert float(ours) == pytest.approx(wanted, rel=1e-5)
        text = data.tokenizer.decode(tokens[trained])
        assert text.endswith("<|im_end|>")
        assert "assistant" not in text


# --- runs


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("adapter", [(), LORA])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_it_starts_at_its_reference(cli, bases, pairs, tmp_path, kind, adapter, loss):
    """Dropout, which both models have in their configuration, would make the margin noise."""
    result = cli(
        *("dpo", "--model", bases / kind, "--data", pairs, *QUICK, "--loss", loss, "--beta", 0.2),
        *("--max-steps", 1, "--val-size", 0, *adapter, "-o", tmp_path / "run"),
    )
    assert result.code == 0, result.err
    (first,) = [row for row in metrics(tmp_path / "run") if "loss" in row]
    wanted = {"sigmoid": math.log(2), "ipo": 1 / (4 * 0.2**2)}[loss]
    assert first["loss"] == pytest.approx(wanted, rel=1e-6)
    assert first["reward_margin"] == pytest.approx(0, abs=0 if adapter else 1e-5)
    assert first["grad_norm"] > 0


def test_noise_is_refused(cli, base, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "without_dropout", lambda model: None)
    for more in ((), LORA):
        result = cli("dpo", "--model", base, "--data", pairs, *QUICK, *more, "-o", tmp_path / "run")
        assert (result.code, "computes with noise" in result.err) == (4, True), result.err


@pytest.fixture(scope="session")
def learned(cli, base, tmp_path_factory):
    """Courtesy, from nothing."""
    out = tmp_path_factory.mktemp("runs") / "dpo"
    result = cli(
        *("dpo", "--model", base, "--data", "builtin:preferences", *RUN, "--max-steps", 100),
        *("--lr", 2e-3, "--val-size", 200, "--max-length", 96, "--eval-every", 10),
        *("-o", out, "--json"),
    )
    assert result.code == 0, result.err
    return out, json.loads(result.out)


def test_it_learns_what_is_preferred(learned):
    out, result = learned
    assert result["val_reward_accuracy"] >= 0.95
    assert result["val_loss"] < math.log(2) / 2
    assert logged(out, "val_reward_margin")[-1] > logged(out, "val_reward_margin")[0]
    keys = {"reward_accuracy", "reward_margin", "chosen_logprob", "rejected_logprob", "lr"}
    assert keys <= {key for row in metrics(out) if "loss" in row for key in row}
    assert metrics(out)[-1]["step"] == result["step"] == 100


def test_its_result_opens_in_a_fresh_process_and_prefers_courtesy(learned):
    out, _ = learned
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M;"
        "m = M.from_pretrained(sys.argv[1]).eval();"
        "print(m(input_ids=torch.tensor([[2, 7, 9, 30, 31]])).logits.double().sum().item())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, out / "model"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    model = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([[2, 7, 9, 30, 31]])).logits.double().sum()
    assert float(ran.stdout) == pytest.approx(float(ours), rel=1e-5)
    assert model.config.attention_dropout == 0.3
    assert model.generation_config.eos_token_id == [3, 5]


def response_log_probability(model, tokenizer, prompt, response):
    """Of a response and its end, and of how many tokens; by definition."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    before, after = (
        tokenizer(part, add_special_tokens=False)["input_ids"]
        for part in (text, f"{response}<|im_end|>")
    )
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before + after])).logits[0]
    scores = torch.log_softmax(logits.double(), -1)
    places = range(len(before), len(before) + len(after))
    return sum(float(scores[at - 1, (before + after)[at]]) for at in places), len(after)


def figures(way, run, base, ranked, loss, beta):
    """What a run should say of rankings, with two models in memory; a ranking's pairs weigh 1."""
    kind = AutoPeftModelForCausalLM if way == "lora" else AutoModelForCausalLM
    policy = kind.from_pretrained(run / ("adapter" if way == "lora" else "model")).eval()
    reference = AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    total = weight = 0.0
    rows = []
    for row in read_rows(ranked):
        ranks = row["ranks"]
        told = [
            [response_log_probability(model, tokenizer, row["prompt"], r) for r in row["responses"]]
            for model in (policy, reference)
        ]
        compared = [(a, b) for a in range(3) for b in range(3) if ranks[a] < ranks[b]]
        for pair in compared:
            own, lengths = zip(*(told[0][k] for k in pair), strict=True)
            gains = [told[0][k][0] - told[1][k][0] for k in pair]
            means = [gain / length for gain, length in zip(gains, lengths, strict=True)]
            one, other = means if loss == "ipo" else gains
            each = (
                (one - other - 1 / (2 * beta)) ** 2
                if loss == "ipo"
                else math.log1p(math.exp(-beta * (one - other)))
            )
            total, weight = total + each / len(compared), weight + 1 / len(compared)
            rows.append([one > other, beta * (one - other), *own, means[0]])
    names = ("accuracy", "margin", "chosen_logprob", "rejected_logprob", "chosen_gain")
    names = [f"reward_{name}" if "_" not in name else name for name in names]
    return {"loss": total / weight, **dict(zip(names, np.mean(rows, 0), strict=True))}


def require_same(found, wanted):
    assert abs(wanted["reward_margin"]) > 1e-3
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
@pytest.mark.parametrize("way", ["full", "lora"])
def test_figures_are_those_of_a_separate_reference(cli, base, pairs, ranked, tmp_path, way, loss):
    """By definition; the validation data are rankings."""
    out = tmp_path / "run"
    result = cli(
        *("dpo", "--model", base, "--data", pairs, "--val-data", ranked, *QUICK, "--loss", loss),
        *("--beta", 0.3, "--lr", 1e-2, *(LORA if way == "lora" else ()), "-o", out, "--json"),
    )
    assert result.code == 0, result.err
    found = json.loads(result.out)
    wanted = figures(way, out, base, ranked, loss, 0.3)
    require_same({name: found[f"val_{name}"] for name in wanted}, wanted)


@pytest.mark.parametrize("way", ["full", "lora"])
def test_the_loss_that_trains_is_that_of_a_separate_reference(cli, base, ranked, tmp_path, way):
    """By definition: what a second step of all pairs says is of the model that the first left."""
    few = write_rows(tmp_path / "few.jsonl", read_rows(ranked)[:6])
    pairs = len(load_dpo_data(settings(base, few, val_size=0)).train)
    for steps in (1, 2):
        result = cli(
            *("dpo", "--model", base, "--data", few, *QUICK, "--max-steps", steps, "--lr", 3e-3),
            *("--schedule", "constant", "--warmup", 0, "--val-size", 0, "--batch-size", pairs),
            *(*(LORA if way == "lora" else ()), "--beta", 0.3, "-o", tmp_path / str(steps)),
        )
        assert result.code == 0, result.err
    wanted = figures(way, tmp_path / "1", base, few, "sigmoid", 0.3)
    require_same(metrics(tmp_path / "2")[1], wanted)


WAYS = {
    "full": (),
    "lora": LORA,
    "accumulation": ("--grad-accum", 2, "--batch-size", 3, "--loss", "ipo"),
}


@pytest.mark.parametrize("way", WAYS)
def test_resume_ends_in_the_same_bits(cli, base, pairs, tmp_path, way):
    """Also the reference: computed again, of the weights that the run began with."""
    run = (
        *("dpo", "--model", base, "--data", pairs, *QUICK, "--max-steps", 7, "--save-every", 3),
        *("--eval-every", 2, "--log-every", 2, "--keep", 9, *WAYS[way], "-o"),
    )
    whole, again = tmp_path / "whole", tmp_path / "again"
    result = cli(*run, whole)
    assert result.code == 0, result.err
    cut_off(whole, again, 3)
    result = cli(*run, again, "--resume")
    assert result.code == 0, result.err
    assert "resuming from" in result.err
    assert digest(again) == digest(whole)
    keys = ("loss", "val_loss", "reward_margin", "val_chosen_gain")
    assert logged(again, *keys) == logged(whole, *keys)


def test_resuming_another_run_is_refused_with_the_difference(cli, base, pairs, tmp_path):
    run = ("dpo", "--model", base, "--data", pairs, *QUICK, "-o", tmp_path / "run")
    assert cli(*run).code == 0
    (tmp_path / "run/status.json").write_text('{"state": "running"}')
    for more, named in (
        (("--beta", 0.3), "beta"),
        (("--loss", "ipo"), "loss"),
        (("--label-smoothing", 0.1), "label_smoothing"),
        (("--val-size", 30), "data"),
    ):
        result = cli(*run, "--resume", *more)
        assert result.code == 4, result.err
        assert f"{named}:" in result.err


@pytest.mark.parametrize("adapter", [(), LORA])
def test_accumulation_equals_a_larger_batch(cli, base, ranked, tmp_path, adapter):
    """The pairs of rankings weigh differently, and so do the micro-batches."""
    common = ("dpo", "--model", base, "--data", ranked, *QUICK, "--val-size", 8, *adapter)
    for name, shape in (("one", (8, 1)), ("four", (2, 4))):
        result = cli(
            *common, "--batch-size", shape[0], "--grad-accum", shape[1], "-o", tmp_path / name
        )
        assert result.code == 0, result.err
    for key in ("loss", "grad_norm", "val_loss", "reward_margin", "chosen_logprob"):
        ours, theirs = (logged(tmp_path / name, key) for name in ("one", "four"))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), key


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [(), LORA])
def test_two_processes_train_the_same_model_as_one_with_twice_the_batch(
    cli, base, ranked, tmp_path, adapter
):
    common = ("dpo", "--model", base, "--data", ranked, *QUICK, "--val-size", 8, *adapter)
    assert cli(*common, "-o", tmp_path / "one").code == 0
    ran = run_llmctl(*common, "--batch-size", 4, "--processes", 2, "-o", tmp_path / "two")
    assert ran.returncode == 0, ran.stderr
    for key in ("loss", "val_loss", "lr", "tokens", "reward_margin", "grad_norm"):
        ours, theirs = (logged(tmp_path / name, key) for name in ("one", "two"))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), key


def test_memory_savers_change_nothing(cli, base, pairs, tmp_path):
    for adapter in ((), LORA):
        found = []
        for more in ((), ("--chunked-loss", "--activation-checkpointing")):
            out = tmp_path / f"{len(adapter)}{len(more)}"
            result = cli(
                "dpo", "--model", base, "--data", pairs, *QUICK, *adapter, *more, "-o", out
            )
            assert result.code == 0, result.err
            found.append(logged(out, "loss", "grad_norm", "val_loss"))
        assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_an_adapter_and_its_merged_model_agree_and_the_copy_is_gone(cli, base, pairs, tmp_path):
    out = tmp_path / "run"
    result = cli(
        *("dpo", "--model", base, "--data", pairs, *QUICK, *LORA, "--merge", "-o", out, "--json"),
        *("--samples", 2, "--sample-tokens", 8, "--eval-every", 1),
    )
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["merge_difference"] < 1e-4
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    assert not [name for name in tensors if "ref" in name.split(".")]
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in tensors.items())
    last = sorted((out / "checkpoints").iterdir())[-1]
    kept = load_file(last / "model.safetensors")
    assert len(json.loads((last / "manifest.json").read_text())["identity"]["adapter"]) == 1
    assert sum(t.numel() for t in tensors.values()) == sum(t.numel() for t in kept.values())
    assert {row["step"] for row in metrics(out, "samples.jsonl")} == {0, 1, 2, 3, 4}
    said = cli("generate", "--model", out, "--chat", "--prompt", "Hi", "--max-new-tokens", 4)
    assert said.code == 0, said.err


def test_an_adapter_beside_a_quantized_base_is_trained_in_float32(cli, base, pairs, tmp_path):
    """In bf16, as TRL has it there, small updates would vanish."""
    torch.manual_seed(0)
    wide = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    tokenizer = AutoTokenizer.from_pretrained(base)
    shape = LlamaConfig(vocab_size=len(tokenizer), intermediate_size=64, **wide)
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    result = cli(
        *("dpo", "--model", tmp_path / "wide", "--data", pairs, *QUICK, *LORA, "--load-in-4bit"),
        *("-o", tmp_path / "run"),
    )
    assert result.code == 0, result.err
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    last = sorted((tmp_path / "run/checkpoints").iterdir())[-1]
    assert {t.dtype for t in load_file(last / "model.safetensors").values()} == {torch.float32}


def test_new_tokens_of_a_template_are_learned_beside_an_adapter(cli, base, pairs, tmp_path):
    out = tmp_path / "run"
    result = cli(
        *("dpo", "--model", base, "--data", pairs, *QUICK, *LORA, "--chat-template", "gemma"),
        *("-o", out, "--merge"),
    )
    assert result.code == 0, result.err
    assert "<start_of_turn>, <end_of_turn>, which the model has never seen" in result.err
    assert metrics(out)[0]["reward_margin"] == 0


def test_plain_texts_need_no_template(cli, base, tmp_path):
    rows = [{"chosen": row["chosen"], "rejected": row["rejected"]} for row in preferences(0)[:40]]
    data = write_rows(tmp_path / "texts.jsonl", rows)
    result = cli("dpo", "--model", base, "--data", data, *QUICK, "-o", tmp_path / "run")
    assert result.code == 0, result.err


def test_the_largest_batch_is_found(cli, base, pairs, tmp_path):
    result = cli(
        *("dpo", "--model", base, "--data", pairs, *QUICK, "--find-batch-size"),
        *("-o", tmp_path / "run"),
    )
    assert result.code == 0, result.err
    assert "batch size 8 of 8 fits" in result.err


def test_a_displacement_is_said_once(cli, base, tmp_path):
    """Both answers begin alike; the model learns to expect neither."""
    draw, rows = random.Random(0), []
    for row in preferences(0)[:64]:
        answer = " ".join(draw.choice(row["chosen"].split()) for _ in range(12))
        rows.append({"prompt": row["prompt"], "chosen": answer, "rejected": answer + " !"})
    data = write_rows(tmp_path / "alike.jsonl", rows)
    result = cli(
        *("dpo", "--model", base, "--data", data, *RUN, "--max-steps", 40, "--lr", 2e-2),
        *("--beta", 0.01, "--eval-every", 2, "--val-size", 8, "-o", tmp_path / "run"),
    )
    assert result.code == 0, result.err
    assert result.err.count("the chosen responses grow less likely too") == 1


def test_odd_data_is_said(cli, base, tmp_path):
    rows = [{**row, "margin": 1.5} for row in preferences(0)[:30]]
    rows.append({**rows[0], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]})
    rows.append({**rows[1], "chosen": rows[1]["rejected"]})
    rows.append({**rows[2], "chosen": rows[2]["rejected"] + " "})
    data = write_rows(tmp_path / "odd.jsonl", rows)
    result = cli("dpo", "--model", base, "--data", data, *QUICK, "--val-size", 0, "--dry-run")
    assert result.code == 0, result.err
    assert "32 pairs have a margin, which this loss has no place for: not used" in result.err
    assert "1 pair stands in both orders" in result.err
    assert "1 with equal responses" in result.err
    assert "left out 1 pair of the same tokens on both sides" in result.err
    assert "stage: dpo" in result.out


BAD = {
    "no data": ((), 2, "--data is required"),
    "both lengths": (("--data", "DATA", "--max-steps", 1, "--epochs", 1), 2, "not both"),
    "smoothed ipo": (
        ("--data", "DATA", "--loss", "ipo", "--label-smoothing", 0.1),
        2,
        "--label-smoothing goes with --loss sigmoid",
    ),
    "smoothed away": (("--data", "DATA", "--label-smoothing", 0.5), 2, "less than 0.5"),
    "no beta": (("--data", "DATA", "--beta", 0), 2, "--beta: should be greater than 0"),
    "another loss": (("--data", "DATA", "--loss", "hinge"), 2, "'sigmoid' or 'ipo'"),
    "4bit without lora": (("--data", "DATA", "--load-in-4bit"), 2, "--lora"),
    "merge without lora": (("--data", "DATA", "--merge"), 2, "--lora"),
    "virtual tokens": (("--data", "DATA", "--prompt-tuning", 4), 2, "use --lora"),
    "dropout": (("--data", "DATA", "--lora", "--lora-dropout", 0.1), 2, "--lora-dropout"),
    "too long": (("--data", "DATA", "--max-length", 4000), 2, "positions"),
    "too short": (("--data", "DATA", "--max-length", 3), 3, "every pair has more than 3 tokens"),
    "nowhere": (("--data", "nowhere.jsonl"), 3, "no such file"),
    "no evaluation": (("--data", "DATA", "--sample-prompt", "a", "--val-size", 0), 2, "validation"),
    "bad template": (("--data", "DATA", "--chat-template", "chatmI"), 2, "chatml"),
    "encoder": (("--data", "DATA", "--model", "BERT"), 4, "not a causal language model"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(cli, bases, base, pairs, tmp_path, name):
    arguments, code, message = BAD[name]
    named = {"DATA": pairs, "BERT": bases / "bert"}
    given = [named.get(a, a) for a in arguments]
    model = () if "--model" in given else ("--model", base)
    result = cli("dpo", *model, *given, "-o", tmp_path / "run")
    assert result.code == code, result.err
    assert message in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "run").exists()


def test_rows_that_are_no_preferences_are_refused_with_their_line(cli, base, tmp_path):
    rows = [*preferences(0)[:30], {"prompt": "Hi", "chosen": "Hello."}]
    run = ("dpo", "--model", base, *QUICK, "-o", tmp_path / "run")
    result = cli(*run, "--data", write_rows(tmp_path / "a.jsonl", rows))
    assert result.code == 3
    assert "a.jsonl:31" in result.err
    assert "no column `rejected`" in result.err
    chats = [{"messages": [{"role": "user", "content": "Hi"}]}]
    result = cli(*run, "--data", write_rows(tmp_path / "b.jsonl", chats))
    assert (result.code, "no example in these columns" in result.err) == (3, True)


def test_an_adapter_cannot_get_a_second_one(cli, base, pairs, tmp_path):
    run = ("dpo", "--data", pairs, *QUICK, *LORA)
    assert cli(*run, "--model", base, "-o", tmp_path / "one").code == 0
    result = cli(*run, "--model", tmp_path / "one", "-o", tmp_path / "two")
    assert (result.code, "merge it first" in result.err) == (4, True), result.err


def test_numbers_that_are_not_finite_end_the_run(cli, base, pairs, tmp_path):
    result = cli(
        *("dpo", "--model", base, "--data", pairs, *QUICK, "--lr", 1e30, "--max-grad-norm", 0),
        *("-o", tmp_path / "run"),
    )
    assert result.code == 7, result.err
