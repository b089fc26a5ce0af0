"""`llmctl sft --task classify`: it learns, its results open, and what would be wrong is refused."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    pipeline,
)

from llmctl.config.commands.sft import SftConfig
from llmctl.data.classification import configure_padding, load_classification_data
from llmctl.data.tokenizer.train import PAD
from llmctl.errors import DataError, ModelError, UserError
from llmctl.models.classifiers import load_classifier, require_padding_unseen, require_positions
from llmctl.models.loading import load_tokenizer
from llmctl.training.classify import class_counts, macro_f1
from tests.conftest import flags
from tests.run_files import cut_off, edit_tensors, metrics, write_rows

FILLER = ["the", "a", "cat", "dog", "house", "river", "sees", "likes", "and", "very", "often"]
COLORS = ("red", "blue", "green")
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>"]
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
QUICK = {"max_steps": 4, "threads": 1, "batch_size": 8, "precision": "fp32", "seed": 3}


def words(path, kind):
    """A tokenizer of whole words: BERT's way, LLaMA's without padding, or GPT-2's pad = eos."""
    vocabulary = {word: number for number, word in enumerate([*SPECIALS, *FILLER, *COLORS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    single = {"bert": "[CLS] $A [SEP]", "llama": "<s> $A", "gpt2": "$A </s>"}[kind]
    used = [(name, vocabulary[name]) for name in single.split() if name != "$A"]
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=used)
    roles = {
        "bert": {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"},
        "llama": {"bos_token": "<s>", "eos_token": "</s>"},
        "gpt2": {"eos_token": "</s>", "pad_token": "</s>"},
    }[kind]
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **roles).save_pretrained(
        path
    )
    return len(vocabulary)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A BERT and its bare body, a LLaMA, a GPT-2: 2 layers each, nothing learned."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    size = {kind: words(root / kind, kind) for kind in ("bert", "llama", "gpt2")}
    small = {"intermediate_size": 64, "max_position_embeddings": 32}
    bert = BertConfig(vocab_size=size["bert"], **TINY, **small)
    BertModel(bert).save_pretrained(root / "bert")
    shutil.copytree(root / "bert", root / "masked")
    BertForMaskedLM(bert).save_pretrained(root / "masked")
    llama = LlamaConfig(vocab_size=size["llama"], **TINY, **small)
    LlamaForCausalLM(llama).save_pretrained(root / "llama")
    gpt2 = GPT2Config(
        vocab_size=size["gpt2"],
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=5,
        eos_token_id=5,
    )
    GPT2LMHeadModel(gpt2).save_pretrained(root / "gpt2")
    return root


def texts(count, colors=COLORS[:2], seed=0):
    """Sentences of 4 to 12 words, one of which is the color that is the label."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        body = [draw.choice(FILLER) for _ in range(draw.randint(3, 11))]
        color = colors[number % len(colors)]
        body.insert(draw.randint(0, len(body)), color)
        rows.append({"text": " ".join(body), "label": f"is {color}"})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("texts") / "texts.jsonl", texts(240))


def settings(model, data, **more):
    return {"model": str(model), "data": [str(data)], "task": "classify", **QUICK, **more}


@pytest.fixture
def sft(cli):
    def run(model, data, out, **more):
        return cli("sft", *flags(settings(model, data, **more)), "--out", out)

    return run


def logits(model, tokenizer, batch):
    with torch.no_grad():
        found = tokenizer(batch, return_tensors="pt", padding=True)
        return model.eval()(
            input_ids=found["input_ids"], attention_mask=found["attention_mask"]
        ).logits


# --- it learns


@pytest.mark.parametrize("kind", ["bert", "masked", "llama", "gpt2"])
def test_it_learns_and_its_result_opens(sft, bases, data, tmp_path, kind):
    out = tmp_path / "run"
    result = sft(bases / kind, data, out, max_steps=80, lr=5e-3, val_size=48, json=True)
    assert result.code == 0, result.err
    said = json.loads(result.out)
    assert said["val_accuracy"] >= 0.9
    assert said["val_macro_f1"] >= 0.9
    rows = [row for row in metrics(out) if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    assert rows[-1]["accuracy"] > rows[0]["accuracy"]
    assert "in 2 classes to train on: is " in result.err
    tell = pipeline("text-classification", model=str(out / "model"))
    wanted = texts(24, seed=9)
    found = tell([row["text"] for row in wanted], batch_size=8)
    right = [one["label"] == row["label"] for one, row in zip(found, wanted, strict=True)]
    assert sum(right) >= 22


@pytest.fixture(scope="module")
def told(cli, bases, data, tmp_path_factory):
    """A short run on the LLaMA."""
    out = tmp_path_factory.mktemp("runs") / "told"
    found = settings(bases / "llama", data, max_steps=30, lr=5e-3, val_size=48, eval_every=5)
    result = cli("sft", *flags(found), "--out", out)
    assert result.code == 0, result.err
    return out


def test_the_best_checkpoint_is_the_result_and_its_figures_are_by_definition(sft, bases, tmp_path):
    """There is nothing in these labels to learn, and so the last checkpoint is not the best."""
    draw = random.Random(1)
    rows = [{**row, "label": draw.choice("xyz")} for row in texts(120)]
    run, data = tmp_path / "run", write_rows(tmp_path / "noise.jsonl", rows)
    result = sft(bases / "llama", data, run, max_steps=40, lr=1e-2, val_size=48, eval_every=5)
    assert result.code == 0, result.err
    result = json.loads((run / "manifest.json").read_text())["result"]
    best = min((r for r in metrics(run) if "val_loss" in r), key=lambda row: row["val_loss"])
    assert (result["best_step"], result["val_loss"]) == (best["step"], best["val_loss"])
    assert best["step"] < 40
    held = json.loads((run / "manifest.json").read_text())["held_out"]
    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    nll, pairs = [], []
    for place in held:
        row = rows[int(place.rsplit(":", 1)[1]) - 1]
        scores = torch.log_softmax(logits(model, tokenizer, [row["text"]])[0], -1)
        true = model.config.label2id[row["label"]]
        nll.append(-float(scores[true]))
        pairs.append((true, int(scores.argmax())))
    assert result["val_loss"] == pytest.approx(sum(nll) / len(nll), rel=1e-4)
    assert result["val_accuracy"] == pytest.approx(np.mean([t == g for t, g in pairs]))
    assert result["val_macro_f1"] == pytest.approx(by_definition(pairs))


def by_definition(pairs):
    """Macro F1 in plain numbers."""
    found = []
    for label in sorted({true for true, _ in pairs} | {told for _, told in pairs}):
        right = sum(true == told == label for true, told in pairs)
        true = sum(true == label for true, _ in pairs)
        told = sum(told == label for _, told in pairs)
        precision, recall = right / told if told else 0, right / true if true else 0
        both = precision + recall
        found.append(2 * precision * recall / both if both else 0)
    return sum(found) / len(found)


def test_macro_f1_by_hand():
    """A confusion matrix (rows true): [[3, 1, 0, 0], [1, 1, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]]."""
    true = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    told = torch.tensor([0, 0, 0, 1, 0, 1, 0, 0])
    counts = class_counts(true, told, 4)
    assert counts.tolist() == [[3, 1, 0, 0], [4, 2, 2, 0], [6, 2, 0, 0]]
    # 6 / 10, 2 / 4, 0 / 2; nothing of the fourth
    assert macro_f1(counts) == pytest.approx((0.6 + 0.5 + 0) / 3)
    assert macro_f1(counts) == pytest.approx(
        by_definition(list(zip(true.tolist(), told.tolist(), strict=True)))
    )


# --- numbers


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_accumulation_equals_a_larger_batch(sft, bases, data, tmp_path, kind):
    base = tmp_path / "base"
    shutil.copytree(bases / kind, base)
    raw = json.loads((base / "config.json").read_text())
    raw |= {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    (base / "config.json").write_text(json.dumps(raw))
    for name, size, passes in (("one", 8, 1), ("four", 2, 4)):
        more = {"batch_size": size, "grad_accum": passes, "max_steps": 2}
        result = sft(base, data, tmp_path / name, **more)
        assert result.code == 0, result.err
    one, four = metrics(tmp_path / "one"), metrics(tmp_path / "four")
    for key in ("loss", "grad_norm", "accuracy", "val_loss", "val_accuracy"):
        ours, theirs = ([row[key] for row in rows if key in row] for rows in (one, four))
        assert ours == pytest.approx(theirs, rel=1e-5)
    weights = [load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "four")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_text_gets_the_same_logits_alone_and_padded(sft, bases, data, tmp_path, kind):
    result = sft(bases / kind, data, tmp_path / "run")
    assert result.code == 0, result.err
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert tokenizer.pad_token == PAD
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert len(tokenizer) <= model.get_input_embeddings().weight.shape[0]
    batch = ["a red cat", "the blue dog sees the old house and the river", "red"]
    together = logits(model, tokenizer, batch)
    for text, found in zip(batch, together, strict=True):
        torch.testing.assert_close(logits(model, tokenizer, [text])[0], found)


def test_a_padding_token_of_its_own_is_kept_and_others_are_not(bases):
    for kind, kept in (("bert", True), ("llama", False), ("gpt2", False)):
        tokenizer = load_tokenizer(str(bases / kind))
        before, size = tokenizer.pad_token, len(tokenizer)
        configure_padding(tokenizer, 16)
        assert (tokenizer.pad_token == before, len(tokenizer) == size) == (kept, kept)
        assert tokenizer.pad_token not in (tokenizer.eos_token, tokenizer.unk_token)


def test_a_model_whose_answer_padding_changes_is_refused(bases):
    tokens = [number % 9 + 6 for number in range(43)]
    model = load_classifier(str(bases / "llama"), ("a", "b")).model
    model.config.pad_token_id = 0
    require_padding_unseen(model, tokens[:3], tokens[3:], 0)
    with pytest.raises(ModelError, match="padding changes the answer"):
        require_padding_unseen(model, tokens[:3], tokens[3:], 3)


def test_a_roberta_has_fewer_positions_than_it_says():
    shape = {"max_position_embeddings": 34, "pad_token_id": 1, "vocab_size": 40, **TINY}
    model = RobertaForSequenceClassification(RobertaConfig(**shape, intermediate_size=64))
    require_positions(model, 32)
    model(input_ids=torch.full((1, 32), 7))
    with pytest.raises(UserError, match="a text of 33 tokens: the model has 32 positions"):
        require_positions(model, 33)


@pytest.mark.parametrize("way", [{}, {"lora": True, "lora_dropout": 0.1}], ids=["full", "lora"])
def test_resume_ends_in_the_same_bits(sft, bases, data, tmp_path, way):
    steps = {"max_steps": 8, "save_every": 3, "eval_every": 4, "keep": 9, **way}
    whole, again = tmp_path / "whole", tmp_path / "again"
    result = sft(bases / "bert", data, whole, **steps)
    assert result.code == 0, result.err
    name = "adapter/adapter_model" if way else "model/model"
    for step in (3, 4):
        cut_off(whole, again, step)
        result = sft(bases / "bert", data, again, **steps, resume=True)
        assert result.code == 0, result.err
        assert f"checkpoint-{step}" in result.err
        ours, theirs = (load_file(run / f"{name}.safetensors") for run in (again, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert metrics(again)[-1]["val_loss"] == metrics(whole)[-1]["val_loss"]


# --- what it starts from


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_an_adapter_opens_and_gives_the_same_logits(sft, bases, data, tmp_path, kind):
    out = tmp_path / "run"
    rows = write_rows(tmp_path / "three.jsonl", texts(120, COLORS))
    result = sft(bases / kind, rows, out, lora=True, merge=True, max_steps=60, lr=1e-2, json=True)
    assert result.code == 0, result.err
    said = json.loads(result.out)
    assert said["merge_difference"] < 1e-3
    assert said["trained_parameters"] < said["parameters"] / 2
    losses = [row["val_loss"] for row in metrics(out) if "val_loss" in row]
    assert losses[-1] < losses[0]
    tokenizer = AutoTokenizer.from_pretrained(out / "adapter")
    about = json.loads((out / "adapter/config.json").read_text())
    labels = {int(number): label for number, label in about["id2label"].items()}
    adapter = AutoPeftModelForSequenceClassification.from_pretrained(
        out / "adapter", id2label=labels
    )
    adapter.config.pad_token_id = tokenizer.pad_token_id
    merged = AutoModelForSequenceClassification.from_pretrained(out / "model")
    assert merged.config.id2label == {0: "is blue", 1: "is green", 2: "is red"}
    batch = [row["text"] for row in texts(8, COLORS, seed=5)]
    ours, theirs = (logits(model, tokenizer, batch) for model in (adapter, merged))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert ours.std() > 0.1


def test_an_adapter_keeps_a_layer_that_the_base_lacks(sft, bases, data, tmp_path):
    result = sft(bases / "masked", data, tmp_path / "run", lora=True, merge=True)
    assert result.code == 0, result.err
    about = json.loads((tmp_path / "run/adapter/config.json").read_text())
    labels = {int(number): label for number, label in about["id2label"].items()}
    adapter = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "run/adapter", id2label=labels
    )
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        ours, theirs = (model.eval()(input_ids=ids).logits for model in (adapter, merged))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_classifier_keeps_its_labels_and_their_numbers(sft, bases, told, tmp_path):
    again = write_rows(tmp_path / "again.jsonl", texts(40, COLORS[1::-1], seed=4))
    result = sft(told, again, tmp_path / "more", val_size=8, json=True)
    assert result.code == 0, result.err
    assert json.loads(result.out)["val_accuracy"] > 0.8
    other = write_rows(tmp_path / "other.jsonl", texts(40, COLORS))
    result = sft(told, other, tmp_path / "other")
    assert result.code == 4
    assert "label `is green` (" in result.err
    assert "is none of the model's: is blue, is red" in result.err


def test_only_the_head_may_be_missing(bases, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases / "llama", base)
    whole = load_file(base / "model.safetensors")

    def saved(change):
        edit_tensors(base / "model.safetensors", change, whole)
        return load_classifier(str(base), ("a", "b"))

    assert saved(lambda tensors: tensors.pop("lm_head.weight")).new_modules == {"score"}
    norm = "model.layers.1.input_layernorm.weight"
    for change, said in (
        (lambda t: t.pop(norm), f"missing weights: {norm}"),
        (lambda t: t.update({norm: torch.ones(7)}), f"mismatched weights: {norm}"),
        (lambda t: t.update({norm.replace("1", "9"): torch.ones(32)}), "unexpected weights: model"),
        (lambda t: t.update({norm: torch.full((32,), torch.nan)}), "not finite"),
    ):
        with pytest.raises(ModelError, match=said):
            saved(change)


def test_an_architecture_without_a_classifier_and_pickles_are_refused(bases, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases / "llama", base)
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 900}))
    with pytest.raises(ModelError, match=r"describes .* parameters, the weights have"):
        load_classifier(str(base), ("a", "b"))
    (base / "config.json").write_text(json.dumps(raw | {"model_type": "mamba"}))
    with pytest.raises(ModelError, match="no classifier of the architecture mamba"):
        load_classifier(str(base), ("a", "b"))
    (base / "config.json").write_text(json.dumps(raw))
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only pickled weights"):
        load_classifier(str(base), ("a", "b"))


# --- data


def loaded(bases, *rows, kind="llama", **more):
    return load_classification_data(SftConfig(**settings(bases / kind, *rows, **more)))


def test_one_class_is_refused(bases, tmp_path):
    rows = write_rows(tmp_path / "one.jsonl", texts(30, COLORS[:1]))
    with pytest.raises(DataError, match="every text has the label `is red`"):
        loaded(bases, rows)


def test_a_label_that_only_validates_is_refused(bases, tmp_path):
    val = write_rows(
        tmp_path / "val.jsonl", texts(5, COLORS[:1], seed=2) + texts(1, ["green"], seed=3)
    )
    with pytest.raises(DataError, match="label `is green`") as caught:
        loaded(bases, write_rows(tmp_path / "train.jsonl", texts(30)), val_data=[str(val)])
    assert (caught.value.file, caught.value.line) == (str(val), 6)


def test_overlap_is_refused(bases, tmp_path):
    rows = texts(30)
    val = write_rows(tmp_path / "val.jsonl", [*texts(4, seed=7), rows[11]])
    with pytest.raises(DataError, match=r"also validates \(.*val.jsonl:5\)") as caught:
        loaded(bases, write_rows(tmp_path / "train.jsonl", rows), val_data=[str(val)])
    assert caught.value.line == 12


def test_whole_numbers_are_in_order_of_their_values(bases, tmp_path):
    rows = [{"text": row["text"], "label": n % 12} for n, row in enumerate(texts(48))]
    found = loaded(bases, write_rows(tmp_path / "many.jsonl", rows), val_size=0)
    assert found.labels == tuple(map(str, range(12)))
    assert found.train.classes[:13].tolist() == [*range(12), 0]


def test_long_texts_are_cut_at_the_end_and_counted(sft, bases, data, tmp_path):
    whole = loaded(bases, data, kind="bert", val_size=0)
    cut = loaded(bases, data, kind="bert", val_size=0, max_length=8)
    longer = whole.train.lengths > 8
    assert cut.train.cut == longer.sum() > 0
    assert cut.train.lengths.max() == 8
    first = int(np.flatnonzero(longer)[0])
    assert cut.train.text(first)[:7].tolist() == whole.train.text(first)[:7].tolist()
    assert cut.train.text(first)[-1] == SPECIALS.index("[SEP]")
    dropped = loaded(bases, data, kind="bert", val_size=0, max_length=8, truncation="drop")
    assert (len(dropped.train), dropped.dropped) == (240 - longer.sum(), longer.sum())
    with pytest.raises(UserError, match="the model has 32 positions"):
        loaded(bases, data, max_length=33)
    result = sft(bases / "bert", data, tmp_path / "run", max_length=8, val_size=0)
    assert result.code == 0, result.err
    assert f"{100 * longer.mean():.1f} % cut at 8" in result.err


def test_a_special_token_in_a_text_is_text(bases, tmp_path):
    rows = [*texts(20), {"text": "red [SEP] [PAD]", "label": "is red"}]
    found = loaded(bases, write_rows(tmp_path / "odd.jsonl", rows), kind="bert", val_size=0)
    tokens = found.train.text(20).tolist()
    assert tokens[0] == SPECIALS.index("[CLS]")
    assert tokens.count(SPECIALS.index("[SEP]")) == 1
    assert SPECIALS.index("[PAD]") not in tokens


def test_odd_data_is_warned_of(sft, bases, tmp_path):
    rows = [*texts(40, COLORS[:1]), *texts(1, ["blue"], seed=3)]
    rows.append({"text": rows[0]["text"], "label": "is green"})
    odd = write_rows(tmp_path / "odd.jsonl", rows)
    result = sft(bases / "llama", odd, tmp_path / "run", val_size=0)
    assert result.code == 0, result.err
    for said in (
        "a single text to learn from: label is blue, is green",
        "label `is red` has 40 texts and `is green` 1: accuracy says little",
        "1 text stands with several labels",
    ):
        assert said in result.err


def test_a_dry_run_checks_and_writes_nothing(sft, bases, data, tmp_path):
    result = sft(bases / "llama", data, tmp_path / "run", dry_run=True)
    assert result.code == 0, result.err
    assert "task: classify" in result.out
    assert not (tmp_path / "run").exists()


def test_quantized_bases_are_refused(sft, bases, data, tmp_path):
    result = sft(bases / "llama", data, tmp_path / "run", lora=True, load_in_4bit=True)
    assert (result.code, "does not go with --task classify" in result.err) == (2, True)
