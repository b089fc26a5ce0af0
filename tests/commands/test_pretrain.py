"""pretrain through the CLI: it learns, resumes to the bit, refuses what would go wrong."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from llmctl.data.shards import open_tokens
from llmctl.models.loading import load_tokenizer
from tests.conftest import SMALL, out_of_memory
from tests.processes import spawn, wait_for
from tests.run_files import cut_off, digest, metrics

STEPS = ("--max-steps", 12, "--save-every", 4, "--eval-every", 6, "--threads", 1)


def test_it_learns_and_says_so(base):
    rows = metrics(base)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] / 2
    validations = [row["val_loss"] for row in rows if "val_loss" in row]
    assert len(validations) == 10
    training = {
        "step",
        "time",
        "tokens",
        "loss",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "mfu",
        "memory_bytes",
    }
    assert any(set(row) == training for row in rows)
    row = next(row for row in rows if "val_loss" in row)
    assert row["val_perplexity"] == pytest.approx(math.exp(row["val_loss"]))


def test_the_result_opens_in_a_fresh_process(base):
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer;"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "assert m.generation_config.eos_token_id == t.eos_token_id != t.pad_token_id;"
        "print(m.num_parameters(), t('The cat').input_ids[0] == t.bos_token_id)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, base / "model"], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[1] == "True"
    manifest = json.loads((base / "manifest.json").read_text())
    assert manifest["result"]["parameters"] == int(ran.stdout.split()[0])


def test_validation_loss_is_the_mean_over_the_whole_split(base, tokens):
    """Against a plain forward, one window at a time, and bits per byte from its definition."""
    from transformers import AutoModelForCausalLM

    from llmctl.data.shards import open_tokens

    val = open_tokens(tokens).val
    ids = torch.from_numpy(val.window(0, val.tokens))
    model = AutoModelForCausalLM.from_pretrained(base / "model")
    nats = 0.0
    with torch.no_grad():
        for start in range(0, val.tokens - 1, 32):
            window = ids[start : start + 33]
            logits = model(window[None, :-1]).logits[0].log_softmax(-1)
            nats -= logits[torch.arange(len(window) - 1), window[1:]].sum().item()
    result = json.loads((base / "manifest.json").read_text())["result"]
    assert result["val_loss"] == pytest.approx(nats / (val.tokens - 1), rel=1e-4)
    bits = nats / math.log(2) * val.tokens / (val.tokens - 1) / val.bytes
    assert result["val_bits_per_byte"] == pytest.approx(bits, rel=1e-4)


def test_json_is_one_object(cli, tokens, tmp_path):
    result = cli("pretrain", "--tokens", tokens, *SMALL, *STEPS, "-o", tmp_path / "run", "--json")
    found = json.loads(result.out)
    wanted = {
        "stage",
        "out",
        "model",
        "status",
        "val_loss",
        "val_bits_per_byte",
        "tokens_per_second",
        "parameters",
    }
    assert wanted <= set(found)
    assert found["status"] == "completed"


def test_the_same_seed_gives_the_same_bits_and_another_does_not(cli, tokens, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        cli("pretrain", "--tokens", tokens, *SMALL, *STEPS, "--seed", seed, "-o", tmp_path / name)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_it_continues_the_same_beginnings_before_and_after(base, tokens):
    rows = metrics(base, "samples.jsonl")
    evaluated = [row["step"] for row in metrics(base) if "val_loss" in row]
    assert sorted({row["step"] for row in rows}) == [0, *evaluated]
    prompts = {row["prompt"] for row in rows}
    assert len(prompts) == 4
    assert len(rows) == 4 * 11
    tokenizer = load_tokenizer(str(tokens))
    split = open_tokens(tokens / "tokens").val
    text = tokenizer.decode(split.window(0, split.tokens))
    assert all(prompt in text for prompt in prompts)
    begins = [text.index(prompt) for prompt in prompts]
    assert all(text[:at].endswith(tokenizer.bos_token) for at in begins)
    before, after = ([r["response"] for r in rows if r["step"] == step] for step in (0, 60))
    assert before != after


def test_samples_are_what_generate_says(cli, tokens, tmp_path):
    """Prompts of several lengths are padded, and training's attention has no mask."""
    prompts = ("A", "The old man sees a song. The")
    asked = [word for prompt in prompts for word in ("--sample-prompt", prompt)]
    shape = ("--layers", 2, "--hidden", 64, "--heads", 2, "--context", 64, "--batch-size", 16)
    flags = (*shape, "--max-steps", 200, "--eval-every", 200, "--threads", 1, "-o", tmp_path)
    assert cli("pretrain", "--tokens", tokens, *flags, *asked, "--sample-tokens", 8).code == 0
    said = [row["response"] for row in metrics(tmp_path, "samples.jsonl")][2:]
    for prompt, response in zip(prompts, said, strict=True):
        more = ("--greedy", "--max-new-tokens", 8, "--json")
        row = json.loads(cli("generate", "--model", tmp_path, "--prompt", prompt, *more).out)
        assert row["response"] == response


