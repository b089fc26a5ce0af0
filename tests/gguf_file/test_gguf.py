"""GGUF files: another reader finds in them the same weights, tokens and settings."""

import json
import math
from collections import Counter

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from llmctl.data.tokenizer.train import save_tokenizer, train_tokenizer
from llmctl.errors import ModelError, ResourceError
from llmctl.gguf_file import check_gguf, read_back, write_gguf
from llmctl.gguf_file.tokenizer import QWEN2
from llmctl.gguf_file.writing import KINDS
from tests.conftest import sentences

torch.set_num_threads(1)

TEXTS = [
    "The cat sees a red ball, 1234 times!  Then it's gone.\n\n\tWe'LL see…",
    "naïve façade Ωmega 日本語 🙂 <|eos|> </s> ▁ a  b   c",
    "",
    " leading and trailing ",
]
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "llama": lambda **more: LlamaConfig(**{**SHAPE, "head_dim": 32, **more}),
    "mistral": lambda **more: MistralConfig(**{**SHAPE, "head_dim": 32, **more}),
    "qwen2": lambda **more: Qwen2Config(**{**SHAPE, **more}),
    "qwen3": lambda **more: Qwen3Config(**{**SHAPE, "head_dim": 32, **more}),
}
DIGITS = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)


def cut_by(regex):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def wrapped(tokenizer, **roles):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"bos_token": "<s>", "eos_token": "</s>", **roles}
    )


def types_of(path):
    """How many tensors a file has of each type."""
    return Counter(tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(path).tensors)


def compare(model, path, windows):
    """Mean KL(model || file) in nats, and the share of positions with the same likeliest token."""
    copy = read_back(path, model.config)
    with torch.inference_mode():
        pairs = [[m(tokens[None]).logits[0] for m in (model, copy)] for tokens in windows]
    ours, theirs = (torch.cat(logits).log_softmax(-1) for logits in zip(*pairs, strict=True))
    divergence = (ours.exp() * (ours - theirs)).sum(-1)
    return float(divergence.mean()), float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """What `llmctl tokenize` trains."""
    folder = tmp_path_factory.mktemp("own")
    save_tokenizer(train_tokenizer(sentences(600), "bpe", vocab_size=350), folder)
    return AutoTokenizer.from_pretrained(folder)


