"""A reward model scores a response the same alone, padded and in any batch; others are refused."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from llmctl.console import log
from llmctl.data.chat.responses import prepare_template
from llmctl.data.chat.templates import set_chat_template
from llmctl.errors import DataError, ModelError
from llmctl.models.loading import load_tokenizer
from llmctl.reward.model import PromptResponse, load_reward_model
from tests.data.chat.test_responses import byte_tokenizer
from tests.data.test_preferences import tokenizer
from tests.run_files import edit_json, edit_tensors

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ROOM = {"max_position_embeddings": 32, "intermediate_size": 64}
ASKED = {"role": "user", "content": "Hi"}
SAMPLES = [
    PromptResponse("Hi", " there"),
    PromptResponse("Hi", " there", ended=False),
    PromptResponse([ASKED], "Hello ."),
    PromptResponse([ASKED], "Hello .", ended=False),
    PromptResponse([ASKED], ""),
    PromptResponse("Hi Hi Hi What", "?"),
    PromptResponse([ASKED, {"role": "assistant", "content": "What ?"}, ASKED], "there"),
]


def build(kind, vocabulary, labels=1):
    if kind == "bert":
        shape = BertConfig(vocab_size=vocabulary, **TINY, **ROOM, num_labels=labels)
        return BertForSequenceClassification(shape)
    if kind == "gpt2":
        size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
        shape = GPT2Config(vocab_size=vocabulary, **size, num_labels=labels, eos_token_id=2)
        return GPT2ForSequenceClassification(shape)
    shape = LlamaConfig(vocab_size=vocabulary, **TINY, **ROOM, num_labels=labels)
    return LlamaForSequenceClassification(shape)


def spread(model):
    """Weights so large that every token tells on the score."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (0.3 if weight.ndim > 1 else 0.1))
    return model


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    """A llama, a GPT-2 and a BERT that score."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("scorers")
    for kind in ("llama", "gpt2", "bert"):
        found = tokenizer("bert" if kind == "bert" else "llama")
        shape = BertConfig() if kind == "bert" else LlamaConfig()
        prepare_template(found, shape, None)
        found.model_max_length = 32
        model = spread(build(kind, len(found)))
        model.config.pad_token_id = found.pad_token_id
        model.save_pretrained(root / kind)
        found.save_pretrained(root / kind)
    return root


@pytest.fixture
def scorer(scorers, tmp_path):
    """A llama's folder to spoil."""
    return shutil.copytree(scorers / "llama", tmp_path / "spoiled")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_score_is_that_of_the_text_alone(scorers, kind):
    found = load_reward_model(str(scorers / kind))
    together = found.score(SAMPLES, batch_size=7)
    assert (together.shape, together.dtype, together.device.type) == ((7,), torch.float32, "cpu")
    for size in (1, 2, 3):
        torch.testing.assert_close(found.score(SAMPLES, batch_size=size), together)
    alone = [float(found.score([sample])[0]) for sample in SAMPLES]
    assert alone == pytest.approx(together.tolist(), rel=1e-4)
    assert len({round(score, 4) for score in alone}) == len(alone) - 2 * (kind == "bert")
    assert found.score(SAMPLES[::-1]).tolist() == pytest.approx(alone[::-1], rel=1e-4)
    assert found.score([]).shape == (0,)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_score_is_the_logit_at_the_last_token(scorers, kind):
    """By hand: the hidden state of the last token of the text alone, times the head."""
    found = load_reward_model(str(scorers / kind))
    for sample in SAMPLES:
        tokens = torch.tensor([found.encode(sample).tokens])
        with torch.no_grad():
            states = found.model.base_model(tokens).last_hidden_state[0, -1]
            wanted = float(found.model.score.weight[0] @ states)
        assert float(found.score([sample])[0]) == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_left_padding_and_what_stands_in_the_padding_change_nothing(scorers):
    found = load_reward_model(str(scorers / "llama"))
    model, pad = found.model, found.pad
    tokens = found.encode(SAMPLES[2]).tokens
    wanted = float(found.score([SAMPLES[2]])[0])
    mask = [1] * len(tokens)
    sides = {
        "right": ([*tokens, pad, pad, pad], [*mask, 0, 0, 0]),
        "left": ([pad, pad, pad, *tokens], [0, 0, 0, *mask]),
    }
    for ids, seen in sides.values():
        with torch.no_grad():
            score = model(torch.tensor([ids]), attention_mask=torch.tensor([seen])).logits
        assert float(score) == pytest.approx(wanted, rel=1e-4)
    kept = model.get_input_embeddings().weight.data[pad].clone()
    model.get_input_embeddings().weight.data[pad] = 1e4
    assert found.score([SAMPLES[2], SAMPLES[-1]]).tolist()[0] == pytest.approx(wanted, rel=1e-4)
    model.get_input_embeddings().weight.data[pad] = kept


