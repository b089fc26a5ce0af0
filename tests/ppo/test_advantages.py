"""PPO's mathematics: published numbers, definitions in plain floats, what must not matter."""

import math

import pytest
import torch

from llmctl.ppo.advantages import (
    adapt_kl_coef,
    generalized_advantages,
    kl_penalty,
    masked_mean,
    response_advantages,
    token_rewards,
    whiten,
)
from llmctl.ppo.update import policy_loss, value_loss

POISON = 1e6


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def gae(rewards, values, next_values, discounts, lam):
    found = generalized_advantages(
        rows(rewards), rows(values), rows(next_values), rows(discounts), lam
    )
    return found[0].tolist()


# --- published numbers


def test_gae_of_tf_agents():
    """tensorflow/agents tf_agents/utils/value_ops_test.py:239: an episode ends at step 5."""
    discounts = [1, 1, 1, 1, 0, 0.9, 0.9, 0.9, 0]
    expected = [2.0808625, 1.13775, 0.145, -0.9, -2.0, 0.56016475, -0.16355, -1.01, -2.0]
    assert gae([1] * 9, [3] * 9, [3] * 9, discounts, 0.95) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("rewards", "values", "discounts", "expected"),
    [
        (
            [0, 0, 1, 0, -0.5],
            [1, 4, -3, -2, -1, -1],
            [0.99] * 5,
            [-1.45118, -4.4557, 2.5396, 0.5249, -0.49],
        ),
        ([0, 0, 0, 0, 1], [-3, -2, -1, 0, 5, -1], [0.9, 0.9, 0.9, 0, 0.9], [3, 2, 1, 0, -4.9]),
    ],
)
def test_gae_of_rlax(rewards, values, discounts, expected):
    """google-deepmind/rlax rlax/_src/multistep_test.py:166, lambda 1; their tolerance."""
    found = gae(rewards, values[:-1], values[1:], discounts, 1.0)
    assert found == pytest.approx(expected, abs=1e-3)


def test_gae_returns_of_tianshou():
    """thu-ml/tianshou test/base/test_returns.py: three episodes in a row, values of next states."""
    rewards = [101, 102, 103, 200, 104, 105, 106, 201, 107, 108, 109, 202]
    following = [2, 3, 4, -1, 5, 6, 7, -2, 8, 9, 10, -3]
    values = [following[-1], *following[:-1]]
    discounts = [0.99, 0.99, 0.99, 0] * 3
    found = gae(rewards, values, following, discounts, 0.95)
    returns = [advantage + value for advantage, value in zip(found, values, strict=True)]
    expected = [454.8344, 376.1143, 291.298, 200, 464.561, 383.1085, 295.387, 201]
    assert returns == pytest.approx([*expected, 474.2876, 390.1027, 299.476, 202], abs=7e-5)


def test_returns_of_torchtune():
    """torchtune tests/torchtune/rlhf/test_rewards.py TestEstimateAdvantages."""
    values = rows([0, 0, 0, 1])
    _, returns = response_advantages(values, values, torch.ones(1, 4) > 0, 0.9, 0.95)
    assert returns[0].tolist() == pytest.approx([0.6579225, 0.7695, 0.9, 1], abs=1e-9)


def test_kl_shaped_rewards_of_torchtune():
    """torchtune test_rewards.py TestGetRewards: coefficient 0.5, k1."""
    log_probs = rows([0.1] * 3, [0.2] * 3, [0.3] * 3)
    kl = kl_penalty(log_probs, 2 * log_probs, "k1")
    found = token_rewards(rows(1, 2, 3), kl, torch.ones(3, 3) > 0, 0.5)
    expected = [[0.05, 0.05, 1.05], [0.1, 0.1, 2.1], [0.15, 0.15, 3.15]]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64))


def test_clipped_policy_loss_of_rlax():
    """google-deepmind/rlax rlax/_src/policy_gradients_test.py:201, epsilon 0.2."""
    logits = rows([1, 1, 1], [2, 0, 0], [-1, -2, -3]).log_softmax(-1)
    old = rows([1, 1, 1], [2, 0, 0], [-3, -2, -1]).log_softmax(-1)
    chosen = torch.arange(3)[:, None]
    new, before = (table.gather(1, chosen).T for table in (logits, old))
    for sign, expected in ((1, -0.17117467), (-1, 0.19333333)):
        advantages = sign * rows([0.3, 0.2, 0.1])
        found = policy_loss(new, before, advantages, torch.ones(1, 3) > 0, 0.2)
        assert float(found.loss) / 3 == pytest.approx(expected, abs=4e-6)


def test_unclipped_policy_loss_and_value_loss_of_tf_agents():
    """tf_agents/agents/ppo/ppo_agent_test.py:919, 947; theirs has no 1/2 on the squared error."""
    new = [
        -0.5 * ((0 - 9) / 8) ** 2 - math.log(8 * math.sqrt(2 * math.pi)),
        -0.5 * ((1 - 15) / 12) ** 2 - math.log(12 * math.sqrt(2 * math.pi)),
    ]
    mask = torch.ones(1, 2) > 0
    found = policy_loss(rows(new), rows([0.9, 0.3]), rows([1.9, 1]), mask, math.inf)
    assert float(found.loss) / 2 == pytest.approx(-0.0164646133, abs=1e-8)
    values = value_loss(rows([9, 15]), rows([0, 0]), rows([1.9, 1]), mask, math.inf)
    assert 2 * float(values.loss) / 2 == pytest.approx(123.205)


