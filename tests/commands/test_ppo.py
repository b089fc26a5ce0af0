"""`llmctl ppo`: it learns, resumes to the bit, opens elsewhere, and refuses what goes wrong."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.run_files import metrics, policy_steps, write_rows

RULES = '''
def letter(prompts, completions, answers):
    """The share of letters that are `a`: dense, so that every step has something to learn."""
    return [c.count("a") / max(1, len(c)) for c in completions]


def fours(prompts, completions, answers):
    """Four responses in a row answer one prompt, and are not all the same."""
    rows = [prompts[i : i + 4] for i in range(0, len(prompts), 4)]
    assert all(len(set(row)) == 1 for row in rows)
    assert len(set(completions[:4])) > 1
    return [0.0 for _ in prompts]


def broken(**columns):
    raise ValueError("no reward today")


def nothing(completions, **columns):
    return [float("nan") for _ in completions]


def few(completions, **columns):
    return [1.0]
'''
PROMPTS = ["The cat", "A dog sees", "My friend likes", "The old man", "Our teacher paints the"]
QUICK = ("--batch-size", 8, "--minibatches", 2, "--ppo-epochs", 2, "--max-new-tokens", 8)
QUICK = (*QUICK, "--threads", 1, "--lr", 1e-3, "--temperature", 0.9)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with rules to import and prompts to answer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ppo_rules.py").write_text(RULES)
    more = [f"{text} {word}" for text in PROMPTS for word in ("here", "there", "now", "then", "so")]
    rows = [{"prompt": text, "answer": "the river"} for text in more]
    write_rows(tmp_path / "prompts.jsonl", rows)
    (tmp_path / "ppo_bad.py").write_text("def rule(:\n")
    monkeypatch.delitem(sys.modules, "ppo_rules", raising=False)
    return tmp_path


def ppo(cli, base, *arguments, rule="python:ppo_rules.letter", quick=QUICK):
    rewards = ("--reward-rule", rule) if rule else ()
    prompts = ("--data", "prompts.jsonl", "--plain")
    return cli("ppo", "--model", base, *prompts, *rewards, *quick, *arguments)


def gain(run):
    """Mean score of the last quarter of the steps by that of the first: one step is noisy."""
    scores = [line["score"] for line in policy_steps(run)]
    quarter = max(2, len(scores) // 4)
    return sum(scores[-quarter:]) / sum(scores[:quarter])


def decisive(run):
    """Metrics without what a clock or the machine decides."""
    clocks = ("time", "seconds", "per_second", "memory_bytes", "mfu")
    return [{k: v for k, v in line.items() if not k.endswith(clocks)} for line in metrics(run)]


def same(one, other):
    for name in ("model", "value_model"):
        a, b = (load_file(Path(run) / name / "model.safetensors") for run in (one, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_policy_learns_what_is_paid_for(cli, base, world):
    result = ppo(cli, base, "--max-steps", 20, "--batch-size", 16, "--json", "-o", "run")
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    first, *_, last = policy_steps("run")
    assert first["kl"] == 0
    assert gain("run") > 1.5
    assert summary["score"] == last["score"]
    assert summary["episodes"] == 320
    low, high = summary["val_win_rate_low"], summary["val_win_rate_high"]
    assert 0 <= low <= summary["val_win_rate"] <= high <= 1
    assert summary["val_win_rate"] > 0.5
    samples = metrics("run", "samples.jsonl")
    assert {"step", "prompt", "before", "now", "score", "score_before"} == set(samples[0])
    for name in ("clip_fraction", "entropy", "eos_share", "explained_variance", "alarms", "length"):
        assert name in last
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert manifest["self_check_ratio"] < 1e-3
    assert manifest["self_check_kl"] == 0
    assert manifest["keeps_sampled_log_probs"] is True


def test_the_result_opens_in_a_fresh_process(cli, base, world):
    assert ppo(cli, base, "--max-steps", 2, "--val-size", 0, "-o", "run").code == 0
    code = """
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("run/model")
model = AutoModelForCausalLM.from_pretrained("run/model")
value = AutoModelForSequenceClassification.from_pretrained("run/value_model")
assert value.config.num_labels == 1
tokens = torch.tensor([tokenizer("The cat")["input_ids"]])
assert torch.isfinite(model(tokens).logits).all()
assert value.model(tokens).last_hidden_state.shape[:2] == tokens.shape
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_lora_shares_one_set_of_weights(cli, base, world):
    from llmctl.config.commands.ppo import PpoConfig
    from llmctl.models.loading import load_tokenizer
    from llmctl.ppo.models import load_models

    config = PpoConfig(model=str(base), data=["x"], reward_rule=["repetition"], lora=True)
    actor_critic = load_models(config, load_tokenizer(str(base)), "", "cpu").actor_critic
    theirs = {weight.data_ptr() for weight in actor_critic.reference.parameters()}
    for part in (actor_critic.policy, actor_critic.value):
        frozen = [w for w in part.parameters() if not w.requires_grad]
        assert frozen
        assert {weight.data_ptr() for weight in frozen} <= theirs
    trained = {id(w) for w in actor_critic.parameters() if w.requires_grad}
    assert trained.isdisjoint({id(w) for w in actor_critic.reference.parameters()})


