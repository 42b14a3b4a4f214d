"""What a token is rewarded with, and how advantages are scaled, against plain loops over floats."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ppo


def ragged(garbage=0.0):
    """Four tensors (3, 7) with garbage outside the mask, and the mask.

    The responses have 3, 1 and 4 tokens.
    """
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, 1:4] = mask[1, 5:6] = mask[2, 3:7] = True
    generator = torch.Generator().manual_seed(1)
    tensors = []
    for _ in range(4):
        x = torch.randn(3, 7, generator=generator, dtype=torch.float64)
        tensors.append(x.where(mask, garbage))
    return tensors, mask


def test_a_token_is_rewarded_by_its_kl_term_and_the_last_one_by_the_score_too():
    """r_t = -beta (log pi_t - log pi_ref_t), plus the score where the last token is chosen.

    arXiv 2009.01325, section 3.4.
    """
    (logprobs, ref_logprobs, _, _), mask = ragged()
    scores, beta = [2.0, -1.0, 0.5], 0.3
    rewards = ppo.token_rewards(torch.tensor(scores), logprobs, ref_logprobs, mask, beta)
    for i, row in enumerate(mask.tolist()):
        last = max(t for t in range(7) if row[t])
        for t in range(7):
            kl = (logprobs[i, t] - ref_logprobs[i, t]).item()
            kl_term = -beta * kl if row[t] else 0.0
            score = scores[i] if t == last else 0.0
            assert rewards[i, t].item() == pytest.approx(kl_term + score), (i, t)


def test_whitened_advantages_have_mean_0_and_variance_1_over_the_responses_tokens():
    """(x - mean) / sqrt(var + 1e-8) over the mask, and 0 outside it."""
    (x, _, _, _), mask = ragged()
    whitened = ppo.whiten(3 + 2 * x.where(mask, 0), mask)
    inside = whitened[mask].tolist()
    assert statistics.fmean(inside) == pytest.approx(0, abs=1e-9)
    assert statistics.pvariance(inside) == pytest.approx(1, abs=1e-6)
    assert not whitened[~mask].any()
    assert torch.equal(whitened[mask].argsort(), x[mask].argsort())


@given(garbage=st.floats(-1e6, 1e6))
def test_what_stands_in_the_pads_does_not_change_the_whitening(garbage):
    (clean, *_), mask = ragged()
    (dirty, *_), _ = ragged(garbage)
    torch.testing.assert_close(ppo.whiten(dirty, mask), ppo.whiten(clean, mask))