def test_a_cut_response_has_no_end_and_a_long_prompt_loses_its_beginning(scorers):
    found = load_reward_model(str(scorers / "llama"))
    end = found.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert found.encode(SAMPLES[2]).tokens[-1] == end
    assert found.encode(SAMPLES[2]).tokens[:-1] == found.encode(SAMPLES[3]).tokens
    eos = found.tokenizer.eos_token_id
    assert found.encode(SAMPLES[0]).tokens == [*found.encode(SAMPLES[1]).tokens, eos]
    long = {"role": "user", "content": " ".join(["Hi"] * 40 + ["What"])}
    tokens = found.encode(PromptResponse([long], "Hello .")).tokens
    assert len(tokens) == found.max_length == 32
    assert tokens[-6:] == found.encode(SAMPLES[2]).tokens[-6:]
    with pytest.raises(DataError, match="has more tokens than the 32 that the reward model"):
        found.score([PromptResponse("Hi", " Hello" * 40)])
    with pytest.raises(DataError, match="has more tokens"):
        load_reward_model(str(scorers / "bert")).score([PromptResponse("Hi", "Hello " * 40)])


@pytest.fixture
def foreign(tmp_path):
    """A reward model of another tool, whose template writes a line break after each turn."""
    found = byte_tokenizer("<|im_start|>", "<|im_end|>")
    found.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    room = {"max_position_embeddings": 128, "intermediate_size": 64}
    shape = LlamaConfig(vocab_size=len(found), **TINY, **room, num_labels=1, pad_token_id=0)
    spread(LlamaForSequenceClassification(shape)).save_pretrained(tmp_path / "foreign")
    found.save_pretrained(tmp_path / "foreign")
    return tmp_path / "foreign"


def test_the_score_stands_at_the_end_of_the_turn_or_where_another_tool_trained_it(
    foreign, caplog, monkeypatch
):
    """By hand: the logit at the last token of transformers' own text, with and without its end."""
    monkeypatch.setattr(log, "propagate", True)
    model = LlamaForSequenceClassification.from_pretrained(foreign)
    found = load_tokenizer(str(foreign))
    answer = {"role": "assistant", "content": "Hello."}
    text = found.apply_chat_template([ASKED, answer], tokenize=False)
    assert text.endswith("<|im_end|>\n")

    def by_hand(written):
        inputs = found(written, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return float(model(inputs).logits)

    def score(**how):
        caplog.clear()
        scorer = load_reward_model(str(foreign), **how)
        return float(scorer.score([PromptResponse([ASKED], "Hello.")])[0]), scorer

    at_turn, at_last = by_hand(text.removesuffix("\n")), by_hand(text)
    assert at_turn != pytest.approx(at_last, rel=1e-2)
    given, scorer = score()
    assert (given, scorer.score_at) == (pytest.approx(at_turn, rel=1e-4), "end-of-turn")
    assert "writes '\\n' after the end of a turn" in caplog.text
    assert "--score-at last-token" in caplog.text
    given, scorer = score(score_at="last-token")
    assert (given, scorer.score_at) == (pytest.approx(at_last, rel=1e-4), "last-token")
    assert caplog.text == "", "whoever says it is not warned"
    assert score(score_at="end-of-turn")[0] == pytest.approx(at_turn, rel=1e-4)
    assert caplog.text == ""
    (foreign.parent / "manifest.json").write_text('{"stage": "reward"}')
    assert score()[0] == pytest.approx(at_turn, rel=1e-4)
    assert caplog.text == "", "a run of an earlier version is ours"
    (foreign.parent / "manifest.json").unlink()
    edit_json(foreign / "config.json", score_at="last-token")
    assert score()[0] == pytest.approx(at_last, rel=1e-4)
    assert caplog.text == "", "nor whoever wrote it down"
    assert score(score_at="end-of-turn")[0] == pytest.approx(at_turn, rel=1e-4)
    edit_json(foreign / "config.json", score_at=["?"])
    assert score()[0] == pytest.approx(at_turn, rel=1e-4)
    assert "--score-at" in caplog.text


def test_a_template_that_ends_with_the_turn_leaves_nothing_open(foreign, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    found = load_tokenizer(str(foreign))
    set_chat_template(found, "vicuna")
    found.save_pretrained(foreign)
    scorer = load_reward_model(str(foreign))
    assert (scorer.score_at, caplog.text) == ("end-of-turn", "")
    found.chat_template = "{{ raise_exception('no') }}"
    found.save_pretrained(foreign)
    assert load_reward_model(str(foreign)).score([PromptResponse("", "Hi")]).shape == (1,)


def test_bert_is_told_which_tokens_are_the_response(scorers):
    found = load_reward_model(str(scorers / "bert"))
    assert found.uses_token_types
    inputs = found.tokenizer("Hi", " there", return_tensors="pt", return_token_type_ids=True)
    assert inputs["token_type_ids"].sum() == 2
    with torch.no_grad():
        wanted = float(found.model(**inputs).logits)
        del inputs["token_type_ids"]
        other = float(found.model(**inputs).logits)
    assert float(found.score([SAMPLES[0]])[0]) == pytest.approx(wanted, rel=1e-4)
    assert wanted != pytest.approx(other, rel=1e-3)


def test_an_adapter_scores_as_it_did(scorers, tmp_path):
    base = tmp_path / "base"
    shape = LlamaConfig(vocab_size=14, **TINY, **ROOM)
    spread(LlamaForCausalLM(shape)).save_pretrained(base)
    shutil.copy(scorers / "llama/tokenizer.json", base)
    torch.manual_seed(3)
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data = torch.randn_like(weight) * 0.3
            assert "score" in name or "lora" in name
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    load_tokenizer(str(scorers / "llama")).save_pretrained(folder)
    found = load_reward_model(str(folder))
    tokens = torch.tensor([found.encode(SAMPLES[2]).tokens])
    model.config.pad_token_id = found.pad
    with torch.no_grad():
        wanted = float(model.eval()(tokens).logits)
    assert float(found.score([SAMPLES[2]])[0]) == pytest.approx(wanted, rel=1e-4)
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in weights if "score" in name)
    del weights[name]
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"missing adapter weights: .*score"):
        load_reward_model(str(folder))