def test_lora_learns_and_leaves_adapters(cli, base, world):
    how = ("--lr", 1e-2, "--batch-size", 16, "--ppo-epochs", 4, "--max-steps", 40)
    result = ppo(cli, base, "--lora", "--lora-r", 8, "--merge", *how, "-o", "run")
    assert result.code == 0, result.err
    assert gain("run") > 1.2
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained("run/adapter")
    tokens = torch.tensor([tokenizer("The cat")["input_ids"]])
    adapted = AutoPeftModelForCausalLM.from_pretrained("run/adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained("run/model").eval()
    assert torch.allclose(adapted(tokens).logits, merged(tokens).logits, atol=1e-4)
    value = AutoPeftModelForSequenceClassification.from_pretrained("run/value_model", num_labels=1)
    learned = load_file("run/value_model/adapter_model.safetensors")
    head = next(tensor for name, tensor in learned.items() if name.endswith("score.weight"))
    assert float(head.abs().max()) > 0
    assert value.config.num_labels == 1


def test_bf16_keeps_frozen_layers_small_and_samples_with_the_fast_pass(cli, base, world):
    options = ("--lora", "--precision", "bf16", "--max-steps", 2, "--val-size", 4, "-o", "run")
    result = ppo(cli, base, *options)
    assert result.code == 0, result.err
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert manifest["self_check_ratio"] == 0
    assert manifest["self_check_kl"] == 0
    assert 0 < manifest["self_check_sampling"] < 0.2
    assert manifest["keeps_sampled_log_probs"] is False


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(cli, base, world):
    one = ppo(cli, base, "--max-steps", 3, "--val-size", 4, "-o", "one")
    assert one.code == 0, one.err
    two = ("--batch-size", 4, "--minibatches", 2, *QUICK[4:])
    command = [
        sys.executable,
        "-m",
        "llmctl",
        "ppo",
        "--model",
        base,
        "--data",
        "prompts.jsonl",
        "--plain",
    ]
    command += ["--reward-rule", "python:ppo_rules.letter", *two, "--max-steps", 3]
    command += ["--val-size", 4, "--processes", 2, "-o", "two"]
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for ours, theirs in zip(metrics("one"), metrics("two"), strict=True):
        for name in ("score", "kl", "loss", "val_loss", "entropy", "explained_variance"):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-3)
    a, b = (load_file(f"{run}/model/model.safetensors") for run in ("one", "two"))
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-4


@pytest.mark.parametrize("way", [(), ("--lora", "--lora-r", 4)], ids=["full", "lora"])
def test_a_run_resumes_to_the_bit(cli, base, world, way):
    options = (*way, "--max-steps", 6, "--save-every", 2, "--eval-every", 3, "--kl-target", 0.5)
    assert ppo(cli, base, *options, "-o", "whole").code == 0
    assert ppo(cli, base, *options, "-o", "cut").code == 0
    for name in ("model", "value_model", "adapter"):
        if (Path("cut") / name).exists():
            subprocess.run(["rm", "-r", f"cut/{name}"], check=True)
    subprocess.run(["rm", "-r", "cut/checkpoints/checkpoint-6"], check=True)
    status = json.loads(Path("cut/status.json").read_text())
    Path("cut/status.json").write_text(json.dumps({**status, "state": "failed"}))
    result = ppo(cli, base, *options, "-o", "cut", "--resume")
    assert result.code == 0, result.err
    assert "resuming from cut/checkpoints/checkpoint-" in result.err
    assert decisive("whole") == decisive("cut")
    assert Path("whole/samples.jsonl").read_text() == Path("cut/samples.jsonl").read_text()
    if not way:
        same("whole", "cut")


