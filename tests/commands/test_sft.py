"""`llmctl sft` from the command line: it learns, its results open, its bad inputs are refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    MambaConfig,
    MambaForCausalLM,
)

from llmctl.files import sha256_file
from tests.conftest import question_row
from tests.processes import run_llmctl
from tests.run_files import cut_off, digest, edit_json, metrics, read_rows, write_rows

RUN = ("--batch-size", 8, "--precision", "fp32", "--threads", 1, "--seed", 3)
QUICK = (*RUN, "--max-steps", 4, "--samples", 0)


def chat(number):
    row = question_row(number)
    turns = (("user", row["prompt"]), ("assistant", row["response"]))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


@pytest.fixture(scope="session")
def base(roomy):
    return roomy


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """Short conversations; the answer stands in the question."""
    return write_rows(
        tmp_path_factory.mktemp("chats") / "chats.jsonl", [chat(n) for n in range(144)]
    )


@pytest.fixture(scope="session")
def tuned(cli, base, chats, tmp_path_factory):
    """A full fine-tune on them."""
    out = tmp_path_factory.mktemp("runs") / "sft"
    result = cli(
        *("sft", "--model", base, "--data", chats, *RUN, "--max-steps", 60, "--lr", "5e-3"),
        *("--val-size", 16, "--samples", 2, "--sample-tokens", 24, "-o", out),
    )
    assert result.code == 0, result.err
    assert result.out == f"{out}\n"
    return out


@pytest.fixture(scope="session")
def adapted(cli, base, chats, tmp_path_factory):
    """A LoRA of it, merged too."""
    out = tmp_path_factory.mktemp("runs") / "lora"
    result = cli(
        *("sft", "--model", base, "--data", chats, *RUN, "--max-steps", 60, "--lora", "--merge"),
        *("--lr", "1e-2", "--val-size", 16, "--samples", 0, "-o", out, "--json"),
    )
    assert result.code == 0, result.err
    return out, json.loads(result.out)


def logits(model, tokens=(1, 5, 9, 30, 31)):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([tokens])).logits


def test_it_learns_and_says_so(tuned):
    rows = [row for row in metrics(tuned) if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    assert rows[-1]["token_accuracy"] > rows[0]["token_accuracy"]
    keys = {"step", "time", "tokens", "loss", "lr", "grad_norm", "tokens_per_second"}
    assert keys <= set(rows[0])
    validations = [row for row in metrics(tuned) if "val_loss" in row]
    assert validations[-1]["val_loss"] < validations[0]["val_loss"]
    assert 0 < validations[-1]["val_token_accuracy"] <= 1


def test_the_manifest_says_what_went_in(tuned, base, chats):
    manifest = json.loads((tuned / "manifest.json").read_text())
    roles = {entry["role"]: entry for entry in manifest["inputs"]}
    assert roles["model"]["path"] == str(base)
    assert roles["data"]["sha256"] == sha256_file(chats)
    assert manifest["audit"]["rows"] == 144
    assert manifest["result"]["status"] == "completed"


def test_the_best_checkpoint_is_the_result(tuned):
    result = json.loads((tuned / "manifest.json").read_text())["result"]
    best = min((r for r in metrics(tuned) if "val_loss" in r), key=lambda row: row["val_loss"])
    assert (result["best_step"], result["val_loss"]) == (best["step"], best["val_loss"])
    kept = load_file(tuned / "checkpoints" / f"checkpoint-{best['step']}" / "model.safetensors")
    exported = load_file(tuned / "model" / "model.safetensors")
    for name, weight in exported.items():
        torch.testing.assert_close(weight, kept[name], rtol=0, atol=0)


def test_validation_loss_is_the_mean_over_all_trained_tokens(tuned, chats):
    """By definition: the answer's tokens and its end, each conversation alone."""
    tokenizer = AutoTokenizer.from_pretrained(tuned / "model")
    model = AutoModelForCausalLM.from_pretrained(tuned / "model")
    held = json.loads((tuned / "manifest.json").read_text())["held_out"]
    rows = read_rows(chats)
    total = count = 0.0
    for place in held:
        messages = rows[int(place.rsplit(":", 1)[1]) - 1]["messages"]
        text = tokenizer.apply_chat_template(
            messages[:1], tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(messages[1]["content"] + "<|im_end|>", add_special_tokens=False)
        answer = answer["input_ids"]
        scores = torch.log_softmax(logits(model, prompt + answer)[0], -1)
        for at, token in enumerate(answer, start=len(prompt)):
            total -= float(scores[at - 1, token])
            count += 1
    result = json.loads((tuned / "manifest.json").read_text())["result"]
    assert result["val_loss"] == pytest.approx(total / count, rel=1e-4)


def test_samples_are_kept(tuned):
    rows = metrics(tuned, "samples.jsonl")
    evaluated = {row["step"] for row in metrics(tuned) if "val_loss" in row}
    assert {row["step"] for row in rows} == {0, *evaluated}
    assert len({row["prompt"] for row in rows}) == 2
    assert rows[-1]["finish_reason"] == "eos"


def test_it_answers_and_stops(cli, tuned):
    prompt = chat(3)["messages"][0]["content"]
    result = cli("generate", "--model", tuned, "--chat", "--prompt", prompt, "--greedy", "--json")
    row = json.loads(result.out)
    assert row["finish_reason"] == "eos"
    assert row["response"].startswith("The ")


def test_an_adapter_and_its_merged_model_say_the_same(cli, adapted, base):
    out, result = adapted
    assert result["merge_difference"] < 1e-3
    assert result["trained_parameters"] < result["parameters"] / 2
    assert (out / "adapter" / "adapter_config.json").is_file()
    said = {}
    for name in ("adapter", "model"):
        found = cli(
            *("generate", "--model", out / name, "--chat", "--prompt", "What does the cat see?"),
            *("--greedy", "--max-new-tokens", 24),
        )
        assert found.code == 0, found.err
        said[name] = found.out
    assert said["adapter"] == said["model"]
    assert load_file(base / "model/model.safetensors").keys()


def test_an_adapter_opens_in_a_fresh_process(cli, adapted):
    out, _ = adapted
    program = (
        "import sys, torch; from peft import AutoPeftModelForCausalLM;"
        "m = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval();"
        "print(m(input_ids=torch.tensor([[1, 5, 9, 30, 31]])).logits.double().sum().item())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, out / "adapter"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    merged = AutoModelForCausalLM.from_pretrained(out / "model")
    assert float(ran.stdout) == pytest.approx(float(logits(merged).double().sum()), rel=1e-4)


WAYS = {
    "full": (),
    "packed": ("--packing",),
    "lora": ("--lora", "--lora-dropout", 0.1),
    "accumulation": ("--grad-accum", 2, "--batch-size", 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_resume_ends_in_the_same_bits(cli, base, chats, tmp_path, way):
    run = (
        *("sft", "--model", base, "--data", chats, *RUN, "--max-steps", 9, "--save-every", 3),
        *("--eval-every", 4, "--keep", 9, "--samples", 1, "--sample-tokens", 8, *WAYS[way], "-o"),
    )
    whole, again = tmp_path / "whole", tmp_path / "again"
    result = cli(*run, whole)
    assert result.code == 0, result.err
    for step in (3, 4, 8):
        cut_off(whole, again, step)
        result = cli(*run, again, "--resume")
        assert result.code == 0, result.err
        name = "adapter/adapter_model" if way == "lora" else "model/model"
        assert digest(again, f"{name}.safetensors") == digest(whole, f"{name}.safetensors")
        assert metrics(again, "samples.jsonl") == metrics(whole, "samples.jsonl")


def test_resuming_another_run_is_refused_with_the_difference(cli, base, chats, tmp_path):
    run = ("sft", "--model", base, "--data", chats, *QUICK, "-o", tmp_path / "run")
    assert cli(*run).code == 0
    (tmp_path / "run/status.json").write_text('{"state": "running"}')
    for more, named in (
        (("--max-length", 100), "max_length"),
        (("--train-on", "all"), "data"),
        (("--lr", 1e-4), "lr"),
        (("--val-size", 30), "data"),
    ):
        result = cli(*run, "--resume", *more)
        assert result.code == 4, result.err
        assert f"{named}:" in result.err


def test_packing_gives_the_loss_of_padding(cli, base, chats, tmp_path):
    """One step of all examples, at a rate of nearly nothing: the same loss, the same gradient."""
    found = {}
    for name, more in (("padded", ("--batch-size", 16)), ("packed", ("--packing",))):
        data = write_rows(tmp_path / "few.jsonl", [chat(n) for n in range(16)])
        out = tmp_path / name
        result = cli(
            *("sft", "--model", base, "--data", data, *QUICK, "--val-size", 0, "--max-length", 128),
            *("--max-steps", 1, "--lr", 1e-9, *more, "-o", out),
        )
        assert result.code == 0, result.err
        found[name] = metrics(out)[0]
    rows = json.loads((tmp_path / "packed" / "manifest.json").read_text())["rows"]
    assert rows < 16
    result = cli(
        *("sft", "--model", base, "--data", data, *QUICK, "--val-size", 0, "--max-length", 128),
        *("--max-steps", 1, "--lr", 1e-9, "--packing", "--batch-size", rows),
        *("-o", tmp_path / "all"),
    )
    assert result.code == 0, result.err
    packed, padded = metrics(tmp_path / "all")[0], found["padded"]
    assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-5)
    assert packed["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-5)
    assert packed["tokens"] == padded["tokens"]


@pytest.mark.parametrize("more", [(), ("--lora",), ("--chunked-loss",)])
def test_accumulation_equals_a_larger_batch(cli, base, chats, tmp_path, more):
    common = ("sft", "--model", base, "--data", chats, *QUICK, "--max-steps", 2, *more)
    for name, shape in (("one", (8, 1)), ("four", (2, 4))):
        result = cli(
            *common, "--batch-size", shape[0], "--grad-accum", shape[1], "-o", tmp_path / name
        )
        assert result.code == 0, result.err
    one, four = metrics(tmp_path / "one"), metrics(tmp_path / "four")
    for key in ("loss", "grad_norm", "val_loss"):
        ours, theirs = ([row[key] for row in rows if key in row] for rows in (one, four))
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_memory_savers_change_nothing(cli, base, chats, tmp_path):
    ways = {"none": (), "both": ("--chunked-loss", "--activation-checkpointing")}
    for name, more in ways.items():
        result = cli(
            *("sft", "--model", base, "--data", chats, *QUICK, *more, "-o", tmp_path / name)
        )
        assert result.code == 0, result.err
    ours, theirs = (
        [row[key] for row in metrics(tmp_path / name) for key in ("loss", "val_loss") if key in row]
        for name in ways
    )
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_prompt_tuning_trains_only_its_own(cli, base, chats, tmp_path):
    out = tmp_path / "prompt"
    result = cli(
        *("sft", "--model", base, "--data", chats, *RUN, "--max-steps", 30, "--lr", 0.1),
        *("--prompt-tuning", 4, "--samples", 1),
        *("-o", out),
    )
    assert result.code == 0, result.err
    rows = [row["loss"] for row in metrics(out) if "loss" in row]
    assert rows[-1] < rows[0]
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    assert [tuple(t.shape) for t in tensors.values()] == [(4, 32)]
    said = cli("generate", "--model", out, "--chat", "--prompt", "What?", "--max-new-tokens", 4)
    assert said.code == 0, said.err


def test_two_processes_train_the_same_model_as_one_with_twice_the_batch(cli, base, chats, tmp_path):
    common = ("sft", "--model", base, "--data", chats, *QUICK)
    assert cli(*common, "-o", tmp_path / "one").code == 0
    ran = run_llmctl(*common, "--batch-size", 4, "--processes", 2, "-o", tmp_path / "two")
    assert ran.returncode == 0, ran.stderr
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for key in ("loss", "val_loss", "lr", "tokens", "token_accuracy"):
        ours, theirs = ([row[key] for row in rows if key in row] for rows in (one, two))
        assert ours == pytest.approx(theirs, rel=1e-5), key


def test_plain_text_trains_on_all_of_it(cli, base, corpus, tmp_path):
    out = tmp_path / "text"
    result = cli("sft", "--model", base, "--data", corpus, *QUICK, "-o", out)
    assert result.code == 0, result.err
    audit = json.loads((out / "manifest.json").read_text())["audit"]
    assert audit["trained_share"] == pytest.approx(1 - 1 / audit["tokens_median"], rel=0.02)


def test_built_in_tasks_need_nothing(cli, base, tmp_path):
    result = cli("sft", "--model", base, "--data", "builtin:tasks", *QUICK, "-o", tmp_path / "run")
    assert result.code == 0, result.err


def test_weights_mix_and_are_said(cli, base, chats, corpus, tmp_path):
    few = write_rows(tmp_path / "few.jsonl", [chat(n) for n in range(100, 120)])
    result = cli(
        *("sft", "--model", base, "--data", f"{chats}=0.75", "--data", f"{few}=0.25", *QUICK),
        *("--val-size", 0, "-o", tmp_path / "run"),
    )
    assert result.code == 0, result.err
    assert "60 of 144 examples" in result.err
    assert "20 of 20 examples" in result.err


def test_dry_run_writes_nothing(cli, base, chats, tmp_path):
    result = cli("sft", "--model", base, "--data", chats, "-o", tmp_path / "run", "--dry-run")
    assert result.code == 0, result.err
    assert "stage: sft" in result.out
    assert not (tmp_path / "run").exists()


def test_a_model_in_bf16_is_trained_in_float32(cli, base, chats, tmp_path):
    """Else most weights would never move: an update of 1e-5 is lost in a bf16 weight of 0.02."""
    model = AutoModelForCausalLM.from_pretrained(base / "model").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(base / "model").save_pretrained(tmp_path / "half")
    result = cli(
        *("sft", "--model", tmp_path / "half", "--data", chats, *QUICK, "--lr", 1e-5),
        *("-o", tmp_path / "run"),
    )
    assert result.code == 0, result.err
    before = load_file(tmp_path / "half/model.safetensors")
    after = load_file(tmp_path / "run/model/model.safetensors")
    for name, weight in after.items():
        assert weight.dtype == torch.float32
        if "embed" not in name and "lm_head" not in name:
            assert (weight != before[name].float()).float().mean() > 0.9, name


def derived(base, to, **changes):
    """A copy of the model's folder with other keys in its JSON files."""
    shutil.copytree(base / "model", to)
    for name, keys in changes.items():
        edit_json(to / f"{name}.json", **keys)
    return to


@pytest.mark.parametrize("more", [(), ("--lora",)])
def test_a_generation_config_that_cannot_be_saved_does_not_cost_the_run(
    cli, base, chats, tmp_path, more
):
    """transformers loads a temperature without do_sample, and refuses to write it."""
    model = derived(base, tmp_path / "odd", generation_config={"temperature": 0.9, "top_p": 0.6})
    result = cli("sft", "--model", model, "--data", chats, *QUICK, *more, "-o", tmp_path / "run")
    assert result.code == 0, result.err
    left_out = "left out of generation_config.json, since they contradict each other: "
    assert result.err.count(f"{left_out}temperature 0.9, top_p 0.6\n") == 1


@pytest.mark.parametrize("more", [(), ("--lora", "--merge")])
def test_how_to_sample_is_kept(cli, base, chats, tmp_path, more):
    wanted = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.05}
    model = derived(base, tmp_path / "instruct", generation_config=wanted)
    result = cli("sft", "--model", model, "--data", chats, *QUICK, *more, "-o", tmp_path / "run")
    assert result.code == 0, result.err
    assert "generation_config" not in result.err
    for folder in ("model", "adapter")[: len(more)] or ("model",):
        file = tmp_path / "run" / folder / "generation_config.json"
        settings = json.loads(file.read_text())
        tokens = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
        assert {k: v for k, v in settings.items() if k not in tokens} == wanted
        assert len(settings["eos_token_id"]) == 2  # eos, and the end of a turn


def test_plain_text_does_not_need_the_chat_template(cli, base, corpus, tmp_path):
    model = derived(base, tmp_path / "odd")
    (model / "chat_template.jinja").write_text("{{ nothing.at.all }}")
    result = cli("sft", "--model", model, "--data", corpus, *QUICK, "-o", tmp_path / "run")
    assert result.code == 0, result.err


def test_a_model_without_keys_and_values_trains_and_says_that_it_cannot_answer(
    cli, base, chats, tmp_path
):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    shape = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2)
    MambaForCausalLM(shape).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    run = ("sft", "--model", tmp_path / "mamba", "--data", chats, *RUN, "--max-steps", 2)
    result = cli(*run, "-o", tmp_path / "run")
    assert result.code == 0, result.err
    assert "no samples: llmctl cannot generate with mamba" in result.err
    said = cli("generate", "--model", tmp_path / "run", "--prompt", "a")
    assert said.code == 4
    result = cli(*run, "--packing", "-o", tmp_path / "packed")
    assert (result.code, "leaks" in result.err) == (4, True), result.err


def test_the_largest_batch_is_found(cli, base, chats, tmp_path):
    result = cli(
        *("sft", "--model", base, "--data", chats, *QUICK, "--find-batch-size"),
        *("-o", tmp_path / "run", "--json"),
    )
    assert result.code == 0, result.err
    assert "batch size 8 of 8 fits" in result.err


BAD = {
    "no data": ((), 2, "--data is required"),
    "both lengths": (("--data", "DATA", "--max-steps", 1, "--epochs", 1), 2, "not both"),
    "4bit without lora": (("--data", "DATA", "--load-in-4bit"), 2, "--lora"),
    "merge without lora": (("--data", "DATA", "--merge"), 2, "--lora"),
    "too long": (("--data", "DATA", "--max-length", 4000), 2, "positions"),
    "head": (("--data", "DATA", "--lora", "--lora-targets", "lm_head"), 2, "lm_head"),
    "nowhere": (("--data", "nowhere.jsonl"), 3, "no such file"),
    "too many virtual tokens": (("--data", "DATA", "--prompt-tuning", 126), 2, "positions"),
    "no evaluation": (("--data", "DATA", "--sample-prompt", "a", "--val-size", 0), 2, "validation"),
    "bad template": (("--data", "DATA", "--chat-template", "chatmI"), 2, "chatml"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(cli, base, chats, tmp_path, name):
    arguments, code, message = BAD[name]
    given = [chats if a == "DATA" else a for a in arguments]
    result = cli("sft", "--model", base, *given, "-o", tmp_path / "run")
    assert result.code == code, result.err
    assert message in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "run").exists()


def test_an_encoder_is_no_language_model(cli, base, chats, tmp_path):
    """BERT loads as a causal model, and would see the answers that it is to learn."""
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    shape = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    torch.manual_seed(0)
    BertForMaskedLM(shape).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    result = cli("sft", "--model", tmp_path / "bert", "--data", chats, *QUICK, "-o", tmp_path / "r")
    assert (result.code, "not a causal" in result.err) == (4, True), result.err
    assert not (tmp_path / "r").exists()


def test_an_adapter_without_a_tokenizer_has_its_bases(cli, adapted, base, tmp_path):
    out, _ = adapted
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(out / "adapter" / name, bare)
    ask = ("--chat", "--prompt", "What does the cat see?", "--greedy", "--max-new-tokens", 8)
    ours, theirs = (cli("generate", "--model", m, *ask) for m in (bare, out / "adapter"))
    assert (ours.code, ours.out) == (0, theirs.out), ours.err
