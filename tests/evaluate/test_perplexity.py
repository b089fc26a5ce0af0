import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from llmctl.errors import ModelError
from llmctl.evaluate.aggregate import compute_figures
from llmctl.evaluate.perplexity import (
    Window,
    encode_documents,
    make_windows,
    window_logits,
    window_nats,
)
from llmctl.models.loading import load_causal_lm, load_tokenizer
from tests.run_files import write_texts


def measure(model, windows, text):
    row = {"nats": math.fsum(window_nats(model, windows))}
    row |= {"tokens": sum(window.scored for window in windows), "bytes": len(text)}
    return compute_figures([row], ["perplexity"])


@pytest.fixture(scope="module")
def model(base):
    return load_causal_lm(str(base), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(str(base))


@pytest.mark.parametrize("stride", [None, 1, 3, 8])
@pytest.mark.parametrize("lengths", [[1], [2, 9, 10, 25], [8, 0, 100]])
def test_every_token_but_the_first_of_a_document_is_scored_once(lengths, stride):
    documents = [[100 * d + i for i in range(length)] for d, length in enumerate(lengths)]
    windows = make_windows(documents, context=8, stride=stride)
    scored = [token for window in windows for token in window.tokens[window.scored_from :]]
    assert scored == [token for document in documents for token in document[1:]]
    for window in windows:
        assert len(window.tokens) <= 9
        assert window.scored_from >= 1
        assert len({token // 100 for token in window.tokens}) == 1
        assert window.scored == len(window.tokens) - window.scored_from > 0


def test_half_the_context_stands_before_all_but_the_first_tokens():
    windows = make_windows([range(50)], context=8)
    assert windows[0] == Window(tuple(range(9)), 1)
    assert windows[1] == Window(tuple(range(4, 13)), 5)
    assert all(window.scored_from == 5 for window in windows[1:])


def test_perplexity_is_the_exponential_of_the_mean_loss_of_a_plain_forward(model, tokenizer):
    text = "The cat sees the river. A dog likes many stars."
    (document,) = encode_documents(tokenizer, [text])
    tokens = torch.tensor([document])
    with torch.no_grad():
        plain = model(input_ids=tokens, labels=tokens).loss
    figures = measure(model, make_windows([document], context=32), text)
    assert figures["tokens"] == len(document) - 1
    assert figures["loss"] == pytest.approx(float(plain), rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(float(plain)), rel=1e-5)
    bits = float(plain) * (len(document) - 1) / math.log(2) / len(text)
    assert figures["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_windows_cost_what_each_position_costs_by_itself(model, tokenizer):
    documents = encode_documents(tokenizer, ["The old man paints a song. " * 6, "A dog."])
    windows = make_windows(documents, context=16, stride=5)
    nats = window_nats(model, windows)
    for window, found in zip(windows, nats, strict=True):
        wanted = 0.0
        for place in range(window.scored_from, len(window.tokens)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([window.tokens[:place]])).logits[0, -1]
            wanted -= float(torch.log_softmax(logits.double(), -1)[window.tokens[place]])
        assert found == pytest.approx(wanted, abs=1e-4)


def test_logits_are_those_of_the_scored_positions_whatever_the_batches(
    model, tokenizer, monkeypatch
):
    documents = encode_documents(
        tokenizer, ["A dog finds the house. " * 5, "The cat.", "My friend"]
    )
    windows = make_windows(documents, context=12)
    logits, targets = window_logits(model, windows)
    assert logits.dtype == torch.float32
    assert logits.shape == (len(targets), model.config.vocab_size)
    loss = cross_entropy(logits.double(), targets, reduction="sum")
    assert float(loss) == pytest.approx(math.fsum(window_nats(model, windows)), rel=1e-5)
    monkeypatch.setattr("llmctl.evaluate.perplexity.BATCH_TOKENS", 13)
    alone, same = window_logits(model, windows)
    assert torch.equal(targets, same)
    torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)


def test_what_fills_a_batch_changes_nothing(model, tokenizer):
    """Rows end in padding, which is token 0 here: the neighbour's length must not matter."""
    short, long = encode_documents(tokenizer, ["A dog.", "The cat follows the garden. " * 3])
    (one,) = make_windows([short], context=30)
    alone = window_nats(model, [one])
    beside = window_nats(model, [one, *make_windows([long], context=30)])
    assert beside[0] == pytest.approx(alone[0], rel=1e-6)


def test_documents_are_framed_as_in_pretraining(tokenizer):
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    plain, spelled, empty = encode_documents(tokenizer, ["A dog", "a <|eos|> b", ""])
    assert plain[0] == bos
    assert plain[-1] == eos
    assert spelled.count(eos) == 1
    assert tokenizer.decode(spelled[1:-1]) == "a <|eos|> b"
    assert empty == [bos, eos]
    assert encode_documents(tokenizer, ["A dog"], end=False) == [plain[:-1]]


@pytest.mark.parametrize("frame", ["{eos} $A", "$A {eos}", "{eos} $A {eos}"])
def test_eos_before_a_text_is_told_from_eos_after_it(tokenizer, frame):
    """OPT's tokenizer puts EOS before texts, as BOS; T5's puts it after them."""
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    name, eos = tokenizer.eos_token, tokenizer.eos_token_id
    framed = deepcopy(tokenizer)
    framed.backend_tokenizer.post_processor = TemplateProcessing(
        single=frame.format(eos=name), special_tokens=[(name, eos)]
    )
    body = tokenizer("A dog", add_special_tokens=False)["input_ids"]
    assert encode_documents(framed, ["A dog"]) == [[eos, *body, eos]]
    assert encode_documents(framed, ["A dog"], end=False) == [[eos, *body]]


def test_a_tokenizer_without_prefix_begins_where_the_last_document_ended(tokenizer):
    from copy import deepcopy

    from tokenizers.processors import ByteLevel

    bare = deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = ByteLevel()
    (document,) = encode_documents(bare, ["A dog"])
    assert document[0] == document[-1] == tokenizer.eos_token_id
    assert document.count(tokenizer.bos_token_id) == 0


def test_val_loss_is_that_of_pretrain(cli, tokens, tmp_path):
    """One document, whole: the stream that pretraining validates on is the document itself."""
    text = "The cat sees the river. A dog likes many stars. Our teacher paints a song. " * 4
    write_texts(tmp_path / "val.jsonl", [text])
    write_texts(tmp_path / "train.jsonl", [f"{i} The cat likes a red ball." for i in range(60)])
    shape = ("--layers", 1, "--hidden", 16, "--heads", 1, "--context", 32, "--batch-size", 2)
    result = cli(
        *("pretrain", "--data", tmp_path / "train.jsonl", "--val-data", tmp_path / "val.jsonl"),
        *("--tokenizer", tokens, *shape, "--max-steps", 2, "--threads", 1),
        *("--eval-tokens", 0, "--json", "-o", tmp_path / "run"),
    )
    assert result.code == 0, result.err
    metrics = json.loads(result.out)
    model = load_causal_lm(str(tmp_path / "run"), dtype=torch.float32)
    documents = encode_documents(load_tokenizer(str(tmp_path / "run")), [text])
    windows = make_windows(documents, context=32, stride=32)
    figures = measure(model, windows, text)
    assert figures["loss"] == pytest.approx(metrics["val_loss"], rel=1e-5)
    # pretrain counts a token more, the first, when it says how many tokens a byte has
    share = figures["tokens"] / (figures["tokens"] + 1)
    assert figures["bits_per_byte"] == pytest.approx(metrics["val_bits_per_byte"] * share, rel=1e-5)


def test_a_token_that_the_model_lacks_is_refused(model):
    with pytest.raises(ModelError, match="another model's"):
        window_nats(model, [Window((1, 100_000), 1)])


def test_figures():
    figures = compute_figures([{"nats": 20.0, "tokens": 10, "bytes": 40}], ["perplexity"])
    assert figures["loss"] == 2.0
    assert figures["perplexity"] == pytest.approx(math.e**2)
    assert figures["bits_per_byte"] == pytest.approx(20 / math.log(2) / 40)
