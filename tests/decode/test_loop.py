"""The decode loop against transformers' own generate, against definitions, and against itself."""

from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmctl.config.sections import Sampling
from llmctl.decode.forward import HuggingFaceForward
from llmctl.decode.llama import LlamaForward, LlamaWeights, fast_forward, is_covered
from llmctl.decode.loop import Prompt, Response, choose_forward, decode
from llmctl.decode.sampling import draw, penalize, truncate, uniform_stream
from llmctl.decode.text import TextStream
from llmctl.errors import DataError, ModelError
from llmctl.models.loading import stop_tokens

VOCABULARY = 259
EOS = 1
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": 2,
}
GPT2_SIZES = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128}
BUILDERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    "window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
    "biased": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, mlp_bias=True)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**GPT2_SIZES, initializer_range=0.4, bos_token_id=0, eos_token_id=EOS)
    ),
}
FAST = ("llama", "mistral", "qwen2", "qwen3")
GREEDY = Sampling(greedy=True, max_new_tokens=24)
PROMPTS = [[0, 7, 8], [0], [0, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39], [0, 200], [0, 7, 8], [9]]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(3)
    model = BUILDERS[name]().eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms and biases: not the identity, so that they count
            torch.nn.init.normal_(parameter, 0.0 if "bias" in parameter_name else 1.0, 0.3)
    return model


@pytest.fixture(scope="module", params=BUILDERS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(request.param)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Bytes as tokens: 0 BOS, 1 EOS, 2 padding, and the bytes from 3 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "</s>", "<pad>", *alphabet]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def run(
    model: PreTrainedModel,
    prompts: list[list[int]],
    sampling: Sampling,
    eos: tuple[int, ...] = (EOS,),
    **options: object,
) -> list[Response]:
    asked = [Prompt(tokens, row) for row, tokens in enumerate(prompts)]
    responses = list(decode(model, asked, sampling, eos=eos, **options))
    assert sorted(r.index for r in responses) == list(range(len(prompts)))
    return sorted(responses, key=lambda response: response.index)


def reference(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    tokens = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=count,
    )
    return tokens[0, len(prompt) :].tolist()


# Greedy decoding


def test_greedy_is_generate_alone_and_in_a_batch(model: PreTrainedModel) -> None:
    expected = [reference(model, prompt, 24) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) > 3  # they differ: the test can fail
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert run(model, [prompt], GREEDY)[0].tokens == tokens
    assert [r.tokens for r in run(model, PROMPTS, GREEDY)] == expected


@pytest.mark.parametrize("name", BUILDERS)
def test_the_fast_pass_is_taken_where_it_covers_the_model(name: str) -> None:
    model = build(name)
    assert is_covered(model) == (name in FAST)
    assert (fast_forward(model, [0, 5]) is not None) == (name in FAST)


