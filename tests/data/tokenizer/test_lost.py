"""Characters that a tokenizer has no token for are counted, and both encoders drop the same."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llmctl.data.tokenizer.encode import fastest_encoder
from llmctl.data.tokenizer.lost import LostCharacters
from llmctl.errors import DataError


def byte_level(texts, alphabet=()):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


CAT = ["the cat sat on the mat\n"] * 20


@pytest.mark.parametrize(
    ("text", "lost"),
    [("the cat", 0), ("the\x04 cat", 1), ("THE", 3), ("thé", 1), ("\U0001f408 the", 1)],
)
def test_lost_characters_are_those_that_decoding_does_not_give_back(text, lost):
    tokenizer = byte_level(CAT)
    counted = LostCharacters(tokenizer)
    assert counted.add(text) == lost
    kept = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)
    whole = "".join(c for c in text if c in "the cat sat on the mat\n")
    assert kept == whole
    assert len(text) - len(whole) == lost


@pytest.mark.parametrize("plain", [False, True])
def test_both_encoders_give_the_ids_of_tokenizers(plain):
    tokenizer = byte_level(CAT)
    texts = ["the cat\x04 sat", "on the mat", "Zoë sat"]
    ids, lengths = fastest_encoder(tokenizer, plain=plain).encode(texts)
    wanted = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert ids.tolist() == [token for row in wanted for token in row]
    assert lengths.tolist() == [len(row) for row in wanted]


def test_what_loses_nothing_counts_nothing():
    whole = byte_level(CAT, pre_tokenizers.ByteLevel.alphabet())
    fallback = Tokenizer(models.BPE(byte_fallback=True))
    unknown = Tokenizer(models.BPE({"[UNK]": 0}, [], unk_token="[UNK]"))
    for tokenizer in (whole, fallback, unknown, None):
        assert LostCharacters(tokenizer).add("\x04 Zoë \U0001f408") == 0


def test_an_alphabet_of_characters():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=60, show_progress=False)
    tokenizer.train_from_iterator(CAT, trainer)
    counted = LostCharacters(tokenizer)
    assert counted.add("the Cat\tsat é") == 2
    assert (counted.example, counted.characters) == ("C", 13)
    assert counted.message() == ('2 of 13 characters have no token and are lost, such as "C"')
    counted.refuse(0.2, "a.txt", None)
    with pytest.raises(DataError, match="2 of 13 characters"):
        counted.refuse(0.1, "a.txt", 3)


def test_many_texts_are_counted_as_each_alone():
    tokenizer = byte_level(CAT)
    texts = ["the cat", "on\x04 the mat", "Zoë", ""]
    one, all_, none = (LostCharacters(tokenizer) for _ in range(3))
    assert [one.add(text) for text in texts] == [0, 1, 2, 0]
    assert all_.add_all(texts) == 1
    assert none.add_all(texts[:1]) is None
    assert (all_.lost, all_.characters, all_.example) == (one.lost, one.characters, one.example)
    assert (none.lost, none.characters) == (0, 7)
