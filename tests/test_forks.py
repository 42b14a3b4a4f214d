"""The forks against what is known beforehand: the closed-form optimum, finite differences, sums."""

import copy
import math

import pytest
import tiny
import torch

import ppo
from data.examples import Prompt
from forks import dpo, grpo
from train.batches import pad_rows
from train.optim import lr_factor, make_optimizers, optimizer_step

PROMPT = [tiny.END]  # opens the response; it never occurs within one
BETA = 0.5


def world(seed):
    """A policy on 4 tokens and its frozen reference."""
    torch.manual_seed(seed)
    policy = tiny.gpt(vocab_size=4, block_size=8)
    return policy, copy.deepcopy(policy).requires_grad_(False)


def optimum(ref_logprobs, rewards, beta):
    """log pi*, with pi* ~ pi_ref exp(r / beta): (40,)."""
    return torch.log_softmax(ref_logprobs + rewards / beta, 0)


def kl(p, q):
    """KL(p || q) from log-probabilities (40,)."""
    return (p.exp() * (p - q)).sum().item()


# ---- DPO


def comparisons(levels):
    """Indices of chosen and rejected responses, (N,) each, of 20 comparisons of every pair.

    Rewards are levels * log 3, so that the labeller of Bradley and Terry prefers the better of two
    in exactly 10, 15 or 18 of 20 cases: by the sigmoid of 0, log 3 and 2 log 3.
    """
    chosen, rejected = [], []
    for i in range(len(levels)):
        for j in range(i):
            better, worse = (i, j) if levels[i] >= levels[j] else (j, i)
            n = {0: 10, 1: 15, 2: 18}[abs(int(levels[i] - levels[j]))]
            chosen += [better] * n + [worse] * (20 - n)
            rejected += [worse] * n + [better] * (20 - n)
    return torch.tensor(chosen), torch.tensor(rejected)


@tiny.in_precision(torch.float32)
def train_dpo(seed, steps=250):
    """Trained policy, reference, and the rewards (40,) that the comparisons follow."""
    policy, ref = world(seed)
    levels = torch.randint(3, (len(tiny.RESPONSES),))
    order = torch.cat(comparisons(levels))  # (2N,)
    tokens = pad_rows([PROMPT + r for r in tiny.RESPONSES], 0, tiny.CPU)  # (40, T)
    mask = pad_rows([[0] + [1] * len(r) for r in tiny.RESPONSES], 0, tiny.CPU).bool()  # (40, T)
    ref_logprobs = dpo.response_sums(ref, tokens, mask)[:, -1]  # (40,)
    optimizers = make_optimizers(policy, 3e-3, weight_decay=0.0)
    for step in range(steps):
        logprobs = dpo.response_sums(policy, tokens, mask)[:, -1]  # (40,)
        dpo.dpo_loss(logprobs[order], ref_logprobs[order], BETA).backward()
        optimizer_step(policy, optimizers, lr_factor(step, steps, 10))
    return policy, ref, levels * math.log(3)


@pytest.mark.parametrize("seed", range(5))
def test_dpo_reaches_the_closed_form_optimum_of_the_labellers_rewards(seed):
    policy, ref, rewards = train_dpo(seed)
    ref_logprobs = tiny.exact_logprobs(ref, PROMPT, 1.0)
    best = optimum(ref_logprobs, rewards.double(), BETA)
    assert kl(ref_logprobs, best) > 0.1  # there is something to learn
    assert kl(tiny.exact_logprobs(policy, PROMPT, 1.0), best) < 1e-3


def test_dpos_loss_is_ln_2_at_the_start_and_its_gradient_that_of_finite_differences():
    logprobs = torch.randn(8, dtype=torch.float64, requires_grad=True)
    ref_logprobs = torch.randn(8, dtype=torch.float64)
    at_start = dpo.dpo_loss(ref_logprobs, ref_logprobs, BETA)
    assert at_start.item() == pytest.approx(math.log(2))
    rewards = BETA * (logprobs - ref_logprobs)
    margins = (rewards[:4] - rewards[4:]).tolist()
    expected = [math.log(1 + math.exp(-margin)) for margin in margins]
    assert dpo.dpo_loss(logprobs, ref_logprobs, BETA).item() == pytest.approx(sum(expected) / 4)
    assert torch.autograd.gradcheck(lambda x: dpo.dpo_loss(x, ref_logprobs, BETA), logprobs)


