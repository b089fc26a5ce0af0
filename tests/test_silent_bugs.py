"""Wrong results that come without an error elsewhere, planted one by one in `llmctl sft`.

Each is refused with its reason, or seen not to happen. docs/correctness.md lists them, with those
that other files plant.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
)

from llmctl.decode.prompts import PromptEncoder
from llmctl.training.sft import SupervisedTokens
from llmctl.training.token_loss import TokenLoss
from tests.conftest import WHO, question_row
from tests.run_files import edit_json, edit_tensors, logged, read_rows, rows_in, write_rows

QUICK = ("--batch-size", 8, "--precision", "fp32", "--threads", 1, "--seed", 3)
SHORT = (*QUICK, "--max-steps", 2, "--samples", 0)
NAMED = "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}END\n{% endfor %}" + NAMED


@pytest.fixture(scope="session")
def base(roomy):
    return roomy


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    return write_rows(
        tmp_path_factory.mktemp("chats") / "chats.jsonl", [question_row(n) for n in range(144)]
    )


@pytest.fixture
def sft(cli, tmp_path):
    """A short run into `tmp_path / "run"`, or where `-o` says."""

    def run(model, data, *more):
        where = () if "-o" in more else ("-o", tmp_path / "run")
        return cli("sft", "--model", model, "--data", data, *SHORT, *more, *where)

    return run


@pytest.fixture
def seen(monkeypatch):
    """The batches that the loss is computed on."""
    found, real = [], TokenLoss.__call__

    def watched(self, model, batch):
        if torch.is_grad_enabled():
            found.append(batch)
        return real(self, model, batch)

    monkeypatch.setattr(TokenLoss, "__call__", watched)
    return found


@pytest.fixture
def copied(base, tmp_path):
    """A copy of the base with a change to its tokenizer, its tensors or its config."""

    def copy(tokenizer=None, tensors=None, config=None, source=base / "model"):
        folder = tmp_path / "copied"
        shutil.copytree(source, folder)
        if tokenizer is not None:
            found = AutoTokenizer.from_pretrained(folder)
            tokenizer(found)
            found.save_pretrained(folder)
        if tensors is not None:
            edit_tensors(folder / "model.safetensors", tensors)
        if config is not None:
            edit_json(folder / "config.json", **config)
        return folder

    return copy


def refused(result, code, *messages):
    assert result.code == code, result.err
    for message in messages:
        assert message in result.err
    assert "Traceback" not in result.err


def template(tmp_path, text):
    (tmp_path / "own.jinja").write_text(text)
    return tmp_path / "own.jinja"


# --- the end of an answer


@pytest.mark.parametrize("way", [(), ("--packing",), ("--chunked-loss",)], ids=str)
@pytest.mark.parametrize("kind", ["chat", "text"])
def test_a_padding_token_that_is_eos_is_trained_on_where_it_ends(
    sft, copied, seen, tmp_path, kind, way
):
    """1: labels masked by the padding token's id lose every EOS."""
    end = "<|im_end|>" if kind == "chat" else "<|eos|>"
    model = copied(lambda tokenizer: setattr(tokenizer, "pad_token", end))
    rows = [
        question_row(n) if kind == "chat" else {"text": question_row(n)["prompt"]}
        for n in range(16)
    ]
    data = write_rows(tmp_path / "few.jsonl", rows)
    more = ("--val-size", 0, "--max-steps", 1, "--batch-size", 16, "--max-length", 128)
    assert sft(model, data, *more, *way, "-o", tmp_path / "one").code == 0
    count = json.loads((tmp_path / "one/manifest.json").read_text())["rows"]
    assert (count < 16) == (way == ("--packing",))
    seen.clear()
    result = sft(model, data, *more, *way, "--batch-size", count)
    assert result.code == 0, result.err
    labels = torch.cat([batch["labels"].flatten() for batch in seen[:1]])
    number = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(end)
    assert int((labels == number).sum()) == 16
    assert "the padding token ends turns: harmless here" in result.err


