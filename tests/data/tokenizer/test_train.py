import json
import random

import pytest
from tokenizers import Tokenizer

from llmctl.data.tokenizer.train import (
    BOS,
    EOS,
    PAD,
    SPECIAL_TOKENS,
    UNKNOWN,
    default_vocab_size,
    fingerprint,
    save_tokenizer,
    train_tokenizer,
)
from llmctl.errors import DataError, UserError

ALGORITHMS = ["bpe", "unigram", "wordpiece", "byte", "char"]
TEXTS = [
    "The cat sees the river.\nA dog finds the garden, and the cat follows it home.\n",
    "Our teacher remembers many stars; the old man paints them.\r\n\tNumbers: 1234567890!\n",
] * 40
CODE = TEXTS[0] + "x = {'a': [1, 2]}\n\n\n    return x  # done\n"
STRANGE = (
    "",
    " ",
    "\n",
    " \n\t \r\n",
    "\ufeff\x00\x7f",
    "e\u0301\u00e9",
    "\u2581\u2581 \u2581",
    "\u202e\u200f",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "<0x41><|eos|>",
    "\U0010ffff",
    "aaaa" * 50,
    "\x85\u2028\x1c",
)


@pytest.fixture(scope="module")
def trained():
    """A tokenizer of each algorithm with one special token of the user's."""
    return {
        name: train_tokenizer(
            iter(TEXTS), name, text_bytes=1000, special_tokens=["<|tool|>"], min_frequency=2
        )
        for name in ALGORITHMS
    }


def random_texts(count, seed):
    draw = random.Random(seed)
    valid = [*range(0xD800), *range(0xE000, 0x110000)]
    for _ in range(count):
        yield "".join(chr(draw.choice(valid)) for _ in range(draw.randrange(30)))


@pytest.mark.parametrize("algorithm", ["bpe", "byte"])
def test_every_text_decodes_to_itself(trained, algorithm):
    tokenizer = trained[algorithm]
    for text in [CODE, *STRANGE, *random_texts(300, seed=0)]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_unigram_keeps_all_but_its_own_space_mark(trained):
    tokenizer = trained["unigram"]
    for text in [CODE, *STRANGE, *random_texts(300, seed=1)]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text.replace("\u2581", " ")


def test_byte_ids_follow_byte_values(trained):
    first = trained["byte"].token_to_id("<|tool|>") + 1
    ids = trained["byte"].encode("a\u00e9\x00", add_special_tokens=False).ids
    assert ids == [first + byte for byte in "a\u00e9\x00".encode()]
    assert trained["byte"].get_vocab_size() == 256 + len(SPECIAL_TOKENS) + 1


def test_char_has_every_character_of_the_corpus_and_no_other(trained):
    tokenizer = trained["char"]
    vocab = set(tokenizer.get_vocab()) - {*SPECIAL_TOKENS, UNKNOWN, "<|tool|>"}
    assert vocab == set("".join(TEXTS))
    unknown = tokenizer.token_to_id(UNKNOWN)
    assert tokenizer.encode("a\u00e9", add_special_tokens=False).ids[1] == unknown
    ids = tokenizer.encode(TEXTS[1], add_special_tokens=False).ids
    assert len(ids) == len(TEXTS[1])
    assert tokenizer.decode(ids) == TEXTS[1]