def byte_level(pre_tokenizer):
    """Byte-level BPE that puts nothing around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(600), trainer)
    return tokenizer


def sentencepiece(*, prefix="always", pieces=40):
    """BPE with byte fallback, merges as a conversion from SentencePiece lists them."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=60 + pieces, show_progress=False)
    trained.train_from_iterator(sentences(600), trainer)
    made = json.loads(trained.to_str())["model"]
    special = ["<unk>", "<s>", "</s>", *map("<0x{:02X}>".format, range(256))]
    vocab = {text: number for number, text in enumerate([*special, *made["vocab"]])}
    order = dict.fromkeys("".join(pair) for pair in made["merges"])
    merges = [
        (text[:cut], text[cut:])
        for text in order
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    if prefix == "normalizer":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return wrapped(tokenizer, unk_token="<unk>")


def make(kind, tokenizer, *, tied=False, more_rows=5, **more):
    """A model with weights large enough to matter, and rows that no token has."""
    rows = max(tokenizer.get_vocab().values()) + 1 + more_rows
    config = CONFIGS[kind](vocab_size=rows, tie_word_embeddings=tied, **more)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def fields(path):
    """The metadata of a file, by the gguf package's reader."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def window(model, length=64):
    draw = torch.Generator().manual_seed(7)
    return torch.randint(0, model.config.vocab_size, (length,), generator=draw)


def greedy(model, steps=16):
    tokens = window(model, 8)[None]
    with torch.inference_mode():
        for _ in range(steps):
            best = model(tokens).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, best], dim=1)
    return tokens


def most_lost(weight, kind):
    """The largest error that rounding to a type may make, element by element.

    Half a step: 2^-11 of a value in float16 and 2^-8 in bfloat16; in blocks of 32 a 254th of the
    largest with eight bits, an eighth with four (whose scale of 16 steps lacks the last). The scale
    is a float16 itself.
    """
    if kind in ("f16", "bf16"):
        return weight.abs() * 2.0 ** (-11 if kind == "f16" else -8) + 2.0**-25
    blocks = weight.reshape(-1, 32).abs().amax(1, keepdim=True)
    share = 0.5 / 127 + 2**-11 if kind == "q8_0" else 1 / 8 + 2**-11
    return (blocks * share).expand(-1, 32).reshape(weight.shape) + 2.0**-25


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_weights_read_back_lose_what_their_type_must_lose(tmp_path, own, architecture, tied, kind):
    model = make(architecture, own, tied=tied)
    written = write_gguf(model, own, tmp_path / "model.gguf", kind)
    file = tmp_path / "model.gguf"
    copy = read_back(file, model.config)
    found = dict(copy.named_parameters())
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, weight in model.named_parameters():
        output = name == "lm_head.weight" or (tied and "embed_tokens" in name)
        limit = most_lost(weight, "q8_0" if output and kind == "q4_0" else kind)
        if kind == "f32" or weight.dim() == 1:
            limit = torch.zeros_like(weight)
        assert ((weight - found[name]).abs() <= limit).all(), name
    mean_kl, top1 = compare(model, file, [window(model)])
    most = {"f32": 1e-12, "f16": 1e-5, "bf16": 1e-3, "q8_0": 1e-2, "q4_0": 1.0}
    assert mean_kl < most[kind]
    if kind in ("f32", "f16"):
        assert top1 == 1
        assert torch.equal(greedy(copy), greedy(model))
    matrices = 14 + 1 + (not tied)
    types = types_of(file)
    assert types.total() == len(found)
    assert types[kind] == (len(found) if kind == "f32" else matrices - (kind == "q4_0"))
    assert (written.kept, written.bytes) == ((), file.stat().st_size)


def test_widths_that_no_block_divides_stay_in_float16(tmp_path, own):
    model = make("llama", own, intermediate_size=172)
    names = tuple(f"model.layers.{layer}.mlp.down_proj" for layer in range(2))
    written = write_gguf(model, own, tmp_path / "a.gguf", "q8_0")
    assert (written.kept, types_of(tmp_path / "a.gguf")["f16"]) == (names, 2)
    also = write_gguf(model, own, tmp_path / "b.gguf", "q8_0", keep=["lm_head"])
    assert set(also.kept) == {*names, "lm_head"}
    weight = read_back(tmp_path / "b.gguf", model.config).lm_head.weight
    assert torch.equal(weight, model.lm_head.weight.half().float())


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"mlp_bias": True}])
def test_biases_are_written(tmp_path, own, biases):
    model = make("llama", own, **biases)
    write_gguf(model, own, tmp_path / "model.gguf", "f32")
    assert compare(model, tmp_path / "model.gguf", [window(model)])[0] < 1e-12


def test_what_the_file_says_of_a_model(tmp_path, own):
    model = make(
        "qwen3", own, rms_norm_eps=3e-5, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    (tmp_path / "base/model").mkdir(parents=True)
    (tmp_path / "base/model/README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    model.config.name_or_path = str(tmp_path / "base/model")
    write_gguf(model, own, tmp_path / "model.gguf", "q8_0")
    found = fields(tmp_path / "model.gguf")
    expected = {
        "general.architecture": "qwen3",
        "general.name": "base",
        "general.license": "mit",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "qwen3.block_count": 2,
        "qwen3.context_length": 128,
        "qwen3.embedding_length": 64,
        "qwen3.feed_forward_length": 96,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 32,
        "qwen3.attention.value_length": 32,
        "qwen3.attention.layer_norm_rms_epsilon": pytest.approx(3e-5),
        "qwen3.rope.freq_base": 5e5,
        "qwen3.vocab_size": 355,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.bos_token_id": own.bos_token_id,
        "tokenizer.ggml.eos_token_id": own.eos_token_id,
        "tokenizer.ggml.padding_token_id": own.pad_token_id,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": own.chat_template,
    }
    assert {name: found[name] for name in expected} == expected
    assert "qwen3.rope.scaling.type" not in found
    texts, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert texts[:3] == ["<|bos|>", "<|eos|>", "<|pad|>"]
    assert texts[350:] == [f"[PAD{row}]" for row in range(350, 355)]
    assert types == [3] * 5 + [1] * 345 + [5] * 5
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert {"blk.1.attn_q_norm.weight", "output.weight", "token_embd.weight"} <= names


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
            {"type": "yarn", "factor": 2.0, "original_context_length": 64},
        ),
        (
            {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 16.0,
            },
            {"type": "yarn", "original_context_length": 64, "yarn_beta_fast": 16.0},
        ),
    ],
    ids=["linear", "yarn", "yarn-beta"],
)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_scaled_positions(tmp_path, own, architecture, rope, expected):
    model = make(architecture, own, rope_parameters={"rope_theta": 1e4, **rope})
    write_gguf(model, own, tmp_path / "model.gguf", "f32")
    found = fields(tmp_path / "model.gguf")
    assert {n: found[f"{architecture}.rope.scaling.{n}"] for n in expected} == expected
    assert compare(model, tmp_path / "model.gguf", [window(model)])[0] < 1e-12


def test_positions_scaled_as_llama_3_does(tmp_path, own):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = make("llama", own, rope_parameters=rope)
    write_gguf(model, own, tmp_path / "model.gguf", "q8_0")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    factors = next(t for t in reader.tensors if t.name == "rope_freqs.weight")
    expected = []  # Llama 3.1's published rule, in plain floats
    for pair in range(16):
        frequency = 500.0 ** (-2 * pair / 32)
        wavelength = 2 * math.pi / frequency
        share = (32 / wavelength - 1) / (4 - 1)
        if wavelength > 32 / 1:
            scaled = frequency / 8
        elif wavelength < 32 / 4:
            scaled = frequency
        else:
            scaled = (1 - share) * frequency / 8 + share * frequency
        expected.append(frequency / scaled)
    assert {1.0, 8.0} < {round(factor, 6) for factor in expected}
    assert factors.data.dtype == np.float32
    np.testing.assert_allclose(factors.data, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "more", "length"),
    [
        ("mistral", {"sliding_window": 48}, 48),
        ("mistral", {"sliding_window": None}, 128),
        ("mistral", {"sliding_window": 4096}, 128),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
            40,
        ),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 40}, 128),
    ],
)
def test_the_context_ends_where_a_window_would_slide(tmp_path, own, architecture, more, length):
    model = make(architecture, own, **more)
    write_gguf(model, own, tmp_path / "model.gguf", "f32")
    name = {"mistral": "llama"}.get(architecture, architecture)
    assert fields(tmp_path / "model.gguf")[f"{name}.context_length"] == length
    assert compare(model, tmp_path / "model.gguf", [window(model, length)])[0] < 1e-12


def read_tokenizer(tokenizer, tmp_path):
    """The tokenizer that transformers makes of a file, and the file's facts."""
    model = make("llama", tokenizer, num_hidden_layers=1)
    write_gguf(model, tokenizer, tmp_path / "model.gguf", "f16")
    return AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf"), fields(
        tmp_path / "model.gguf"
    )