def test_prompts_of_ones_own_are_continued_also_without_validation(cli, corpus, tmp_path):
    tok, out = tmp_path / "tok", tmp_path / "run"
    flags = ("--data", corpus, "--vocab-size", 300, "--val-fraction", 0, "-o", tok)
    assert cli("tokenize", *flags).code == 0
    flags = (*SMALL, "--max-steps", 2, "--eval-every", 1, "--threads", 1, "-o", out)
    said = ("--sample-prompt", "The cat", "--sample-tokens", 3)
    assert cli("pretrain", "--tokens", tok, *flags, *said).code == 0
    rows = metrics(out, "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in rows] == [(n, "The cat") for n in range(3)]


def test_evaluating_and_saving_more_often_changes_nothing(cli, tokens, tmp_path):
    weights = []
    for every in (3, 12):
        out = tmp_path / str(every)
        cli(
            "pretrain",
            "--tokens",
            tokens,
            *SMALL,
            "--max-steps",
            12,
            "--threads",
            1,
            "--save-every",
            every,
            "--eval-every",
            every,
            "--samples",
            every // 12,
            "-o",
            out,
        )
        weights.append(load_file(out / "checkpoints" / "checkpoint-12" / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_accumulation_equals_a_larger_batch(cli, tokens, tmp_path, optimizer):
    shape = ("--layers", 2, "--hidden", 32, "--heads", 2, "--context", 32)
    for name, size, passes in (("whole", 8, 1), ("parts", 2, 4)):
        cli(
            "pretrain",
            "--tokens",
            tokens,
            *shape,
            "--batch-size",
            size,
            "--grad-accum",
            passes,
            "--optimizer",
            optimizer,
            "--max-steps",
            4,
            "--threads",
            1,
            "-o",
            tmp_path / name,
        )
    whole, parts = (load_file(tmp_path / n / "model/model.safetensors") for n in ("whole", "parts"))
    tolerance = 2e-3 if optimizer == "muon" else 1e-4  # Muon multiplies in bfloat16
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], atol=tolerance, rtol=tolerance)


def test_resume_from_every_checkpoint_ends_in_the_same_bits(cli, tokens, tmp_path):
    run = ("pretrain", "--tokens", tokens, *SMALL, *STEPS, "--keep", 9, "-o")
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert cli(*run, whole).code == 0
    for step in (0, 4, 6, 8):
        cut_off(whole, again, step)
        assert cli(*run, again, "--resume").code == 0
        assert digest(again) == digest(whole)
        assert [r["step"] for r in metrics(again)] == [r["step"] for r in metrics(whole)]
        assert metrics(again, "samples.jsonl") == metrics(whole, "samples.jsonl")


@pytest.fixture(scope="module")
def long_run(cli, tokens, tmp_path_factory):
    """The command of a run of some seconds, to which its folder is to be added, and its result."""
    run = ("pretrain", "--tokens", tokens, *SMALL, "--max-steps", 300, "--threads", 1, "-o")
    whole = tmp_path_factory.mktemp("long") / "whole"
    assert cli(*run, whole).code == 0
    return run, digest(whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_resume_ends_in_the_same_bits(cli, long_run, tmp_path, number, code):
    run, whole = long_run
    process = spawn(*run, tmp_path / "cut")
    wait_for(tmp_path / "cut" / "metrics.jsonl", process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "saved" in err
    assert "--resume" in err
    status = json.loads((tmp_path / "cut" / "status.json").read_text())
    assert (status["state"], status["resumable"], status["exit_code"]) == ("preempted", True, code)
    assert not (tmp_path / "cut" / "model").exists()
    assert cli(*run, tmp_path / "cut").code == 3, "without --resume it is not written over"
    assert cli(*run, tmp_path / "cut", "--resume").code == 0
    assert digest(tmp_path / "cut") == whole


@pytest.mark.slow
def test_kill_at_any_time_and_resume_ends_in_the_same_bits(cli, long_run, tmp_path):
    (*run, flag), whole = long_run
    run += ["--save-every", 2, flag]
    out = tmp_path / "cut"
    for delay in (0.0, 0.3, 0.9):
        process = spawn(*run, out, "--resume")
        wait_for(out / "metrics.jsonl", process)
        time.sleep(delay)
        process.kill()
        process.communicate()
    assert cli(*run, out, "--resume").code == 0
    assert digest(out) == whole


def test_resuming_from_another_runs_checkpoint_ends_where_it_would_have(cli, tokens, tmp_path):
    run = ("pretrain", "--tokens", tokens, *SMALL, *STEPS, "--keep", 9, "-o")
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli(*run, first).code == 0
    result = cli(*run, second, "--resume-from", first / "checkpoints" / "checkpoint-6")
    assert result.code == 0, result.err
    assert digest(second) == digest(first)


@pytest.mark.parametrize("named", ["", "checkpoints"])
def test_of_a_run_the_newest_sound_checkpoint_is_resumed(cli, tokens, tmp_path, named):
    run = ("pretrain", "--tokens", tokens, *SMALL, *STEPS, "--keep", 9, "-o")
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli(*run, first).code == 0
    steps = sorted(int(p.name.split("-")[1]) for p in (first / "checkpoints").iterdir())
    cut = cut_off(first, tmp_path / "cut", steps[-2])
    (cut / "checkpoints" / f"checkpoint-{steps[-2]}" / "model.safetensors").write_bytes(b"")
    result = cli(*run, second, "--resume-from", cut / named)
    assert result.code == 0, result.err
    assert f"passing over {cut}/checkpoints/checkpoint-{steps[-2]}: model.safeten" in result.err
    assert f"resuming from {cut}/checkpoints/checkpoint-{steps[-3]}" in result.err
    assert digest(second) == digest(first)
    shutil.rmtree(cut / "checkpoints")
    (cut / "checkpoints").mkdir()
    result = cli(*run, tmp_path / "third", "--resume-from", cut / named)
    assert (result.code, "this run has no checkpoint" in result.err) == (4, True)


def test_a_failed_overwrite_leaves_the_model(cli, base, tokens):
    before = digest(base)
    result = cli("pretrain", "--tokens", "nowhere", "-o", base, "--overwrite")
    assert result.code == 3
    assert digest(base) == before
    result = cli("pretrain", "--model", base, "--tokens", tokens, "-o", base, "--overwrite")
    assert result.code == 4
    assert digest(base) == before


def test_training_attends_causally_without_a_mask(base, tokens, tmp_path, monkeypatch, cli):
    """What flash attention takes; and the name of our attention does not get into the result."""
    from torch.nn import functional

    seen = set()
    attend = functional.scaled_dot_product_attention

    def spy(*tensors, attn_mask=None, is_causal=False, **options):
        seen.add((attn_mask is None, is_causal))
        return attend(*tensors, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    out = tmp_path / "run"
    run = ("pretrain", "--tokens", tokens, *SMALL, *STEPS, "--samples", 0, "-o", out)
    assert cli(*run).code == 0
    assert seen == {(True, True)}
    assert "sdpa_causal" not in (out / "model" / "config.json").read_text()


def test_memory_that_runs_out_is_said_as_such(cli, tokens, tmp_path, monkeypatch):
    from llmctl.training import loop

    monkeypatch.setattr(loop, "accumulate", out_of_memory)
    result = cli("pretrain", "--tokens", tokens, *SMALL, *STEPS, "-o", tmp_path / "run")
    assert result.code == 5
    assert "try --batch-size 4 --grad-accum 2" in result.err


def test_a_finished_run_is_left_untouched(cli, base, tokens):
    before = {p: p.stat().st_mtime_ns for p in base.rglob("*") if p.is_file()}
    result = cli("pretrain", "--tokens", tokens, *SMALL, "-o", base, "--resume")
    assert (result.code, result.out.strip()) == (0, str(base))
    assert "already complete" in result.err
    assert {p: p.stat().st_mtime_ns for p in base.rglob("*") if p.is_file()} == before


def test_resuming_another_run_is_refused_with_the_difference(cli, tokens, tmp_path):
    out = tmp_path / "run"
    run = ("pretrain", "--tokens", tokens, *SMALL, *STEPS, "-o", out)
    assert cli(*run).code == 0
    (out / "status.json").write_text('{"state": "failed"}')
    result = cli(*run, "--resume", "--lr", 0.01)
    assert result.code == 4
    assert "lr: 0.00" in result.err
    assert "-> 0.01" in result.err


def test_nan_stops_before_the_step(cli, tokens, tmp_path):
    result = cli(
        "pretrain",
        "--tokens",
        tokens,
        *SMALL,
        *STEPS,
        "--lr",
        1e30,
        "--warmup",
        0,
        "--max-grad-norm",
        0,
        "-o",
        tmp_path / "run",
    )
    assert result.code == 7
    assert "nan" in result.err or "inf" in result.err
    assert "sequences" in result.err
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "diverged"
    assert not (tmp_path / "run" / "model").exists()


def test_the_best_checkpoint_is_the_result(cli, tokens, tmp_path):
    """With a learning rate that ruins the model late, the result is from before."""
    out = tmp_path / "run"
    cli(
        "pretrain",
        "--tokens",
        tokens,
        *SMALL,
        "--max-steps",
        40,
        "--eval-every",
        5,
        "--warmup",
        40,
        "--lr",
        3.0,
        "--optimizer",
        "adamw",
        "--threads",
        1,
        "-o",
        out,
    )
    result = json.loads((out / "manifest.json").read_text())["result"]
    losses = {r["step"]: r["val_loss"] for r in metrics(out) if "val_loss" in r}
    assert result["best_step"] == min(losses, key=losses.get) < 40
    best = load_file(
        out / "checkpoints" / f"checkpoint-{result['best_step']}" / "model.safetensors"
    )
    final = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(best[name], final[name]) for name in final)


def test_early_stop_ends_the_run(cli, tokens, tmp_path):
    out = tmp_path / "run"
    result = cli(
        "pretrain",
        "--tokens",
        tokens,
        *SMALL,
        "--max-steps",
        200,
        "--eval-every",
        2,
        "--warmup",
        100,
        "--lr",
        3.0,
        "--optimizer",
        "adamw",
        "--early-stop",
        2,
        "--threads",
        1,
        "-o",
        out,
        "--json",
    )
    assert json.loads(result.out)["step"] < 200


def test_continuing_a_model_starts_from_its_weights(cli, base, tokens, tmp_path):
    out = tmp_path / "more"
    result = cli(
        "pretrain",
        "--model",
        base,
        "--tokens",
        tokens,
        "--max-steps",
        2,
        "--batch-size",
        8,
        "--eval-every",
        1,
        "--threads",
        1,
        "-o",
        out,
        "--json",
    )
    assert result.code == 0, result.err
    before = json.loads((base / "manifest.json").read_text())["result"]["val_loss"]
    assert json.loads(result.out)["val_loss"] == pytest.approx(before, abs=0.1)


def test_text_and_a_tokenizer_do_instead_of_tokens(cli, corpus, tokens, tmp_path):
    out = tmp_path / "run"
    result = cli("pretrain", "--data", corpus, "--tokenizer", tokens, *SMALL, *STEPS, "-o", out)
    assert result.code == 0, result.err
    reference = tmp_path / "reference"
    cli("pretrain", "--tokens", tokens, *SMALL, *STEPS, "-o", reference)
    assert digest(out) == digest(reference)


def test_dry_run_writes_nothing(cli, tokens, tmp_path):
    out = tmp_path / "run"
    result = cli("pretrain", "--tokens", tokens, *SMALL, *STEPS, "-o", out, "--dry-run")
    assert result.code == 0
    assert result.out.startswith("stage: pretrain\n")
    assert "parameters" in result.err
    assert not out.exists()


# --- several processes


@pytest.mark.slow
def test_two_processes_train_the_same_model_as_one_with_twice_the_batch(cli, tokens, tmp_path):
    shape = (
        "--layers",
        2,
        "--hidden",
        32,
        "--heads",
        2,
        "--context",
        32,
        "--max-steps",
        10,
        "--optimizer",
        "adamw",
        "--threads",
        1,
    )
    one, two = tmp_path / "one", tmp_path / "two"
    cli("pretrain", "--tokens", tokens, *shape, "--batch-size", 8, "-o", one)
    process = spawn(
        "pretrain",
        "--tokens",
        tokens,
        *shape,
        "--batch-size",
        4,
        "--processes",
        2,
        "-o",
        two,
        "--json",
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert len(out.splitlines()) == 1, "only rank 0 prints"
    assert json.loads((two / "manifest.json").read_text())["world_size"] == 2
    a, b = (load_file(run / "model/model.safetensors") for run in (one, two))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=1e-3)
    one_rows, two_rows = (
        [r["val_loss"] for r in metrics(x) if "val_loss" in r] for x in (one, two)
    )
    assert one_rows == pytest.approx(two_rows, rel=1e-4)


@pytest.mark.slow
def test_a_childs_exit_code_is_passed_on(tokens, tmp_path):
    process = spawn(
        "pretrain",
        "--tokens",
        tokens,
        *SMALL,
        *STEPS,
        "--lr",
        "1e30",
        "--warmup",
        0,
        "--max-grad-norm",
        0,
        "--processes",
        2,
        "-o",
        tmp_path / "run",
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 7, err


@pytest.mark.slow
def test_a_launcher_that_starts_one_process_of_two_is_an_error(tokens, tmp_path):
    process = spawn(
        "--cpu",
        "--num_processes",
        2,
        "-m",
        "llmctl",
        "pretrain",
        "--tokens",
        tokens,
        *SMALL,
        *STEPS,
        "-o",
        tmp_path / "run",
        launcher=("-m", "accelerate.commands.accelerate_cli", "launch"),
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "started one" in err


@pytest.mark.gpu
def test_a_gpu_trains_in_bfloat16_and_resumes(cli, tokens, tmp_path):
    run = (
        "pretrain",
        "--tokens",
        tokens,
        *SMALL,
        "--max-steps",
        60,
        "--device",
        "cuda",
        "--precision",
        "bf16",
        "--compile",
        "-o",
        tmp_path / "run",
        "--json",
    )
    found = json.loads(cli(*run).out)
    assert found["val_loss"] < 3.5
    assert found["memory_bytes"] > 0
    (tmp_path / "run" / "status.json").write_text('{"state": "failed"}')
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-60")
    shutil.rmtree(tmp_path / "run" / "model")
    again = json.loads(cli(*run, "--resume").out)
    assert again["val_loss"] == pytest.approx(found["val_loss"], rel=1e-3)


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--context", 100_000), 3, "fewer than one sequence"),
        (("--hidden", 33), 2, "odd width"),
        (("--device", "cuda"), 5, "--device cuda: there is none here"),
        (("--lrr", 1), 2, "--lr"),
        (("--max-steps", "many"), 2, "expected a count"),
        (("--optimizer", "adamw", "--momentum", 0.8), 2, "--momentum is Muon's"),
        (("--schedule", "constant", "--min-lr", 0.2), 2, "--min-lr does not go with"),
        (("--resume-allow", "lr"), 2, "--resume-allow goes with --resume"),
        (("--model", "nobody/nothing"), 6, "the Hub is switched off"),
        (("--config-from", "./nothing"), 4, "no such model folder"),
        (("--resume-from", "nowhere"), 4, "not a valid checkpoint: manifest.json is missing"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="expects a machine without a GPU")
def test_bad_input(cli, tokens, tmp_path, arguments, code, message):
    out = tmp_path / "run"
    result = cli(
        "pretrain", "--tokens", tokens, "-o", out, "--threads", 1, "--max-steps", 2, *arguments
    )
    assert result.code == code, result.err
    assert message in result.err
    last = result.err[result.err.index("error:") :]
    assert len(last.strip().splitlines()) <= 3
    assert not out.exists()
    assert not result.out


def test_tokens_that_are_not_there(cli, tmp_path):
    result = cli("pretrain", "--tokens", tmp_path, "-o", tmp_path / "run")
    assert result.code == 3
    assert "no token shards here" in result.err


def test_tokens_of_another_tokenizer(cli, base, corpus, tmp_path):
    other = tmp_path / "tok"
    assert cli("tokenize", "--data", corpus, "--algorithm", "char", "-o", other).code == 0
    result = cli("pretrain", "--model", base, "--tokens", other, "-o", tmp_path / "run")
    assert result.code == 3
    assert "tokens are of another tokenizer than the model's" in result.err


def test_a_model_of_pickles_and_one_with_code_of_its_own(cli, base, tokens, tmp_path):
    pickles = tmp_path / "pickles"
    shutil.copytree(base / "model", pickles)
    (pickles / "model.safetensors").rename(pickles / "pytorch_model.bin")
    result = cli("pretrain", "--model", pickles, "--tokens", tokens, "-o", tmp_path / "a")
    assert result.code == 4
    assert "only pickled weights" in result.err
    remote = tmp_path / "remote"
    shutil.copytree(base / "model", remote)
    canary = tmp_path / "canary"
    (remote / "code.py").write_text(f"open({str(canary)!r}, 'w')")
    config = json.loads((remote / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    }
    (remote / "config.json").write_text(json.dumps(config))
    result = cli("pretrain", "--model", remote, "--tokens", tokens, "-o", tmp_path / "b")
    assert result.code == 4
    assert "Python code of its own" in result.err
    assert not canary.exists()


def test_weights_that_are_damaged_are_named(cli, base, tokens, tmp_path):
    from safetensors.torch import save_file

    weights = load_file(base / "model" / "model.safetensors")
    name = next(n for n in weights if "q_proj" in n)
    for change, message in (
        ({k: v for k, v in weights.items() if k != name}, "missing weights"),
        ({**weights, name: weights[name] * float("nan")}, "not finite"),
        ({**weights, name: weights[name][:1]}, "weights"),
        (
            {**weights, name.replace("layers.0", "layers.9"): weights[name].clone()},
            "unexpected weights",
        ),
    ):
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(base / "model", broken)
        save_file(change, broken / "model.safetensors", metadata={"format": "pt"})
        result = cli("pretrain", "--model", broken, "--tokens", tokens, "-o", tmp_path / "run")
        assert result.code == 4, result.err
        assert message in result.err
        assert name.rpartition("layers.")[2][2:] in result.err
    (broken / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    result = cli("pretrain", "--model", broken, "--tokens", tokens, "-o", tmp_path / "run")
    assert result.code == 4, result.err


def test_a_finished_run_names_the_flags_that_it_was_not_made_with(cli, tokens, tmp_path):
    run = ("pretrain", "--tokens", tokens, *SMALL, "--max-steps", 2, "-o", tmp_path / "run")
    assert cli(*run, "--lr", 0.001).code == 0
    before = digest(tmp_path / "run")
    same = cli(*run, "--lr", 0.001, "--resume", "--threads", 2)
    assert (same.code, "not as it was made" in same.err) == (0, False)
    other = cli(*run, "--lr", 0.002, "--seed", 3, "--resume")
    assert other.code == 0
    assert "not as it was made, and not run again: --seed 0 -> 3; --lr 0.001 -> 0.002" in other.err
    assert digest(tmp_path / "run") == before
