"""Estimators of the KL divergence by enumeration of all responses.

And the reward model: its score by brute force, its loss in a world whose scores are known.
"""

import json
import math
import random

import pytest
import tiny
import torch
import torch.nn.functional as F

import ppo
import reward
from data.examples import Example, Pair
from train.batches import collate
from train.checkpoint import load_checkpoint, save_checkpoint
from train.optim import lr_factor, make_optimizers, optimizer_step
from utils.files import write_jsonl

PROMPT = [tiny.END]
T = 0.7


def policies():
    """Two policies over the 40 responses, 0.3 to 1 nats apart."""
    return tiny.gpt(vocab_size=4), tiny.gpt(vocab_size=4)


def enumerated(policy, ref):
    """Probabilities (40,) of all responses; ppo's log-probabilities of their tokens, (40, T).

    The latter under both policies, with their mask.
    """
    tokens, mask = tiny.enumerate_responses(PROMPT)
    with torch.no_grad():
        logprobs = ppo.response_logprobs(policy, tokens, mask, T).double()
        ref_logprobs = ppo.response_logprobs(ref, tokens, mask, T).double()
    return tiny.exact_logprobs(policy, PROMPT, T).exp(), logprobs, ref_logprobs, mask


def kl_token_by_token(policy, ref):
    """KL(pi || pi_ref) by the chain rule, and the entropy of pi in the same way.

    The sum of pi(y_<t) KL(pi(.|y_<t) || pi_ref(.|y_<t)) over all beginnings y_<t. No
    log-probability of a whole response enters.
    """
    beginnings = {tuple(r[:i]) for r in tiny.RESPONSES for i in range(len(r))}
    probability, kl, entropy = {(): 1.0}, 0.0, 0.0
    for beginning in sorted(beginnings, key=len):
        tokens = torch.tensor([[*PROMPT, *beginning]])
        with torch.no_grad():
            p = (policy(tokens)[0, -1].double() / T).log_softmax(0)  # (V,)
            q = (ref(tokens)[0, -1].double() / T).log_softmax(0)  # (V,)
        for token in range(4):
            here = probability[beginning] * p[token].exp().item()
            probability[(*beginning, token)] = here
        kl += probability[beginning] * (p.exp() * (p - q)).sum().item()
        entropy -= probability[beginning] * (p.exp() * p).sum().item()
    return kl, entropy


@pytest.mark.parametrize("seed", range(3))
def test_k1_and_k3_both_have_the_kl_divergence_as_their_mean(seed):
    """E_pi[sum_t d_t] = E_pi[sum_t exp(-d_t) - 1 + d_t] = KL(pi || pi_ref).

    With d_t = log pi_t - log pi_ref_t. J. Schulman, Approximating KL Divergence,
    joschu.net/blog/kl-approx.html, names them k1, k2 and k3.
    """
    torch.manual_seed(seed)
    policy, ref = policies()
    probabilities, logprobs, ref_logprobs, mask = enumerated(policy, ref)
    d = logprobs - ref_logprobs  # (40, T), 0 outside the mask
    exact, _ = kl_token_by_token(policy, ref)
    assert exact > 0.1
    k1, k2, k3 = d, 0.5 * d**2, torch.exp(-d) - 1 + d  # (40, T) each
    assert (probabilities @ k1.sum(1)).item() == pytest.approx(exact, rel=1e-4)
    assert (probabilities @ k3.sum(1)).item() == pytest.approx(exact, rel=1e-4)
    assert (probabilities @ k2.sum(1)).item() != pytest.approx(exact, rel=0.02)  # biased


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_of_the_summed_rewards_is_the_objective(seed):
    """E_pi[sum_t r_t] = E_pi[score] - beta KL(pi || pi_ref).

    So PPO maximizes what is wanted (arXiv 2203.02155, equation 2).
    """
    torch.manual_seed(seed)
    policy, ref = policies()
    probabilities, logprobs, ref_logprobs, mask = enumerated(policy, ref)
    scores, beta = torch.randn(40, dtype=torch.float64), 0.5
    rewards = ppo.token_rewards(scores, logprobs, ref_logprobs, mask, beta)
    exact, _ = kl_token_by_token(policy, ref)
    objective = (probabilities @ scores).item() - beta * exact
    assert (probabilities @ rewards.sum(1)).item() == pytest.approx(objective, abs=1e-4)