@tiny.in_precision(torch.float32)
def test_a_responses_log_probability_is_the_chain_rules_whatever_stands_beside_it():
    policy, _ = world(0)
    responses = [[0, 1, tiny.END], [tiny.END], [2, 2, 2]]
    tokens = pad_rows([PROMPT + r for r in responses], 0, tiny.CPU)
    mask = pad_rows([[0] + [1] * len(r) for r in responses], 0, tiny.CPU).bool()
    exact = tiny.exact_logprobs(policy, PROMPT, 1.0)
    expected = torch.stack([exact[tiny.RESPONSES.index(r)] for r in responses])
    sums = dpo.response_sums(policy, tokens, mask)
    torch.testing.assert_close(sums[:, -1].double(), expected, atol=1e-4, rtol=0)
    assert not sums[:, 0].any()  # the prompt counts nothing


# ---- GRPO


def lengths(tokens, mask, prompts, responses):
    """A reward: the response's number of tokens."""
    return mask.sum(1).float()


@tiny.in_precision(torch.float32)
def train_grpo(seed, beta=BETA, divide_by_std=False, steps=300):
    """Trained policy, reference, and the rewards (40,)."""
    policy, ref = world(seed)
    rewards = 1.5 * torch.rand(len(tiny.RESPONSES))  # (40,)
    rewards[[r[-1] != tiny.END for r in tiny.RESPONSES]] = 0.0
    config = grpo.Config(
        steps=steps,
        batch_size=256,
        group_size=256,
        minibatch_size=256,
        epochs=1,
        lr=1e-2,
        beta=beta,
        divide_by_std=divide_by_std,
        max_new_tokens=tiny.MAX_NEW_TOKENS,
        missing_eos_score=0.0,
    )
    tokenizer = tiny.EnumerableTokenizer()
    reward_of = {}
    for response, reward in zip(tiny.RESPONSES, rewards.tolist()):
        body = response[:-1] if response[-1] == tiny.END else response
        reward_of[tokenizer.decode(body)] = reward

    def score(tokens, mask, prompts, responses):
        return torch.tensor([reward_of[response] for response in responses])

    optimizers = make_optimizers(policy, config.lr, 0.0, 0.0, betas=(0.9, 0.999), eps=1e-5)
    prompts = [Prompt(PROMPT, [{"role": "user", "content": ""}], 0)]
    prompts *= config.batch_size // config.group_size
    for step in range(steps):
        batch = grpo.rollout(policy, ref, score, prompts, tokenizer, config)
        batch["advantages"] = grpo.compute_advantages(batch, config)
        grpo.update(policy, optimizers, batch, lr_factor(step, steps, 0), config)
    return policy, ref, rewards.double()


@pytest.mark.parametrize("seed", range(5))
def test_grpo_without_the_division_reaches_the_closed_form_optimum(seed):
    policy, ref, rewards = train_grpo(seed)
    ref_logprobs = tiny.exact_logprobs(ref, PROMPT, 1.0)
    best = optimum(ref_logprobs, rewards, BETA)
    assert kl(ref_logprobs, best) > 0.1
    assert kl(tiny.exact_logprobs(policy, PROMPT, 1.0), best) < 1e-3


def test_grpo_with_the_division_ends_where_the_kl_weight_is_beta_sigma():
    """In units of their own deviation sigma the scores count 1 / sigma as much, so the end is
    pi ~ pi_ref exp(r / (beta sigma)), sigma that of the scores under pi itself: 0.29 here."""
    policy, ref, rewards = train_grpo(0, beta=1.0, divide_by_std=True)
    ref_logprobs = tiny.exact_logprobs(ref, PROMPT, 1.0)
    sigma = 1.0
    for _ in range(200):  # the fixed point, by damped iteration
        end = optimum(ref_logprobs, rewards, sigma)
        mean = (end.exp() * rewards).sum()
        variance = (end.exp() * (rewards - mean) ** 2).sum().item()
        sigma = 0.5 * sigma + 0.5 * variance**0.5
    logprobs = tiny.exact_logprobs(policy, PROMPT, 1.0)
    assert kl(logprobs, end) < 0.01
    assert kl(logprobs, optimum(ref_logprobs, rewards, 1.0)) == pytest.approx(0.28, abs=0.05)


def test_grpo_with_the_division_and_a_smaller_beta_collapses_onto_the_best_response():
    """As the policy gets sure, sigma falls, and the penalty beta sigma with it, to the end."""
    policy, _, rewards = train_grpo(0, divide_by_std=True)
    logprobs = tiny.exact_logprobs(policy, PROMPT, 1.0)
    assert logprobs.argmax() == rewards.argmax()
    assert logprobs.max().exp() > 0.99