def test_generation_stops_where_turns_end(sft, base, chats, seen, tmp_path):
    """2: turns end with another token than the tokenizer's eos, and nobody stops there."""
    own = template(tmp_path, TURNS.replace("END", "<|im_end|>"))
    for more in ((), ("--lora", "--merge")):
        result = sft(base, chats, "--chat-template", own, *more, "-o", tmp_path / str(len(more)))
        assert result.code == 0, result.err
        for folder in ("model", "adapter")[: len(more)] or ("model",):
            made = tmp_path / str(len(more)) / folder
            tokenizer = AutoTokenizer.from_pretrained(made)
            end = tokenizer.convert_tokens_to_ids("<|im_end|>")
            stops = json.loads((made / "generation_config.json").read_text())["eos_token_id"]
            assert set(stops) == {end, tokenizer.eos_token_id}
    for batch in seen:
        assert ((batch["labels"] == end).sum(-1) == 1).all()


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("", "only 0.0 % of the rows end with a token that is trained on and stops"),
        (
            "{{ '<|im_end|>' if m.content | length < 8 else '<|pad|>' }}",
            "generation does not stop at <|pad|> (2), and that ends 132 of 132 turns",
        ),
    ],
    ids=["none", "foreign"],
)
def test_turns_that_generation_cannot_end_are_refused(sft, base, chats, tmp_path, end, message):
    """2: the template ends turns with nothing, or with a token that stops nothing."""
    own = template(tmp_path, TURNS.replace("END", end))
    refused(sft(base, chats, "--chat-template", own), 3, message, "--chat-template")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["sft", "audit"])
def test_cut_ends_are_counted_and_many_are_refused(cli, sft, base, tmp_path, command):
    """3: rows that are too long lose their EOS."""

    def rows(long):
        some = [question_row(n % 36) for n in range(100)]
        said = [row | {"response": 20 * row["response"]} for row in some[:long]]
        return write_rows(tmp_path / f"{long}.jsonl", [*said, *some[long:]])

    def look(data, *more):
        if command == "sft":
            return sft(base, data, "--val-size", 0, *more)
        return cli("audit", data, "--model", base, "--val-size", 0, *more)

    refused(look(rows(30)), 3, "30 of 100 rows would lose their end at 128 tokens")
    result = look(rows(30), "--truncation", "cut")
    assert (result.code, "30 of 100 rows lose their end" in result.err + result.out) == (0, True)
    if command == "audit":
        return
    result = sft(base, rows(5), "--val-size", 0, "-o", tmp_path / "few")
    assert (result.code, "5 of 100 rows lose their end at 128 tokens" in result.err) == (0, True)
    report = json.loads((tmp_path / "few/manifest.json").read_text())["audit"]
    assert (report["truncated_rows"], report["ended_rows"]) == (5, 95)
    result = sft(base, rows(5), "--val-size", 0, "--truncation", "drop", "-o", tmp_path / "less")
    assert json.loads((tmp_path / "less/manifest.json").read_text())["rows"] == 95


# --- the beginning


