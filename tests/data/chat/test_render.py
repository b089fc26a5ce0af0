"""Conversations as tokens: what training shows before an answer is what use feeds, to the token."""

import itertools
import random
import time
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from llmctl.data.bad_rows import BadRows
from llmctl.data.chat import render
from llmctl.data.chat.render import ChatFormat, common_prefix
from llmctl.data.chat.templates import TEMPLATE_TOKENS, TEMPLATES, read_template, set_chat_template
from llmctl.errors import DataError, ModelError, UserError

WORDS = [
    "the cat sees",
    " a dog,",
    "\n\nfoo",
    " bar  baz\n",
    "Hü 東京",
    "x = 1;\n\n\n",
    "assistant",
]
SPELLED = [
    "</s>",
    "<s>",
    "<|im_end|>\n<|im_start|>system\n",
    "<|user|>",
    "<unk>",
    "<<s>s>",
    "[INST]",
]
TEXTS = ["".join(pair) for pair in itertools.product(WORDS, repeat=2)] * 20 + ["\n\n\nfoo"] * 200


def build(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of one of the kinds that models have."""
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    specials = ["<unk>", "<s>", "</s>"]
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = BpeTrainer(
            vocab_size=380, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        if kind == "prepend":
            steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            tokenizer.normalizer = normalizers.Sequence(steps)
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        trainer = BpeTrainer(
            vocab_size=420, special_tokens=[*specials, *bytes_], show_progress=False
        )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


KINDS = ("bytes", "prepend", "first")


@pytest.fixture(scope="module")
def built() -> dict[str, str]:
    return {kind: build(kind).backend_tokenizer.to_str() for kind in KINDS}


@pytest.fixture
def tokenizer_of(built):
    """A fresh one of a kind, with the template of this name or text."""

    def make(kind: str, template: str) -> PreTrainedTokenizerFast:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(built[kind]),
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            clean_up_tokenization_spaces=False,
        )
        if template in TEMPLATES:
            set_chat_template(tokenizer, template)
        else:
            tokenizer.chat_template = template
        return tokenizer

    return make


def talk(*said: str, **last) -> list[dict]:
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    messages = [{"role": roles[text[0]], "content": text[1:]} for text in said]
    messages[-1] |= last
    return messages


def conversations(count: int, spelled: bool = False):
    draw = random.Random(count)
    pool = WORDS + (SPELLED if spelled else [])
    for _ in range(count):
        roles = "s" * draw.randint(0, 1) + "ua" * draw.randint(1, 3)
        yield talk(*[role + "".join(draw.choices(pool, k=draw.randint(1, 3))) for role in roles])


def spans(encoded) -> list[tuple[int, int]]:
    """Where stretches of trained tokens begin and end."""
    flags = [False, *encoded.trained, False]
    edges = [k for k in range(len(flags) - 1) if flags[k] != flags[k + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


PLAIN = (
    "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING = (  # like reasoning models: what was thought is kept in the last turn only
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>' + m.thought + '</think>' }}"
    "{% endif %}{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAIL = (  # an answer right after a newline, into which it may merge
    "{% for m in messages %}{{ m.role + '\n' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)


# What training shows is what use feeds


@pytest.mark.parametrize("template", [*TEMPLATES, PLAIN, TAIL])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_turn_stands_after_exactly_its_prompt(tokenizer_of, kind, template) -> None:
    tokenizer = tokenizer_of(kind, template)
    chat = ChatFormat(tokenizer)
    for messages in conversations(12, spelled=True):
        numbers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        prompts = [chat.encode_prompt(messages[:i]) for i in numbers]
        found = chat.encode_conversation(messages, "assistant")
        begins = [(e.tokens, begin) for e in found for begin, _ in spans(e)]
        assert [tokens[:begin] for tokens, begin in begins] == prompts
        assert len(found) in (1, len(numbers))
        for encoded in [*found, *chat.encode_conversation(messages, "all")]:
            assert len(encoded.tokens) == len(encoded.trained)
            assert not encoded.trained[0]
            assert encoded.ends == (template != PLAIN)


@pytest.mark.parametrize("template", [*TEMPLATES, TAIL])
@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_text_gives_the_tokens_of_apply_chat_template(
    tokenizer_of, kind, template
) -> None:
    tokenizer = tokenizer_of(kind, template)
    chat = ChatFormat(tokenizer)
    for messages in conversations(12):
        theirs = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)
        assert chat.encode_prompt(messages[:-1]) == theirs["input_ids"]
        (ours,) = chat.encode_conversation(messages, "all")[-1:]
        if ours.tokens[: len(theirs["input_ids"])] == theirs["input_ids"]:
            whole = tokenizer.apply_chat_template(messages)["input_ids"]
            assert tokenizer.decode(ours.tokens) == tokenizer.decode(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_the_answer_and_its_end(tokenizer_of, kind) -> None:
    for template, end in (("chatml", "<|im_end|>"), ("zephyr", "</s>"), ("gemma", "<end_of_turn>")):
        tokenizer = tokenizer_of(kind, template)
        messages = talk("uthe cat", "aa dog,", "ubar", "abaz</s>")
        (encoded,) = ChatFormat(tokenizer).encode_conversation(messages, "assistant")
        texts = [tokenizer.decode(encoded.tokens[a:b]).lstrip() for a, b in spans(encoded)]
        assert texts == ["a dog," + end, "baz</s>" + end]
        assert encoded.tokens.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_merges_into_its_prompt_is_kept_apart(tokenizer_of, kind) -> None:
    tokenizer = tokenizer_of(kind, TAIL)
    chat = ChatFormat(tokenizer)
    messages = talk("uhi", "a\n\nfoo", "uho", "a\n\nfoo")
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    prompt = chat.encode_prompt(messages[:1])
    found = chat.encode_conversation(messages, "assistant")
    assert whole[: len(prompt)] != prompt
    for encoded, i in zip(found, (1, 3), strict=True):
        prompt = chat.encode_prompt(messages[:i])
        assert encoded.tokens[: len(prompt)] == prompt
    (first, second), (both,) = (
        chat.encode_conversation(messages, "all"),
        chat.encode_conversation(messages, "prompt"),
    )
    known = common_prefix(first.tokens, second.tokens)
    assert sum(second.trained) == len(second.tokens) - known
    assert both.tokens == whole
    for encoded in found:
        assert "\n\n\nfoo</s>" in tokenizer.decode(encoded.tokens)
        assert "\n \n" not in tokenizer.decode(encoded.tokens)


def test_a_template_that_forgets_gives_each_turn_its_own_sequence(tokenizer_of) -> None:
    tokenizer = tokenizer_of("bytes", "chatml")
    tokenizer.chat_template = THINKING
    chat = ChatFormat(tokenizer)
    messages = talk("ubar", "aone", "ubaz", "atwo")
    messages[1]["thought"] = messages[3]["thought"] = "foo"
    found = chat.encode_conversation(messages, "assistant")
    assert [tokenizer.decode([t for t, w in zip(*e[:2], strict=True) if w]) for e in found] == [
        "<think>foo</think>one<|im_end|>",
        "<think>foo</think>two<|im_end|>",
    ]
    for encoded, i in zip(found, (1, 3), strict=True):
        prompt = chat.encode_prompt(messages[:i])
        assert encoded.tokens[: len(prompt)] == prompt
    assert chat.encode_conversation(messages, "completion") == found[1:]
    with pytest.raises(ModelError, match="writes earlier turns anew"):
        chat.encode_conversation(messages, "prompt")


@pytest.mark.parametrize(
    ("prompt", "answer"), [("assistant\\n<think>", "assistant\\n"), ("bot: ", "assistant: ")]
)
def test_a_prompt_unlike_what_is_trained_is_refused(tokenizer_of, prompt, answer) -> None:
    template = (
        "{% for m in messages %}{{ '" + answer + "' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + prompt + "' }}{% endif %}"
    )
    chat = ChatFormat(tokenizer_of("bytes", template))
    with pytest.raises(ModelError, match="training and use would differ") as refused:
        chat.encode_conversation(talk("uhi", "aho"), "assistant")
    assert (refused.value.code, prompt[-6:] in str(refused.value)) == (4, True)
    with pytest.raises(ModelError, match="training and use would differ"):
        _ = chat.end_of_turn


# What counts


def texts_of(tokenizer, encoded) -> list[str]:
    return [tokenizer.decode(encoded.tokens[a:b]) for a, b in spans(encoded)]


def test_what_each_way_trains_on(tokenizer_of) -> None:
    tokenizer = tokenizer_of("bytes", "chatml")
    chat = ChatFormat(tokenizer)
    messages = talk("sS", "uU", "aA", "tT", "aB", "aC", "uV")
    found = {
        way: chat.encode_conversation(messages, way) for way in ("assistant", "completion", "all")
    }
    asked = "<|im_start|>assistant\n"
    assert [len(sequences) for sequences in found.values()] == [1, 1, 1]
    assert texts_of(tokenizer, found["assistant"][0]) == [f"{x}<|im_end|>" for x in "ABC"]
    assert texts_of(tokenizer, found["completion"][0]) == ["C<|im_end|>"]
    assert found["all"][0].trained == [False] + [True] * (len(found["all"][0].tokens) - 1)
    (prompt,) = chat.encode_conversation(messages, "prompt")
    assert "".join(texts_of(tokenizer, prompt)) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
        + asked
        + "\n<|im_start|>tool\nT<|im_end|>\n"
        + asked
        + "\n"
        + asked
        + "\n<|im_start|>user\nV<|im_end|>\n"
    )
    assert (prompt.ends, prompt.tokens) == (False, found["all"][0].tokens)


def test_weight_and_a_greeting_are_context(tokenizer_of) -> None:
    tokenizer = tokenizer_of("bytes", "chatml")
    chat = ChatFormat(tokenizer)
    messages = talk("aWelcome", "uU", "aA", "uV", "aB", weight=0)
    for way in ("assistant", "all"):
        (encoded,) = chat.encode_conversation(messages, way)
        kept = "".join(texts_of(tokenizer, encoded))
        assert ("A<|im_end|>" in kept, "B<|im_end|>" in kept) == (True, False)
        assert encoded.ends
    assert "Welcome" not in "".join(
        texts_of(tokenizer, chat.encode_conversation(messages, "assistant")[0])
    )
    seen = ChatFormat(tokenizer_of("bytes", "{{ messages | tojson }}")).encode_prompt(messages)
    assert "weight" not in tokenizer.decode(seen)
    for way, said in (("completion", messages), ("assistant", messages[:2])):
        (nothing,) = chat.encode_conversation(said, way)
        assert (any(nothing.trained), nothing.ends) == (False, False)


def test_text_is_text(tokenizer_of) -> None:
    tokenizer = tokenizer_of("prepend", "chatml")
    tokenizer.chat_template = None
    chat = ChatFormat(tokenizer)
    encoded = chat.encode_text("<s>the cat</s>")
    assert (encoded.tokens[0], encoded.tokens[-1]) == (1, 2)
    assert (encoded.tokens.count(1), encoded.tokens.count(2)) == (1, 1)
    assert tokenizer.decode(encoded.tokens[1:-1]).strip() == "<s>the cat</s>"
    assert encoded.trained == [False] + [True] * (len(encoded.tokens) - 1)
    assert encoded.ends
    assert chat.encode_text("") == ([1, 2], [False, True], True)
    tokenizer.eos_token = None
    assert not ChatFormat(tokenizer).encode_text("the cat").ends
    assert chat.end_of_turn is None
    with pytest.raises(ModelError, match="no chat template"):
        chat.encode_prompt(talk("uhi"))


# Where turns end


def test_the_end_of_turn_is_trained_wherever_the_template_puts_it(tokenizer_of) -> None:
    outside = (  # markers that leave the end out
        "{% for m in messages %}{{ m.role + '\n' }}"
        "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    chat = ChatFormat(tokenizer_of("bytes", outside))
    (encoded,) = chat.encode_conversation(talk("uhi", "aho"), "assistant")
    ((_, end),) = spans(encoded)
    assert (encoded.tokens[end - 1], encoded.ends, chat.end_of_turn) == (2, True, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_without_an_end_is_known(tokenizer_of, kind) -> None:
    tokenizer = tokenizer_of(kind, PLAIN)
    chat = ChatFormat(tokenizer)
    assert (chat.end_of_turn, chat.probe.ends) == (None, False)
    (encoded,) = chat.encode_conversation(talk("uhi", "aho  "), "assistant")
    assert texts_of(tokenizer, encoded) == ["ho  "]
    inner = "{% for m in messages %}{{ m.role + ': ' + eos_token + m.content + '.\n' }}{% endfor %}"
    chat = ChatFormat(tokenizer_of(kind, inner))
    assert chat.end_of_turn is None
    (encoded,) = chat.encode_conversation(talk("uhi", "aho"), "assistant")
    assert "ho." in tokenizer.decode(encoded.tokens[spans(encoded)[0][0] :])


# Special tokens


@pytest.mark.parametrize("kind", KINDS)
def test_spelled_tokens_are_text_in_every_place(tokenizer_of, kind) -> None:
    template = (
        "{{ bos_token }}{{ tools | tojson }}{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{{ m.tool_calls | tojson if m.tool_calls }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    chat = ChatFormat(tokenizer_of(kind, template))
    messages = talk("u</s><s>", "a<</s>/s>", tool_calls=[{"function": {"name": "f</s>"}}])
    (encoded,) = chat.encode_conversation(
        messages, "assistant", [{"description": "<s>", "name": "</s>"}]
    )
    assert (encoded.tokens.count(1), encoded.tokens.count(2)) == (1, 2)
    decoded = chat.tokenizer.decode(encoded.tokens)
    for said in ("u</s><s>"[1:], "<</s>/s>", "f</s>", '"<s>"'):
        assert said in decoded
    assert "\ufdd0" not in decoded


def test_a_token_that_is_looked_for_in_normalized_text_is_hidden_too(tokenizer_of) -> None:
    tokenizer = tokenizer_of("prepend", TAIL)
    tokenizer.add_special_tokens({"sep_token": AddedToken("|sep|", normalized=True, special=True)})
    chat = ChatFormat(tokenizer)
    assert tokenizer.sep_token_id not in chat.encode_prompt(talk("uthe cat|sep|"))
    tokenizer.chat_template = TAIL + "|sep|"
    assert ChatFormat(tokenizer).encode_prompt(talk("u|sep|"))[-1] == tokenizer.sep_token_id


def test_tools_that_a_template_would_drop_are_refused(tokenizer_of) -> None:
    chat = ChatFormat(tokenizer_of("bytes", "chatml"))
    with pytest.raises(ModelError, match="no place for tools"):
        chat.encode_prompt(talk("uhi"), [{"name": "f"}])
    with pytest.raises(ModelError, match="no place for calls of tools"):
        chat.encode_conversation(talk("uhi", "a", tool_calls=[{"name": "f"}]), "assistant")


def test_tokens_that_eat_the_space_after_them(tokenizer_of) -> None:
    tokenizer = tokenizer_of("first", "phi-3")
    tokenizer.add_tokens(
        [AddedToken(t, rstrip=True, special=True) for t in TEMPLATE_TOKENS["phi-3"]],
        special_tokens=True,
    )
    chat = ChatFormat(tokenizer)
    messages = talk("u  <s>hi", "a \nho", "ubar", "abaz")
    (encoded,) = chat.encode_conversation(messages, "assistant")
    for (begin, _), i in zip(spans(encoded), (1, 3), strict=True):
        assert encoded.tokens[:begin] == chat.encode_prompt(messages[:i])
    theirs = tokenizer.apply_chat_template(talk("uhi"), add_generation_prompt=True)["input_ids"]
    assert chat.encode_prompt(talk("uhi")) == theirs


def test_a_tokenizer_in_python_works_too() -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = TAIL
    chat = ChatFormat(tokenizer)
    messages = talk("uhi</s>", "aho", "u<pad>", "ahe")
    (encoded,) = chat.encode_conversation(messages, "assistant")
    assert texts_of(tokenizer, encoded) == ["ho</s>", "he</s>"]
    assert encoded.tokens.count(1) == 4
    assert encoded.tokens[: spans(encoded)[1][0]] == chat.encode_prompt(messages[:3])


# Named templates


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates_hold_every_message_and_end_turns(tokenizer_of, built, name) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(built["bytes"]))
    added = set_chat_template(tokenizer, name)
    needs_eos = "eos_token" in tokenizer.chat_template
    assert added == [*(["</s>"] if needs_eos else []), *TEMPLATE_TOKENS.get(name, ())]
    assert set_chat_template(tokenizer, name) == []
    chat = ChatFormat(tokenizer)
    encoded = chat.encode_conversation(talk("sS1", "uU1", "aA1", "uU2", "aA2"), "assistant")[-1]
    text = tokenizer.decode(encoded.tokens)
    places = [text.index(said) for said in ("S1", "U1", "A1", "U2", "A2")]
    assert places == sorted(places)
    assert tokenizer.decode([chat.end_of_turn]) in (tokenizer.eos_token, added[-1])
    (bare,) = chat.encode_conversation(talk("uU", "aA"), "assistant")
    assert (bare.ends, encoded.ends, len(spans(bare))) == (True, True, 1)


@pytest.mark.parametrize("name", ["llama-2", "mistral", "gemma"])
def test_a_system_message_without_its_user_is_refused_not_dropped(tokenizer_of, name) -> None:
    chat = ChatFormat(tokenizer_of("bytes", name))
    for messages in (talk("uU", "sS", "aA"), talk("uU", "tT", "aA")):
        with pytest.raises(DataError, match="refuses these messages: this format has"):
            chat.encode_conversation(messages, "assistant")


def test_the_llama_2_format_to_the_letter(tokenizer_of) -> None:
    chat = ChatFormat(tokenizer_of("bytes", "llama-2"))
    (encoded,) = chat.encode_conversation(talk("sS", "uU", "aA", "uV", "aB"), "assistant")
    assert chat.tokenizer.decode(encoded.tokens) == (
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A </s><s>[INST] V [/INST] B </s>"
    )


def test_a_model_keeps_its_template_and_a_base_gets_chatml(tokenizer_of) -> None:
    tokenizer = tokenizer_of("bytes", TAIL)
    assert (set_chat_template(tokenizer, None), tokenizer.chat_template) == ([], TAIL)
    tokenizer.chat_template = None
    assert set_chat_template(tokenizer, None) == ["<|im_start|>", "<|im_end|>"]
    assert ChatFormat(tokenizer).end_of_turn == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_template_from_a_file(tokenizer_of, tmp_path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("é" + TAIL)
    tokenizer = tokenizer_of("bytes", "chatml")
    assert set_chat_template(tokenizer, str(file)) == []
    assert tokenizer.chat_template == "é" + TAIL
    for content, error, message in (
        (b"\xe9", DataError, "not UTF-8 at byte 0"),
        (b"\xe9" * 1_100_000, ModelError, "larger than 250,000 characters"),
        (b"x" * 1_100_000, ModelError, "larger than 250,000 characters"),
    ):
        file.write_bytes(content)
        with pytest.raises(error, match=message):
            read_template(str(file))
    with pytest.raises(DataError, match="cannot read: Is a directory"):
        read_template(str(tmp_path))
    with pytest.raises(UserError, match="--chat-template lama-3: neither") as refused:
        read_template("lama-3")
    assert (refused.value.code, refused.value.hint) == (2, "did you mean llama-3?")


@pytest.mark.slow
@pytest.mark.parametrize(
    "bomb",
    [
        "{% for a in range(99999) %}" * 2 + "{% endfor %}" * 2,
        "{{ 'x' * 10**9 }}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    ],
)
def test_a_hostile_file_is_refused_in_time(tokenizer_of, tmp_path, bomb) -> None:
    (tmp_path / "bomb").write_text(bomb)
    tokenizer = tokenizer_of("bytes", "chatml")
    set_chat_template(tokenizer, str(tmp_path / "bomb"))
    begun = time.monotonic()
    with pytest.raises(ModelError, match="the chat template "):
        ChatFormat(tokenizer).encode_conversation(talk("uhi", "aho"), "assistant")
    assert time.monotonic() - begun < 60, "the limit is of a processor, which others use, too"


def test_only_templates_written_here_run_here(tokenizer_of, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(
        render,
        "render_cuts",
        lambda *a, trusted, **k: seen.append(trusted) or iter(["hi"] * len(a[2])),
    )
    for name in TEMPLATES:
        ChatFormat(tokenizer_of("bytes", name)).encode_prompt(talk("uhi"))
    ChatFormat(tokenizer_of("bytes", TEMPLATES["chatml"] + " ")).encode_prompt(talk("uhi"))
    assert seen == [True] * len(TEMPLATES) + [False]


# Many at once


def test_a_batch_names_the_row_that_a_template_refuses(tokenizer_of) -> None:
    template = "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}" + TAIL
    chat = ChatFormat(tokenizer_of("bytes", template))

    def row(line: int, text: str | None = None, *said: str) -> SimpleNamespace:
        messages = talk(*said) if said else None
        return SimpleNamespace(text=text, messages=messages, tools=None, place="a.jsonl", line=line)

    rows = [row(1, "the cat"), row(2, None, "uhi", "aho"), row(3, None, "ubad", "aho")]
    found = chat.encode_examples(rows, "assistant", BadRows())
    assert next(found) == [chat.encode_text("the cat")]
    assert next(found) == chat.encode_conversation(talk("uhi", "aho"), "assistant")
    with pytest.raises(DataError, match=r"a.jsonl:3: the chat template refuses .* no"):
        next(found)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_template_that_writes_the_date_can_be_held(tokenizer_of, frozen) -> None:
    """A run that is resumed on another day must have the same data."""
    template = (
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    )
    tokenizer = tokenizer_of("bytes", template)
    held = ChatFormat(tokenizer, "2024-05-06T10:00:00+0200" if frozen else None)
    text = tokenizer.decode(held.encode_prompt(talk("ufoo")))
    assert ("06 May 2024" in text) == frozen
