"""Alarms of PPO: each rings for its own sign, once, and survives a checkpoint."""

import json

import pytest

from llmctl.ppo import alarms
from llmctl.ppo.alarms import ALARMS, STEPS, Alarms

FINE = {
    "kl": 1.0,
    "length": 20.0,
    "score": 0.0,
    "score_std": 1.0,
    "entropy": 2.0,
    "eos_share": 0.9,
    "explained_variance": 0.5,
    "clip_fraction": 0.1,
}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("negative_kl", {"kl": -3.0}),
        ("exploding_kl", {"kl": 80.0}),
        ("longer_and_better", {"length": 90.0, "score": 2.0}),
        ("collapsed_entropy", {"entropy": 0.1}),
        ("falling_eos", {"eos_share": 0.2}),
        ("useless_values", {"explained_variance": -0.3}),
        ("clipping", {"clip_fraction": 0.5}),
        ("flat_scores", {"score_std": 0.0}),
    ],
)
def test_each_alarm_rings_for_its_own_sign(name, changed, caplog, monkeypatch):
    monkeypatch.setattr(alarms.log, "propagate", True)
    watch = Alarms()
    for step in range(1, 11):
        assert watch.check(step, FINE) == []
    rung = [watch.check(step, {**FINE, **changed}) for step in range(11, 11 + STEPS)]
    assert [name for names in rung for name in names] == [name]
    assert any(word in caplog.text for word in ("--", "look at"))
    assert watch.check(16, {**FINE, **changed}) == []


def test_every_alarm_is_tested():
    assert len(ALARMS) == 8


def test_alarms_survive_a_checkpoint():
    one, other = Alarms(), Alarms()
    for step in range(1, 4):
        one.check(step, {**FINE, "kl": -5.0})
    other.restore(json.loads(json.dumps(one.state())))
    assert [other.check(step, {**FINE, "kl": -5.0}) for step in (4, 5)] == [[], ["negative_kl"]]