@pytest.mark.parametrize("where", ["text", "prompt", "response"])
def test_texts_that_were_rendered_before_are_refused(sft, cli, base, tmp_path, where):
    """4: BOS or EOS in the data itself, and once more by the tokenizer or the template."""
    changed = {
        "text": {"text": "<|bos|>The cat sees the river."},
        "prompt": question_row(0)
        | {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"},
        "response": question_row(0) | {"response": "The cat sees the river.<|eos|>\n"},
    }[where]
    plain = [
        {"text": question_row(n)["prompt"]} if where == "text" else question_row(n)
        for n in range(60)
    ]
    for count, code in ((1, 0), (9, 3)):
        data = write_rows(tmp_path / "few.jsonl", plain[count:] + [changed] * count)
        result = sft(base, data, "--val-size", 0, "-o", tmp_path / str(count))
        refused(result, code, f"begin or end texts: {count} of 60 rows")
        assert code == 0 or f"few.jsonl:{61 - count}" in result.err
        result = cli("audit", data, "--model", base, "--val-size", 0)
        assert result.code == code


def test_bos_stands_once_in_training_and_in_use(sft, cli, base, seen, monkeypatch, tmp_path):
    """4: a template that writes BOS, and a tokenizer that puts another before it."""
    own = template(tmp_path, "{{ bos_token }}" + TURNS.replace("END", "<|im_end|>"))
    data = write_rows(tmp_path / "few.jsonl", [question_row(n) for n in range(12)])
    assert sft(base, data, "--chat-template", own, "--val-size", 0).code == 0
    for batch in seen:
        assert ((batch["input_ids"] == 0).sum(-1) == 1).all()
        assert (batch["input_ids"][:, 0] == 0).all()
    prompts = asked(cli, tmp_path / "run", [question_row(0)["prompt"]], monkeypatch)
    assert [ids.count(0) for ids in prompts] == [1]
    text = write_rows(
        tmp_path / "text.jsonl", [{"text": question_row(n)["prompt"]} for n in range(12)]
    )
    seen.clear()
    assert sft(base, text, "--val-size", 0, "-o", tmp_path / "text").code == 0
    assert all(((batch["input_ids"] == 0).sum(-1) == 1).all() for batch in seen)


def asked(cli, model, prompts, monkeypatch, *more):
    """What `generate --chat` gives the model."""
    found, real = [], PromptEncoder.encode

    def watched(encoder, ask):
        found.append(real(encoder, ask))
        return found[-1]

    monkeypatch.setattr(PromptEncoder, "encode", watched)
    given = [part for prompt in prompts for part in ("--prompt", prompt)]
    result = cli("generate", "--model", model, "--chat", *given, "--max-new-tokens", 2, *more)
    assert result.code == 0, result.err
    monkeypatch.setattr(PromptEncoder, "encode", real)
    return found


# --- what a step is


@pytest.mark.parametrize("more", [(), ("--lora",), ("--packing", "--max-length", 100)], ids=str)
def test_the_step_at_the_end_of_the_data_weighs_as_much(sft, base, tmp_path, more):
    """5: the last window of accumulation, which is not full, gets a fraction of its gradient."""
    data = write_rows(tmp_path / "ten.jsonl", [question_row(n, 3 * (n % 3)) for n in range(10)])
    found = {}
    for size, passes in ((4, 1), (2, 2), (1, 4)):
        out = tmp_path / f"{size}x{passes}"
        shape = ("--batch-size", size, "--grad-accum", passes, "--max-steps", 6)
        result = sft(base, data, "--val-size", 0, "--weight-decay", 0.1, *shape, *more, "-o", out)
        assert result.code == 0, result.err
        found[size] = [logged(out, key) for key in ("loss", "grad_norm", "lr", "tokens")]
    for numbers in (found[2], found[1]):
        for ours, theirs in zip(numbers, found[4], strict=True):
            assert len(ours) == 6
            assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("more", [(), ("--lora",)], ids=str)
def test_packing_that_leaks_is_refused(sft, base, chats, monkeypatch, tmp_path, more):
    """7: an all-ones mask lets packed sequences see each other."""
    real = LlamaForCausalLM.forward

    def leaking(model, input_ids=None, position_ids=None, **how):
        return real(model, input_ids, **how | {"attention_mask": torch.ones_like(input_ids)})

    assert sft(base, chats, "--packing", *more, "-o", tmp_path / "sound").code == 0
    monkeypatch.setattr(LlamaForCausalLM, "forward", leaking)
    refused(sft(base, chats, "--packing", *more), 4, "--packing leaks", "drop --packing")
    assert not (tmp_path / "run").exists()


# --- weights


@pytest.mark.parametrize("target", ["embed_tokens", "model.embed_tokens", "lm_head"])
def test_lora_on_tied_weights_is_refused(sft, base, chats, tmp_path, target):
    """8: one adapter on weights that two layers share merges into another model."""
    result = sft(base, chats, "--lora", "--lora-targets", "q_proj", "--lora-targets", target)
    refused(result, 2, f"--lora-targets {target} is", "leave it out")
    assert not (tmp_path / "run").exists()


DAMAGE = {
    "missing": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "missing weights: model.l"),
    "shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(31)}),
        "mismatched weights: model.norm.weight",
    ),
    "superfluous": (
        lambda t: t.update({"model.layers.7.mlp.up_proj.weight": torch.ones(128, 32)}),
        "unexpected weights: model.layers.7",
    ),
    "nan": (lambda t: t["model.norm.weight"][3].fill_(torch.nan), "not finite: model.norm.weight"),
}
TASKS = {"full": (), "lora": ("--lora",), "classify": ("--task", "classify")}


