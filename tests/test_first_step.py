"""What must hold before the first optimizer step, with unequal prompts and a temperature of 0.7.

The policy is still its own reference and the one that sampled: every ratio is 1, the KL to both
is 0, nothing is clipped (the first lines that summarize_from_feedback_details prints; TRL issue
3029 and trlx issue 107 are runs where they failed).
"""

import copy
import dataclasses
from unittest import mock

import pytest
import tiny
import torch

import ppo
from train.optim import make_optimizers

CONFIG = ppo.Config(
    batch_size=24,
    minibatch_size=24,
    micro_batch_size=24,
    epochs=1,
    max_new_tokens=8,
    temperature=0.7,
)


def first_iteration(factor, config=CONFIG):
    """The metrics of rollout and update, the log-ratios (N,), how far the policy moved.

    The log-ratios are all that the update compared.
    """
    torch.manual_seed(0)
    policy = tiny.gpt(vocab_size=6, n_layer=3)
    ref, critic = copy.deepcopy(policy), tiny.critic(policy)
    rows = [torch.randint(6, (1 + i % 9,)).tolist() for i in range(config.batch_size)]
    prompts, tokenizer = tiny.prompts(rows), tiny.EnumerableTokenizer()

    def score(tokens, mask, prompts, responses):
        return torch.randn(len(prompts))

    batch = ppo.rollout(policy, ref, critic, score, prompts, tokenizer, config)
    metrics = ppo.rollout_metrics(batch)
    batch |= ppo.compute_advantages(batch, config.beta, config)
    optimizers = []
    for model in (policy, critic):
        optimizers += make_optimizers(model, 1e-2, weight_decay=0.0)
    # the real loss, watched
    with mock.patch.object(ppo, "policy_loss", wraps=ppo.policy_loss) as policy_loss:
        metrics |= ppo.update(policy, critic, optimizers, batch, factor, config)
    compared = [call.args for call in policy_loss.call_args_list]
    log_ratios = torch.cat([(new - old)[mask].detach() for new, old, _, mask, _ in compared])
    assert len(log_ratios) == config.epochs * batch["mask"].sum()
    weights = zip(policy.parameters(), ref.parameters())
    moved = max((p - q).abs().max().item() for p, q in weights)
    return metrics, log_ratios, moved


# Measured on a CPU with AVX512-BF16, at widths of 16 to 192: bfloat16 exactly 0, float32 1e-6.
PRECISIONS = [
    pytest.param(torch.float32, 1e-4, id="float32"),
    pytest.param(torch.bfloat16, 1e-2, id="bfloat16"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_at_the_first_step_ratios_are_1_and_both_kl_are_0(dtype, tolerance):
    """And the policy loss -mean(A rho) is 0, as whitened advantages have mean 0."""
    with tiny.in_precision(dtype):
        metrics, log_ratios, moved = first_iteration(1.0)
    assert (log_ratios.exp() - 1).abs().max() <= tolerance
    assert abs(metrics["kl_ref"]) <= tolerance
    assert abs(metrics["approx_kl"]) <= tolerance
    assert metrics["clip_fraction"] == 0
    assert abs(metrics["policy_loss"]) <= tolerance
    assert moved > 1e-3  # the step after these metrics is a real one


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_with_learning_rate_0_they_hold_through_all_epochs(dtype, tolerance):
    """In other minibatches and micro-batches than the rollout's, so beside other pads."""
    with tiny.in_precision(dtype):
        config = dataclasses.replace(CONFIG, epochs=4, minibatch_size=8, micro_batch_size=3)
        metrics, log_ratios, moved = first_iteration(0.0, config)
    assert moved == 0
    assert (log_ratios.exp() - 1).abs().max() <= tolerance
    assert abs(metrics["approx_kl"]) <= tolerance
    assert metrics["clip_fraction"] == 0


@tiny.in_precision(torch.float32)
def test_the_rollout_samples_from_the_policy_whose_log_probabilities_it_records():
    """With prompts of unequal length and a temperature of 0.7.

    The recorded log-probabilities are those of the chain rule, and how often each of the 40
    possible responses comes up follows them (Pearson's chi-squared, 39 degrees of freedom a
    prompt).
    """
    policy = tiny.gpt(vocab_size=4)
    rows, n = [[3, 0], [3, 1, 2, 2]], 4000
    sizes = dict(batch_size=2 * n, micro_batch_size=0, max_new_tokens=tiny.MAX_NEW_TOKENS)
    config = dataclasses.replace(CONFIG, **sizes)

    def score(tokens, mask, prompts, responses):
        return torch.zeros(len(prompts))

    critic, tokenizer = tiny.critic(policy), tiny.EnumerableTokenizer()
    prompts = tiny.prompts(rows * n)
    batch = ppo.rollout(policy, policy, critic, score, prompts, tokenizer, config)
    pairs = zip(batch["tokens"][:, 1:], batch["mask"])
    responses = [tokens[mask].tolist() for tokens, mask in pairs]
    for i, prompt in enumerate(rows):
        exact = tiny.exact_logprobs(policy, prompt, config.temperature)  # (40,)
        index = [tiny.RESPONSES.index(response) for response in responses[i::2]]
        index = torch.tensor(index)  # (n,)
        recorded = batch["logprobs"][i::2].sum(1).double()  # (n,)
        torch.testing.assert_close(recorded, exact[index], atol=1e-4, rtol=0)
        expected = n * exact.exp()
        counts = torch.bincount(index, minlength=40)
        chi_squared = ((counts - expected) ** 2 / expected).sum().item()
        assert chi_squared < 100  # p < 1e-6
