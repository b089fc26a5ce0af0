"""Sequences as arrays, packed, in batches, and the loss over what counts."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from llmctl.data.tokenized import EncodedSequence, collect, pack
from llmctl.errors import ModelError, UserError
from llmctl.training.batches import SequenceRows, on_device
from llmctl.training.model_checks import require_isolated
from llmctl.training.token_loss import require_chunkable, token_loss_of

SIZE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama():
    torch.manual_seed(0)
    shape = LlamaConfig(
        **SIZE, intermediate_size=32, num_key_value_heads=2, max_position_embeddings=64
    )
    return LlamaForCausalLM(shape).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    ).eval()


def gemma2():
    torch.manual_seed(0)
    shape = Gemma2Config(
        **SIZE,
        intermediate_size=32,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        final_logit_softcapping=2.0,
    )
    model = Gemma2ForCausalLM(shape).eval()
    model.lm_head.weight.data *= 100
    return model


def sequences(*lengths):
    """Sequences of these lengths, every second token trained on."""
    draw = np.random.default_rng(0)
    return collect(
        [
            [
                EncodedSequence(
                    draw.integers(1, 40, n).tolist(), [i % 2 == 1 for i in range(n)], True
                )
            ]
            for n in lengths
        ]
    )


def by_definition(model, data):
    """Summed loss and count of right guesses, each sequence alone, token by token."""
    loss, right, count = 0.0, 0, 0
    for number in range(len(data)):
        tokens, trained = data.sequence(number)
        ids = torch.from_numpy(tokens.astype("int64"))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        for place in range(1, len(ids)):
            if trained[place]:
                loss -= float(torch.log_softmax(logits[place - 1], -1)[ids[place]])
                right += int(logits[place - 1].argmax() == ids[place])
                count += 1
    return loss, right, count


def test_collect_and_select():
    data = collect(
        [
            [EncodedSequence([1, 2, 3], [False, True, True], True)],
            [],
            [EncodedSequence([4, 5], [False, True], False), EncodedSequence([6], [False], True)],
        ]
    )
    assert data.lengths.tolist() == [3, 2, 1]
    assert data.rows.tolist() == [0, 2, 2]
    assert data.trained_counts.tolist() == [2, 1, 0]
    kept = data.select(data.trained_counts > 0)
    assert kept.tokens.tolist() == [1, 2, 3, 4, 5]
    assert kept.rows.tolist() == [0, 2]
    assert data.select(np.array([2, 0])).tokens.tolist() == [6, 1, 2, 3]
    assert data.digest() != kept.digest()


def test_shortening_cuts_or_drops():
    data = sequences(3, 9, 5)
    cut = data.truncated(5, "cut")
    assert cut.lengths.tolist() == [3, 5, 5]
    assert cut.cut.tolist() == [False, True, False]
    assert cut.sequence(1)[0].tolist() == data.sequence(1)[0][:5].tolist()
    assert cut.sequence(2)[0].tolist() == data.sequence(2)[0].tolist()
    assert data.truncated(5, "drop").lengths.tolist() == [3, 5]


def test_packing_uses_every_sequence_once_and_no_bin_overflows():
    lengths = np.random.default_rng(1).integers(1, 65, 500)
    bins = pack(lengths, 64)
    assert sorted(n for numbers in bins for n in numbers) == list(range(500))
    assert max(lengths[numbers].sum() for numbers in bins) <= 64
    assert lengths.sum() / (64 * len(bins)) > 0.97


def test_packing_finds_the_fullest_bin():
    # 6 and 5 open bins with room for 4 and 5; 4 goes where it leaves nothing, 5 to the other
    bins = pack(np.array([4, 6, 5, 5]), 10)
    assert [sorted(numbers.tolist()) for numbers in bins] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("make", [llama, gpt2, gemma2])
@pytest.mark.parametrize("size", [None, 24])
def test_loss_is_that_of_each_sequence_alone(make, size):
    model, data = make(), sequences(4, 11, 7, 2, 9)
    rows = SequenceRows(data, pad=0, size=size)
    batch = rows.batch(range(len(rows)))
    assert batch["tokens"] == 33
    found = token_loss_of(model, chunked=False)(model, batch)
    loss, right, count = by_definition(model, data)
    assert float(found.losses.sum().detach()) == pytest.approx(loss, rel=1e-5)
    assert (int(found.correct), batch["weight"]) == (right, count)


@pytest.mark.parametrize("size", [None, 24])
def test_chunked_loss_has_the_same_value_and_gradients(size, monkeypatch):
    monkeypatch.setattr("llmctl.training.token_loss.CHUNK_LOGITS", 120)  # three positions
    model, rows = llama(), SequenceRows(sequences(4, 11, 7), pad=0, size=size)
    batch = rows.batch(range(len(rows)))
    gradients = []
    for chunked in (False, True):
        model.zero_grad()
        found = token_loss_of(model, chunked=chunked)(model, batch)
        found.losses.sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        gradients[-1]["loss"] = found.losses.sum().detach()
        gradients[-1]["correct"] = found.correct
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, rtol=1e-5, atol=1e-6)


def test_chunking_a_model_that_changes_its_logits_is_refused():
    rows = SequenceRows(sequences(9), pad=0)
    batch = rows.batch([0])
    model = llama()
    require_chunkable(model, token_loss_of(model, chunked=True), batch)
    capped = gemma2()
    with pytest.raises(UserError, match="changes its logits"):
        require_chunkable(capped, token_loss_of(capped, chunked=True), batch)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_packed_sequences_are_seen_to_be_apart(make):
    rows = SequenceRows(sequences(6, 7, 8), pad=0, size=30)
    assert require_isolated(make(), rows, 40) < 1e-5


def test_a_model_that_leaks_is_refused():
    class Leaking(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.device = llama(), torch.device("cpu")

        def forward(self, input_ids, position_ids, use_cache):
            return self.inner(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))

    rows = SequenceRows(sequences(6, 7, 8), pad=0, size=30)
    with pytest.raises(ModelError, match="leaks"):
        require_isolated(Leaking(), rows, 40)


def test_nothing_looks_at_padding():
    model, rows = llama(), SequenceRows(sequences(4, 11), pad=0)
    other = SequenceRows(rows.data, pad=7)
    losses = []
    for some in (rows, other):
        batch = some.batch([0, 1])
        losses.append(
            float(token_loss_of(model, chunked=False)(model, batch).losses.sum().detach())
        )
    assert losses[0] == losses[1]


def test_labels_start_no_sequence():
    rows = SequenceRows(sequences(4, 5, 6), pad=0, size=20)
    batch = rows.batch([0])
    starts = batch["position_ids"][0] == 0
    assert int(starts.sum()) == 3
    assert (batch["labels"][0][starts] == -100).all()


def test_micro_batches_add_up_to_the_batch():
    model, rows = llama(), SequenceRows(sequences(4, 11, 7, 2, 9, 3), pad=0)
    token_loss = token_loss_of(model, chunked=False)

    def gradient(parts):
        model.zero_grad()
        total = sum(int((rows.batch(p)["labels"] != -100).sum()) for p in parts)
        for part in parts:
            batch = rows.batch(part)
            (token_loss(model, batch).losses.sum() / total).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient([[0, 1, 2, 3, 4, 5]])
    for size in (1, 2, 4):
        parts = [list(range(i, min(6, i + size))) for i in range(0, 6, size)]
        torch.testing.assert_close(gradient(parts), whole, rtol=1e-5, atol=1e-6)


def test_cross_entropy_is_the_reference():
    model, data = llama(), sequences(8)
    batch = SequenceRows(data, pad=0).batch([0])
    logits = model(input_ids=batch["input_ids"]).logits
    expected = cross_entropy(
        logits[0, :-1], batch["labels"][0, 1:], ignore_index=-100, reduction="sum"
    )
    found = token_loss_of(model, chunked=False)(model, batch).losses.sum()
    torch.testing.assert_close(found, expected)


def test_the_experts_are_kept_in_balance():
    """Their balancing loss counts where the configuration wants it, as in transformers."""
    torch.manual_seed(0)
    shape = MixtralConfig(
        **SIZE,
        intermediate_size=16,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    )
    model = MixtralForCausalLM(shape).eval()
    batch = SequenceRows(sequences(9), pad=0).batch([0])
    found = token_loss_of(model, chunked=False)(model, on_device(batch, model.device))
    whole = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    ours = found.losses.sum() / batch["weight"] + found.balance
    torch.testing.assert_close(ours, whole)