def labelled(tmp_path, count=24):
    rows = [{"text": question_row(n)["prompt"], "label": WHO[n % 2]} for n in range(count)]
    return write_rows(tmp_path / "labelled.jsonl", rows)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_refused(cli, copied, chats, tmp_path, damage, task):
    """9, 20: tensors that are missing are made up, others dropped, NaN trained on."""
    change, message = DAMAGE[damage]
    data = labelled(tmp_path) if task == "classify" else chats
    arguments = ("--max-steps", 1, "--threads", 1, "-o", tmp_path / "run", *TASKS[task])
    model = copied(tensors=change)
    refused(cli("sft", "--model", model, "--data", data, *arguments), 4, message)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def classifier(cli, base, tmp_path_factory):
    """A classifier made of the base."""
    folder = tmp_path_factory.mktemp("classifier")
    result = cli(
        *("sft", "--model", base, "--data", labelled(folder), "--task", "classify"),
        *("--max-steps", 20, "--lr", "5e-3", "--threads", 1, "-o", folder / "run"),
    )
    assert result.code == 0, result.err
    return folder / "run"


def test_the_head_of_a_classifier_is_never_made_up(cli, copied, chats, classifier, tmp_path):
    """9: a classifier without its head gets a random one; with it, it is no language model."""
    task = ("--task", "classify", "--max-steps", 1, "--threads", 1, "-o", tmp_path / "run")
    headless = copied(tensors=lambda t: t.pop("score.weight"), source=classifier / "model")
    data = labelled(tmp_path)
    result = cli("sft", "--model", headless, "--data", data, *task)
    refused(result, 4, "missing weights: score.weight")
    for command in (
        ("sft", "--model", classifier, "--data", chats, *SHORT, "-o", tmp_path / "run"),
        ("generate", "--model", classifier, "--prompt", "The cat", "--max-new-tokens", 2),
    ):
        refused(cli(*command), 4, "unexpected weights: score.weight")


def test_a_classifier_answers_from_the_last_token_of_the_text(cli, copied, tmp_path):
    """10: padding that is eos, or stands at the left, moves the place the answer is read off."""

    def change(tokenizer):
        tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"

    model, data = copied(tokenizer=change), labelled(tmp_path)
    result = cli(
        *("sft", "--model", model, "--data", data, "--task", "classify", "--max-steps", 4),
        *("--lr", "5e-3", "--threads", 1, "-o", tmp_path / "run"),
    )
    assert result.code == 0, result.err
    made = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    texts = ["The cat", "A dog sees the house and the garden.", "My friend likes a song."]
    ended = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    for side in ("right", "left"):
        batch = tokenizer.pad({"input_ids": ended}, padding_side=side, return_tensors="pt")
        assert (batch["input_ids"] == tokenizer.pad_token_id).any()
        with torch.no_grad():
            together = made(**batch).logits
            for ids, found in zip(ended, together, strict=True):
                hidden = made.model(torch.tensor([ids])).last_hidden_state[0, -1]
                torch.testing.assert_close(found, made.score(hidden), rtol=1e-4, atol=1e-5)


