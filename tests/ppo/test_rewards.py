"""Rewards of PPO: rules by definition, running moments, and the weighted sum."""

import pytest
import torch

from llmctl.errors import DataError, UserError
from llmctl.ppo.advantages import single_process
from llmctl.ppo.rewards import RewardSource, RewardSum, RunningMoments, parse_weight, unique_names
from llmctl.ppo.rules import Sample, exact, find_rule, length, repetition


def sample(response, reference=None):
    return Sample("What?", response, reference, "a.jsonl:1")


def test_rules_by_definition():
    assert exact(sample(" The River. ", "the river")) == 1
    assert exact(sample("a river", "the river")) == 0
    assert length("one two three", 4) == pytest.approx(-0.25)
    assert length("a " * 50, 4) == -1
    assert repetition("a b c d") == 0
    assert repetition("a b c a b c a b c") == pytest.approx(3 / 7 - 1)
    assert repetition("a b") == 0
    assert find_rule("regex:b+")([sample("abb"), sample("ccc")]) == [1, 0]


def test_moments_are_those_of_all_batches():
    values = [torch.tensor([1.0, 2.0, 4.0]), torch.tensor([10.0, -3.0])]
    moments = RunningMoments()
    for batch in values:
        moments.update(batch, single_process)
    whole = torch.cat(values).double()
    assert moments.mean == pytest.approx(float(whole.mean()))
    assert moments.std == pytest.approx(float(whole.std()))
    assert moments.normalize(torch.tensor([100.0]), 5.0).tolist() == [5.0]
    assert moments.normalize(torch.tensor([100.0]), 0.0)[0] == pytest.approx(
        (100 - 2.8) / float(whole.std())
    )


def test_scores_that_never_vary_are_not_divided_by_nothing():
    moments = RunningMoments()
    moments.update(torch.tensor([2.0, 2.0]), single_process)
    assert moments.normalize(torch.tensor([2.0]), 5.0).tolist() == [0.0]


def test_the_sum_of_rewards_in_plain_floats():
    model = RewardSource("m", 0.5, lambda t, e: torch.tensor([3.0, 1.0]), is_model=True)
    rule = RewardSource("r", -2.0, lambda t, e: torch.tensor([0.5, 1.0]), is_model=False)
    rewards = RewardSum([model, rule], "reference", 1.0, 0.25)
    raw = rewards.raw([sample("x"), sample("y")], [True, False])
    rewards.measure({"m": torch.tensor([0.0, 2.0])}, single_process)
    total = rewards.combine(raw, [True, False]).tolist()
    std = 2**0.5
    assert total[0] == pytest.approx(0.5 * min(1.0, (3 - 1) / std) - 2 * 0.5)
    assert total[1] == pytest.approx(0.5 * 0 - 2 * 1.0 - 0.25)


def test_a_score_that_is_no_number_is_refused():
    source = RewardSource("m", 1.0, lambda t, e: torch.tensor([float("nan")]), is_model=True)
    with pytest.raises(DataError, match=r"m gave nan for the response to a\.jsonl:1: 'x'"):
        RewardSum([source], "none", 0.0, 0.0).raw([sample("x")], [True])


def test_weights_and_names():
    assert parse_weight("--reward-model", "runs/a=0.7") == ("runs/a", 0.7)
    assert parse_weight("--reward-rule", "regex:x=y") == ("regex:x=y", 1.0)
    assert parse_weight("--reward-rule", "regex:x=2=-1") == ("regex:x=2", -1.0)
    assert unique_names(["runs/a", "other/a", "length:3"]) == ["a-1", "a-2", "length:3"]
    with pytest.raises(UserError, match="must be a number other than 0"):
        parse_weight("--reward-model", "runs/a=inf")
