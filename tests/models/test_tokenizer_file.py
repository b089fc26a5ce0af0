"""A tokenizer is its tokenizer.json, whatever class opens it, and draws no lots."""

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from llmctl.console import set_up
from llmctl.data.tokenizer.load import load_vocabulary
from llmctl.errors import ModelError
from llmctl.models.loading import load_tokenizer
from llmctl.models.tokenizer_file import TORTURE
from tests.conftest import sentences

SHORT = "it's what we don't say"
WORDS = [*sentences(200), *[SHORT] * 50, "1234567 and 7654321.", "x\n\n  y\n"]
SPACES = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"\s?\S+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
"""A split at spaces only: `it's` is one word, and two in GPT-2's."""
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(split: pre_tokenizers.PreTokenizer, normalizer=None, texts=WORDS) -> Tokenizer:
    """Train byte-level BPE with this split."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = split, decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return made


def llama_like() -> Tokenizer:
    """BPE over characters, with bytes to fall back on, in the layout of Llama 2's file."""
    alphabet = sorted({"\u2581", *"".join(WORDS)} - {" "})
    vocab = ["<unk>", "<s>", "<|endoftext|>", *(f"<0x{b:02X}>" for b in range(256)), *alphabet]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("\u2581", "\u2581")]
    vocab += [a + b for a, b in merges]
    made = Tokenizer(
        models.BPE(
            {t: i for i, t in enumerate(dict.fromkeys(vocab))},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    made.add_special_tokens(["<unk>", "<s>", "<|endoftext|>"])
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return made


def folder_of(folder: Path, made: Tokenizer, class_name: str | None, **config: object) -> Path:
    """Write a folder as models on the Hub have it."""
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    roles = dict.fromkeys(("eos_token", "bos_token"), "<|endoftext|>")
    named = {} if class_name is None else {"tokenizer_class": class_name}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles | named))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def ids_of(made: Tokenizer, text: str) -> list[int]:
    return list(made.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("config", [{}, {"model_type": "gpt2"}], ids=["alone", "model"])
@pytest.mark.parametrize("name", ["GPT2Tokenizer", None])
def test_a_class_that_splits_otherwise_is_refused(cli, tmp_path, corpus, name, config):
    if name is None and not config:
        return  # nothing names a class: the file is taken as it is
    made = byte_level(SPACES)
    folder = folder_of(tmp_path / "own", made, name, **config)
    opened = AutoTokenizer.from_pretrained(folder)
    assert opened(SHORT)["input_ids"] != ids_of(made, SHORT)  # the fault, in transformers
    for load in (load_tokenizer, load_vocabulary):
        with pytest.raises(ModelError) as refusal:
            load(str(folder))
        assert "opens as GPT2Tokenizer" in refusal.value.message
    result = cli("tokenize", "--data", corpus, "--tokenizer", folder, "-o", tmp_path / "run")
    assert result.code == 4
    assert 'set "tokenizer_class": "TokenizersBackend" in tokenizer_config.json' in result.err
    content = json.loads((folder / "tokenizer_config.json").read_text())
    content["tokenizer_class"] = "TokenizersBackend"  # as the hint has it
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    assert load_tokenizer(str(folder))(SHORT)["input_ids"] == ids_of(made, SHORT)


@pytest.mark.parametrize("name", ["T5TokenizerFast", 7, ["GPT2Tokenizer"]])
def test_a_class_that_does_not_open_its_file_is_named_with_the_fix(cli, tmp_path, corpus, name):
    """A class of another kind of vocabulary, or no name of a class at all."""
    made = byte_level(SPACES)
    folder = folder_of(tmp_path / "own", made, name)
    result = cli("tokenize", "--data", corpus, "--tokenizer", folder, "-o", tmp_path / "run")
    assert result.code == 4
    assert f"does not load as {name}, its `tokenizer_class`: " in result.err
    assert 'set "tokenizer_class": "TokenizersBackend" in tokenizer_config.json' in result.err
    config = json.loads((folder / "tokenizer_config.json").read_text())
    fixed = json.dumps(config | {"tokenizer_class": "TokenizersBackend"})
    (folder / "tokenizer_config.json").write_text(fixed)  # as the hint has it
    assert load_tokenizer(str(folder))(SHORT)["input_ids"] == ids_of(made, SHORT)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelError, match="not a tokenizer") as refused:
        load_tokenizer(str(folder))
    assert refused.value.hint is None


