import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from llmctl.data import scan as scan_module
from llmctl.data.shards import open_tokens
from llmctl.data.tokenizer.train import fingerprint
from tests.hub_server import online
from tests.processes import run_llmctl
from tests.run_files import read_rows, write_texts

PROSE = "The cat sees the river. A dog, they say, follows my friend; isn't it so?\n"


def tokenize(cli, out, data, *arguments):
    """Run the command; the final object, the index and the tokenizer."""
    result = cli("tokenize", "--data", data, "-o", out, "--json", *arguments)
    assert result.code == 0, result.err
    tokenizer = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return json.loads(result.out), open_tokens(out), tokenizer


def documents(split, index):
    """The ids of each document, eos left out."""
    ids = split.window(0, split.tokens)
    stops = np.flatnonzero(ids == index.eos_token_id)
    assert stops[-1] == len(ids) - 1
    return [part.tolist() for part in np.split(ids, stops + 1)[:-1]]


@pytest.mark.parametrize("algorithm", ["bpe", "unigram", "wordpiece", "byte", "char"])
def test_shards_hold_every_document_between_bos_and_eos(cli, tmp_path, algorithm):
    texts = [PROSE * n + f"Number {n}." for n in range(1, 30)]
    data = write_texts(tmp_path / "a.jsonl", texts)
    _, index, tokenizer = tokenize(cli, tmp_path / "run", data, "--algorithm", algorithm)
    found = documents(index.train, index) + documents(index.val, index)
    expected = [[*tokenizer.encode(text).ids, index.eos_token_id] for text in texts]
    assert sorted(found) == sorted(expected)
    assert all(ids[0] == index.bos_token_id for ids in found)
    assert index.dtype == "<u2"
    assert index.tokenizer_sha256 == fingerprint(tokenizer)
    assert index.train.bytes + index.val.bytes == sum(len(t.encode()) for t in texts)
    assert index.train.documents + index.val.documents == len(texts)


def test_the_report_says_what_is_there(cli, tmp_path):
    texts = [PROSE * n for n in (4, 9, 1, 6)]
    data = write_texts(tmp_path / "a.jsonl", texts)
    result, index, tokenizer = tokenize(
        cli, tmp_path / "run", data, "--algorithm", "byte", "--special-token", "<|x|>"
    )
    lengths = [len(tokenizer.encode(text).ids) + 1 for text in texts]
    assert result["stage"] == "tokenize"
    assert result["status"] == "completed"
    assert result["tokenizer"] == str(tmp_path / "run" / "tokenizer")
    assert result["tokens"] == sum(lengths) == index.train.tokens + index.val.tokens
    assert result["documents"] == 4
    assert result["bytes"] == 20 * len(PROSE)
    assert result["bytes_per_token"] == pytest.approx(20 * len(PROSE) / sum(lengths))
    assert result["tokens_per_second"] > 0
    assert result["unknown_rate"] == 0
    assert result["vocab_size"] == index.vocab_size == 256 + 6
    assert result["vocab_used"] == pytest.approx((len(set(PROSE)) + 2) / 262)
    assert result["longest_document"] == {"tokens": max(lengths), "file": str(data), "line": 2}
    assert result["shortest_document"] == {"tokens": min(lengths), "file": str(data), "line": 3}


def test_the_figures_stand_on_stderr_and_the_path_on_stdout(cli, tmp_path):
    data = write_texts(tmp_path / "a.jsonl", [PROSE * 3, PROSE * 5])
    result = cli("tokenize", "--data", data, "-o", tmp_path / "run")
    assert result.out == f"{tmp_path / 'run'}\n"
    for words in ("bytes per token", "tokens/s", "% unknown", "longest document", f"({data}:2)"):
        assert words in result.err