@pytest.mark.slow
def test_a_signal_in_a_rollout_is_obeyed_and_the_run_resumes_to_the_bit(cli, base, world):
    # almost all of a step is its rollout, so that is where a signal falls
    quick = ("--batch-size", 4, "--minibatches", 1, "--ppo-epochs", 1, "--max-new-tokens", 24)
    quick = (*quick, "--threads", 1, "--lr", 1e-3, "--ignore-eos", "--val-size", 0)
    quick = (*quick, "--schedule", "constant", "--warmup", 0)
    options = ("--max-steps", 300, "--save-every", 1000)
    command = [sys.executable, "-m", "llmctl", "ppo", "--model", base, "--data", "prompts.jsonl"]
    command += ["--plain", "--reward-rule", "python:ppo_rules.letter", *quick, *options]
    command += ["-o", "cut"]
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not (Path("cut/metrics.jsonl").exists() and len(policy_steps("cut")) > 2):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    done = json.loads(Path("cut/status.json").read_text())
    assert done["resumable"]
    assert done["state"] == "preempted"
    stop = ("--max-steps", done["step"] + 2)
    resumed = ppo(
        cli, base, *stop, "--resume", "--resume-allow", "max_steps", "-o", "cut", quick=quick
    )
    assert resumed.code == 0, resumed.err
    assert ppo(cli, base, *stop, "-o", "whole", quick=quick).code == 0
    same("whole", "cut")


def test_a_signal_ends_sampling_before_the_next_token(cli, base, world):
    from llmctl.models.loading import load_causal_lm, load_tokenizer
    from llmctl.ppo.rollout import RolloutInterrupted, RolloutSampler
    from llmctl.signals import StopFlag

    model = load_causal_lm(str(base), dtype=torch.float32)
    sampler = RolloutSampler(load_tokenizer(str(base)), 8, 1.0, set(), 0, 4)
    flag = StopFlag()
    flag.received = signal.SIGTERM
    with pytest.raises(RolloutInterrupted):
        sampler.sample(model, [[5, 6]], [0], flag, contextlib.nullcontext)


def test_resuming_with_other_rewards_is_refused(cli, base, world):
    options = ("--max-steps", 2, "--val-size", 0, "-o", "run")
    assert ppo(cli, base, *options, "--save-every", 1).code == 0
    status = json.loads(Path("run/status.json").read_text())
    Path("run/status.json").write_text(json.dumps({**status, "state": "failed"}))
    result = ppo(cli, base, *options, "--resume", "--kl-coef", 0.3)
    assert result.code == 4
    assert "kl_coef: 0.05 -> 0.3" in result.err
    result = ppo(cli, base, *options, "--resume", rule="python:ppo_rules.letter=2")
    assert result.code == 4
    assert "reward_rule" in result.err


def test_passes_of_any_size_give_the_same_model(cli, base, world):
    """A minibatch is a sum over its tokens, in however many pieces it is computed."""
    options = ("--max-steps", 3, "--val-size", 0)
    assert ppo(cli, base, *options, "-o", "whole").code == 0
    assert ppo(cli, base, *options, "--pass-tokens", 16, "-o", "pieces").code == 0
    a, b = (load_file(f"{run}/model/model.safetensors") for run in ("whole", "pieces"))
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-4


def test_adaptive_penalty_and_early_stop(cli, base, world):
    options = ("--max-steps", 4, "--val-size", 0, "--kl-target", 1e-3, "--kl-horizon", 16)
    assert ppo(cli, base, *options, "--stop-kl", 1e-9, "-o", "run").code == 0
    lines = policy_steps("run")
    assert lines[-1]["kl_coef"] > lines[1]["kl_coef"]
    assert lines[1]["updates"] < 4


def test_every_response_has_the_same_length_where_eos_is_ignored(cli, base, world):
    assert ppo(cli, base, "--ignore-eos", "--max-steps", 2, "--val-size", 0, "-o", "run").code == 0
    assert [line["length"] for line in policy_steps("run")] == [8, 8]
    assert policy_steps("run")[0]["eos_share"] == 0


def test_weights_and_rules_add_up(cli, base, world):
    options = ("--reward-rule", "repetition", "--reward-rule", "length:4=2", "--max-steps", 1)
    result = ppo(cli, base, *options, "--val-size", 0, "-o", "run", rule="regex:a=0.5")
    assert result.code == 0, result.err
    (line,) = policy_steps("run")
    parts = {name: line[f"score/{name}"] for name in ("regex:a", "repetition", "length:4")}
    total = 0.5 * parts["regex:a"] + parts["repetition"] + 2 * parts["length:4"]
    assert line["score"] == pytest.approx(total)


def test_missing_eos_is_penalised(cli, base, world):
    options = ("--max-steps", 1, "--val-size", 0, "--max-new-tokens", 2)
    assert ppo(cli, base, *options, "-o", "plain").code == 0
    assert ppo(cli, base, *options, "--missing-eos-penalty", 3, "-o", "paid").code == 0
    (plain,), (paid,) = policy_steps("plain"), policy_steps("paid")
    assert paid["score"] == pytest.approx(plain["score"] - 3 * (1 - plain["eos_share"]))


