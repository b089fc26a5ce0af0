"""Adapters: what is trained, what is refused, and that a folder gives back what was saved."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

from llmctl.config.finetuning import Adapter
from llmctl.console import log
from llmctl.errors import ModelError, UserError
from llmctl.models.adapters import save_adapter, weights_sha256
from llmctl.models.loading import grow_embeddings, load_causal_lm, load_config, trainable_parameters
from llmctl.training.adapters import adapt
from tests.run_files import edit_json, edit_tensors

torch.set_num_threads(1)

WORDS = 48
NEW = ["<|im_start|>", "<|im_end|>"]
TOKENS = torch.tensor([[3, 9, 11, 4, 30, 21, 8, 40], [5, 5, 6, 17, 29, 33, 47, 2]])
BF16_CPU = torch.cpu.get_capabilities().get("avx512_bf16", False)


def make_tokenizer(added=()):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(WORDS - 3))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"extra_special_tokens": list(added)})
    return tokenizer


def make_base(folder, kind="llama", tied=True, hidden=64, seed=0):
    """A folder with a model of two layers and a tokenizer."""
    torch.manual_seed(seed)
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    if kind == "gpt2":
        shape = GPT2Config(
            vocab_size=WORDS, n_embd=hidden, n_layer=2, n_head=2, n_positions=32, **ends
        )
        shape.tie_word_embeddings = tied
        model = GPT2LMHeadModel(shape)
    else:
        shape = LlamaConfig(
            vocab_size=WORDS,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
            **ends,
        )
        model = LlamaForCausalLM(shape)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def load(folder, load_in="full", dtype=torch.float32):
    return load_causal_lm(str(folder), dtype=dtype, load_in=load_in)


def train(model, steps=4, tokens=TOKENS):
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-2)
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model.eval()(input_ids=tokens).logits.float()[:, -tokens.shape[1] :]


def make_adapter(base, folder, *, added=(), load_in="full", steps=4, **fields):
    """Train an adapter on the base, save it; the model as it was saved."""
    tokenizer = make_tokenizer(added)
    torch.manual_seed(1)
    model = load(base, load_in)
    grow_embeddings(model, tokenizer)
    ids = tokenizer.convert_tokens_to_ids(list(added))
    model = adapt(model, Adapter(**fields), added_tokens=ids)
    tokens = TOKENS.clone()
    if ids:
        tokens[0, 2:4] = torch.tensor(ids)
    train(model, steps, tokens)
    save_adapter(
        model,
        tokenizer,
        folder,
        base=base,
        base_sha256=weights_sha256(base),
        generation_config=GenerationConfig(eos_token_id=[1, *ids]),
    )
    return model


WAYS = {
    "lora": {"lora": True, "lora_r": 4},
    "rslora": {"lora": True, "lora_r": 4, "rslora": True, "lora_alpha": 3.0},
    "dora": {"lora": True, "lora_r": 4, "dora": True},
    "prompt": {"prompt_tuning": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_only_the_adapter_trains(tmp_path, kind, way):
    base = make_base(tmp_path / "base", kind)
    before = load_file(base / "model.safetensors")
    model = adapt(load(base), Adapter(**WAYS[way]))
    first = {n: w.detach().clone() for n, w in model.named_parameters() if w.requires_grad}
    train(model)
    after = model.get_base_model().state_dict()
    for name, weight in before.items():
        place = name if name in after else name.replace(".weight", ".base_layer.weight")
        place = place if place in after else name.replace(".bias", ".base_layer.bias")
        assert torch.equal(after[place], weight), name
    moved = {n for n, w in model.named_parameters() if n in first and not torch.equal(first[n], w)}
    assert moved == set(first)
    trained, total = trainable_parameters(model)
    assert trained == sum(w.numel() for w in first.values())
    assert trained < total / 2


def test_the_default_is_every_linear_layer_but_the_output(tmp_path):
    model = adapt(load(make_base(tmp_path / "base")), Adapter(lora=True, lora_r=3))
    adapted = {n.rpartition(".lora_A")[0] for n, _ in model.named_parameters() if "lora_A" in n}
    names = {name.rpartition(".")[2] for name in adapted}
    assert names == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    assert len(adapted) == 14
    about = model.peft_config["default"]
    assert (about.r, about.lora_alpha) == (3, 6)


def test_scales(tmp_path):
    """By definition: alpha / r, and alpha / sqrt(r)."""
    base = make_base(tmp_path / "base")
    for fields, scale in (({}, 2.0), ({"rslora": True}, 4.0), ({"lora_alpha": 3.0}, 0.75)):
        model = adapt(load(base), Adapter(lora=True, lora_r=4, **fields))
        layer = model.get_base_model().model.layers[0].mlp.up_proj
        assert layer.scaling["default"] == pytest.approx(scale)


def test_named_targets(tmp_path):
    base = make_base(tmp_path / "base")
    model = adapt(load(base), Adapter(lora=True, lora_targets=["q_proj", "layers.1.mlp.up_proj"]))
    adapted = {n for n, _ in model.named_parameters() if "lora_A" in n}
    assert len(adapted) == 3


BAD_TARGETS = {
    "q_porj": "did you mean q_proj",
    "self_attn": "is no linear layer",
    "lm_head": "output layer",
    "embed_tokens": "tied",
    "model.embed_tokens": "tied",
}


@pytest.mark.parametrize("name", BAD_TARGETS)
def test_targets_that_would_go_wrong_are_refused(tmp_path, name):
    model = load(make_base(tmp_path / "base"))
    with pytest.raises(UserError, match=BAD_TARGETS[name]) as caught:
        adapt(model, Adapter(lora=True, lora_targets=["q_proj", name]))
    assert caught.value.hint


@pytest.mark.parametrize(("name", "message"), [("lm_head", "output layer"), ("wte", "tied")])
def test_tied_targets_of_gpt2_are_refused(tmp_path, name, message):
    model = load(make_base(tmp_path / "base", "gpt2"))
    with pytest.raises(UserError, match=message):
        adapt(model, Adapter(lora=True, lora_targets=[name]))


@pytest.mark.parametrize("given", [["q_proj, v_proj"], ["q_proj", "v_proj"], "q_proj,v_proj"])
def test_targets_are_split_at_commas(tmp_path, given):
    model = adapt(load(make_base(tmp_path / "base")), Adapter(lora=True, lora_targets=given))
    names = {name.split(".")[-4] for name, w in model.named_parameters() if w.requires_grad}
    assert names == {"q_proj", "v_proj"}


def test_all_linear_stands_alone(tmp_path):
    model = load(make_base(tmp_path / "base"))
    with pytest.raises(UserError, match="stands alone"):
        adapt(model, Adapter(lora=True, lora_targets=["all-linear", "embed_tokens"]))


def test_virtual_tokens_cannot_teach_new_ones(tmp_path):
    model = load(make_base(tmp_path / "base"))
    with pytest.raises(ModelError, match="cannot teach the model 2 tokens") as caught:
        adapt(model, Adapter(prompt_tuning=3), added_tokens=[48, 49])
    assert "--lora" in caught.value.hint


def test_virtual_tokens_start_as_words(tmp_path):
    base = make_base(tmp_path / "base")
    torch.manual_seed(5)
    model = adapt(load(base), Adapter(prompt_tuning=3))
    torch.manual_seed(5)
    again = adapt(load(base), Adapter(prompt_tuning=3))
    found = get_peft_model_state_dict(model)["prompt_embeddings"]
    words = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert all(any(torch.equal(row, word) for word in words) for row in found)
    assert torch.equal(found, get_peft_model_state_dict(again)["prompt_embeddings"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_new_tokens_train_by_themselves(tmp_path, kind, tied):
    base = make_base(tmp_path / "base", kind, tied)
    tokenizer = make_tokenizer(NEW)
    model = load(base)
    grow_embeddings(model, tokenizer)
    before = model.get_input_embeddings().weight.detach().clone()
    head_before = model.get_output_embeddings().weight.detach().clone()
    model = adapt(model, Adapter(lora=True, lora_r=4), added_tokens=[48, 49])
    train(model, tokens=torch.tensor([[3, 48, 11, 49, 7], [48, 5, 49, 8, 1]]))
    merged = model.merge_and_unload()
    embedding, head = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert torch.equal(embedding[:48], before[:48])
    assert not torch.isclose(embedding[48:], before[48:]).any()
    if tied:
        assert head is embedding
        assert merged.config.tie_word_embeddings
    else:
        assert torch.equal(head[:48], head_before[:48])
        assert not torch.isclose(head[48:], head_before[48:]).any()


def test_an_adapter_that_trains_tokens_says_where_it_does_not_load(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    base = make_base(tmp_path / "base")
    for added, merge, said in (
        ([48], False, "trains the rows of 1 added token: vLLM and llama.cpp load no such adapter"),
        ([48, 49], False, "of 2 added tokens"),
        ([48], True, None),
        ([], False, None),
    ):
        model = load(base)
        grow_embeddings(model, make_tokenizer(NEW))
        caplog.clear()
        adapt(model, Adapter(lora=True, lora_r=4, merge=merge), added_tokens=added)
        assert said in caplog.text if said else caplog.text == ""
        assert ("--merge" in caplog.text) == (said is not None)


ALL_WAYS = [(way, added) for way in WAYS for added in ((), NEW) if not (added and way == "prompt")]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("way", "added"), ALL_WAYS)
def test_a_saved_adapter_is_the_trained_one(tmp_path, way, tied, added):
    base = make_base(tmp_path / "base", tied=tied)
    model = make_adapter(base, tmp_path / "adapter", added=added, **WAYS[way])
    tokens = TOKENS.clone()
    if added:
        tokens[:, 3] = 49
    expected = logits(model, tokens)
    with model.disable_adapter():
        assert (expected - logits(model, tokens)).abs().max() > 1e-3
    torch.manual_seed(99)
    ours = load(tmp_path / "adapter")
    assert torch.equal(logits(ours, tokens), expected)
    torch.manual_seed(98)
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert torch.equal(logits(theirs, tokens), expected)
    assert load_config(str(tmp_path / "adapter")).vocab_size == WORDS + len(added)
    assert ours.generation_config.eos_token_id == [1, *(48, 49)[: len(added)]]


def test_a_folder_holds_the_adapter_only_and_names_its_base(tmp_path):
    base = make_base(tmp_path / "base")
    make_adapter(base, tmp_path / "adapter", added=NEW, **WAYS["lora"])
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    others = {n: tuple(t.shape) for n, t in tensors.items() if "lora_" not in n}
    assert list(others.values()) == [(2, 64)]
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(base.resolve())
    assert about["target_modules"] == sorted(about["target_modules"])
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["base_sha256"] == weights_sha256(base)
    assert (tmp_path / "adapter" / "tokenizer.json").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_classifier_saves_its_output_layer(tmp_path):
    base = make_base(tmp_path / "base", tied=False)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model = adapt(model, Adapter(lora=True, lora_r=4), task="classify")
    train_labels = torch.tensor([2, 0])
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    for _ in range(3):
        model(input_ids=TOKENS, labels=train_labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(
        model,
        make_tokenizer(),
        tmp_path / "adapter",
        base=base,
        base_sha256=weights_sha256(base),
        generation_config=None,
    )
    from peft import PeftModel

    again = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    again = PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ModelError, match="SEQ_CLS"):
        load(tmp_path / "adapter")


# Refused when it is loaded


@pytest.fixture
def pair(tmp_path):
    """A base and an adapter with new tokens on it."""
    base = make_base(tmp_path / "base")
    make_adapter(base, tmp_path / "adapter", added=NEW, steps=1, **WAYS["lora"])
    return base, tmp_path / "adapter"


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
DAMAGE = {
    "missing": (lambda t: t.pop(Q), f"missing adapter weights: {Q}"),
    "missing rows": (lambda t: t.pop(ROWS), "trainable_tokens_delta"),
    "superfluous": (lambda t: t.update({Q.replace(".1.", ".7."): t[Q] + 1}), "unexpected"),
    "shape": (lambda t: t.update({Q: t[Q][:, :9].clone()}), "is 4 x 9, the base takes 4 x 64"),
    "nan": (lambda t: t[Q].fill_(float("nan")), "not finite"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_adapters_are_refused_by_name(pair, name):
    change, message = DAMAGE[name]
    edit_tensors(pair[1] / "adapter_model.safetensors", change)
    with pytest.raises(ModelError, match=message):
        load(pair[1])


def test_another_base_is_refused(pair, tmp_path):
    other = make_base(tmp_path / "other", seed=7)
    edit_json(pair[1] / "adapter_config.json", base_model_name_or_path=str(other))
    with pytest.raises(ModelError, match="trained on another base") as caught:
        load(pair[1])
    assert str(other) in str(caught.value)


def test_a_base_that_changed_is_refused(pair):
    make_base(pair[0], seed=8)
    with pytest.raises(ModelError, match="have changed since"):
        load(pair[1])


def test_a_base_that_is_gone_is_named(pair):
    shutil.rmtree(pair[0])
    for reading in (load, lambda folder: load_config(str(folder))):
        with pytest.raises(ModelError, match="is gone") as caught:
            reading(pair[1])
        assert "--base" in caught.value.hint


def test_rows_that_nobody_has_are_refused(pair):
    """A number of rows that takes all memory is refused before any is taken."""
    edit_json(
        pair[1] / "adapter_config.json",
        trainable_token_indices={"model.embed_tokens": [48, 10**12]},
    )
    with pytest.raises(ModelError, match="no values for row 49"):
        load(pair[1])


def test_absurd_sizes_take_no_memory(pair):
    edit_json(pair[1] / "adapter_config.json", r=10**11)
    with pytest.raises(ModelError, match="r of 100,000,000,000, and no tensor has"):
        load(pair[1])


# Quantized bases


def test_dora_on_eight_bits_is_refused(tmp_path):
    """PEFT loses the scales of 8-bit weights when it computes DoRA's magnitudes."""
    model = load(make_base(tmp_path / "base"), "8bit")
    with pytest.raises(UserError, match="--dora does not go"):
        adapt(model, Adapter(dora=True))


