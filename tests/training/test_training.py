"""The pieces of training: schedules, batches, plans, the finite check, two processes as one."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmctl.config.commands.pretrain import PretrainConfig
from llmctl.errors import DataError, ResourceError, UserError
from llmctl.models import presets
from llmctl.training.batches import Order, Windows, validation_shares, validation_windows
from llmctl.training.hyperparameters import default_lr, for_pretraining, preset_for
from llmctl.training.optimizers import make_optimizers

IDS = type("Ids", (), {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2})


class Counting:
    """A split whose token number n is n."""

    def __init__(self, tokens):
        self.tokens, self.bytes = tokens, 2 * tokens

    def windows(self, starts, length):
        assert max(starts) + length <= self.tokens
        return np.asarray(starts)[:, None] + np.arange(length)


def plan(**flags):
    facts = {"parameters": 10**6, "train_tokens": 10**6, "context": 64, "world_size": 1}
    options = {"max_steps": "100", **flags}
    config = PretrainConfig(tokens="t", **options)
    return for_pretraining(config, **facts, device="cpu", sharded=False)


# --- learning rate


def test_warmup_rises_to_the_peak():
    made = plan(warmup=10, lr=1.0, schedule="cosine")
    assert [made.lr_at(i) for i in range(10)] == pytest.approx([(i + 1) / 10 for i in range(10)])


def test_cosine_ends_near_its_floor_and_is_halfway_in_the_middle():
    made = plan(warmup=0, lr=1.0, min_lr=0.2)
    assert made.lr_at(50) == pytest.approx(0.6)
    assert made.lr_at(99) == pytest.approx(0.2, abs=1e-3)


def test_linear_falls_evenly():
    made = plan(warmup=0, lr=1.0, min_lr=0.0, schedule="linear")
    assert np.diff([made.lr_at(i) for i in range(100)]) == pytest.approx([-0.01] * 99)


def test_wsd_holds_then_decays():
    made = plan(warmup=10, lr=1.0, min_lr=0.0, schedule="wsd", decay=0.3)
    assert [made.lr_at(i) for i in (10, 40, 69, 70)] == [1.0] * 4
    assert made.lr_at(85) == pytest.approx(0.5)


def test_constant_stays():
    made = plan(warmup=0, lr=1.0, schedule="constant")
    assert {made.lr_at(i) for i in range(100)} == {1.0}


def test_warmup_below_one_is_a_share():
    assert plan(warmup=0.07).warmup_steps == 7
    assert plan(warmup=30).warmup_steps == 30


# --- length and batch


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({"max_steps": "7"}, 7),
        ({"max_steps": None, "epochs": 2, "batch_size": 10}, round(2e6 / 640)),
        ({"max_steps": None, "tokens_budget": "640k", "batch_size": 10}, 1000),
        ({"max_steps": None, "tokens_per_parameter": 20, "batch_size": 10}, round(20e6 / 640)),
        ({"max_steps": None, "batch_size": 10}, round(10e6 / 640)),
    ],
)
def test_length(flags, steps):
    assert plan(**flags).max_steps == steps


def test_batch_tokens_are_reached_by_accumulation():
    assert plan(batch_size=4, batch_tokens="1024").grad_accum == 4
    with pytest.raises(UserError, match="not a multiple of the 256 tokens"):
        plan(batch_size=4, batch_tokens="1000")


def test_larger_models_learn_more_slowly_and_continued_ones_more_gently():
    rates = [default_lr(n, "pretrain") for n in (10**6, 10**8, 10**10)]
    assert rates == sorted(rates, reverse=True)
    assert default_lr(124_000_000, "pretrain") == 6e-4
    assert default_lr(124_000_000, "pretrain", continued=True) == 6e-5


def test_presets_grow_with_the_corpus_but_not_past_a_cpu():
    assert [preset_for(n, "cuda") for n in (10**5, 10**7, 10**8, 10**9, 10**11)] == [
        "nano",
        "tiny",
        "mini",
        "small",
        "medium",
    ]
    assert preset_for(10**11, "cpu") == "tiny"


def test_what_does_not_run_here_is_refused():
    with pytest.raises(ResourceError, match="adamw-8bit needs a GPU"):
        plan(optimizer="adamw-8bit")
    config = PretrainConfig(tokens="t", optimizer="muon")
    with pytest.raises(UserError, match="does not run under FSDP"):
        for_pretraining(
            config,
            parameters=1,
            train_tokens=1,
            context=1,
            world_size=1,
            device="cpu",
            sharded=True,
        )


# --- batches


def test_an_epoch_visits_every_window_once():
    windows = Windows(Counting(1000), context=10, seed=1)
    starts = windows.starts(0, windows.windows)
    assert len(set(starts.tolist())) == windows.windows
    assert set(np.diff(np.sort(starts)).tolist()) == {10}


def test_epochs_differ_and_seeds_differ_but_nothing_else_does():
    windows = Windows(Counting(1000), context=10, seed=1)
    first, second = (windows.starts(e * windows.windows, windows.windows) for e in (0, 1))
    assert first.tolist() != second.tolist()
    assert first.tolist() != Windows(Counting(1000), 10, seed=2).starts(0, len(first)).tolist()
    assert first.tolist() == Windows(Counting(1000), 10, seed=1).starts(0, len(first)).tolist()


def test_a_batch_across_an_epoch_is_its_two_parts():
    windows = Windows(Counting(1000), context=10, seed=1)
    whole = windows.starts(windows.windows - 3, 6).tolist()
    assert whole[:3] == windows.starts(windows.windows - 3, 3).tolist()
    assert whole[3:] == windows.starts(windows.windows, 3).tolist()


def test_targets_are_the_next_tokens():
    batch = Windows(Counting(1000), context=10, seed=1).batch(0, 4)
    assert torch.equal(batch["input_ids"] + 1, batch["targets"])
    assert batch["targets"].is_contiguous()
    assert batch["weight"] == batch["tokens"] == 40


def test_a_corpus_of_exactly_one_window_trains_and_a_shorter_one_is_refused():
    assert Windows(Counting(11), context=10, seed=1).starts(0, 3).tolist() == [0, 0, 0]
    with pytest.raises(DataError, match="10 training tokens, fewer than one sequence of 11"):
        Windows(Counting(10), context=10, seed=1)


@pytest.mark.parametrize("tokens", [11, 100, 101, 109, 111])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_visits_every_target_once(tokens, world):
    seen, rounds = [], set()
    for rank in range(world):
        batches = list(validation_windows(Counting(tokens), 10, 4, 0, rank, world))
        rounds.add(len(batches))
        for batch in (batch for batch, counts in batches if counts):
            assert torch.equal(batch["input_ids"] + 1, batch["targets"])
            seen += batch["targets"].flatten().tolist()
    assert sorted(seen) == list(range(1, tokens))
    assert len(rounds) == 1, "every rank takes part in as many forward passes"


def test_validation_limit_spreads_over_the_split():
    batches = validation_windows(Counting(10_001), 10, 8, 100)
    targets = torch.cat([batch["targets"].flatten() for batch, _ in batches])
    assert len(targets) == 100
    assert targets.min() < 20
    assert targets.max() > 9980


def order(size=10, **how):
    return Order(size, **{"batch_size": 4, "seed": 1, **how})


def test_every_example_once_an_epoch_whatever_the_split():
    whole = order()
    seen = [i for n in range(5) for i in whole.batch(n)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    for accum, world in ((2, 1), (1, 2), (2, 2)):
        ranks = [
            order(batch_size=4 // (accum * world), grad_accum=accum, rank=rank, world=world)
            for rank in range(world)
        ]
        for step in range(5):
            parts = [rank.batch(step * accum + number) for number in range(accum) for rank in ranks]
            assert [i for part in parts for i in part] == whole.batch(step) == whole.step(step)


@pytest.mark.parametrize("size", [64, 61])
def test_grouping_puts_alike_lengths_into_a_step(size):
    lengths = [(i * 37) % 101 for i in range(size)]
    grouped, mixed = order(size, lengths=lengths), order(size)
    batches, plain = ([some.batch(n) for n in range(2 * size // 4)] for some in (grouped, mixed))
    seen = [i for batch in batches for i in batch]
    assert sorted(seen[:size]) == list(range(size))
    assert sorted(seen[size : 2 * size]) == sorted(set(seen[size : 2 * size]))

    def spread(numbers):
        return max(lengths[i] for i in numbers) - min(lengths[i] for i in numbers)

    assert sum(map(spread, batches)) < sum(map(spread, plain)) / 4


def test_no_examples_are_refused():
    with pytest.raises(DataError, match="no training examples"):
        order(0)


@pytest.mark.parametrize("size", [1, 2, 7, 12])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_validates_as_many_batches_and_each_row_counts_once(size, world):
    lengths = [(i * 37) % 101 for i in range(size)]
    shares = [validation_shares(lengths, 2, rank, world) for rank in range(world)]
    counted = [i for share in shares for numbers, counts in share if counts for i in numbers]
    assert sorted(counted) == list(range(size))
    assert len({len(share) for share in shares}) == 1
    assert all(numbers for share in shares for numbers, _ in share)


# --- architectures and optimizers


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3", "mixtral"])
def test_the_count_without_allocation_is_the_count(arch):
    shape = PretrainConfig(tokens="t", arch=arch, layers=2, hidden=64, heads=4, context=32)
    config = presets.new_config(shape, "nano", 100, IDS)
    model = presets.new_model(config)
    assert presets.count_parameters(config) == sum(p.numel() for p in model.parameters())
    assert config.max_position_embeddings == 32


def test_presets_run_from_about_a_million_to_eight_billion():
    counts = []
    for name in presets.PRESETS:
        vocab = 1024 if name == "nano" else 128_256 if name == "8b" else 32_768
        config = presets.new_config(PretrainConfig(tokens="t"), name, vocab, IDS)
        counts.append(presets.count_parameters(config))
        dials = presets.PRESETS[name]
        if name != "nano":
            kv_width = dials.hidden // dials.heads * dials.kv_heads
            assert not {dials.hidden % 64, dials.intermediate % 64, kv_width % 64} - {0}
    assert counts == sorted(counts)
    assert 0.8e6 < counts[0] < 1.2e6
    assert 8.0e9 < counts[-1] < 8.1e9


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"hidden": 100, "heads": 3}, "--hidden 100 is not a multiple of --heads 3"),
        ({"heads": 4, "kv_heads": 3}, "--heads 4 is not a multiple of --kv-heads 3"),
        ({"hidden": 66, "heads": 22}, "heads of odd width 3"),
    ],
)
def test_sizes_that_do_not_divide(flags, message):
    with pytest.raises(UserError, match=message):
        presets.resolve_size(PretrainConfig(tokens="t", **flags), "nano")


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(arch):
    shape = PretrainConfig(tokens="t", arch=arch, layers=2, hidden=64, heads=4)
    model = presets.new_model(presets.new_config(shape, "nano", 100, IDS))
    optimizers = make_optimizers(model, plan(optimizer="muon"), "cpu")
    updated = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(map(id, updated)) == sorted(map(id, model.parameters()))
    for group in (g for o in optimizers for g in o.param_groups):
        assert all((p.dim() >= 2) == (group["weight_decay"] > 0) for p in group["params"])
    embeddings = model.get_input_embeddings().weight
    assert not any(embeddings is p for g in optimizers[1].param_groups for p in g["params"])


def test_flops_are_six_per_parameter_and_token_and_attention():
    config = presets.new_config(PretrainConfig(tokens="t"), "nano", 100, IDS)
    assert presets.flops_per_token(10, config, 7) == 6 * 10 + 12 * 4 * 128 * 7


def test_identity_ignores_what_does_not_touch_the_weights():
    one, other = plan(), replace(plan(), eval_every=3, save_every=9)
    assert one.identity() == other.identity()
    assert one.identity() != replace(one, lr=1.0).identity()
    assert math.isfinite(one.lr)
