"""Estimators of the KL divergence by enumeration of all responses, and the preference loss in a world whose scores are known."""

import math
import random

import pytest
import tiny
import torch

import common
import ppo
import reward

PROMPT = [tiny.END]
T = 0.7


def policies():
    """Two policies over the 40 responses, 0.3 to 1 nats apart."""
    return tiny.gpt(vocab_size=4), tiny.gpt(vocab_size=4)


def enumerated(policy, ref):
    """Probabilities (40,) of all responses, and ppo's log-probabilities of their tokens under both policies: (40, T)."""
    tokens, mask = tiny.enumerate_responses(PROMPT)
    with torch.no_grad():
        logprobs, ref_logprobs = (ppo.response_logprobs(model, tokens, mask, T)[0].double() for model in (policy, ref))
    return tiny.exact_logprobs(policy, PROMPT, T).exp(), logprobs, ref_logprobs, mask


def kl_token_by_token(policy, ref):
    """KL(pi || pi_ref) by the chain rule: the sum of pi(y_<t) KL(pi(.|y_<t) || pi_ref(.|y_<t)) over all beginnings y_<t.

    No log-probability of a whole response enters. Also the entropy of pi, summed in the same way.
    """
    beginnings = {tuple(r[:i]) for r in tiny.RESPONSES for i in range(len(r))}
    probability, kl, entropy = {(): 1.0}, 0.0, 0.0
    for beginning in sorted(beginnings, key=len):
        with torch.no_grad():
            tokens = torch.tensor([[*PROMPT, *beginning]])
            p, q = ((model(tokens)[0, -1].double() / T).log_softmax(0) for model in (policy, ref))
        for token in range(4):
            probability[(*beginning, token)] = probability[beginning] * p[token].exp().item()
        kl += probability[beginning] * (p.exp() * (p - q)).sum().item()
        entropy -= probability[beginning] * (p.exp() * p).sum().item()
    return kl, entropy


@pytest.mark.parametrize("seed", range(3))
def test_k1_and_k3_both_have_the_kl_divergence_as_their_mean(seed):
    """E_pi[sum_t d_t] = E_pi[sum_t exp(-d_t) - 1 + d_t] = KL(pi || pi_ref), d_t = log pi_t - log pi_ref_t.

    Source: J. Schulman, Approximating KL Divergence, joschu.net/blog/kl-approx.html, which names them k1, k2 and k3.
    """
    torch.manual_seed(seed)
    policy, ref = policies()
    probabilities, logprobs, ref_logprobs, mask = enumerated(policy, ref)
    d = logprobs - ref_logprobs  # (40, T), 0 outside the mask
    exact, _ = kl_token_by_token(policy, ref)
    assert exact > 0.1
    assert (probabilities @ d.sum(1)).item() == pytest.approx(exact, rel=1e-4)
    assert (probabilities @ (torch.exp(-d) - 1 + d).sum(1)).item() == pytest.approx(exact, rel=1e-4)
    assert (probabilities @ (0.5 * d**2).sum(1)).item() != pytest.approx(exact, rel=0.02)  # k2 is biased


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_of_the_summed_rewards_is_the_objective(seed):
    """E_pi[sum_t r_t] = E_pi[score] - beta KL(pi || pi_ref): PPO maximizes what is wanted (arXiv 2203.02155, equation 2)."""
    torch.manual_seed(seed)
    policy, ref = policies()
    probabilities, logprobs, ref_logprobs, mask = enumerated(policy, ref)
    scores, beta = torch.randn(40, dtype=torch.float64), 0.5
    rewards = ppo.token_rewards(scores, logprobs, ref_logprobs, mask, beta)
    exact, _ = kl_token_by_token(policy, ref)
    assert (probabilities @ rewards.sum(1)).item() == pytest.approx((probabilities @ scores).item() - beta * exact, abs=1e-4)