@pytest.mark.parametrize(("way", "load_in"), [("lora", "4bit"), ("lora", "8bit"), ("dora", "4bit")])
def test_adapters_of_a_quantized_base(tmp_path, way, load_in):
    base = make_base(tmp_path / "base")
    model = make_adapter(base, tmp_path / "adapter", added=NEW, load_in=load_in, **WAYS[way])
    assert all(w.dtype == torch.float32 for w in model.parameters() if w.requires_grad)
    expected = logits(model)
    assert torch.equal(logits(load(tmp_path / "adapter", load_in)), expected)
    again = load(tmp_path / "adapter")
    assert 0 < (logits(again) - expected).abs().max() < 1


@pytest.mark.skipif(not BF16_CPU, reason="only CPUs with AVX512-BF16 repack 4-bit weights")
def test_gradients_survive_an_evaluation_in_four_bits(tmp_path):
    """Without the guard the weights are repacked in place, and most gradients are wrong."""
    model = load(make_base(tmp_path / "base"), "4bit")
    torch.manual_seed(0)
    model = adapt(model, Adapter(lora=True, lora_r=4))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)

    def gradients():
        model.zero_grad()
        model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
        return [w.grad.clone() for w in model.parameters() if w.requires_grad]

    before = gradients()
    logits(model)
    for ours, theirs in zip(gradients(), before, strict=True):
        assert torch.equal(ours, theirs)