def test_the_file_is_used_where_it_is_wanted_whatever_the_type_of_the_model(tmp_path, capsys):
    made = byte_level(SPACES)
    folder = folder_of(tmp_path / "own", made, "PreTrainedTokenizerFast", model_type="qwen2")
    text = f"e\u0301 {SHORT}"
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] != ids_of(made, text)
    set_up()
    loaded = load_tokenizer(str(folder))
    assert loaded(text)["input_ids"] == ids_of(made, text)
    assert load_vocabulary(str(folder))[0].tokenizer.encode(text).ids == ids_of(made, text)
    assert "as Qwen2Tokenizer this tokenizer gives other tokens" in capsys.readouterr().err


def test_the_file_is_used_where_only_spaces_are_cut_otherwise(tmp_path, capsys):
    """SmolLM2 and StarCoder split digits off, and name a class that does not."""
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    made = byte_level(pre_tokenizers.Sequence(parts), texts=[*WORDS, *["in  2024"] * 50])
    folder = folder_of(tmp_path / "own", made, "GPT2Tokenizer", model_type="llama")
    assert AutoTokenizer.from_pretrained(folder)("it  9")["input_ids"] != ids_of(made, "it  9")
    set_up()
    loaded = load_tokenizer(str(folder))
    assert loaded("it  9")["input_ids"] == ids_of(made, "it  9")
    assert "as GPT2Tokenizer this tokenizer cuts runs of spaces" in capsys.readouterr().err
    loaded.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again("it  9")["input_ids"] == ids_of(made, "it  9")


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)), "GPT2Tokenizer"),
        (
            lambda: byte_level(
                pre_tokenizers.Sequence(
                    [
                        pre_tokenizers.Split(Regex(QWEN), "isolated"),
                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                    ]
                ),
                normalizers.NFC(),
            ),
            "Qwen2Tokenizer",
        ),
        (llama_like, "LlamaTokenizer"),
        (llama_like, "LlamaTokenizerFast"),
    ],
    ids=["gpt2", "qwen2", "llama", "llama-fast"],
)
def test_a_class_that_agrees_with_its_file_is_taken(tmp_path, build, name):
    made = build()
    loaded = load_tokenizer(str(folder_of(tmp_path / "own", made, name)))
    assert type(loaded).__name__ == name.removesuffix("Fast")
    assert loaded("the cat")["input_ids"][-4:] == ids_of(made, "the cat")[-4:]


def test_dropout_of_merges_is_switched_off(tmp_path, capsys):
    made = byte_level(SPACES)
    expected = ids_of(made, WORDS[0])
    made.model.dropout = 0.5
    folder = folder_of(tmp_path / "own", made, "TokenizersBackend")
    assert len({tuple(ids_of(made, WORDS[0])) for _ in range(20)}) > 1
    set_up()
    loaded = load_tokenizer(str(folder))
    vocabulary, save = load_vocabulary(str(folder))
    said = "its tokenizer drops 0.5 of the merges at random: switched off"
    assert capsys.readouterr().err.count(said) == 2
    for _ in range(20):
        assert loaded(WORDS[0])["input_ids"] == expected
        assert ids_of(vocabulary.tokenizer, WORDS[0]) == expected
    save(tmp_path / "saved")
    loaded.save_pretrained(tmp_path / "again")
    for name in ("saved", "again"):
        content = json.loads((tmp_path / name / "tokenizer.json").read_text())
        assert content["model"]["dropout"] is None


def test_a_tokenizer_that_is_its_file_opens_the_same_without_a_search(base):
    """Of a run: its config says TokenizersBackend, and no class is looked for."""
    folder = base / "model"
    declared = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert declared == "TokenizersBackend"
    ours, theirs = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(theirs)
    assert ours(TORTURE)["input_ids"] == theirs(TORTURE)["input_ids"]
    assert ours.special_tokens_map == theirs.special_tokens_map
    for name in ("chat_template", "padding_side", "truncation_side", "model_max_length"):
        assert getattr(ours, name) == getattr(theirs, name), name