@tiny.in_precision(torch.float32)
def test_the_logged_kl_and_entropy_estimate_the_exact_ones():
    """kl_ref is k1, summed over a response, between policy and reference; approx_kl is k3, a token, between the rollout's policy
    and the new one. Each lies within 5 standard errors over 8000 sampled responses."""
    policy, ref = policies()
    config = ppo.Config(minibatch_size=8000, micro_batch_size=8000, epochs=1, max_new_tokens=tiny.MAX_NEW_TOKENS, temperature=T)

    def score(tokens, mask, texts, responses):
        return torch.zeros(len(texts))

    critic = tiny.critic(policy)
    batch, figures, _ = ppo.rollout(policy, ref, critic, score, [PROMPT] * 8000, [""] * 8000, tiny.EnumerableTokenizer(), config)
    exact, entropy = kl_token_by_token(policy, ref)
    mask = batch["mask"]
    length = mask.sum(1).double().mean().item()
    d = batch["logprobs"] - batch["ref_logprobs"]
    standard_error = (d.sum(1).std() / 8000**0.5).item()
    assert figures["kl_ref"] == pytest.approx(exact, abs=5 * standard_error)
    assert figures["entropy"] == pytest.approx(entropy / length, rel=0.02)

    # an update whose policy is the reference, and which does not move it
    batch |= dict(returns=batch["values"], advantages=torch.zeros_like(batch["values"]))
    optimizers = common.make_optimizers(ref, 0.0) + common.make_optimizers(critic, 0.0)
    diagnostics = ppo.update(ref, critic, optimizers, batch, 0.0, config)
    k3 = torch.exp(-d) - 1 + d  # 0 outside the mask
    assert diagnostics["approx_kl"] == pytest.approx(k3.sum().item() / mask.sum().item(), rel=1e-4)
    standard_error = (k3.sum(1).std() / 8000**0.5 / length).item()
    assert diagnostics["approx_kl"] == pytest.approx(exact / length, abs=5 * standard_error)
    outside = ((-d).exp() - 1).abs() > config.clip
    assert diagnostics["clip_fraction"] == pytest.approx((outside & mask).sum().item() / mask.sum().item())


# ---- the preference loss


def comparisons(true_scores, n):
    """n pairs (winner, loser), each (n,): item a beats b with probability sigmoid(s_a - s_b), the Bradley-Terry model."""
    a, b = torch.randint(len(true_scores), (2, n))
    a_wins = torch.rand(n) < torch.sigmoid(true_scores[a] - true_scores[b])
    return torch.where(a_wins, a, b), torch.where(a_wins, b, a)