@tiny.in_precision(torch.float32)
def test_the_logged_kl_and_entropy_estimate_the_exact_ones():
    """Each lies within 5 standard errors over 8000 sampled responses.

    kl_ref is k1, summed over a response, between policy and reference; approx_kl is k3, a token,
    between the rollout's policy and the new one.
    """
    policy, ref = policies()
    config = ppo.Config(
        minibatch_size=8000,
        micro_batch_size=8000,
        epochs=1,
        max_new_tokens=tiny.MAX_NEW_TOKENS,
        temperature=T,
    )

    def score(tokens, mask, prompts, responses):
        return torch.zeros(len(prompts))

    critic, tokenizer = tiny.critic(policy), tiny.EnumerableTokenizer()
    prompts = tiny.prompts([PROMPT] * 8000)
    batch = ppo.rollout(policy, ref, critic, score, prompts, tokenizer, config)
    metrics = ppo.rollout_metrics(batch)
    exact, entropy = kl_token_by_token(policy, ref)
    mask = batch["mask"]
    length = mask.sum(1).double().mean().item()
    d = batch["logprobs"] - batch["ref_logprobs"]
    standard_error = (d.sum(1).std() / 8000**0.5).item()
    assert metrics["kl_ref"] == pytest.approx(exact, abs=5 * standard_error)
    assert metrics["entropy"] == pytest.approx(entropy / length, rel=0.02)

    # an update whose policy is the reference, and which does not move it
    values = batch["values"]
    batch |= dict(returns=values, whitened_advantages=torch.zeros_like(values))
    optimizers = make_optimizers(ref, 0.0) + make_optimizers(critic, 0.0)
    metrics = ppo.update(ref, critic, optimizers, batch, 0.0, config)
    k3 = torch.exp(-d) - 1 + d  # 0 outside the mask
    n_actions = mask.sum().item()
    assert metrics["approx_kl"] == pytest.approx(k3.sum().item() / n_actions, rel=1e-4)
    standard_error = (k3.sum(1).std() / 8000**0.5 / length).item()
    assert metrics["approx_kl"] == pytest.approx(exact / length, abs=5 * standard_error)
    outside = ((-d).exp() - 1).abs() > config.clip
    n_outside = (outside & mask).sum().item()
    assert metrics["clip_fraction"] == pytest.approx(n_outside / n_actions)


# ---- the preference loss


def comparisons(true_scores, n):
    """n pairs (winner, loser), each (n,), by the Bradley-Terry model.

    Item a beats b with probability sigmoid(s_a - s_b).
    """
    a, b = torch.randint(len(true_scores), (2, n))
    a_wins = torch.rand(n) < torch.sigmoid(true_scores[a] - true_scores[b])
    return torch.where(a_wins, a, b), torch.where(a_wins, b, a)


def test_the_preference_loss_recovers_bradley_terry_scores_up_to_a_constant():
    """Over many comparisons it is least at the true scores, but for a shift that none can show.

    -log sigmoid(chosen - rejected) is the model's negative log-likelihood (arXiv 2203.02155,
    equation 1).
    """
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
    s = scores.tolist()
    pairs = zip(winner.tolist(), loser.tolist())
    expected = [math.log(1 + math.exp(s[b] - s[a])) for a, b in pairs]
    assert closure().item() == pytest.approx(sum(expected) / len(expected))


def test_the_preference_loss_does_not_see_a_shift_of_all_scores():
    chosen, rejected = torch.randn(2, 7, dtype=torch.float64)
    loss = reward.preference_loss(chosen, rejected)
    torch.testing.assert_close(reward.preference_loss(chosen + 100, rejected + 100), loss)
    assert reward.preference_loss(rejected, chosen) != loss


# ---- the reward model: its score


def examples_of(lengths):
    """Examples of random ids; lengths: (of the prompt, of the answer)."""
    examples = []
    for n_prompt, n_answer in lengths:
        tokens = torch.randint(11, (n_prompt + n_answer,)).tolist()
        examples.append(Example(tokens, [0] * n_prompt + [1] * n_answer, line=0))
    return examples


UNEQUAL = [(1, 1), (3, 2), (2, 9), (6, 4)]