@pytest.mark.parametrize("name", FAST)
def test_fast_logits_are_transformers_logits(name: str) -> None:
    model = build(name)
    fast, slow = LlamaForward(LlamaWeights.of_model(model)), HuggingFaceForward(model)
    with torch.inference_mode():
        for forward in (fast, slow):
            forward.logits = [forward.prefill([[3, 4, 5, 6, 7], [8, 9], [10, 11, 12]])]
            forward.select([0, 2])
            forward.logits += [forward.step(torch.tensor([20, 21])) for _ in range(3)]
            forward.select([1])
            forward.logits += [forward.step(torch.tensor([22])) for _ in range(70)]
    for ours, theirs in zip(fast.logits, slow.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_wrong_fast_pass_is_not_used(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = reference(llama, [0, 7, 8], 24)
    rotate = LlamaForward._rotate
    monkeypatch.setattr(
        LlamaForward, "_rotate", lambda self, h, n, turns: rotate(self, h, n, turns.conj())
    )
    assert isinstance(choose_forward(llama, [0, 7, 8]), HuggingFaceForward)
    assert run(llama, [[0, 7, 8]], GREEDY)[0].tokens == expected


def test_low_precision_takes_the_fast_pass() -> None:
    model = build("qwen3").to(torch.bfloat16)
    assert fast_forward(model, [0, 5]) is not None
    assert len(run(model, [[0, 5]], GREEDY, eos=())[0].tokens) == 24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAST)
def test_low_precision_is_no_further_from_float32_than_transformers(
    name: str, dtype: torch.dtype
) -> None:
    """By the KL of next tokens: prompts of several lengths, steps, and rows that leave."""
    exact, rounded = build(name), build(name).to(dtype)
    forwards = {
        "exact": HuggingFaceForward(exact),
        "theirs": HuggingFaceForward(rounded),
        "ours": LlamaForward(LlamaWeights.of_model(rounded)),
    }
    found: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for side, forward in forwards.items():
            logits = [forward.prefill([[3, 4, 5, 6, 7], [8, 9], [10, 11, 12]])]
            logits += [forward.step(torch.tensor([20, 21, 22])) for _ in range(20)]
            forward.select([1])
            logits += [forward.step(torch.tensor([22])) for _ in range(20)]
            found[side] = torch.cat(logits).double().log_softmax(1)
    apart = {
        side: float((found["exact"].exp() * (found["exact"] - found[side])).sum(1).mean())
        for side in ("theirs", "ours")
    }
    assert 0 < apart["ours"] <= 1.05 * apart["theirs"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT's generate
@pytest.mark.parametrize("kind", ["lora", "prompt"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_write_what_peft_generates(name: str, kind: str) -> None:
    peft = pytest.importorskip("peft")
    config = {
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }[kind]()
    model = peft.get_peft_model(build(name), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    for prompt, response in zip(PROMPTS, run(model, PROMPTS, GREEDY), strict=True):
        expected = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=24,
            pad_token_id=2,
        )[0].tolist()
        assert response.tokens == expected[len(prompt) :]


# Batches


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(max_new_tokens=24, temperature=1.0),
        Sampling(max_new_tokens=24, greedy=True, repetition_penalty=1.8),
    ],
)
def test_a_batch_is_its_rows_alone(name: str, sampling: Sampling) -> None:
    model = build(name)
    eos = (EOS, *range(100, 130))  # about one token in eight, so that rows leave at all times
    prompts = PROMPTS * 2
    together = run(model, prompts, sampling, eos, seed=5)
    assert len({len(response.tokens) for response in together}) >= 3
    for size in (1, 2, 5):
        assert run(model, prompts, sampling, eos, seed=5, batch_size=size) == together
    asked = [Prompt(tokens, row) for row, tokens in enumerate(prompts)]
    alone = [next(decode(model, [prompt], sampling, eos=eos, seed=5)).tokens for prompt in asked]
    assert alone == [response.tokens for response in together]


def test_the_seed_and_the_row_make_the_text(llama: PreTrainedModel) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=1.0, top_p=1.0)
    first = run(llama, [[0, 7]] * 3, sampling, seed=1)
    assert run(llama, [[0, 7]] * 3, sampling, seed=1) == first
    assert run(llama, [[0, 7]] * 3, sampling, seed=2) != first
    assert len({tuple(response.tokens) for response in first}) == 3


def test_equal_prompts_are_read_once(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    prefill = LlamaForward.prefill
    forward = LlamaForward(LlamaWeights.of_model(llama))
    monkeypatch.setattr(
        LlamaForward, "prefill", lambda self, p: read.append(len(p)) or prefill(self, p)
    )
    run(llama, [[0, 7]] * 4 + [[0, 8]], GREEDY, forward=forward)
    assert read == [2]


# Ends


def test_every_eos_token_ends_a_response(llama: PreTrainedModel) -> None:
    tokens = reference(llama, [0, 7, 8], 24)
    for eos in (tokens[3], tokens[9]):
        response = run(llama, [[0, 7, 8]], GREEDY, (EOS, eos))[0]
        assert response.tokens == tokens[: tokens.index(eos) + 1]
        assert response.finish_reason == "eos"
    assert run(llama, [[0, 7, 8]], GREEDY, ())[0].finish_reason == "length"


def test_stop_tokens_are_the_configured_ones(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert stop_tokens(llama, tokenizer) == [1]
    llama.generation_config.eos_token_id = [5, 6]
    assert stop_tokens(llama, tokenizer) == [1, 5, 6]
    llama.generation_config.eos_token_id = EOS


def test_a_full_context_ends_a_response(llama: PreTrainedModel) -> None:
    response = run(llama, [[5] * 120], GREEDY, ())[0]
    assert (len(response.tokens), response.finish_reason) == (8, "length")
    with pytest.raises(DataError, match="prompt 2 has 128 tokens, the model's context 128"):
        run(llama, [[5], [5] * 128], GREEDY)


def test_a_token_the_model_lacks_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="token 259, the model's vocabulary only 259"):
        run(llama, [[259]], GREEDY)


def test_stop_strings_end_the_text(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = run(llama, [[0, 70, 71]], GREEDY, (), tokenizer=tokenizer)[0]
    place = next(i for i in range(3, 20) if whole.text[i : i + 3].isprintable())
    stop = whole.text[place : place + 3]  # three tokens
    said: list[str] = []
    response = run(
        llama,
        [[0, 70, 71]],
        Sampling(greedy=True, max_new_tokens=24, stop=["never", stop]),
        (),
        tokenizer=tokenizer,
        on_text=lambda _, piece: said.append(piece),
    )[0]
    assert response.finish_reason == "stop"
    assert response.text == whole.text[: whole.text.index(stop)] == "".join(said)
    assert len(response.tokens) < len(whole.tokens)


# Sampling


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, top_p=1.0),
        Sampling(temperature=1.3, top_p=0.6),
        Sampling(temperature=1.0, top_p=1.0, top_k=5),
        Sampling(temperature=1.0, top_p=0.8, top_k=9),
        Sampling(temperature=1.0, top_p=1.0, min_p=0.2),
        Sampling(temperature=0.9, top_p=0.9, top_k=20, min_p=0.05, repetition_penalty=1.4),
        Sampling(temperature=1.0, top_p=1.0, repetition_penalty=1.4),
        Sampling(temperature=0.9, top_p=0.001),
        Sampling(temperature=0.9, top_k=1000),
    ],
)
def test_truncation_is_that_of_transformers(sampling: Sampling) -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(16, 60) * 2, torch.randint(0, 60, (16, 12))
    chain = LogitsProcessorList()
    chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    chain.append(TopPLogitsWarper(sampling.top_p))
    chain.append(MinPLogitsWarper(sampling.min_p))
    expected = chain(tokens, logits.clone()).softmax(-1)
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, tokens, True)
    penalized = penalize(logits, seen, sampling.repetition_penalty)
    weights = truncate((penalized / sampling.temperature).softmax(-1), sampling)
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), expected)