@pytest.mark.parametrize(
    ("cut", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (cut_by(QWEN2), "qwen2"),
        (DIGITS, "smollm"),
    ],
    ids=["gpt-2", "qwen2", "smollm"],
)
def test_byte_level_tokens(tmp_path, cut, name):
    tokenizer = wrapped(byte_level(cut))
    copy, found = read_tokenizer(tokenizer, tmp_path)
    assert found["tokenizer.ggml.pre"] == name
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (
        False,
        False,
    )
    texts = [text for text in TEXTS if name != "smollm" or not any(map(str.isdigit, text))]
    for text in texts:  # transformers reads smollm's files as GPT-2's, which keeps digits together
        assert copy(text)["input_ids"] == tokenizer(text)["input_ids"], text


def test_tokens_that_llmctl_trains(tmp_path, own):
    copy, _ = read_tokenizer(own, tmp_path)
    for text in TEXTS:
        assert copy(text)["input_ids"] == own(text)["input_ids"], text
    assert copy.chat_template == own.chat_template
    assert (copy.eos_token, copy.bos_token, copy.pad_token) == ("<|eos|>", "<|bos|>", "<|pad|>")


def by_scores(text, found):
    """SentencePiece's way with a text: join the neighbours whose token has the best score."""
    texts = found["tokenizer.ggml.tokens"]
    scores = dict(zip(texts, found["tokenizer.ggml.scores"], strict=True))
    ids = {text: number for number, text in enumerate(texts)}
    prefix = " " if text and found["tokenizer.ggml.add_space_prefix"] else ""
    symbols = list((prefix + text).replace(" ", "▁"))
    while True:
        joined = [symbols[i] + symbols[i + 1] for i in range(len(symbols) - 1)]
        able = [(-scores[token], i) for i, token in enumerate(joined) if token in ids]
        if not able:
            break
        _, best = min(able)
        symbols[best : best + 2] = [joined[best]]
    tokens = [found["tokenizer.ggml.bos_token_id"]] * found["tokenizer.ggml.add_bos_token"]
    for symbol in symbols:
        spelled = [symbol] if symbol in ids else map("<0x{:02X}>".format, symbol.encode())
        tokens += [ids[token] for token in spelled]
    return tokens