def test_the_preference_loss_recovers_bradley_terry_scores_up_to_a_constant():
    """-log sigmoid(chosen - rejected) is the model's negative log-likelihood (arXiv 2203.02155, equation 1), so over many
    comparisons it is least at the true scores, but for a shift that no comparison can show."""
    true_scores = torch.linspace(-2, 2, 9, dtype=torch.float64)
    winner, loser = comparisons(true_scores, 60_000)
    scores = torch.zeros(9, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = reward.preference_loss(scores[winner], scores[loser])
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (scores - scores.mean() - true_scores).abs().max() < 0.08  # 4 standard errors
    expected = [math.log(1 + math.exp(scores[b].item() - scores[a].item())) for a, b in zip(winner, loser)]
    assert closure().item() == pytest.approx(sum(expected) / len(expected))


def test_the_preference_loss_does_not_see_a_shift_of_all_scores():
    chosen, rejected = torch.randn(2, 7, dtype=torch.float64)
    loss = reward.preference_loss(chosen, rejected)
    torch.testing.assert_close(reward.preference_loss(chosen + 100, rejected + 100), loss)
    assert reward.preference_loss(rejected, chosen) != loss


@tiny.in_precision(torch.float32)
def test_a_score_is_the_heads_plus_the_weighed_log_probability_of_the_answer():
    """head(hidden) + w log p(answer | prompt), both from the same trunk; the answer's tokens count, not the prompt's."""
    model, prompt = tiny.critic(tiny.gpt(vocab_size=4)), [tiny.END, 1, 2]
    tokens, mask = tiny.enumerate_responses(prompt)
    mask = torch.nn.functional.pad(mask, (1, 0))  # (40, T+1), as ppo hands it over
    last = torch.tensor([len(prompt) + len(response) - 1 for response in tiny.RESPONSES])  # (40,)
    with torch.no_grad():
        head = model.head(model.trunk.hidden(tokens)).squeeze(-1)[torch.arange(40), last].double()  # (40,)
        for weight in (0.0, 1.0, -2.5):
            model.likelihood_weight.fill_(weight)
            expected = head + weight * tiny.exact_logprobs(model.trunk, prompt, temperature=1.0)
            torch.testing.assert_close(model.score(tokens, mask).double(), expected, atol=1e-4, rtol=0)


@tiny.in_precision(torch.float32)
def test_the_likelihoods_weight_starts_where_the_preference_loss_is_least():
    """Among 2001 weights, by the scores of the real model with a head of 0; at the bound where likelihood explains all."""
    model = tiny.critic(tiny.gpt())
    torch.nn.init.zeros_(model.head.weight)
    examples = [([0, 3] + torch.randint(11, (n,)).tolist(), [0, 0] + [1] * n) for n in torch.randint(1, 9, (200,)).tolist()]
    likelihood = model.score(*reward.collate(examples, 0, tiny.CPU)).tolist()
    rng = random.Random(0)
    for slope in (0.3, -0.2, 50.0):
        pairs, differences = [], []
        for i, j in zip(range(0, 200, 2), range(1, 200, 2)):
            if rng.random() > torch.sigmoid(torch.tensor(slope * (likelihood[i] - likelihood[j]))):
                i, j = j, i
            pairs.append((examples[i], examples[j]))
            differences.append(likelihood[i] - likelihood[j])
        weights = torch.linspace(-1, 1, 2001)[:, None]  # (2001, 1)
        losses = -torch.nn.functional.logsigmoid(weights * torch.tensor(differences)).mean(1)  # (2001,)
        best = weights[losses.argmin()].item()
        assert reward.likelihood_fit(model, pairs, 0, tiny.CPU) == pytest.approx(best, abs=1.1e-3)
        assert (best == 1) == (slope == 50)


@tiny.in_precision(torch.float32)
def test_a_score_does_not_depend_on_the_padding_or_the_neighbours():
    """The score of an answer alone, read at its end token, is its score among longer ones and with any ids in the pads."""
    model = tiny.critic(tiny.gpt())
    examples = []
    for n_prompt, n_answer in [(1, 1), (3, 2), (2, 9), (6, 4)]:
        examples.append((torch.randint(11, (n_prompt + n_answer,)).tolist(), [0] * n_prompt + [1] * n_answer))
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([tokens]), torch.tensor([mask]).bool())[:, -1] for tokens, mask in examples])
        assert alone.std() > 0.1
        for pad in (0, 10):
            tokens, mask = reward.collate(examples, pad, tiny.CPU)
            torch.testing.assert_close(model.score(tokens, mask), alone, atol=1e-5, rtol=0)


@tiny.in_precision(torch.float32)
def test_the_reward_model_learns_the_scores_of_a_bradley_terry_world():
    """Six answers of unequal length with known scores; the real model, its batches and loss, 20,000 comparisons."""
    true_scores = torch.tensor([-1.5, -0.6, -0.2, 0.3, 0.5, 1.5])
    winner, loser = comparisons(true_scores, 20_000)
    answers = [[1], [2], [1, 4], [5, 2, 7], [5, 2, 8, 8], [9, 2, 7, 1, 1, 6]]
    examples = [([0, 3] + answer, [0, 0] + [1] * len(answer)) for answer in answers]
    model = tiny.critic(tiny.gpt())
    optimizers = common.make_optimizers(model, 1e-2, weight_decay=0.0)
    for step in range(150):
        scores = model.score(*reward.collate(examples, 0, tiny.CPU))  # (6,)
        reward.preference_loss(scores[winner], scores[loser]).backward()
        common.optimizer_step(model, optimizers, common.lr_factor(step, 150, 0))
    scores = model.score(*reward.collate(examples, 0, tiny.CPU)).detach()
    assert (scores - scores.mean() - true_scores + true_scores.mean()).abs().max() < 0.15
