"""What must hold before the first optimizer step has changed anything, on a rollout with unequal prompts and T = 0.7.

The policy is still its own reference and the one that sampled: every ratio is 1, the KL to both is 0, nothing is clipped
(the first lines that summarize_from_feedback_details prints; TRL issue 3029 and trlx issue 107 are runs where they failed).
"""

import copy
import dataclasses
from unittest import mock

import pytest
import tiny
import torch

import common
import ppo

CONFIG = ppo.Config(batch_size=24, minibatch_size=24, micro_batch_size=24, epochs=1, max_new_tokens=8, temperature=0.7)


def first_iteration(lr_factor, config=CONFIG):
    """The rollout's figures, the update's diagnostics, all log-ratios it compared (N,), and how far it moved the policy."""
    torch.manual_seed(0)
    policy = tiny.gpt(vocab_size=6, n_layer=3)
    ref, critic = copy.deepcopy(policy), tiny.critic(policy)
    prompts = [torch.randint(6, (1 + i % 9,)).tolist() for i in range(config.batch_size)]

    def score(tokens, mask, texts, responses):
        return torch.randn(len(texts))

    batch, figures, _ = ppo.rollout(policy, ref, critic, score, prompts, prompts, tiny.EnumerableTokenizer(), config)
    batch = ppo.credit(batch, config.beta, config)
    optimizers = common.make_optimizers(policy, 1e-2, weight_decay=0.0) + common.make_optimizers(critic, 1e-2, weight_decay=0.0)
    with mock.patch.object(ppo, "policy_loss", wraps=ppo.policy_loss) as policy_loss:  # the real one, watched
        diagnostics = ppo.update(policy, critic, optimizers, batch, lr_factor, config)
    compared = [call.args for call in policy_loss.call_args_list]
    log_ratios = torch.cat([(new - old)[mask].detach() for new, old, _, mask, _ in compared])
    assert len(log_ratios) == config.epochs * batch["mask"].sum()
    moved = max((p - q).abs().max().item() for p, q in zip(policy.parameters(), ref.parameters()))
    return figures, diagnostics, log_ratios, moved


# Measured on a CPU with AVX512-BF16, at widths of 16 to 192: bfloat16 exactly 0, float32 1e-6.
PRECISIONS = [pytest.param(torch.float32, 1e-4, id="float32"), pytest.param(torch.bfloat16, 1e-2, id="bfloat16")]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_at_the_first_step_ratios_are_1_and_both_kl_are_0(dtype, tolerance):
    """And the policy loss -mean(A rho) is 0, as whitened advantages have mean 0."""
    with tiny.in_precision(dtype):
        figures, diagnostics, log_ratios, moved = first_iteration(1.0)
    assert (log_ratios.exp() - 1).abs().max() <= tolerance
    assert abs(figures["kl_ref"]) <= tolerance
    assert abs(diagnostics["approx_kl"]) <= tolerance
    assert diagnostics["clip_fraction"] == 0
    assert abs(diagnostics["policy_loss"]) <= tolerance
    assert moved > 1e-3  # the step after these figures is a real one


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_with_learning_rate_0_they_hold_through_all_epochs(dtype, tolerance):
    """In other minibatches and microbatches than the rollout's, so beside other neighbours and pads."""
    with tiny.in_precision(dtype):
        config = dataclasses.replace(CONFIG, epochs=4, minibatch_size=8, micro_batch_size=3)
        figures, diagnostics, log_ratios, moved = first_iteration(0.0, config)
    assert moved == 0
    assert (log_ratios.exp() - 1).abs().max() <= tolerance
    assert abs(diagnostics["approx_kl"]) <= tolerance
    assert diagnostics["clip_fraction"] == 0


@tiny.in_precision(torch.float32)
def test_the_rollout_samples_from_the_policy_whose_log_probabilities_it_records():
    """With prompts of unequal length and T = 0.7: the recorded log-probabilities are those of the chain rule, and how often
    each of the 40 possible responses comes up follows them (Pearson's chi-squared, 39 degrees of freedom a prompt)."""
    policy = tiny.gpt(vocab_size=4)
    prompts, n = [[3, 0], [3, 1, 2, 2]], 4000
    config = dataclasses.replace(CONFIG, max_new_tokens=tiny.MAX_NEW_TOKENS)

    def score(tokens, mask, texts, responses):
        return torch.zeros(len(texts))

    critic, all_prompts = tiny.critic(policy), prompts * n
    batch, _, _ = ppo.rollout(policy, policy, critic, score, all_prompts, all_prompts, tiny.EnumerableTokenizer(), config)
    responses = [tokens[mask].tolist() for tokens, mask in zip(batch["tokens"][:, 1:], batch["mask"])]
    for i, prompt in enumerate(prompts):
        exact = tiny.exact_logprobs(policy, prompt, config.temperature)  # (40,)
        index = torch.tensor([tiny.RESPONSES.index(response) for response in responses[i::2]])  # (n,)
        torch.testing.assert_close(batch["logprobs"][i::2].sum(1).double(), exact[index], atol=1e-4, rtol=0)
        expected = n * exact.exp()
        chi_squared = ((torch.bincount(index, minlength=40) - expected) ** 2 / expected).sum().item()
        assert chi_squared < 100  # p < 1e-6