@pytest.mark.parametrize("prefix", ["normalizer", "always", "first", "never"])
def test_tokens_with_byte_fallback(tmp_path, prefix, caplog):
    tokenizer = sentencepiece(prefix=prefix)
    copy, found = read_tokenizer(tokenizer, tmp_path)
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] == (prefix != "never")
    assert found["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 6, 6]
    assert len(set(found["tokenizer.ggml.scores"])) > 30
    for text in [*sentences(20, seed=9), *TEXTS, "thethe  re ed seseses"]:
        ids = tokenizer(text)["input_ids"]
        if "</s>" in text:  # a special token's text is that token to transformers
            continue
        if prefix in ("normalizer", "never") or not text.startswith(" "):
            assert by_scores(text, found) == ids, text
        if prefix == "always" or (prefix != "never" and not text.startswith(" ")):
            assert copy(text)["input_ids"] == ids, text  # transformers knows that prefix alone
    warned = "llama.cpp may cut text that begins with a space" in caplog.text
    assert warned == (prefix in ("always", "first"))


def test_added_tokens_have_their_types(tmp_path):
    tokenizer = sentencepiece()
    tokenizer.add_tokens(["▁word"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>"]})
    _, found = read_tokenizer(tokenizer, tmp_path)
    last = max(tokenizer.get_vocab().values())
    assert found["tokenizer.ggml.tokens"][last - 1 : last + 2] == [
        " word",
        "<|turn|>",
        f"[PAD{last + 1}]",
    ]
    assert found["tokenizer.ggml.token_type"][last - 1 : last + 2] == [4, 3, 5]


def test_several_chat_templates(tmp_path):
    tokenizer = sentencepiece()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    _, found = read_tokenizer(tokenizer, tmp_path)
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    assert found["tokenizer.chat_template.tool_use"] == "{{ tools }}"


def test_tokens_that_end_a_turn(tmp_path, own):
    model = make("llama", own)
    turn = own.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = [own.eos_token_id, turn]
    write_gguf(model, own, tmp_path / "model.gguf", "f16")
    found = fields(tmp_path / "model.gguf")
    assert found["tokenizer.ggml.eot_token_id"] == turn
    assert "tokenizer.ggml.eom_token_id" not in found


def test_the_same_bytes_again(tmp_path, own):
    for name in ("a", "b"):
        write_gguf(make("llama", own), own, tmp_path / f"{name}.gguf", "q4_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def refused(config, tokenizer):
    with pytest.raises(ModelError) as caught:
        check_gguf(config, tokenizer)
    assert caught.value.code == 4
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (GPT2Config(), "architecture gpt2\nthose that can: llama, mistral, qwen2, qwen3"),
        (CONFIGS["llama"](hidden_act="gelu"), "hidden_act gelu"),
        (CONFIGS["qwen3"](attention_bias=True), "attention_bias"),
        (CONFIGS["llama"](quantization_config={"load_in_8bit": True}), "quantized already"),
        (
            CONFIGS["llama"](
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
            ),
            "type dynamic",
        ),
        (
            CONFIGS["qwen2"](
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            ),
            "type llama3 in qwen2",
        ),
        (
            CONFIGS["llama"](
                rope_parameters={
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "original_max_position_embeddings": 64,
                    "attention_factor": 3.0,
                }
            ),
            "attention_factor 3.0",
        ),
        (CONFIGS["llama"](vocab_size=349), "has token 349, the model 349 rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_that_cannot_be_written(own, config, says):
    assert says in refused(config, own)


@pytest.mark.parametrize("algorithm", ["char", "byte", "unigram", "wordpiece"])
def test_tokenizers_of_llmctl_that_llama_cpp_does_not_know(tmp_path, algorithm):
    size = {"unigram": 330, "wordpiece": 130}.get(algorithm)
    save_tokenizer(train_tokenizer(sentences(300), algorithm, vocab_size=size), tmp_path)
    message = refused(CONFIGS["llama"](), AutoTokenizer.from_pretrained(tmp_path))
    kind = {"char": "WordLevel tokens", "byte": "bytes without merges"}
    assert kind.get(algorithm, f"{algorithm.title().replace('piece', 'Piece')} tokens") in message
    assert "byte-level BPE" in message


def changed(tokenizer, change):
    form = json.loads(tokenizer.backend_tokenizer.to_str())
    change(form)
    return wrapped(Tokenizer.from_str(json.dumps(form)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.update(normalizer={"type": "Lowercase"}), "normalized by Lowercase"),
        (lambda f: f["pre_tokenizer"].update(add_prefix_space=True), "cut into words by"),
        (lambda f: f.update(pre_tokenizer={"type": "Whitespace"}), '{"type": "Whitespace"}'),
        (lambda f: f.update(pre_tokenizer=None), "not cut into words"),
        (lambda f: f["added_tokens"][0].update(rstrip=True), "<s> with rstrip"),
        (
            lambda f: (f["model"]["vocab"].update(qqq=400), f["model"].update(ignore_merges=True)),
            "'qqq'",
        ),
        (lambda f: f["model"].update(end_of_word_suffix="</w>"), "prefix or suffix"),
        (
            lambda f: f.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [
                        {"Sequence": {"id": "A", "type_id": 0}},
                        {"SpecialToken": {"id": "<s>", "type_id": 0}},
                    ],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
                }
            ),
            "put around a text",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_byte_level_tokenizers_that_llama_cpp_would_run_otherwise(change, says):
    tokenizer = wrapped(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)))
    assert says in refused(CONFIGS["llama"](), changed(tokenizer, change))


def tear(form):
    """Give one of two pairs that make the same token another rank."""
    merges = form["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    first = next(i for i in range(len(made) - 1) if made[i] == made[i + 1])
    merges.append(merges.pop(first))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f["model"]["vocab"].pop("<0x0A>"), "without a token <0x0A>"),
        (lambda f: f["model"]["merges"].pop(), "not all of its parts are merged"),
        (tear, "different ranks"),
        (lambda f: f.update(normalizer={"type": "NFKC"}), "other normalizers"),
        (lambda f: f["model"].update(ignore_merges=True), "ignore_merges"),
    ],
    ids=["bytes", "merges", "ranks", "normalizer", "whole"],
)
def test_tokenizers_with_byte_fallback_that_llama_cpp_would_run_otherwise(change, says):
    tokenizer = changed(sentencepiece(), change)
    assert says in refused(CONFIGS["llama"](), tokenizer)


def test_the_extra_is_named_where_it_is_missing(monkeypatch, own):
    monkeypatch.setattr("llmctl.errors.find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r'pip install "llmctl\[gguf\]"'):
        check_gguf(CONFIGS["llama"](), own)


def test_a_failure_leaves_the_file_as_it_was(tmp_path, own):
    model = make("llama", own)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"earlier")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(ModelError, match=r"float16 holds: model\.layers\.1\.mlp\.up_proj\.weight"):
        write_gguf(model, own, path, "f16")
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]
    assert path.read_bytes() == b"earlier"
    write_gguf(model, own, path, "bf16")
    assert compare(model, path, [window(model)])[0] < 1e-3