def test_draws_follow_the_weights() -> None:
    weights = torch.tensor([[0.0, 0.1, 0.0, 0.5, 0.2, 0.0]])
    drawn = (
        draw(weights.expand(40_000, -1), uniform_stream(0, 0, 40_000)).bincount(minlength=6)
        / 40_000
    )
    torch.testing.assert_close(drawn, weights[0] / 0.8, atol=0.01, rtol=0)
    assert drawn[[0, 2, 5]].sum() == 0
    edge = torch.tensor([0.0, 1 - 2**-24])
    assert draw(weights.expand(2, -1), edge).tolist() == [1, 4]


def test_samples_follow_the_model(llama: PreTrainedModel) -> None:
    sampling = Sampling(temperature=1.5, top_p=1.0, max_new_tokens=1)
    responses = run(llama, [[0, 7]] * 3000, sampling, batch_size=1000)
    counts = torch.tensor([r.tokens[0] for r in responses]).bincount(minlength=VOCABULARY)
    with torch.no_grad():
        expected = (llama(torch.tensor([[0, 7]])).logits[0, -1] / 1.5).softmax(-1)
    assert (counts / 3000 - expected).abs().max() < 0.03


def test_log_probs_are_those_of_the_tempered_model(llama: PreTrainedModel) -> None:
    sampling = Sampling(temperature=0.7, top_k=3, top_p=0.9, max_new_tokens=20)
    responses = run(llama, PROMPTS, sampling, (EOS, *range(100, 130)), log_probs=True)
    for prompt, response in zip(PROMPTS, responses, strict=True):
        with torch.no_grad():
            logits = llama(torch.tensor([prompt + response.tokens])).logits[0]
        scores = (logits[len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        expected = scores.gather(1, torch.tensor(response.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(response.log_probs), expected, atol=1e-4, rtol=0)


def test_zero_temperature_is_greedy(llama: PreTrainedModel) -> None:
    cold = Sampling(temperature=0.0, max_new_tokens=24)
    assert run(llama, PROMPTS, cold) == run(llama, PROMPTS, GREEDY)


def test_the_repetition_penalty_is_generates(llama: PreTrainedModel) -> None:
    sampling = Sampling(greedy=True, max_new_tokens=24, repetition_penalty=1.8)
    for prompt, response in zip(PROMPTS, run(llama, PROMPTS, sampling), strict=True):
        expected = llama.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=24, repetition_penalty=1.8
        )
        assert response.tokens == expected[0, len(prompt) :].tolist()


# Text


def pieces(stream: TextStream, tokens: list[int]) -> Iterator[str]:
    for token in tokens:
        yield stream.feed([token])
    yield stream.finish()


def test_characters_are_never_broken(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Grüße, 世界! 👩‍👩‍👧 ünï" * 5
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) == len(text.encode())
    said = list(pieces(TextStream(tokenizer, [0]), tokens))
    assert "".join(said) == text
    assert not any("\ufffd" in piece for piece in said)
    cut = list(pieces(TextStream(tokenizer, [0]), tokenizer("naïve 世")["input_ids"][:-1]))
    assert "".join(cut) == "naïve "
    assert TextStream(tokenizer, [0]).feed(tokens) == text


def test_text_is_held_while_it_may_be_a_stop(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer("one \nUse \nUser: two")["input_ids"]
    stream = TextStream(tokenizer, [0], ["\nUser:", "zzz"])
    said = [stream.feed([token]) for token in tokens]
    assert "".join(said) == "one \nUse "
    assert said[4:8] == ["", "", "", ""]  # "\nUse" may begin the stop string
    assert stream.stopped
    other = TextStream(tokenizer, [0], ["\nUser:"])
    assert "".join(pieces(other, tokenizer("a\nUs")["input_ids"])) == "a\nUs"


def test_streamed_text_is_the_whole_text(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    said: dict[int, str] = dict.fromkeys(range(len(PROMPTS)), "")

    def hear(index: int, piece: str) -> None:
        said[index] += piece

    sampling = Sampling(max_new_tokens=60, temperature=1.0)
    streamed = run(llama, PROMPTS, sampling, tokenizer=tokenizer, on_text=hear)
    whole = run(llama, PROMPTS, sampling, tokenizer=tokenizer)
    assert [r.text for r in whole] == [r.text for r in streamed] == list(said.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_writes_the_same(llama: PreTrainedModel) -> None:
    expected = [r.tokens for r in run(llama, PROMPTS, GREEDY)]
    model = build("llama").cuda()
    assert [r.tokens for r in run(model, PROMPTS, GREEDY)] == expected
    assert [
        r.tokens for r in run(model, PROMPTS, GREEDY, forward=HuggingFaceForward(model))
    ] == expected