# --- what is no reward model


def test_a_language_model_and_a_classifier_are_refused(scorer, scorers, tmp_path):
    edit_json(scorer / "config.json", architectures=["LlamaForCausalLM"])
    with pytest.raises(ModelError, match="LlamaForCausalLM has no head that scores") as caught:
        load_reward_model(str(scorer))
    assert caught.value.code == 4
    three = tmp_path / "three"
    build("llama", 14, labels=3).save_pretrained(three)
    shutil.copy(scorers / "llama/tokenizer.json", three)
    with pytest.raises(ModelError, match="it tells 3 labels apart"):
        load_reward_model(str(three))


def test_a_missing_head_and_broken_weights_are_refused(scorer):
    file = scorer / "model.safetensors"
    whole = load_file(file)

    def saved(change):
        edit_tensors(file, change, whole)
        return load_reward_model(str(scorer))

    assert saved(lambda tensors: None).max_length == 32
    for change, said in (
        (lambda t: t.pop("score.weight"), "missing weights: score.weight"),
        (lambda t: t.update({"score.weight": torch.full((1, 32), torch.nan)}), "not finite: score"),
        (lambda t: t.update({"score.weight": torch.ones(2, 32)}), "mismatched weights: score"),
        (lambda t: t.pop("model.norm.weight"), "missing weights: model.norm.weight"),
    ):
        with pytest.raises(ModelError, match=said):
            saved(change)


def test_pickles_and_other_architectures_are_refused(scorer):
    edit_json(scorer / "config.json", model_type="mamba")
    with pytest.raises(ModelError, match="no classifier of the architecture mamba"):
        load_reward_model(str(scorer))
    edit_json(scorer / "config.json", model_type="llama")
    (scorer / "model.safetensors").rename(scorer / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only pickled weights"):
        load_reward_model(str(scorer))


def test_padding_that_also_ends_texts_is_refused(scorer):
    edit_json(scorer / "config.json", pad_token_id=2)
    with pytest.raises(ModelError, match="the padding token </s> also ends texts"):
        load_reward_model(str(scorer))
    edit_json(scorer / "config.json", pad_token_id=0, eos_token_id=[2, 0])
    with pytest.raises(ModelError, match="also ends texts"):
        load_reward_model(str(scorer))
    tokens = json.loads((scorer / "tokenizer_config.json").read_text())
    del tokens["pad_token"]
    (scorer / "tokenizer_config.json").write_text(json.dumps(tokens))
    edit_json(scorer / "config.json", pad_token_id=None, eos_token_id=2)
    with pytest.raises(ModelError, match="no padding token"):
        load_reward_model(str(scorer))


def test_a_tokenizer_of_another_model_is_refused(scorer):
    found = load_tokenizer(str(scorer))
    found.add_tokens(["unheard"])
    found.save_pretrained(scorer)
    with pytest.raises(
        DataError, match=r"has a token id of 14, and the reward model .* has only 14"
    ):
        load_reward_model(str(scorer)).score([PromptResponse("Hi", " unheard")])
    found.add_special_tokens({"pad_token": "[OTHER]"})
    found.save_pretrained(scorer)
    edit_json(scorer / "config.json", pad_token_id=None)
    with pytest.raises(ModelError, match="the padding token has the id 15"):
        load_reward_model(str(scorer))


def test_a_text_that_holds_the_padding_is_refused(scorer):
    found = load_reward_model(str(scorer))
    unknown = found.tokenizer.unk_token_id
    edit_json(scorer / "config.json", pad_token_id=unknown)
    found = load_reward_model(str(scorer))
    with pytest.raises(DataError, match="has the padding token in it"):
        found.score([PromptResponse("Hi", " unheard of")])
