"""PPO's two losses (arXiv 1707.06347): values against loops, gradients against finite differences.

In float64.
"""

import copy
import dataclasses
import math

import pytest
import tiny
import torch

import ppo

CLIP = 0.2


def actions(seed=0):
    """A batch (4, 6), float64: new, old, a third quantity, and the mask.

    Half of the ratios lie beyond the clip on either side, and all kinks at least 0.02 away.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(choices):
        index = torch.randint(len(choices), (4, 6), generator=generator)
        return torch.tensor(choices, dtype=torch.float64)[index]

    mask = torch.arange(6) < torch.tensor([6, 1, 4, 3])[:, None]
    old = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    return old + draw([-0.6, -0.1, 0.1, 0.6]), old, draw([-2.0, -0.5, 0.7, 1.5]), mask


def gradient(loss, x):
    return torch.autograd.grad(loss(x.requires_grad_()), x)[0]


def finite_differences(loss, x, h=1e-6):
    """(loss(x + h e) - loss(x - h e)) / 2h for every entry."""
    slopes = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=x.dtype)
        step[i] = h
        step = step.view(x.shape)
        slopes.view(-1)[i] = (loss(x + step) - loss(x - step)) / (2 * h)
    return slopes


def as_floats(*tensors):
    """The entries of the tensors (B, T), side by side, as Python's numbers."""
    return zip(*(x.flatten().tolist() for x in tensors))


@pytest.mark.parametrize("seed", range(3))
def test_the_policy_loss_is_the_mean_of_the_clipped_surrogate(seed):
    """L = -1/N sum min(A rho, A clip(rho, 1 - eps, 1 + eps)), rho = pi / pi_old (equation 7).

    Over the responses' tokens.
    """
    logprobs, old, advantages, mask = actions(seed)
    terms = []
    for new, before, a, trains in as_floats(logprobs, old, advantages, mask):
        if trains:
            ratio = math.exp(new - before)
            terms.append(min(a * ratio, a * min(max(ratio, 1 - CLIP), 1 + CLIP)))

    def loss(x):
        return ppo.policy_loss(x, old, advantages, mask, CLIP)

    assert loss(logprobs).item() == pytest.approx(-sum(terms) / len(terms))
    expected = finite_differences(loss, logprobs.detach())
    torch.testing.assert_close(gradient(loss, logprobs), expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_the_value_loss_is_the_worse_of_the_plain_and_the_clipped_error(seed):
    """L = 1/2N sum max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2).

    V_old is the rollout's (OpenAI baselines, ppo2).
    """
    values, old_values, returns, mask = actions(seed)
    terms = []
    for v, before, r, trains in as_floats(values, old_values, returns, mask):
        if trains:
            clipped = min(max(v, before - CLIP), before + CLIP)
            terms.append(max((v - r) ** 2, (clipped - r) ** 2))

    def loss(x):
        return ppo.value_loss(x, old_values, returns, mask, CLIP)

    assert loss(values).item() == pytest.approx(sum(terms) / len(terms) / 2)
    expected = finite_differences(loss, values.detach())
    torch.testing.assert_close(gradient(loss, values), expected, atol=1e-8, rtol=0)


def test_clipped_actions_and_pads_get_exactly_no_gradient():
    """All other actions get some.

    A policy gets none where the ratio has left 1 +- eps in the direction that the advantage asks
    for, a value none where it has moved toward the return by more than eps.
    """
    logprobs, old, advantages, mask = actions()
    ratio = torch.exp(logprobs - old)
    clipped = torch.where(advantages > 0, ratio > 1 + CLIP, ratio < 1 - CLIP)
    assert (clipped & mask).any() and (~clipped & mask).any()
    slopes = gradient(lambda x: ppo.policy_loss(x, old, advantages, mask, CLIP), logprobs)
    assert torch.equal(slopes != 0, mask & ~clipped)

    values, old_values, returns, mask = actions()
    moved = values - old_values
    at_the_clip = old_values + moved.sign() * CLIP
    is_nearer = (values - returns).abs() < (at_the_clip - returns).abs()
    clipped = (moved.abs() > CLIP) & is_nearer
    assert (clipped & mask).any() and (~clipped & mask).any()
    slopes = gradient(lambda x: ppo.value_loss(x, old_values, returns, mask, CLIP), values)
    assert torch.equal(slopes != 0, mask & ~clipped)


# ---- through the model


CONFIG = ppo.Config(
    batch_size=16,
    minibatch_size=8,
    micro_batch_size=8,
    epochs=2,
    max_new_tokens=6,
    temperature=0.7,
)


def experience():
    """Policy, critic and a rollout of 16 responses of 1 to 6 tokens to prompts of 1 to 5 tokens."""
    torch.manual_seed(0)
    policy, ref = tiny.gpt(vocab_size=5), tiny.gpt(vocab_size=5)
    critic = tiny.critic(policy)
    prompts = tiny.prompts([torch.randint(5, (1 + i % 5,)).tolist() for i in range(16)])
    tokenizer = tiny.EnumerableTokenizer()

    def score(tokens, mask, prompts, responses):
        return torch.randn(len(prompts))

    batch = ppo.rollout(policy, ref, critic, score, prompts, tokenizer, CONFIG)
    batch |= ppo.compute_advantages(batch, CONFIG.beta, CONFIG)
    # lengths differ, or a mean of means would be the mean
    assert len(set(batch["mask"].sum(1).tolist())) > 2
    return policy, critic, batch


@tiny.in_precision(torch.float32)
def test_at_ratio_1_the_policy_gradient_is_reinforces():
    """grad L = -1/N sum_t A_t grad log pi(a_t | s_t) (equation 1), for every weight."""
    policy, _, batch = experience()
    tokens, mask, advantages = batch["tokens"], batch["mask"], batch["whitened_advantages"]
    logprobs = ppo.response_logprobs(policy, tokens, mask, CONFIG.temperature)
    loss = ppo.policy_loss(logprobs, batch["logprobs"], advantages, mask, CLIP)
    ppo_gradients = torch.autograd.grad(loss, list(policy.parameters()))

    objective = 0.0
    for i, t in mask.nonzero().tolist():  # each action from a forward pass of its own, without pads
        logits = policy(tokens[i : i + 1, : t + 1])[0, -1] / CONFIG.temperature  # (V,)
        objective = objective - advantages[i, t] * logits.log_softmax(0)[tokens[i, t + 1]]
    reinforce = torch.autograd.grad(objective / mask.sum(), list(policy.parameters()))
    assert sum(g.square().sum() for g in reinforce) > 1e-3
    torch.testing.assert_close(ppo_gradients, reinforce, atol=1e-5, rtol=1e-4)


@tiny.in_precision(torch.float32)
def test_the_update_compares_with_what_the_rollout_recorded():
    """Ratios to the rollout's log-probabilities, values against the rollout's values.

    Both lie apart from the networks' own, as they do after the first optimizer step.
    """
    policy, critic, batch = experience()
    mask, moved = batch["mask"], 0.4 * torch.randn(2, *batch["mask"].shape)
    with torch.no_grad():
        logprobs = ppo.response_logprobs(policy, batch["tokens"], mask, CONFIG.temperature)
        values = ppo.action_values(critic, batch["tokens"], mask)
    batch |= dict(logprobs=logprobs + moved[0] * mask, values=values + moved[1])
    surrogates, errors, n_clipped, k3 = [], [], 0, []
    rows = (logprobs, batch["logprobs"], batch["whitened_advantages"])
    rows += (values, batch["values"], batch["returns"])
    for new, old, a, v, before, r in zip(*(x[mask].tolist() for x in rows)):
        ratio, clipped = math.exp(new - old), min(max(v, before - CLIP), before + CLIP)
        surrogates.append(min(a * ratio, a * min(max(ratio, 1 - CLIP), 1 + CLIP)))
        errors.append(max((v - r) ** 2, (clipped - r) ** 2))
        n_clipped += abs(ratio - 1) > CLIP
        k3.append(ratio - 1 - math.log(ratio))
    n = len(errors)
    loss, metrics = ppo.ppo_loss(policy, critic, batch, CONFIG)
    expected = dict(
        policy_loss=-sum(surrogates) / n,
        value_loss=sum(errors) / n / 2,
        approx_kl=sum(k3) / n,
        clip_fraction=n_clipped / n,
    )
    assert 0.2 < expected["clip_fraction"] < 0.8
    got = {name: value.item() for name, value in metrics.items()}
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)
    total = expected["policy_loss"] + CONFIG.value_coef * expected["value_loss"]
    assert loss.item() == pytest.approx(total, rel=1e-4, abs=1e-5)


