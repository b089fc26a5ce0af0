import random
import sys
import types

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from llmctl.data.tokenizer import encode
from llmctl.data.tokenizer.encode import Cutter, Mismatch, RunTooLong, fastest_encoder
from llmctl.data.tokenizer.train import train_tokenizer

WHITE = [
    *"\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2003\u2028\u2029\u202f\u3000\u200b\ufeff"
]
LETTERS = [
    *"abcABC'sdmtre19.,!?-_()#$\u0301\u0308\u00e9\u4e2d\u6587\u3042\u30a2\ud55c\u00df\u017f\u0130",
    *"\u0131\u0663\u00b2\u2167\x00\x01\x7f\u00ad",
]
FAMILY = "\U0001f468\u200d\U0001f469\ufe0f"
JOINED = ["\r\n", "'ll", "'S", FAMILY, "\U0001f600", "<|eos|>", " the", "\n\n", "##"]
MARKED = ["\u2581", "\u2581 the", "\u2581\u2581", " \u2581a"]
POOL = WHITE + LETTERS + JOINED + MARKED + [" "] * 20 + ["\n"] * 8

TEXTS = ["the cat sees the river, don't you see it's there? 123 456\n", "a b\n\n  the   end."] * 40


def gpt2():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def prepending():
    """Llama 2's way: a space mark before every text, so that no text can be cut."""
    tokenizer = train_tokenizer(TEXTS, "unigram")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("x"), "isolated")
    return tokenizer


def llama2(*more):
    """Llama 2's own: pairs merged in a whole text, a mark before it and for each space."""
    words = ["\u2581", *"abcABCthersind.,", *(chr(0x4E2D + n) for n in range(3)), "\u3042"]
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("\u2581", "the"),
        ("\u2581", "\u2581"),
        ("\u2581", "a"),
        *more,
    ]
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    tokens = dict.fromkeys(["<unk>", *bytes_, *words, *map("".join, merges)])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers():
    names = ["bpe", "unigram", "wordpiece", "byte", "char"]
    trained = {name: train_tokenizer(TEXTS, name) for name in names}
    return trained | {
        "gpt2": gpt2(),
        "prepending": prepending(),
        "llama2": llama2(),
        "across": llama2(("e", "\u2581")),
    }


KINDS = {
    "bpe": "words",
    "gpt2": "words",
    "byte": "anywhere",
    "char": "anywhere",
    "unigram": "spaces",
    "wordpiece": "spaces",
    "prepending": "nowhere",
    "llama2": "marks",
    "across": "nowhere",
}


def random_texts(count, seed):
    draw = random.Random(seed)
    for _ in range(count):
        yield "".join(draw.choice(POOL) for _ in range(draw.randrange(400)))
        yield "".join(draw.choice("ab \n") for _ in range(draw.randrange(400)))


def cut(text, cuts, draw):
    """The text's pieces, when it comes in stretches of random length."""
    cutter, pieces, start = Cutter(cuts), [], 0
    while True:
        stop = start + draw.randint(1, 150)
        pieces += cutter.feed(text[start:stop], stop >= len(text))
        if stop >= len(text):
            return pieces
        start = stop


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_pieces_encode_to_the_ids_of_the_whole(tokenizers, monkeypatch, name, plain):
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", 40)
    coder, draw = fastest_encoder(tokenizers[name], plain=plain), random.Random(7)
    assert coder.cuts == KINDS[name]
    for text in random_texts(120, seed=3):
        pieces = cut(text, coder.cuts, draw)
        assert (" " if coder.cuts == "marks" else "").join(pieces) == text
        ids, lengths = coder.encode(pieces)
        assert ids.tolist() == tokenizers[name].encode(text, add_special_tokens=False).ids
        assert lengths.sum() == len(ids)
        if pieces:
            alone = tokenizers[name].encode(pieces[0], add_special_tokens=False).ids
            assert lengths[0] == len(alone)


def test_long_text_with_words_is_cut_into_pieces_of_bounded_length(tokenizers, monkeypatch):
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", 100)
    words, lines = "word " * 300, "line\n" * 300
    for text, cuts in ((words, "spaces"), (lines, "words"), ("x" * 900, "anywhere")):
        pieces = list(Cutter(cuts).feed(text, True))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 100
        assert len(pieces) < 310


def test_a_stretch_without_a_place_to_cut_is_refused(monkeypatch):
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", 10)
    monkeypatch.setattr(encode, "RUN_CHARACTERS", 100)
    cutter = Cutter("words")
    assert list(cutter.feed("a " + "x" * 90, False)) == ["a"]
    with pytest.raises(RunTooLong):
        list(cutter.feed("x" * 20, False))
    assert "".join(Cutter("words").feed("a b" * 100, True)) == "a b" * 100


def test_soft_cuts_are_at_words_where_there_are_any():
    text = "word " * 30 + "x" * 95
    pieces = list(Cutter("softly", 20).feed(text, True))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 20
    assert all(p.startswith(" ") for p in pieces[1:8])


def test_a_cut_is_found_once_it_comes(monkeypatch):
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", 10)
    cutter, pieces = Cutter("words"), []
    for stretch in ("x" * 30, "y" * 5, " ", "z" * 30):
        pieces += cutter.feed(stretch, False)
    assert pieces == ["x" * 30 + "y" * 5]
    assert list(cutter.feed("", True)) == [" " + "z" * 30]


class Wrong:
    """A fast encoder that is wrong about one character."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def encode_batch_flat(self, texts, **_):
        rows = [self.tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
        rows = [[0 if "q" in t else i for i in row] for t, row in zip(texts, rows, strict=True)]
        lengths = [len(row) for row in rows]
        flat = np.array([i for row in rows for i in row], "<u4").tobytes()
        return flat, np.cumsum([0, *lengths]).astype("<u8").tobytes()


@pytest.fixture
def wrong_fastokens(monkeypatch, tokenizers):
    fake = types.SimpleNamespace(from_json_str=lambda _: Wrong(tokenizers["bpe"]))
    monkeypatch.setitem(sys.modules, "fastokens", types.SimpleNamespace(Tokenizer=fake))


@pytest.mark.usefixtures("wrong_fastokens")
def test_a_fast_encoder_is_compared_at_the_start_and_now_and_then(tokenizers, monkeypatch):
    with pytest.raises(Mismatch, match="q"):
        fastest_encoder(tokenizers["bpe"]).encode(["a", "q"])
    monkeypatch.setattr(encode, "CHECK_EVERY", 100)
    coder = fastest_encoder(tokenizers["bpe"])
    coder.encode(["a" * 10])
    coder.encode(["q" * 50])
    with pytest.raises(Mismatch):
        coder.encode(["q" * 50])


@pytest.mark.usefixtures("wrong_fastokens")
def test_plain_does_without_the_fast_encoder(tokenizers):
    ids, _ = fastest_encoder(tokenizers["bpe"], plain=True).encode(["q"])
    assert ids.tolist() == tokenizers["bpe"].encode("q", add_special_tokens=False).ids


def test_a_missing_fast_encoder_is_done_without(tokenizers, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastokens", None)
    ids, _ = fastest_encoder(tokenizers["bpe"]).encode(["the cat"])
    assert ids.tolist() == tokenizers["bpe"].encode("the cat", add_special_tokens=False).ids
