"""Generalized advantage estimation (arXiv 1506.02438) in float64.

For any rewards, values and response lengths.
"""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

import ppo

number = st.floats(-10, 10)
fraction = st.floats(0, 1)
# One response: the slots before it (its prompt), and a reward and a value for each of its tokens.
steps = st.lists(st.tuples(number, number), min_size=1, max_size=6)
response = st.tuples(st.integers(0, 3), steps)
responses = st.lists(response, min_size=1, max_size=4)


def batch(responses, garbage=0.0):
    """rewards, values and mask (B, T): each response at its own place, garbage elsewhere."""
    T = max(start + len(steps) for start, steps in responses) + 1
    rewards = torch.full((len(responses), T), garbage, dtype=torch.float64)
    values, mask = rewards.clone(), torch.zeros(rewards.shape, dtype=torch.bool)
    for i, (start, steps) in enumerate(responses):
        here = slice(start, start + len(steps))
        rewards[i, here], values[i, here] = torch.tensor(steps, dtype=torch.float64).T
        mask[i, here] = True
    return rewards, values, mask


def rows(x, responses):
    """The entries of x (B, T) that belong to responses, as one flat tensor."""
    slots = enumerate(responses)
    return torch.cat([x[i, start : start + len(steps)] for i, (start, steps) in slots])


def discounted(rewards, gamma):
    return sum(gamma**i * r for i, r in enumerate(rewards))


def flat(per_response, responses):
    """per_response(rewards, values) -> a number a token, over all responses as one tensor."""
    numbers = []
    for _, steps in responses:
        numbers += per_response(*zip(*steps))
    return torch.tensor(numbers, dtype=torch.float64)


def mixture_of_n_step_advantages(rewards, values, gamma, lam):
    """Equation 16 before it is simplified: A = (1 - lam) sum_n lam^(n-1) A^(n), where

        A^(n)_t = r_t + gamma r_{t+1} + .. + gamma^(n-1) r_{t+n-1} + gamma^n V_{t+n} - V_t

    (equation 14). From the response's end on A^(n) no longer changes, so the last one carries all
    of the weight that is left.
    """
    advantages = []
    for t, value in enumerate(values):
        n_left = len(rewards) - t
        n_step = []
        for n in range(1, n_left):
            later = gamma**n * values[t + n]
            n_step.append(discounted(rewards[t : t + n], gamma) + later - value)
        whole = discounted(rewards[t:], gamma) - value
        mixture = sum((1 - lam) * lam**i * a for i, a in enumerate(n_step))
        advantages.append(mixture + lam ** (n_left - 1) * whole)
    return advantages


@given(responses=responses, gamma=fraction, lam=fraction)
def test_gae_is_the_mixture_of_n_step_advantages(responses, gamma, lam):
    """And the returns are advantages + values."""
    rewards, values, mask = batch(responses)
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    advantages, returns = rows(advantages, responses), rows(returns, responses)
    expected = flat(lambda r, v: mixture_of_n_step_advantages(r, v, gamma, lam), responses)
    torch.testing.assert_close(advantages, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(returns, expected + rows(values, responses), atol=1e-9, rtol=0)


@given(responses=responses, gamma=fraction)
def test_lambda_1_gives_the_return_minus_the_value(responses, gamma):
    """A_t = sum_l gamma^l r_{t+l} - V_t (equation 18)."""

    def return_minus_value(r, v):
        return [discounted(r[t:], gamma) - v[t] for t in range(len(r))]

    advantages, _ = ppo.gae(*batch(responses), gamma, 1.0)
    expected = flat(return_minus_value, responses)
    torch.testing.assert_close(rows(advantages, responses), expected, atol=1e-9, rtol=0)


@given(responses=responses, gamma=fraction)
def test_lambda_0_gives_the_td_error(responses, gamma):
    """A_t = r_t + gamma V_{t+1} - V_t, with V = 0 after the end (equation 17)."""

    def td_error(r, v):
        return [r[t] + gamma * (*v, 0)[t + 1] - v[t] for t in range(len(r))]

    advantages, _ = ppo.gae(*batch(responses), gamma, 0.0)
    expected = flat(td_error, responses)
    torch.testing.assert_close(rows(advantages, responses), expected, atol=1e-9, rtol=0)


@given(responses=responses, gamma=fraction, lam=fraction)
def test_each_response_in_a_ragged_batch_gets_what_it_gets_alone(responses, gamma, lam):
    together = ppo.gae(*batch(responses), gamma, lam)
    alone = [ppo.gae(*batch([(0, steps)]), gamma, lam) for _, steps in responses]
    for x, xs in zip(together, zip(*alone)):
        lengths = [len(steps) for _, steps in responses]
        expected = torch.cat([a[0, :n] for a, n in zip(xs, lengths)])
        assert torch.equal(rows(x, responses), expected)


garbage = st.sampled_from([1e6, float("inf"), float("nan")])


@given(responses=responses, gamma=fraction, lam=fraction, garbage=garbage)
def test_what_stands_outside_the_responses_changes_nothing(responses, gamma, lam, garbage):
    """Prompts and pads; there the result is 0."""
    clean = ppo.gae(*batch(responses), gamma, lam)
    dirty = ppo.gae(*batch(responses, garbage), gamma, lam)
    assert all(map(torch.equal, clean, dirty))
    outside = ~batch(responses)[2]
    assert not dirty[0][outside].any()


def test_the_adaptive_beta_moves_toward_the_target_by_at_most_a_fifth():
    """beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon) (arXiv 1909.08593, section 2.2)."""
    kls = (0.0, 5.4, 6.0, 6.6, 60.0)
    changes = [ppo.adapt_beta(0.1, kl, 6.0, 1000) / 0.1 - 1 for kl in kls]
    torch.testing.assert_close(changes, [-0.02, -0.01, 0.0, 0.01, 0.02])
    assert all(a < b for a, b in itertools.pairwise(changes))