@tiny.in_precision(torch.float32)
def test_a_score_is_the_heads_plus_the_weighed_log_probability_of_the_answer():
    """head(hidden) + w log p(answer | prompt), both from the same trunk.

    The answer's tokens count, not the prompt's.
    """
    model, prompt = tiny.critic(tiny.gpt(vocab_size=4)), [tiny.END, 1, 2]
    tokens, mask = tiny.enumerate_responses(prompt)
    mask = F.pad(mask, (1, 0))  # (40, T+1), as ppo hands it over
    last = [len(prompt) + len(response) - 1 for response in tiny.RESPONSES]
    with torch.no_grad():
        heads = model.head(model.trunk.hidden(tokens)).squeeze(-1)  # (40, T+1)
        head = heads[torch.arange(40), torch.tensor(last)].double()  # (40,)
        for weight in (0.0, 1.0, -2.5):
            model.logprob_weight.fill_(weight)
            logprobs = tiny.exact_logprobs(model.trunk, prompt, temperature=1.0)  # (40,)
            expected = head + weight * logprobs
            score = model.score(tokens, mask).double()
            torch.testing.assert_close(score, expected, atol=1e-4, rtol=0)


@tiny.in_precision(torch.float32)
def test_without_the_term_a_score_is_the_head_on_the_last_hidden_state_and_nothing_else():
    """w . h + b, with h from a forward pass of each answer alone; there is no weight of a term."""
    gpt = tiny.gpt()
    model = reward.from_gpt(gpt, logprob_term=False)
    own = {name for name, _ in model.named_parameters() if not name.startswith("trunk.")}
    assert own == {"head.weight", "head.bias"}
    assert not any("logprob" in name for name in model.state_dict())
    with torch.no_grad():
        model.head.bias.fill_(0.3)
        examples = examples_of(UNEQUAL)
        expected = []
        for example in examples:
            h = gpt.hidden(torch.tensor([example.tokens]))[0, -1].tolist()  # (C,)
            w = model.head.weight[0].tolist()  # (C,)
            expected.append(sum(a * b for a, b in zip(w, h)) + 0.3)
        score = model.score(*collate(examples, 0, tiny.CPU))
    assert score.tolist() == pytest.approx(expected, abs=1e-5)
    assert score.std() > 0.1