def test_group_advantages_are_differences_within_the_group_and_equal_rewards_give_none():
    rewards = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    advantages = grpo.group_advantages(rewards, 3)
    assert advantages.tolist() == [-2.0, -1.0, 3.0, 0.0, 0.0, 0.0]
    divided = grpo.group_advantages(rewards, 3, divide_by_std=True)
    std = (7.0) ** 0.5  # of 1, 2, 6, with n - 1
    assert divided[:3].tolist() == pytest.approx([-2 / std, -1 / std, 3 / std], rel=1e-3)
    assert not divided[3:].any()
    assert advantages.view(2, 3).sum(1).abs().max() == 0


def test_a_group_with_equal_scores_and_no_kl_gives_no_gradient():
    policy, ref = world(0)
    config = grpo.Config(batch_size=8, group_size=4, minibatch_size=8, epochs=1, max_new_tokens=3)
    prompts = [Prompt(PROMPT, [], 0)] * 2

    def score(tokens, mask, prompts, responses):
        return torch.full((len(prompts),), -3.0)  # what a response without end gets, too

    batch = grpo.rollout(policy, ref, score, prompts, tiny.EnumerableTokenizer(), config)
    batch["advantages"] = grpo.compute_advantages(batch, config)
    before = copy.deepcopy(policy.state_dict())
    grpo.update(policy, make_optimizers(policy, 1.0, weight_decay=0.0), batch, 1.0, config)
    assert all(torch.equal(before[name], w) for name, w in policy.state_dict().items())


def test_a_groups_responses_share_a_prompt_and_their_own_advantage_at_each_token():
    policy, ref = world(1)
    config = grpo.Config(batch_size=8, group_size=4, minibatch_size=8, max_new_tokens=3, beta=0.3)
    prompts = [Prompt([tiny.END], [], 0), Prompt([0, 1], [], 1)]

    def score(tokens, mask, prompts, responses):
        return torch.arange(8.0) ** 2

    batch = grpo.rollout(policy, ref, score, prompts, tiny.EnumerableTokenizer(), config)
    batch["ref_logprobs"] = batch["logprobs"] - batch["mask"] * torch.rand(8, 1)
    firsts = [
        row[: mask.int().argmax() + 1].tolist() for row, mask in zip(batch["tokens"], batch["mask"])
    ]
    assert firsts == [[tiny.END]] * 4 + [[0, 1]] * 4
    advantages = grpo.compute_advantages(batch, config)
    kls = (batch["logprobs"] - batch["ref_logprobs"]).sum(1)
    for i in range(8):
        group = range(i // 4 * 4, i // 4 * 4 + 4)
        of = [batch["scores"][k].item() - 0.3 * kls[k].item() for k in group]
        expected = of[i % 4] - sum(of) / 4
        row = advantages[i][batch["mask"][i]]
        assert row.tolist() == pytest.approx([expected] * len(row), abs=1e-4)
        assert not advantages[i][~batch["mask"][i]].any()


@tiny.in_precision(torch.float32)
def test_grpos_micro_batches_of_any_size_give_the_same_update():
    """One step of plain gradient descent on responses of unequal length."""
    weights = []
    for micro_batch_size in (0, 1, 3):
        policy, ref = world(2)
        config = grpo.Config(
            batch_size=8, group_size=4, minibatch_size=8, epochs=1, max_new_tokens=3
        )
        config.micro_batch_size = micro_batch_size
        torch.manual_seed(0)
        prompts = [Prompt([tiny.END], [], 0), Prompt([0, 1], [], 1)]
        batch = grpo.rollout(policy, ref, lengths, prompts, tiny.EnumerableTokenizer(), config)
        batch["advantages"] = grpo.compute_advantages(batch, config)
        assert len(batch["mask"].sum(1).unique()) > 1
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
        optimizer.param_groups[0]["initial_lr"] = 0.1
        grpo.update(policy, [optimizer], batch, 1.0, config)
        weights.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    for others in weights[1:]:
        torch.testing.assert_close(others, weights[0], atol=1e-6, rtol=0)
    assert (weights[0] - torch.cat([p.flatten() for p in ref.parameters()])).abs().max() > 1e-3


def test_ppos_rollout_without_a_critic_has_values_of_0():
    policy, ref = world(0)
    config = grpo.Config(batch_size=4, group_size=2, max_new_tokens=3)

    def score(tokens, mask, prompts, responses):
        return torch.zeros(len(prompts))

    prompts = [Prompt(PROMPT, [], 0)] * 2
    batch = grpo.rollout(policy, ref, score, prompts, tiny.EnumerableTokenizer(), config)
    assert not batch["values"].any() and batch["values"].shape == batch["mask"].shape
    assert ppo.rollout_metrics(batch)["score_se"] >= 0