# --- templates and roles


@pytest.mark.parametrize("more", [(), ("--lora", "--merge")], ids=["full", "lora"])
def test_what_is_asked_in_use_is_what_was_trained(
    cli, sft, base, chats, seen, monkeypatch, tmp_path, more
):
    """15: training and inference render conversations in two ways."""
    own = template(tmp_path, TURNS.replace("END", "<|im_end|>"))
    result = sft(base, chats, "--chat-template", own, *more)
    assert result.code == 0, result.err
    trained = [
        [int(i) for i in ids] for batch in seen for ids in batch["input_ids"] if len(ids) > 1
    ]
    rows = read_rows(chats)
    for folder in ("model", "adapter")[: 2 if more else 1]:
        made = tmp_path / "run" / folder
        tokenizer = AutoTokenizer.from_pretrained(made)
        assert tokenizer.chat_template == own.read_text()
        prompts = asked(cli, made, [row["prompt"] for row in rows], monkeypatch)
        begun = 0
        for prompt, row in zip(prompts, rows, strict=True):
            (answer,) = [tokenizer(row["response"], add_special_tokens=False)["input_ids"]]
            whole = [*prompt, *answer, tokenizer.convert_tokens_to_ids("<|im_end|>")]
            begun += any(ids[: len(whole)] == whole for ids in trained)
        assert begun >= 16


def test_a_base_without_a_template_does_not_chat(cli, copied):
    """15: a model that never saw a template answers in one all the same."""
    model = copied(lambda tokenizer: setattr(tokenizer, "chat_template", None))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    result = cli("generate", "--model", model, "--chat", "--prompt", "Hi", "--max-new-tokens", 2)
    refused(result, 4, "no chat template")


@pytest.mark.parametrize("command", ["sft", "audit"])
@pytest.mark.parametrize("role", ["asistant", "Assistant", "bot"])
def test_a_misspelled_role_is_refused(cli, sft, base, tmp_path, role, command):
    """16: an answer under a role that nobody has is context, and never trained on."""
    ask, say = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
    rows = [{"messages": [ask, say]}] * 6 + [{"messages": [ask, say | {"role": role}]}]
    data = write_rows(tmp_path / "few.jsonl", rows)
    result = sft(base, data) if command == "sft" else cli("audit", data, "--model", base)
    refused(result, 3, "few.jsonl:7", f"`messages[1]` is `{role}`")


# --- tokenizer and embeddings


@pytest.mark.parametrize("task", TASKS)
def test_the_tokenizer_of_another_model_is_refused(cli, copied, tmp_path, task):
    """17: ids beyond the embedding."""
    model = copied(lambda tokenizer: tokenizer.add_tokens([f"zq{n}" for n in range(50)]))
    data = labelled(tmp_path)
    rows = [
        {"text": f"zq{n} cat", "label": n % 2, "prompt": f"zq{n}", "response": "Yes."}
        for n in range(9)
    ]
    keep = ("text", "label") if task == "classify" else ("prompt", "response")
    data = write_rows(tmp_path / "few.jsonl", [{key: row[key] for key in keep} for row in rows])
    arguments = ("--max-steps", 1, "--threads", 1, "-o", tmp_path / "run", *TASKS[task])
    result = cli("sft", "--model", model, "--data", data, *arguments)
    refused(result, 3, "the model has only 320 embeddings: the tokenizer is another model's")


@pytest.mark.parametrize("task", TASKS)
def test_a_padded_embedding_never_shrinks(cli, copied, chats, tmp_path, task):
    """17: resizing to the tokenizer's length takes rows away."""
    name = "model.embed_tokens.weight"

    def pad(tensors):
        tensors[name] = torch.cat([tensors[name], torch.full((64, 32), 0.01)])

    model = copied(tensors=pad, config={"vocab_size": 384})
    data = labelled(tmp_path) if task == "classify" else chats
    more = (*TASKS[task], "--merge") if task == "lora" else TASKS[task]
    arguments = ("--max-steps", 1, "--threads", 1, "-o", tmp_path / "run", *more)
    result = cli("sft", "--model", model, "--data", data, *arguments)
    assert result.code == 0, result.err
    found = load_file(tmp_path / "run/model/model.safetensors")[name]
    assert found.shape == (384, 32)
    torch.testing.assert_close(found[320:], torch.full((64, 32), 0.01), atol=5e-3, rtol=0)