def test_char_with_a_smaller_vocabulary_keeps_the_most_frequent():
    tokenizer = train_tokenizer(["aaabbc"], "char", vocab_size=len(SPECIAL_TOKENS) + 3)
    assert set(tokenizer.get_vocab()) - {*SPECIAL_TOKENS, UNKNOWN} == {"a", "b"}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_text_that_spells_a_special_token_is_text(trained, algorithm):
    tokenizer = trained[algorithm]
    specials = {tokenizer.token_to_id(t) for t in (*SPECIAL_TOKENS, "<|tool|>")}
    for token in (*SPECIAL_TOKENS, "<|tool|>"):
        for text in (token, f"a{token}b", f"the cat {token} {token}"):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert ids
            assert not specials & set(ids)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bos_begins_a_text_and_eos_does_not_end_it(trained, algorithm):
    tokenizer = trained[algorithm]
    ids = tokenizer.encode("the cat").ids
    assert ids[0] == tokenizer.token_to_id(BOS)
    assert ids[-1] != tokenizer.token_to_id(EOS)
    assert tokenizer.encode("").ids == [tokenizer.token_to_id(BOS)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_transformers_opens_the_saved_folder(trained, algorithm, tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(trained[algorithm], tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (BOS, EOS, PAD)
    assert loaded.pad_token_id != loaded.eos_token_id
    assert loaded.unk_token == (UNKNOWN if algorithm in ("wordpiece", "char") else None)
    assert len(loaded) == trained[algorithm].get_vocab_size()
    assert "<|tool|>" in loaded.all_special_tokens
    for text in (CODE, "don 't  stop , it 's \u00e9\n", "a . b"):
        ids = trained[algorithm].encode(text).ids
        assert loaded(text).input_ids == ids
        assert loaded.decode(ids) == trained[algorithm].decode(ids, skip_special_tokens=False)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    digests = {fingerprint(trained[algorithm]), fingerprint(loaded.backend_tokenizer)}
    digests.add(fingerprint(Tokenizer.from_file(str(again / "tokenizer.json"))))
    assert len(digests) == 1


def test_fingerprints_differ_where_ids_do(trained):
    assert len({fingerprint(tokenizer) for tokenizer in trained.values()}) == len(trained)


def test_the_chat_template_marks_what_the_assistant_wrote(trained, tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(trained["bpe"], tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    turns = ["user", "assistant", "user", "assistant"]
    messages = [{"role": r, "content": f"text {i}"} for i, r in enumerate(turns)]
    rendered = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
    marked = zip(rendered["input_ids"], rendered["assistant_masks"], strict=True)
    assert tokenizer.decode([i for i, m in marked if m]) == "text 1<|im_end|>text 3<|im_end|>"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == f"{BOS}<|im_start|>user\ntext 0<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False).startswith(prompt + "text 1")


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece", "char"])
def test_training_twice_gives_the_same_tokenizer(algorithm):
    found = {fingerprint(train_tokenizer(TEXTS, algorithm)) for _ in range(4)}
    assert len(found) == 1


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece", "unigram", "char"])
def test_a_vocabulary_larger_than_the_corpus_allows_names_the_largest(algorithm):
    with pytest.raises(DataError, match="larger than the corpus allows") as caught:
        train_tokenizer(TEXTS, algorithm, vocab_size=20_000)
    largest = int(caught.value.message.rsplit(" ", 1)[1].replace(",", ""))
    tokenizer = train_tokenizer(TEXTS, algorithm, vocab_size=largest)
    assert tokenizer.get_vocab_size() == largest


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece", "unigram"])
def test_a_vocabulary_too_small_names_the_smallest(algorithm):
    with pytest.raises(UserError, match="--vocab-size 20: the smallest possible here is") as caught:
        train_tokenizer(TEXTS, algorithm, vocab_size=20)
    assert caught.value.code == 2
    smallest = int(caught.value.message.split(" is ")[1].split(" ")[0].replace(",", ""))
    tokenizer = train_tokenizer(TEXTS, algorithm, vocab_size=smallest)
    assert tokenizer.get_vocab_size() == smallest


@pytest.mark.parametrize(
    ("algorithm", "size"), [("bpe", 300), ("wordpiece", 140), ("unigram", 330), ("char", 30)]
)
def test_vocab_size_counts_special_tokens(algorithm, size):
    tokenizer = train_tokenizer(TEXTS, algorithm, vocab_size=size, special_tokens=["<|x|>"])
    assert sorted(tokenizer.get_vocab().values()) == list(range(size))


def test_unigram_by_default_has_room_for_every_character():
    texts = ["".join(map(chr, range(0x4E00, 0x5200))), *TEXTS]
    tokenizer = train_tokenizer(texts, "unigram", text_bytes=5000)
    assert set("".join(texts)) - {" "} <= set(tokenizer.get_vocab())


@pytest.mark.parametrize(
    ("token", "message"),
    [("<|eos|>", "in the vocabulary already"), (" ", "expected some text")],
)
def test_a_bad_special_token_is_refused(token, message):
    with pytest.raises(UserError, match=message):
        train_tokenizer(TEXTS, "bpe", special_tokens=[token])


@pytest.mark.parametrize("algorithm", ["wordpiece", "char"])
def test_a_special_token_that_text_could_be_is_refused(algorithm):
    with pytest.raises(UserError, match="plain text would be taken for it"):
        train_tokenizer(TEXTS, algorithm, special_tokens=["Q"])


def test_min_frequency_keeps_rare_pairs_apart():
    texts = ["qzqz " + "the " * 50]
    common = train_tokenizer(texts, "bpe", text_bytes=1000, min_frequency=10)
    rare = train_tokenizer(texts, "bpe", text_bytes=1000, min_frequency=1)
    assert "qz" not in json.loads(common.to_str())["model"]["vocab"]
    assert "qz" in json.loads(rare.to_str())["model"]["vocab"]


@pytest.mark.parametrize(
    ("text_bytes", "size"),
    [(1, 512), (658_000, 1024), (1_115_394, 1024), (100_000_000, 8192), (10**12, 32768)],
)
def test_the_default_size_follows_the_corpus(text_bytes, size):
    assert default_vocab_size(text_bytes) == size
