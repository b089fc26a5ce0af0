"""PPO's losses: published numbers, definitions in plain floats, padding."""

import math

import pytest
import torch

from llmctl.ppo.advantages import (
    kl_penalty,
    masked_mean,
    response_advantages,
    token_rewards,
    whiten,
)
from llmctl.ppo.update import policy_loss, value_loss
from tests.ppo.test_advantages import MASK, POISON, rows, some


def test_clipped_policy_loss_of_rlax():
    """google-deepmind/rlax rlax/_src/policy_gradients_test.py:201, epsilon 0.2."""
    logits = rows([1, 1, 1], [2, 0, 0], [-1, -2, -3]).log_softmax(-1)
    old = rows([1, 1, 1], [2, 0, 0], [-3, -2, -1]).log_softmax(-1)
    chosen = torch.arange(3)[:, None]
    new, before = (table.gather(1, chosen).T for table in (logits, old))
    for sign, expected in ((1, -0.17117467), (-1, 0.19333333)):
        advantages = sign * rows([0.3, 0.2, 0.1])
        policy = policy_loss(new, before, advantages, torch.ones(1, 3) > 0, 0.2)
        assert float(policy.loss) / 3 == pytest.approx(expected, abs=4e-6)


def test_unclipped_policy_loss_and_value_loss_of_tf_agents():
    """tf_agents/agents/ppo/ppo_agent_test.py:919, 947; theirs has no 1/2 on the squared error."""
    new = [
        -0.5 * ((0 - 9) / 8) ** 2 - math.log(8 * math.sqrt(2 * math.pi)),
        -0.5 * ((1 - 15) / 12) ** 2 - math.log(12 * math.sqrt(2 * math.pi)),
    ]
    mask = torch.ones(1, 2) > 0
    policy = policy_loss(rows(new), rows([0.9, 0.3]), rows([1.9, 1]), mask, math.inf)
    assert float(policy.loss) / 2 == pytest.approx(-0.0164646133, abs=1e-8)
    values = value_loss(rows([9, 15]), rows([0, 0]), rows([1.9, 1]), mask, math.inf)
    assert 2 * float(values.loss) / 2 == pytest.approx(123.205)


@pytest.mark.parametrize("clip", [0.2, 0.5])
def test_losses_in_plain_floats(clip):
    new, old, advantages = 0.3 * some(3), 0.3 * some(4), some(5)
    values, before, returns = some(6), some(7), some(8)
    surrogate = squared = clipped = kl = 0.0
    for row, t in MASK.nonzero().tolist():
        ratio = math.exp(float(new[row, t]) - float(old[row, t]))
        advantage = float(advantages[row, t])
        held = min(max(ratio, 1 - clip), 1 + clip)
        surrogate -= min(ratio * advantage, held * advantage)
        clipped += held * advantage < ratio * advantage
        kl += ratio - 1 - math.log(ratio)
        value, was, wanted = (float(x[row, t]) for x in (values, before, returns))
        near = min(max(value, was - clip), was + clip)
        squared += 0.5 * max((value - wanted) ** 2, (near - wanted) ** 2)
    policy = policy_loss(new, old, advantages, MASK, clip)
    assert float(policy.loss) == pytest.approx(surrogate)
    assert float(policy.clipped) == clipped
    assert float(policy.kl) == pytest.approx(kl)
    assert float(value_loss(values, before, returns, MASK, clip).loss) == pytest.approx(squared)


def test_poisoned_padding_changes_nothing():
    clean = {n: some(n) for n in range(6)}
    dirty = {n: x.where(MASK, POISON * (-1) ** n) for n, x in clean.items()}
    losses = []
    for x in (clean, dirty):
        kl = kl_penalty(x[0], x[1], "k1")
        rewards = token_rewards(rows(1, 2, 3), kl, MASK, 0.1)
        advantages, returns = response_advantages(rewards, x[2], MASK, 0.99, 0.95)
        advantages = whiten(advantages, MASK)
        policy = policy_loss(0.1 * x[3], 0.1 * x[0], advantages, MASK, 0.2)
        value = value_loss(x[4], x[2], returns, MASK, 0.2)
        losses.append([float(part) for part in (*policy, *value, masked_mean(x[5], MASK))])
        assert (advantages[~MASK] == 0).all()
    assert losses[0] == losses[1]


def test_gradients_do_not_come_from_padding():
    new = some(14).where(MASK, POISON).requires_grad_()
    policy_loss(new, some(15), some(16), MASK, 0.2).loss.backward()
    assert (new.grad[~MASK] == 0).all()
    assert torch.isfinite(new.grad).all()