def test_a_model_that_llmctl_pretrains(tmp_path, base):
    model = AutoModelForCausalLM.from_pretrained(base / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    file = tmp_path / "base.gguf"
    write_gguf(model, tokenizer, file, "q8_0")
    text = " ".join(sentences(40, seed=5))
    copy = AutoTokenizer.from_pretrained(tmp_path, gguf_file="base.gguf")
    ids = copy(text)["input_ids"]
    assert ids == tokenizer(text)["input_ids"]
    windows = [torch.tensor(ids[start : start + 32]) for start in range(0, 128, 32)]
    assert compare(model, file, windows)[1] > 0.97
    assert fields(file)["general.name"] == "base"


@pytest.fixture
def llama(monkeypatch):
    """Open a file with llama.cpp: `llama(path)`; where that is not installed there is no test."""
    library = pytest.importorskip("llama_cpp").llama_cpp
    default = library.llama_model_default_params

    def without_repacking():
        parameters = default()
        parameters.use_extra_bufts = False  # AMX kernels die where a sandbox forbids them
        return parameters

    monkeypatch.setattr(library, "llama_model_default_params", without_repacking)
    opened = []

    def load(path):
        from llama_cpp import Llama

        opened.append(Llama(str(path), n_ctx=256, logits_all=True, n_threads=1, verbose=False))
        return opened[-1]

    yield load
    for model in opened:
        model.close()


def logits_of(llama, tokens):
    llama.reset()
    llama.eval(tokens.tolist())
    return torch.tensor(llama.scores[: len(tokens)])


ROPES = {
    "plain": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize(
    ("architecture", "rope"),
    [
        (architecture, rope)
        for architecture in CONFIGS
        for rope in ROPES
        if rope != "llama3" or not architecture.startswith("qwen")
    ],
)
def test_llama_cpp_computes_the_same(tmp_path, own, llama, architecture, rope):
    positions = {"rope_theta": 500.0, **ROPES[rope]}
    model = make(architecture, own, tied=rope == "linear", rope_parameters=positions)
    write_gguf(model, own, tmp_path / "model.gguf", "f32")
    opened = llama(tmp_path / "model.gguf")
    tokens = window(model, 128)
    with torch.inference_mode():
        expected = model(tokens[None]).logits[0]
    found = logits_of(opened, tokens)
    assert (found - expected).norm() / expected.norm() < 2e-3
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.98
    opened.reset()
    made = opened.generate(window(model, 8).tolist(), temp=0.0, top_k=1, repeat_penalty=1.0)
    assert [next(made) for _ in range(16)] == greedy(model)[0, 8:].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_reads_every_type(tmp_path, own, llama, kind):
    model = make("llama", own, intermediate_size=172)
    write_gguf(model, own, tmp_path / "model.gguf", kind)
    tokens = window(model, 64)
    with torch.inference_mode():
        expected = read_back(tmp_path / "model.gguf", model.config)(tokens[None]).logits[0]
    found = logits_of(llama(tmp_path / "model.gguf"), tokens)
    assert (found - expected).norm() / expected.norm() < 0.05  # it rounds activations too


@pytest.mark.parametrize("name", ["own", "gpt-2", "qwen2", "smollm", "normalizer", "never"])
def test_llama_cpp_finds_the_same_tokens(tmp_path, own, llama, name):
    cuts = {"gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False), "smollm": DIGITS}
    if name == "own":
        tokenizer = own
    elif name in ("normalizer", "never"):
        tokenizer = sentencepiece(prefix=name)
    else:
        tokenizer = wrapped(byte_level(cuts.get(name) or cut_by(QWEN2)))
    model = make("llama", tokenizer, num_hidden_layers=1)
    write_gguf(model, tokenizer, tmp_path / "model.gguf", "f16")
    opened = llama(tmp_path / "model.gguf")
    assert opened.token_eos() == tokenizer.eos_token_id
    for text in [*sentences(20, seed=9), *TEXTS]:
        ids = tokenizer(text)["input_ids"]
        assert opened.tokenize(text.encode(), add_bos=True, special=True) == ids, text