# --- the definitions, in plain floats


def some(seed=0, shape=(3, 5)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]) > 0


def test_advantages_are_the_sum_of_discounted_errors():
    rewards, values, gamma, lam = some(1), some(2), 0.9, 0.7
    found, _ = response_advantages(rewards, values, MASK, gamma, lam)
    for row, length in enumerate(MASK.sum(1).tolist()):
        for t in range(length):
            total = 0.0
            for k in range(t, length):
                after = float(values[row, k + 1]) if k + 1 < length else 0.0
                error = float(rewards[row, k]) + gamma * after - float(values[row, k])
                total += (gamma * lam) ** (k - t) * error
            assert float(found[row, t]) == pytest.approx(total)


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


def test_kl_estimators():
    p, q = some(9), some(10)
    k3 = kl_penalty(p, q, "k3")
    assert torch.allclose(kl_penalty(p, q, "k1"), p - q)
    assert torch.allclose(k3, (q - p).exp() - 1 - (q - p))
    assert float(k3.min()) >= 0
    assert torch.equal(kl_penalty(p, p, "k3"), torch.zeros_like(p))


def test_kl_estimators_are_unbiased():
    p, q = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.2, 0.5, 0.3]).log()
    exact = float((p.exp() * (p - q)).sum())
    for estimator in ("k1", "k3"):
        assert float((p.exp() * kl_penalty(p, q, estimator)).sum()) == pytest.approx(exact)


def test_a_policy_that_moves_away_is_paid_less():
    mask = torch.ones(1, 4) > 0
    near, far = rows([-1.0] * 4), rows([-0.2] * 4)
    reference = rows([-1.0] * 4)
    paid = [
        float(token_rewards(rows(1), kl_penalty(p, reference, "k1"), mask, 0.1).sum())
        for p in (near, far)
    ]
    assert paid[0] == pytest.approx(1.0)
    assert paid[1] == pytest.approx(1 - 0.1 * 3.2)


def test_the_score_stands_on_the_last_token():
    found = token_rewards(rows(5, 7, 9), torch.zeros(3, 5), MASK, 0.0)
    assert found.nonzero().tolist() == [[0, 4], [1, 1], [2, 0]]
    assert found.sum(1).tolist() == [5, 7, 9]


def test_whitening():
    found = whiten(some(11), MASK)[MASK]
    assert float(found.mean()) == pytest.approx(0, abs=1e-12)
    assert float(found.var(unbiased=False)) == pytest.approx(1, abs=1e-6)


def test_whitening_over_two_processes_is_that_over_all():
    values = some(12, (4, 5))
    mask = torch.cat([MASK, MASK[:1]])
    whole = whiten(values, mask)
    sums = {}

    def remember(name):
        def total(found):
            sums.setdefault(name, []).append(found.clone())
            return found

        return total

    def add(turn):
        place = iter(range(2))
        return lambda found: found + sums[turn][next(place)]

    mean = masked_mean(values, mask)
    for name, part in (("a", slice(0, 2)), ("b", slice(2, 4))):
        ours, seen = values[part], mask[part]
        remember(name)(torch.stack([ours[seen].sum(), seen.sum()]))
        remember(name)(torch.stack([((ours[seen] - mean) ** 2).sum(), seen.sum()]))
    first = whiten(values[:2], mask[:2], add("b"))
    assert torch.allclose(first, whole[:2])


def test_adaptive_penalty():
    """Ziegler et al. (2019), section 2.2, by hand: a clipped, proportional error."""
    assert adapt_kl_coef(0.1, 12.0, 6.0, 64, 640) == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert adapt_kl_coef(0.1, 6.3, 6.0, 64, 640) == pytest.approx(0.1 * (1 + 0.05 * 0.1))
    assert adapt_kl_coef(0.1, 0.0, 6.0, 64, 640) == pytest.approx(0.1 * (1 - 0.2 * 0.1))


# --- what must not matter


def test_poisoned_padding_changes_nothing():
    clean = {n: some(n) for n in range(6)}
    dirty = {n: x.where(MASK, POISON * (-1) ** n) for n, x in clean.items()}
    found = []
    for x in (clean, dirty):
        kl = kl_penalty(x[0], x[1], "k1")
        rewards = token_rewards(rows(1, 2, 3), kl, MASK, 0.1)
        advantages, returns = response_advantages(rewards, x[2], MASK, 0.99, 0.95)
        advantages = whiten(advantages, MASK)
        policy = policy_loss(0.1 * x[3], 0.1 * x[0], advantages, MASK, 0.2)
        value = value_loss(x[4], x[2], returns, MASK, 0.2)
        found.append([float(part) for part in (*policy, *value, masked_mean(x[5], MASK))])
        assert (advantages[~MASK] == 0).all()
    assert found[0] == found[1]


def test_padding_columns_change_nothing():
    values, wider = some(13), torch.nn.functional.pad(some(13), (0, 3), value=POISON)
    mask = torch.nn.functional.pad(MASK, (0, 3))
    one = response_advantages(values, values, MASK, 0.9, 0.9)[0]
    other = response_advantages(wider, wider, mask, 0.9, 0.9)[0]
    assert torch.equal(one, other[:, :5])


def test_gradients_do_not_come_from_padding():
    new = some(14).where(MASK, POISON).requires_grad_()
    policy_loss(new, some(15), some(16), MASK, 0.2).loss.backward()
    assert (new.grad[~MASK] == 0).all()
    assert torch.isfinite(new.grad).all()