def test_new_tokens_are_trained_beside_an_adapter_and_saved(sft, base, chats, tmp_path):
    """17: an adapter leaves the rows of new tokens as they were drawn, or does not save them."""
    for name, lr in (("still", 1e-12), ("run", 1e-2)):
        more = ("--chat-template", "gemma", "--lora", "--merge", "--lr", lr, "-o", tmp_path / name)
        result = sft(base, chats, *more)
        assert result.code == 0, result.err
    rows = {
        name: load_file(tmp_path / name / "model/model.safetensors")["model.embed_tokens.weight"]
        for name in ("still", "run")
    }
    start = load_file(base / "model/model.safetensors")["model.embed_tokens.weight"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/adapter")
    new = tokenizer.convert_tokens_to_ids(["<start_of_turn>", "<end_of_turn>"])
    assert sorted(new) == [320, 321]
    kept = {}
    for name in rows:
        assert torch.equal(rows[name][:320], start)
        tensors = load_file(tmp_path / name / "adapter/adapter_model.safetensors").values()
        (kept[name],) = [tensor for tensor in tensors if tensor.shape == (2, 32)]
        torch.testing.assert_close(rows[name][320:], kept[name])
    assert ((kept["run"] - kept["still"]).abs().max(-1).values > 1e-3).all()


def test_new_tokens_of_a_saved_adapter_give_the_same_logits(sft, base, chats, tmp_path):
    """17: a reloaded adapter meets other rows than it was trained with."""
    from llmctl.models.loading import load_causal_lm

    result = sft(base, chats, "--chat-template", "gemma", "--lora", "--merge", "--lr", 1e-2)
    assert result.code == 0, result.err
    ids = torch.tensor([[0, 320, 9, 30, 321, 7, 320]])
    adapter = load_causal_lm(str(tmp_path / "run/adapter"), dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    with torch.no_grad():
        ours, theirs = (model.eval()(input_ids=ids).logits for model in (adapter, merged))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# --- precision


def test_an_adapter_of_a_bf16_model_trains_in_float32(sft, copied, chats, tmp_path):
    """18: small updates are lost in bf16 weights."""
    model = copied(
        tensors=lambda t: t.update({k: v.to(torch.bfloat16) for k, v in t.items()}),
        config={"dtype": "bfloat16"},
    )
    for name, lr in (("still", 1e-30), ("run", 1e-6)):
        more = ("--lora", "--lr", lr, "--schedule", "constant", "-o", tmp_path / name)
        result = sft(model, chats, *more)
        assert result.code == 0, result.err
    still, run = (
        load_file(tmp_path / name / "adapter/adapter_model.safetensors")
        for name in ("still", "run")
    )
    for name, weight in run.items():
        assert weight.dtype == torch.float32
        assert (weight != still[name]).float().mean() > 0.9, name


def test_pure_bf16_is_only_on_request_and_warned_of(sft, base, chats, tmp_path):
    """18: see above."""
    result = sft(base, chats, "--precision", "pure-bf16", "--lr", 1e-5)
    assert (result.code, "pure bf16 weights: updates smaller than" in result.err) == (0, True)


# --- use


@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_in_a_batch_are_those_alone(cli, sft, base, chats, copied, tmp_path, side):
    """19: padding on the wrong side, or seen, changes what is generated."""
    assert sft(base, chats, "-o", tmp_path / "tuned").code == 0
    model = copied(
        lambda tokenizer: setattr(tokenizer, "padding_side", side), source=tmp_path / "tuned/model"
    )
    prompts = [{"prompt": question_row(n * 7, n)["prompt"]} for n in range(12)]
    many = write_rows(tmp_path / "prompts.jsonl", prompts)
    how = ("generate", "--model", model, "--chat", "--prompts-file", many, "--max-new-tokens", 48)
    found = {}
    for name, more in (
        ("greedy", ("--greedy", "--repetition-penalty", 1.2)),
        ("sampled", ("--temperature", 1)),
    ):
        for size in (1, 64):
            result = cli(*how, *more, "--batch-size", size, "--json")
            assert result.code == 0, result.err
            rows = rows_in(result.out)
            found[name, size] = [row["response"] for row in rows]
        assert found[name, 1] == found[name, 64]
    assert len(set(found["sampled", 1])) == 12


@pytest.mark.parametrize("more", [(), ("--lora",)], ids=str)
def test_a_loss_that_is_nan_ends_the_run(sft, base, chats, monkeypatch, tmp_path, more):
    """20: NaN is logged as 0, and every later step writes it into the weights."""
    real, calls = SupervisedTokens.loss, []

    def broken(*args):
        calls.append(1)
        loss = real(*args)
        return loss._replace(total=loss.total * (torch.nan if len(calls) == 2 else 1))

    monkeypatch.setattr(SupervisedTokens, "loss", broken)
    how = ("--max-steps", 4, "--eval-every", 4, "--save-every", 4)
    refused(sft(base, chats, *how, *more), 7, "step 2: loss nan")
    assert not (tmp_path / "run/model").exists()
    assert not (tmp_path / "run/adapter").exists()


# --- data


@pytest.mark.parametrize("task", ["chat", "classify"])
def test_validation_on_what_is_trained_is_refused(cli, base, tmp_path, task):
    """21: the validation set is in the training set, perhaps in other letters."""
    rows = [question_row(n) for n in range(12)]
    more = ()
    if task == "classify":
        rows = [{"text": row["prompt"], "label": n % 2} for n, row in enumerate(rows)]
        more = ("--task", "classify")
    key = "text" if task == "classify" else "prompt"
    again = [rows[4] | {key: rows[4][key].upper() + " "}]
    data, val = (
        write_rows(tmp_path / "train.jsonl", rows),
        write_rows(tmp_path / "val.jsonl", again),
    )
    how = ("--max-steps", 1, "--threads", 1, "-o", tmp_path / "run", *more)
    result = cli("sft", "--model", base, "--data", data, "--val-data", val, *how)
    refused(result, 3, "train.jsonl:5", "also validates")


@pytest.mark.parametrize("task", ["chat", "classify"])
def test_copies_of_an_example_are_on_one_side(cli, base, tmp_path, task):
    """21: examples that were repeated, then split."""
    rows = [question_row(n) for n in range(20)]
    more = ("--task", "classify") if task == "classify" else ("--samples", 0)
    if task == "classify":
        rows = [{"text": row["prompt"], "label": n % 2} for n, row in enumerate(rows)]
    data = write_rows(tmp_path / "many.jsonl", rows * 5)
    how = ("--val-size", 15, "--max-steps", 1, "--threads", 1, *more, "-o", tmp_path / "run")
    result = cli("sft", "--model", base, "--data", data, *how)
    assert result.code == 0, result.err
    held = json.loads((tmp_path / "run/manifest.json").read_text())["held_out"]
    lines = [int(place.rsplit(":", 1)[1]) - 1 for place in held]
    assert len(lines) == 15
    assert len({line % 20 for line in lines}) == 3
    assert re.search(r"\b80\b.*\b(duplicates|100 rows)|\b80 duplicates", result.err)


FINE = json.dumps(question_row(0))
BAD_LINES = {
    "missing column": ('{"prompt": "Hi"}', "no column `response`; there is `prompt`"),
    "null": ('{"prompt": "Hi", "response": null}', "`response` is null, expected text"),
    "a number": ('{"prompt": "Hi", "response": 7}', "`response` is a number, expected text"),
    "NaN": ('{"prompt": "Hi", "response": NaN}', "NaN is no JSON number"),
    "empty": ('{"prompt": "Hi", "response": " "}', "the assistant says nothing"),
    "twice": ('{"prompt": "Hi", "prompt": "Ho", "response": "a"}', "duplicate key `prompt`"),
    "half": ('{"prompt": "Hi", "resp', "not JSON"),
    "mixed": ('{"text": "Hi."}', "this row is `text`, but that of line 1 is `prompt`"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_row_is_refused_with_its_line(sft, base, tmp_path, name):
    """22, 24: rows that become None, text or another form without a word."""
    line, message = BAD_LINES[name]
    lines = [FINE] * 6 + [line] + [FINE] * 2
    data = tmp_path / "rows.jsonl"
    data.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    refused(sft(base, data), 3, "rows.jsonl:7", message)
    assert not (tmp_path / "run").exists()


def test_bytes_that_are_no_text_are_refused_with_their_place(sft, base, tmp_path):
    """22: bytes that are not UTF-8 become other letters."""
    data, raw = tmp_path / "rows.jsonl", FINE.encode() + b"\n"
    data.write_bytes(raw * 6 + raw.replace(b"cat", b"c\xe4t") + raw)
    place = 6 * len(raw) + raw.index(b"cat") + 1
    refused(sft(base, data), 3, "rows.jsonl", f"not UTF-8 at byte {place}")


NOTHING = {
    "no rows": ("", (), "an empty file"),
    "blank lines": ("\n\n", (), "an empty file"),
    "prompts fill it": (FINE, ("--max-length", 12), "none of 1 row has a token to train on"),
    "no messages": ('{"messages": []}', (), "rows.jsonl:1: `messages` is empty"),
    "no answers": (
        '{"messages": [{"role": "user", "content": "Hi"}]}',
        (),
        "no message of the assistant",
    ),
    "all dropped": (
        FINE,
        ("--max-length", 12, "--truncation", "drop"),
        "no row is left to train on",
    ),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_train_on_is_refused(sft, base, tmp_path, name):
    """23: everything is filtered or cut away, and the loss is 0."""
    content, more, message = NOTHING[name]
    data = tmp_path / "rows.jsonl"
    data.write_text(content)
    refused(sft(base, data, "--val-size", 0, *more), 3, message)


def test_a_step_without_a_label_cannot_come(sft, base, seen, tmp_path):
    """23: batches in which every label is masked train on nothing."""
    long = {"prompt": "Yes. " * 60, "response": "No."}
    data = write_rows(tmp_path / "few.jsonl", [question_row(n) for n in range(30)] + [long] * 2)
    more = ("--val-size", 0, "--batch-size", 1, "--grad-accum", 1, "--max-steps", 30)
    result = sft(base, data, *more, "--eval-every", 30, "--save-every", 30)
    assert "no token to train on in 2 of 32 rows: they are left out" in result.err
    assert result.code == 0
    assert all((batch["labels"] != -100).any() for batch in seen)
    assert len(seen) == 30


# --- the page


def test_every_test_that_the_page_names_is_there():
    here = Path(__file__).parent
    page = (here.parent / "docs" / "correctness.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    cells = [row[3].strip(" |") for row in rows if "test_" in row[3]]
    assert len(cells) > 20
    named = set()
    for group in (group for cell in cells for group in cell.split("; ")):
        file = Path(__file__).name
        for part in group.split(", "):
            found = re.fullmatch(r"(?:((?:\w+/)*test_\w+\.py)(?:: )?)?(?:`(test_\w+)`)?", part)
            assert found, part
            file = found[1] or file
            assert not found[2] or f"def {found[2]}(" in (here / file).read_text(), part
            named.add(found[2])
    ours = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(), re.MULTILINE))
    assert ours - named == {"test_every_test_that_the_page_names_is_there"}