def test_an_end_that_is_also_called_unknown_is_not_counted(cli, tmp_path):
    """GPT-2's tokenizers call one token eos, bos and unk; some of them can give it for a word."""
    vocab = {"<end>": 0, "word": 1, "other": 2}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path / "own"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    roles = dict.fromkeys(("eos_token", "bos_token", "unk_token"), "<end>")
    config = {"tokenizer_class": "TokenizersBackend", **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, texts, rate in (
        ("all", ["word other", "word", "other other"], 0),
        ("most", ["word strange", "word", "other other"], 1 / 8),
    ):
        data = write_texts(tmp_path / f"{name}.jsonl", texts)
        flags = ("--tokenizer", folder, "--val-fraction", 0)
        assert tokenize(cli, tmp_path / name, data, *flags)[0]["unknown_rate"] == rate


def test_unknown_tokens_are_counted(cli, tmp_path):
    train = write_texts(tmp_path / "a.jsonl", ["ab" * 10])
    other = write_texts(tmp_path / "b.jsonl", ["abcc", "bacc"])
    tokenize(cli, tmp_path / "char", train, "--algorithm", "char", "--val-fraction", 0)
    result, _, _ = tokenize(cli, tmp_path / "run", other, "--tokenizer", tmp_path / "char")
    assert result["unknown_rate"] == 4 / 12


def test_a_manifest_names_inputs_and_outputs_with_hashes(cli, tmp_path, corpus):
    import hashlib

    tokenize(cli, tmp_path / "run", corpus)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    digest = hashlib.sha256(corpus.read_bytes()).hexdigest()
    entry = {"role": "data", "path": str(corpus), "kind": "jsonl", "sha256": digest}
    assert manifest["inputs"] == [entry]
    written = {entry["path"] for entry in manifest["outputs"]}
    assert {"tokens/train-00000.bin", "tokens/index.json", "tokenizer/tokenizer.json"} <= written


def test_one_document_is_split_by_position_as_nanogpt_does(cli, tmp_path):
    text = "".join(f"{n} is a number.\n" for n in range(3000))
    (tmp_path / "a.txt").write_text(text)
    result, index, tokenizer = tokenize(
        cli, tmp_path / "run", tmp_path / "a.txt", "--algorithm", "char"
    )
    cut = int(len(text) * 0.9)
    assert (index.train.bytes, index.val.bytes) == (cut, len(text) - cut)
    for split, part in ((index.train, text[:cut]), (index.val, text[cut:])):
        (ids,) = documents(split, index)
        assert tokenizer.decode(ids) == part
    assert result["documents"] == 1


def test_a_cut_by_position_falls_between_characters(cli, tmp_path):
    (tmp_path / "a.txt").write_text("é😀ab " * 1001)
    _, index, tokenizer = tokenize(cli, tmp_path / "run", tmp_path / "a.txt", "--algorithm", "byte")
    (train,), (val,) = documents(index.train, index), documents(index.val, index)
    assert tokenizer.decode(train) + tokenizer.decode(val) == "é😀ab " * 1001


@pytest.mark.parametrize("small_bytes", [64 << 20, 0])
def test_equal_documents_are_on_one_side(cli, tmp_path, monkeypatch, small_bytes):
    monkeypatch.setattr(scan_module, "SMALL_BYTES", small_bytes)
    texts = [f"{PROSE}{n % 50}" for n in range(500)]
    data = write_texts(tmp_path / "a.jsonl", texts)
    _, index, _ = tokenize(cli, tmp_path / "run", data, "--val-fraction", 0.2)
    train = {tuple(ids) for ids in documents(index.train, index)}
    val = {tuple(ids) for ids in documents(index.val, index)}
    assert len(train) + len(val) == 50
    assert not train & val
    assert 3 <= len(val) <= 20


def test_the_validation_share_is_exact_in_a_small_corpus(cli, tmp_path, corpus):
    _, index, _ = tokenize(cli, tmp_path / "run", corpus, "--val-fraction", 0.05)
    assert (index.train.documents, index.val.documents) == (380, 20)


def test_the_split_does_not_depend_on_order_or_file(cli, tmp_path):
    texts = [f"{PROSE}{n}" for n in range(40)]
    write_texts(tmp_path / "a.jsonl", texts)
    write_texts(tmp_path / "b.jsonl", texts[::-1])
    sides = []
    for name in "ab":
        arguments = ("--algorithm", "byte")
        _, index, _ = tokenize(cli, tmp_path / name, tmp_path / f"{name}.jsonl", *arguments)
        sides.append(sorted(documents(index.val, index)))
    assert len(sides[0]) == 4
    assert sides[0] == sides[1]


def test_documents_in_many_pieces_keep_their_side(cli, tmp_path, monkeypatch):
    from llmctl.data import documents as reading

    folder = tmp_path / "data"
    folder.mkdir()
    for n in range(12):
        (folder / f"{n}.txt").write_text(f"{n} {PROSE}" * (n + 1))
    sides = []
    for block in (1 << 20, 100):
        monkeypatch.setattr(reading, "BLOCK_BYTES", block)
        _, index, _ = tokenize(cli, tmp_path / str(block), folder, "--val-fraction", 0.3)
        sides.append((documents(index.train, index), documents(index.val, index)))
    assert sides[0] == sides[1]
    assert len(sides[0][1]) == 4


def test_without_a_validation_share_there_is_no_val_split(cli, tmp_path, corpus):
    result, index, _ = tokenize(cli, tmp_path / "run", corpus, "--val-fraction", 0)
    assert index.val is None
    assert index.train.documents == 400
    assert result["val_tokens"] == 0


def test_val_data_is_the_validation_split(cli, tmp_path, corpus):
    val = write_texts(tmp_path / "val.jsonl", ["Quite another text.", "And one more."])
    _, index, tokenizer = tokenize(cli, tmp_path / "run", corpus, "--val-data", val)
    assert [tokenizer.decode(ids) for ids in documents(index.val, index)] == [
        "Quite another text.",
        "And one more.",
    ]
    assert index.train.documents == 400
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [entry["role"] for entry in manifest["inputs"]] == ["data", "val-data"]


def test_a_tokenizer_can_be_used_again(cli, tmp_path, tokens, corpus):
    _, index, tokenizer = tokenize(cli, tmp_path / "run", corpus, "--tokenizer", tokens)
    before = open_tokens(tokens)
    assert index.tokenizer_sha256 == before.tokenizer_sha256 == fingerprint(tokenizer)
    first, second = (i.train.window(0, i.train.tokens) for i in (before, index))
    assert (first == second).all()


def test_a_foreign_tokenizer_frames_documents_its_own_way(cli, tmp_path, corpus):
    """A GPT-2 style tokenizer has no bos in front, and its files hold no class that we know."""
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([PROSE], trainer)
    folder = tmp_path / "foreign"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    _, index, saved = tokenize(cli, tmp_path / "run", corpus, "--tokenizer", folder)
    texts = [row["text"] for row in read_rows(corpus)]
    expected = [[*saved.encode(text).ids, 0] for text in texts]
    assert sorted(documents(index.train, index) + documents(index.val, index)) == sorted(expected)
    assert index.eos_token_id == 0
    assert index.bos_token_id is None


def test_the_same_call_writes_the_same_bytes(cli, tmp_path, corpus):
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        tokenize(cli, run, corpus)
    for name in ("tokens/train-00000.bin", "tokens/val-00000.bin", "tokenizer/tokenizer.json"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()


def test_a_sample_trains_the_tokenizer_on_the_whole_span(cli, tmp_path):
    texts = [f"{'ab' if n < 100 else 'yz'} " * 200 for n in range(200)]
    data = write_texts(tmp_path / "a.jsonl", [f"{t}{n}" for n, t in enumerate(texts)])
    _, _, tokenizer = tokenize(cli, tmp_path / "run", data, "--train-bytes", 12_000)
    assert {"ab", "yz"} <= {t.removeprefix("Ġ") for t in tokenizer.get_vocab()}


def test_a_dry_run_reads_all_and_writes_nothing(cli, tmp_path, corpus):
    out = tmp_path / "run"
    result = cli("tokenize", "--data", corpus, "-o", out, "--dry-run", "--vocab-size", 300)
    assert result.code == 0, result.err
    recipe = yaml.safe_load(result.out)
    assert (recipe["stage"], recipe["vocab_size"]) == ("tokenize", 300)
    assert "would encode 400 documents" in result.err
    assert not out.exists()
    corpus_with_error = write_texts(tmp_path / "a.jsonl", ["fine"])
    corpus_with_error.write_text(corpus_with_error.read_text() + "{\n")
    assert cli("tokenize", "--data", corpus_with_error, "-o", out, "--dry-run").code == 3


def test_tokenizing_needs_no_torch_and_reads_stdin(tmp_path):
    program = (
        "import sys; from llmctl.cli import main\n"
        "try: main()\n"
        "finally: print({'torch', 'transformers', 'datasets'} & set(sys.modules), file=sys.stderr)"
    )
    out = tmp_path / "run"
    ran = subprocess.run(
        [sys.executable, "-c", program, "tokenize", "--data", "-", "-o", out, "-q"],
        input=PROSE * 50,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == f"{out}\n"
    assert ran.stderr == "set()\n"
    assert open_tokens(out).train.documents == 1


BAD = {
    "empty file": ({"a.txt": b""}, 3, "an empty corpus"),
    "blank lines": ({"a.txt": b"\n \r\n\t\n"}, 3, "an empty corpus"),
    "blank jsonl": ({"a.jsonl": b"\n\n"}, 3, "an empty corpus"),
    "header only": ({"a.csv": b"text\n"}, 3, "an empty corpus"),
    "empty texts": ({"a.jsonl": b'{"text": ""}\n'}, 3, "an empty corpus"),
    "invalid UTF-8": ({"a.txt": b"abc\xff"}, 3, "a.txt: not UTF-8 at byte 3"),
    "UTF-16": ({"a.txt": "\ufeffhello".encode("utf-16-le")}, 3, "UTF-16 byte-order mark"),
    "bad line": ({"a.jsonl": b'{"text": "a"}\n{"text"\n'}, 3, "a.jsonl:2: not JSON"),
    "missing column": ({"a.jsonl": b'{"body": "a"}\n'}, 3, "a.jsonl:1: no column `text`"),
    "null text": ({"a.jsonl": b'{"text": null}\n'}, 3, "a.jsonl:1: `text` is null"),
    "surrogate": ({"a.jsonl": b'{"text": "\\udc00"}\n'}, 3, "a.jsonl:1: `text` has half"),
    "same documents": ({"a.jsonl": b'{"text": "a"}\n' * 9}, 3, "cannot be split"),
    "one letter": ({"a.txt": b"a"}, 3, "cannot be split"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_refused_and_leaves_nothing(cli, tmp_path, name):
    files, code, message = BAD[name]
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
        out = tmp_path / "run"
        result = cli("tokenize", "--data", tmp_path / file, "-o", out)
    assert result.code == code
    assert message in result.err
    assert "Traceback" not in result.err
    assert result.err.count("\n") <= 3
    assert result.out == ""
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--data", "none.txt"), 3, "none.txt: no such file"),
        (("--data", "nothing"), 3, "nothing: no such file"),
        (("--data", "owner/name"), 6, "the Hub is switched off (HF_HUB_OFFLINE)"),
        (("--data", "builtin:none"), 3, "there is builtin:python-docs"),
        (("--data", "a.txt", "--vocab-size", "9000"), 3, "larger than the corpus allows"),
        (("--data", "a.txt", "--vocab-size", "100"), 2, "the smallest possible here is 261"),
        (("--data", "a.txt", "--val-data", "a.txt"), 3, "a.txt: this document is in --val-data"),
        (("--data", "a.txt", "--val-data", "none.txt"), 3, "none.txt: no such file"),
        (("--data", "a.txt", "--special-token", "<|eos|>"), 2, "in the vocabulary already"),
        (("--data", "a.txt", "--tokenizer", "./none"), 4, "no such tokenizer folder"),
        (("--data", "a.txt", "--tokenizer", "owner/name"), 6, "the Hub is switched off"),
        (("--data", "a.txt", "--tokenizer", "empty"), 4, "no tokenizer in this folder"),
        (("--data", "a.txt", "--tokenizer", "broken"), 4, "not a tokenizer"),
        (("--data", "a.txt", "--tokenizer", "endless"), 4, "no eos token"),
        (("--data", "a.txt", "--text-colum", "b"), 2, "--text-column"),
        ((), 2, "--data is required"),
    ],
)
def test_bad_arguments_are_refused_and_leave_nothing(
    cli, tmp_path, monkeypatch, tokens, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(PROSE * 40)
    plain = '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    sound = (tokens / "tokenizer" / "tokenizer.json").read_text()
    for name, content in (("empty", None), ("broken", "{}"), ("endless", sound)):
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "tokenizer_config.json").write_text(plain)
            (tmp_path / name / "tokenizer.json").write_text(content)
    result = cli("tokenize", *arguments, "-o", "run")
    assert result.code == code, result.err
    assert message in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "run").exists()


def test_a_stretch_without_spaces_over_the_limit_is_refused(cli, tmp_path, monkeypatch):
    from llmctl.data import corpus
    from llmctl.data.tokenizer import encode

    for module in (encode, corpus):
        monkeypatch.setattr(module, "RUN_CHARACTERS", 50_000)
    (tmp_path / "a.txt").write_text(PROSE + "x" * 60_000)
    result = cli("tokenize", "--data", tmp_path / "a.txt", "-o", tmp_path / "run")
    assert result.code == 3
    assert "50,000 characters, the limit" in result.err
    assert not (tmp_path / "run").exists()
    result = cli(
        "tokenize", "--data", tmp_path / "a.txt", "-o", tmp_path / "run", "--algorithm", "byte"
    )
    assert result.code == 0, result.err


def test_an_error_while_encoding_leaves_nothing(cli, tmp_path, monkeypatch, corpus):
    from llmctl.data.corpus import SplitWriter
    from llmctl.errors import ResourceError

    def fail(self):
        raise ResourceError("no space")

    monkeypatch.setattr(SplitWriter, "index_entry", fail)
    result = cli("tokenize", "--data", corpus, "-o", tmp_path / "run")
    assert result.code == 5
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("wrong_encoder")
def test_a_wrong_fast_encoder_is_found_out_and_not_used(cli, tmp_path, corpus):
    result = cli("tokenize", "--data", corpus, "-o", tmp_path / "run", "--vocab-size", 300)
    assert result.code == 0
    assert "fastokens disagrees with tokenizers" in result.err
    index = open_tokens(tmp_path / "run")
    tokenizer = Tokenizer.from_file(str(tmp_path / "run" / "tokenizer" / "tokenizer.json"))
    texts = [row["text"] for row in read_rows(corpus)]
    expected = sorted([*tokenizer.encode(text).ids, 1] for text in texts)
    assert sorted(documents(index.train, index) + documents(index.val, index)) == expected
    assert not list((tmp_path / "run" / "tokens").glob(".*"))


@pytest.fixture
def wrong_encoder(monkeypatch):
    import types

    class Wrong:
        @staticmethod
        def from_json_str(content):
            return Wrong()

        def encode_batch_flat(self, texts, **_):
            ids = np.zeros(len(texts), "<u4")
            return ids.tobytes(), np.arange(len(texts) + 1, dtype="<u8").tobytes()

    monkeypatch.setitem(sys.modules, "fastokens", types.SimpleNamespace(Tokenizer=Wrong))


def test_a_hub_that_cannot_be_reached_is_told_at_once(tmp_path):
    nowhere = online("http://127.0.0.1:9", tmp_path / "home")
    command = ("tokenize", "--data", "owner/name", "-o", tmp_path / "run")
    ran = run_llmctl(*command, seconds=60, **nowhere)
    assert ran.returncode == 6
    assert "the Hub cannot be reached" in ran.stderr
    assert not (tmp_path / "run").exists()


def test_bad_rows_are_left_out_up_to_a_number(cli, corpus, tmp_path):
    """The tokens are those of the good rows alone."""
    good = corpus.read_text().splitlines()
    bad = ["not JSON", '{"text": 3}', '{"other": "a"}']
    (tmp_path / "good.jsonl").write_text("\n".join(good) + "\n")
    (tmp_path / "mixed.jsonl").write_text("\n".join([*good[:9], *bad, *good[9:]]) + "\n")

    def run(name, *flags):
        data = ("--data", tmp_path / f"{name}.jsonl", "--vocab-size", 320)
        return cli("tokenize", *data, *flags, "-o", tmp_path / name)

    assert run("good").code == 0
    few = run("mixed", "--skip-bad-rows", 2)
    assert (few.code, "mixed.jsonl:12" in few.err) == (3, True), few.err
    mixed = run("mixed", "--skip-bad-rows", 3)
    assert mixed.code == 0, mixed.err
    assert "left out 3 rows that cannot be used, the first: " in mixed.err
    for file in ("tokens/train-00000.bin", "tokens/val-00000.bin", "tokenizer/tokenizer.json"):
        assert (tmp_path / "mixed" / file).read_bytes() == (tmp_path / "good" / file).read_bytes()