def test_eight_bits_dequantize_and_stay_whole(tmp_path):
    from llmctl.models.quantized import copy_dequantized

    base = make_base(tmp_path / "base")
    quantized, full = load(base, "8bit"), load(base)
    copy_dequantized(quantized, full)
    first = logits(quantized)
    copy_dequantized(quantized, full)
    assert torch.equal(logits(quantized), first)
    assert 0 < (logits(full) - first).abs().max() < 0.05


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_four_bits_dequantize_to_what_they_compute_with(tmp_path, kind):
    """Also layers whose width NF4 cannot divide into blocks, and after a forward pass."""
    from llmctl.models.quantized import copy_dequantized, loaded_in

    base = make_base(tmp_path / "base", kind, hidden=96)
    quantized, full = load(base, "4bit"), load(base)
    assert loaded_in(quantized) == "4bit"
    packed = [m for m in quantized.modules() if type(m).__name__ == "Linear4bit"]
    assert packed
    assert all(module.in_features % 64 == 0 for module in packed)
    original = logits(full)
    expected = logits(quantized)
    copy_dequantized(quantized, full)
    torch.testing.assert_close(logits(full), expected, rtol=1e-4, atol=1e-5)
    assert (original - expected).abs().max() < 0.5


def test_norms_of_a_quantized_base_are_kept_in_float32(tmp_path):
    model = load(make_base(tmp_path / "base"), "4bit", torch.bfloat16)
    model = adapt(model, Adapter(lora=True, lora_r=4), added_tokens=[46, 47])
    norms = [w for n, w in model.named_parameters() if "norm" in n]
    assert all(w.dtype == torch.float32 for w in norms)
    assert len(norms) == 5
    with torch.autocast("cpu", torch.bfloat16):
        train(model, steps=2)
    assert all(w.isfinite().all() for w in model.parameters() if w.requires_grad)


def test_new_tokens_beside_an_output_layer_with_a_bias_are_refused():
    """PEFT's layer for single rows computes without the bias: another model would be trained."""
    torch.manual_seed(0)
    shape = PhiConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with pytest.raises(ModelError, match="has a bias"):
        adapt(PhiForCausalLM(shape), Adapter(lora=True), added_tokens=[38, 39])
