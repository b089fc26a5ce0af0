import json

import pytest
from tokenizers import Tokenizer, models, normalizers, processors

from llmctl.config.sections import Corpus
from llmctl.data import corpus as corpus_module
from llmctl.data import documents
from llmctl.data.corpus import open_corpus
from llmctl.data.documents import hash_text
from llmctl.data.shards import open_tokens
from llmctl.data.tokenizer import encode
from llmctl.data.tokenizer.load import load_vocabulary, vocabulary_of
from llmctl.data.tokenizer.train import BOS, EOS, fingerprint, save_tokenizer, train_tokenizer
from llmctl.errors import DataError
from tests.run_files import write_texts

TEXTS = [f"Number {n} is {'a small one' if n % 3 else 'odd'}.\n" * (n % 7 + 1) for n in range(60)]


@pytest.fixture
def data(tmp_path):
    return write_texts(tmp_path / "a.jsonl", TEXTS)


@pytest.fixture(scope="module")
def vocabulary():
    return vocabulary_of(train_tokenizer(TEXTS, "bpe"), eos=EOS, bos=BOS)


def test_documents_across_batches_are_whole(tmp_path, vocabulary, monkeypatch):
    folder, written = tmp_path / "texts", []
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    for batch, piece, block in ((1 << 20, 1 << 15, 1 << 20), (50, 20, 64)):
        monkeypatch.setattr(corpus_module, "BATCH_CHARACTERS", batch)
        monkeypatch.setattr(encode, "PIECE_CHARACTERS", piece)
        monkeypatch.setattr(documents, "BLOCK_BYTES", block)
        with open_corpus(Corpus(data=[str(folder)])) as corpus:
            metrics = corpus.write(tmp_path / str(batch), vocabulary)
        index = open_tokens(tmp_path / str(batch))
        tokens = [s.window(0, s.tokens).tolist() for s in (index.train, index.val)]
        metrics.pop("tokens_per_second")
        written.append((tokens, metrics, index.train.documents))
    assert written[0] == written[1]


@pytest.mark.parametrize("share", [0.1, 0.5, 2.0])
def test_a_sample_is_drawn_evenly_across_the_corpus(data, share):
    with open_corpus(Corpus(data=[str(data)])) as corpus:
        sample = list(corpus.sample(int(share * corpus.scan.bytes)))
        again = list(corpus.sample(int(share * corpus.scan.bytes)))
    assert sample == again
    if share > 1:
        assert sample == TEXTS
        return
    for part in (TEXTS[:30], TEXTS[30:]):
        taken = sum(len(text) for text in sample if text in set(part))
        assert taken == pytest.approx(share * sum(map(len, part)), rel=0.4)


def test_a_sample_prefers_neither_short_nor_long_documents(tmp_path):
    texts = [f"{n} " * (5 if n % 2 else 100) for n in range(2000)]
    path = write_texts(tmp_path / "a.jsonl", texts)
    with open_corpus(Corpus(data=[str(path)])) as corpus:
        sample = list(corpus.sample(corpus.scan.bytes // 10))
    assert len(sample) == pytest.approx(200, rel=0.1)
    assert sum(len(text) < 100 for text in sample) == pytest.approx(100, rel=0.25)


def test_data_that_changes_while_it_is_read_is_refused(tmp_path, data, vocabulary):
    with open_corpus(Corpus(data=[str(data)])) as corpus:
        with data.open("a") as file:
            file.write('{"text": "one more"}\n')
        with pytest.raises(DataError, match="changed while it was read"):
            corpus.write(tmp_path / "out", vocabulary)


def test_a_validation_split_that_holds_most_of_the_text_is_warned_of(
    tmp_path, vocabulary, caplog, monkeypatch
):
    from llmctl.console import log

    monkeypatch.setattr(log, "propagate", True)
    short = next(t for t in map(str, range(99)) if hash_text(t.encode()) > 1 << 63)
    long = next(t for t in (f"{n} " * 500 for n in range(99)) if hash_text(t.encode()) < 1 << 63)
    for name, text in (("a.txt", short), ("b.txt", long)):
        (tmp_path / name).write_text(text)
    with open_corpus(Corpus(data=[str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])) as corpus:
        corpus.write(tmp_path / "out", vocabulary)
    assert "validation holds more text than training" in caplog.text


def test_a_tokenizer_that_adds_eos_itself_ends_documents_once():
    tokenizer = train_tokenizer(TEXTS, "bpe")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 0), (EOS, 1)]
    )
    assert vocabulary_of(tokenizer, eos=EOS).prefix == (0,)


def test_truncation_and_padding_of_a_tokenizer_are_lifted(data, tmp_path):
    tokenizer = train_tokenizer(TEXTS, "bpe")
    before = fingerprint(tokenizer)
    expected = [tokenizer.encode(text).ids for text in TEXTS]
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=8)
    assert fingerprint(tokenizer) == before
    lifted = vocabulary_of(tokenizer, eos=EOS)
    assert lifted.prefix == (0,)
    assert [lifted.tokenizer.encode(text).ids for text in TEXTS] == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"add_bos_token": False},
        {"add_eos_token": True},
        {"add_prefix_space": True},
        {"tokenizer_class": "TokenizersBackend"},
        {"tokenizer_class": None},
        {"eos_token": {"content": EOS, "__type": "AddedToken"}},
    ],
)
def test_a_folder_is_read_as_transformers_reads_it(tmp_path, changes):
    from transformers import AutoTokenizer

    save_tokenizer(train_tokenizer(TEXTS, "bpe"), tmp_path / "tok")
    path = tmp_path / "tok" / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tok")
    found, save = load_vocabulary(str(tmp_path / "tok"))
    ids = loaded("Number 7 is odd.").input_ids
    body = found.tokenizer.encode("Number 7 is odd.", add_special_tokens=False).ids
    whole = [*found.prefix, *body]
    assert whole == (ids[:-1] if ids[-1] == loaded.eos_token_id else ids)
    assert (found.eos, found.bos) == (loaded.eos_token_id, loaded.bos_token_id)
    assert fingerprint(found.tokenizer) == fingerprint(loaded.backend_tokenizer)
    save(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again("Number 7 is odd.").input_ids == ids
    assert again.chat_template == loaded.chat_template


def test_a_stretch_that_cannot_be_cut_is_called_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(encode, "RUN_CHARACTERS", 100)
    tokenizer = Tokenizer(models.BPE({c: n for n, c in enumerate("\u2581abc")}, []))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    llama = vocabulary_of(tokenizer, eos="<s>")
    for name, text in (("words", "ab c " * 90 + "b"), ("run", "ab" * 60)):
        (tmp_path / f"{name}.txt").write_text(text)
    with open_corpus(Corpus(data=[str(tmp_path / "words.txt")], val_fraction=0)) as corpus:
        corpus.write(tmp_path / "words", llama)
    split = open_tokens(tmp_path / "words").train
    written = split.window(0, split.tokens).tolist()
    assert written == [*tokenizer.encode("ab c " * 90 + "b").ids, tokenizer.token_to_id("<s>")]
    with (
        open_corpus(Corpus(data=[str(tmp_path / "run.txt")], val_fraction=0)) as corpus,
        pytest.raises(DataError, match="without a single space between words") as caught,
    ):
        corpus.write(tmp_path / "run", llama)
    assert caught.value.file == str(tmp_path / "run.txt")