@tiny.in_precision(torch.float32)
@pytest.mark.parametrize("logprob_term", [True, False])
def test_a_score_does_not_depend_on_the_padding_or_the_neighbours(logprob_term):
    """The score of an answer alone, read at its end token, is its score in a batch.

    Among longer ones, and with any ids in the pads.
    """
    model = reward.from_gpt(tiny.gpt(), logprob_term)
    examples = examples_of(UNEQUAL)
    with torch.no_grad():
        alone = []
        for example in examples:
            tokens, mask = torch.tensor([example.tokens]), torch.tensor([example.mask]).bool()
            alone.append(model(tokens, mask)[:, -1])
        alone = torch.cat(alone)  # (4,)
        assert alone.std() > 0.1
        for pad in (0, 10):
            tokens, mask = collate(examples, pad, tiny.CPU)
            torch.testing.assert_close(model.score(tokens, mask), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("logprob_term", [True, False])
def test_a_reward_model_comes_back_from_its_checkpoint(tmp_path, logprob_term):
    """Of either kind: the file says which, so that load_checkpoint needs no flag."""
    path, tokenizer = tmp_path / "reward.pt", tiny.byte_tokenizer()
    model = reward.from_gpt(tiny.gpt(vocab_size=tokenizer.vocab_size), logprob_term)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    config = reward.Config(logprob_term=logprob_term)
    save_checkpoint(path, "reward", model, tokenizer, config)
    loaded, _ = load_checkpoint(path, ["reward"], reward.RewardModel, tiny.CPU)
    assert loaded.config == model.config
    assert loaded.config.logprob_term == logprob_term
    weights, expected = loaded.state_dict(), model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    tokens, mask = collate(examples_of(UNEQUAL), 0, tiny.CPU)
    with torch.no_grad():
        assert torch.equal(loaded.score(tokens, mask), model.score(tokens, mask))


# ---- the reward model: its training


@tiny.in_precision(torch.float32)
def test_the_spread_of_log_probabilities_is_over_pairs_whatever_the_batches():
    """Each answer's log-probability summed token by token by the trunk alone."""
    model = tiny.critic(tiny.gpt())
    pairs, differences = [], []
    for lengths in torch.randint(1, 9, (30, 2)).tolist():
        pair, logprobs = [], []
        for n in lengths:
            prompt, answer = [0, 3], torch.randint(11, (n,)).tolist()
            pair.append(Example(prompt + answer, [0, 0] + [1] * n, line=0))
            table = model.trunk(torch.tensor([prompt + answer])).log_softmax(-1)[0]  # (T, V)
            logprobs.append(sum(table[1 + i, token].item() for i, token in enumerate(answer)))
        pairs.append(Pair(*pair, line=0))
        differences.append(logprobs[0] - logprobs[1])
    expected = math.sqrt(sum(d * d for d in differences) / len(differences))
    for size in (1, 7, 64):
        spread = reward.logprob_spread(model, pairs, 0, tiny.CPU, size)
        assert spread == pytest.approx(expected, rel=1e-4)


@tiny.in_precision(torch.float32)
@pytest.mark.parametrize("logprob_term", [True, False])
def test_the_reward_model_learns_the_scores_of_a_bradley_terry_world(logprob_term):
    """Six answers of unequal length with known scores.

    The real model, its batches and loss, 20,000 comparisons.
    """
    true_scores = torch.tensor([-1.5, -0.6, -0.2, 0.3, 0.5, 1.5])
    winner, loser = comparisons(true_scores, 20_000)
    answers = [[1], [2], [1, 4], [5, 2, 7], [5, 2, 8, 8], [9, 2, 7, 1, 1, 6]]
    examples = [Example([0, 3] + a, [0, 0] + [1] * len(a), line=0) for a in answers]
    model = reward.from_gpt(tiny.gpt(), logprob_term)
    optimizers = make_optimizers(model, 1e-2, weight_decay=0.0)
    for step in range(150):
        scores = model.score(*collate(examples, 0, tiny.CPU))  # (6,)
        reward.preference_loss(scores[winner], scores[loser]).backward()
        optimizer_step(model, optimizers, lr_factor(step, 150, warmup=0))
    scores = model.score(*collate(examples, 0, tiny.CPU)).detach()
    errors = scores - scores.mean() - true_scores + true_scores.mean()
    assert errors.abs().max() < 0.15


@tiny.in_precision(torch.float32)
@pytest.mark.parametrize("logprob_term", [True, False])
def test_a_run_on_separable_pairs_orders_all_held_out_ones(tmp_path, monkeypatch, logprob_term):
    """reward.main: of two answers the one with the greater letter is preferred.

    Afterwards the answers of its calibration have mean score 0 and standard deviation 1.
    """
    tokenizer, rng = tiny.byte_tokenizer(), random.Random(0)
    sft = tiny.gpt(vocab_size=tokenizer.vocab_size)
    files = dict(
        init=tmp_path / "sft.pt", data=tmp_path / "pairs.jsonl", out=tmp_path / "reward.pt"
    )
    save_checkpoint(files["init"], "sft", sft, tokenizer, reward.Config())
    records = []
    for i in range(400):
        prompt = [{"role": "user", "content": f"{i}?"}]
        rejected, chosen = sorted(rng.sample("abcdef", 2))
        records.append(dict(messages=prompt, chosen=chosen, rejected=rejected))
    write_jsonl(files["data"], records)
    flags = dict(device="cpu", lr=1e-2, steps=120, batch_size=16, logprob_term=logprob_term)
    flags |= dict(max_new_tokens=4, calibration_size=64)

    examples, mean_and_std = [], []
    real = reward.calibrate

    def calibrate(model, sft, prompts, tokenizer, config):
        real(model, sft, prompts, tokenizer, config)
        torch.manual_seed(config.seed)
        answers = sft.generate(prompts, config.max_new_tokens, end_id=tokenizer.end)
        for prompt, answer in zip(prompts, answers):
            mask = [0] * len(prompt) + [1] * len(answer)
            examples.append(Example(prompt + answer, mask, line=0))
        scores = model.score(*collate(examples, tokenizer.pad, tiny.CPU))
        mean_and_std[:] = [scores.mean().item(), scores.std().item()]

    monkeypatch.setattr(reward, "calibrate", calibrate)
    tiny.run(reward, files | flags)
    last = json.loads((tmp_path / "reward.jsonl").read_text().splitlines()[-1])
    assert last["val_accuracy"] == 1
    assert len(examples) == 64 and mean_and_std == pytest.approx([0, 1], abs=1e-4)
    model, _ = load_checkpoint(files["out"], ["reward"], reward.RewardModel, tiny.CPU)
    assert hasattr(model, "logprob_weight") == logprob_term