def weights(policy, critic):
    return dict(policy.named_parameters()) | dict(critic.named_parameters())


def update(experience, micro_batch_size):
    """All weights and the metrics after two epochs.

    Plain gradient steps: Adam would blow rounding up to full size.
    """
    policy, critic, batch = copy.deepcopy(experience)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (policy, critic)]
    for optimizer in optimizers:
        optimizer.param_groups[0]["initial_lr"] = 0.1
    torch.manual_seed(1)
    config = dataclasses.replace(CONFIG, micro_batch_size=micro_batch_size)
    metrics = ppo.update(policy, critic, optimizers, batch, 1.0, config)
    return weights(policy, critic), metrics


@tiny.in_precision(torch.float32)
def test_micro_batches_of_any_size_give_the_same_update():
    """The means of an optimizer step run over all of its actions.

    However many forward passes they are split into; size 0 is the whole minibatch.
    """
    policy, critic, batch = experience()
    whole, metrics = update((policy, critic, batch), 8)
    for name, weight in weights(policy, critic).items():
        assert (whole[name] - weight).abs().max() > 1e-4  # an update it is
    for micro_batch_size in (0, 1, 2, 3, 5, 7):
        split, split_metrics = update((policy, critic, batch), micro_batch_size)
        torch.testing.assert_close(split, whole, atol=2e-6, rtol=0)
        assert split_metrics == pytest.approx(metrics, abs=1e-5)
