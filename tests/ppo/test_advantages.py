"""Advantages, KL and token rewards: published numbers, definitions in plain floats, padding."""

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

POISON = 1e6


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def gae(rewards, values, next_values, discounts, lam):
    tensors = (rows(part) for part in (rewards, values, next_values, discounts))
    return generalized_advantages(*tensors, lam)[0].tolist()


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
    advantages = gae(rewards, values[:-1], values[1:], discounts, 1.0)
    assert advantages == pytest.approx(expected, abs=1e-3)


def test_gae_returns_of_tianshou():
    """thu-ml/tianshou test/base/test_returns.py: three episodes in a row, values of next states."""
    rewards = [101, 102, 103, 200, 104, 105, 106, 201, 107, 108, 109, 202]
    following = [2, 3, 4, -1, 5, 6, 7, -2, 8, 9, 10, -3]
    values = [following[-1], *following[:-1]]
    discounts = [0.99, 0.99, 0.99, 0] * 3
    advantages = gae(rewards, values, following, discounts, 0.95)
    returns = [a + value for a, value in zip(advantages, values, strict=True)]
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
    rewards = token_rewards(rows(1, 2, 3), kl, torch.ones(3, 3) > 0, 0.5)
    expected = [[0.05, 0.05, 1.05], [0.1, 0.1, 2.1], [0.15, 0.15, 3.15]]
    assert torch.allclose(rewards, torch.tensor(expected, dtype=torch.float64))


# --- the definitions, in plain floats


def some(seed=0, shape=(3, 5)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]) > 0


def test_advantages_are_the_sum_of_discounted_errors():
    rewards, values, gamma, lam = some(1), some(2), 0.9, 0.7
    advantages, _ = response_advantages(rewards, values, MASK, gamma, lam)
    for row, length in enumerate(MASK.sum(1).tolist()):
        for t in range(length):
            total = 0.0
            for k in range(t, length):
                after = float(values[row, k + 1]) if k + 1 < length else 0.0
                error = float(rewards[row, k]) + gamma * after - float(values[row, k])
                total += (gamma * lam) ** (k - t) * error
            assert float(advantages[row, t]) == pytest.approx(total)


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
    rewards = token_rewards(rows(5, 7, 9), torch.zeros(3, 5), MASK, 0.0)
    assert rewards.nonzero().tolist() == [[0, 4], [1, 1], [2, 0]]
    assert rewards.sum(1).tolist() == [5, 7, 9]


def test_whitening():
    whitened = whiten(some(11), MASK)[MASK]
    assert float(whitened.mean()) == pytest.approx(0, abs=1e-12)
    assert float(whitened.var(unbiased=False)) == pytest.approx(1, abs=1e-6)


def test_whitening_over_two_processes_is_that_over_all():
    values = some(12, (4, 5))
    mask = torch.cat([MASK, MASK[:1]])
    whole = whiten(values, mask)
    sums = {}

    def remember(name):
        def total(tensor):
            sums.setdefault(name, []).append(tensor.clone())
            return tensor

        return total

    def add(turn):
        place = iter(range(2))
        return lambda tensor: tensor + sums[turn][next(place)]

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


def test_padding_columns_change_nothing():
    values, wider = some(13), torch.nn.functional.pad(some(13), (0, 3), value=POISON)
    mask = torch.nn.functional.pad(MASK, (0, 3))
    one = response_advantages(values, values, MASK, 0.9, 0.9)[0]
    other = response_advantages(wider, wider, mask, 0.9, 0.9)[0]
    assert torch.equal(one, other[:, :5])