def test_several_samples_share_a_prompt(cli, base, world):
    options = ("--num-samples", 4, "--max-steps", 1, "--val-size", 0, "-o", "run")
    result = ppo(cli, base, *options, rule="python:ppo_rules.fours")
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--reward-rule", "python:ppo_rules.broken"), 3, "raised ValueError: no reward today"),
        (("--reward-rule", "python:ppo_rules.nothing"), 3, "gave nan for the response to"),
        (("--reward-rule", "python:ppo_rules.few"), 3, "gave 1 score for"),
        (("--reward-rule", "python:ppo_rules.absent"), 2, "ppo_rules has no absent"),
        (("--reward-rule", "python:nowhere.to_be"), 2, "No module named 'nowhere'"),
        (("--reward-rule", "regex:("), 2, "no regular expression"),
        (("--reward-rule", "length:x"), 2, "expected a number of words"),
        (("--reward-rule", "polite"), 2, "no reward rule `polite`"),
        (("--reward-rule", "regex:a=0"), 2, "the weight must be a number other than 0"),
        (("--minibatches", 9), 2, "a step has 8 episodes"),
        (("--num-samples", 3), 2, "--num-samples 3 does not divide --batch-size 8"),
        (("--lora", "--lora-dropout", 0.1), 2, "the ratio of the policies would not be 1"),
        (("--lora", "--precision", "pure-bf16"), 2, "pure-bf16 does not go with adapters"),
        (("--reward-rule", "python:ppo_bad.rule"), 2, "SyntaxError"),
        (("--kl-horizon", 5), 2, "--kl-horizon goes with --kl-target"),
        (("--clip-score", 5.5), 2, "--clip-score goes with --reward-model"),
        (("--score-at", "last-token"), 2, "--score-at goes with --reward-model"),
        (("--max-steps", 2, "--episodes", 16), 2, "give --max-steps or --episodes, not both"),
        (("--max-step", 2), 2, "No such option: --max-step"),
        (("--val-size", 25), 3, "25 prompts to hold out, but there are only 25"),
        (("--value-init", "reward"), 2, "no reward model is a decoder with the policy's"),
    ],
)
def test_bad_settings(cli, base, world, arguments, code, said):
    rule = None if "--reward-rule" in arguments else "python:ppo_rules.letter"
    result = ppo(cli, base, *arguments, "-o", "run", rule=rule)
    assert (result.code, said in result.err) == (code, True), result.err
    assert "Traceback" not in result.err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ('{"prompt": ""}\n', "bad.jsonl:1: `prompt` is empty"),
        ('{"prompt": "a"}\n{"prompt": "  "}\n', "bad.jsonl:2: `prompt` is nothing but white space"),
        ('{"text": "a"}\n', "bad.jsonl:1: no prompt in these columns: `text`"),
        ('{"prompt": 3}\n', "bad.jsonl:1: `prompt` is a number, expected text"),
        ('{"prompt": "' + "the cat " * 60 + '"}\n', "bad.jsonl:1: the prompt has"),
        ('{"messages": [{"role": "assistant", "content": "Hi"}]}\n', "begins with the assistant"),
        ("{\n", "bad.jsonl:1: not JSON"),
        ("", "no prompt in it"),
    ],
)
def test_bad_prompts(cli, base, world, rows, said):
    Path("bad.jsonl").write_text(rows)
    result = cli(
        *("ppo", "--model", base, "--plain", "--data", "bad.jsonl", "--reward-rule", "repetition"),
        *(*QUICK, "--max-steps", 1, "--val-size", 0, "-o", "run"),
    )
    assert result.code == 3
    assert said in result.err


def test_bad_rows_may_be_skipped(cli, base, world):
    Path("bad.jsonl").write_text('{"prompt": ""}\n{"prompt": "The cat"}\n')
    arguments = ("--data", "bad.jsonl", "--reward-rule", "repetition", "--skip-bad-rows", 1)
    result = cli(
        "ppo", "--plain", "--model", base, *arguments, *QUICK, "--max-steps", 1, "-o", "run"
    )
    assert result.code == 0, result.err
    assert "left out 1 row" in result.err


def test_exact_needs_answers(cli, base, world):
    Path("prompts.txt").write_text("The cat\nA dog\n")
    arguments = ("--data", "prompts.txt", "--reward-rule", "exact", *QUICK, "--max-steps", 1)
    result = cli("ppo", "--plain", "--model", base, *arguments, "-o", "run")
    assert result.code == 3
    assert "exact needs answers, and prompts.txt:" in result.err


def test_a_dry_run_writes_nothing(cli, base, world):
    result = ppo(cli, base, "--dry-run")
    assert result.code == 0
    assert result.out.startswith("stage: ppo\n")
    assert "steps of 8 episodes" in result.err
    assert not Path("runs").exists()


def test_the_value_model_is_of_the_policys_kind(cli, base, world):
    assert ppo(cli, base, "--max-steps", 1, "--val-size", 0, "-o", "run").code == 0
    value = AutoModelForSequenceClassification.from_pretrained("run/value_model")
    assert type(value).__name__ == "LlamaForSequenceClassification"
