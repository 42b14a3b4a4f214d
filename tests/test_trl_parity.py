"""PPO's arithmetic against TRL's: its formulas as loops, and one real iteration of its trainer.

TRL had a PPOTrainer up to version 1.12: `pip install trl==1.12.0` and every test here runs on both.
Where the two differ:

- TRL pays the score one slot after the end token and trains a value there, ours at the choice of
  the end token, after which V is 0. With gamma = lambda = 1 the advantages are the same; with less,
  part of the score reaches TRL's answer only through V.
- TRL's whitening divides by n - 1, ours by n.
- As its source reads: the log-probabilities of the rollout are the sampler's (in bfloat16 the first
  ratios are then not 1); the mean over micro-batches weighs each alike, ours each token; the logged
  KL is k2 with the pads counted in; k3 is allowed inside the reward, where it moves the optimum;
  the gradient's norm is not clipped; a missing end lowers the score, ours replaces it.
"""

import statistics
import sys
from unittest import mock

import pytest
import torch

import ppo

GAMMA, LAM, CLIP, VALUE_CLIP, BETA = 0.9, 0.7, 0.2, 0.1, 0.05
END, PAD = 1, 0


# ---- the formulas, written anew, over lists of floats with an entry a slot


def rewards_of(logprobs, ref_logprobs, score, has_slot_after_end):
    kl_terms = [-BETA * (p - q) for p, q in zip(logprobs, ref_logprobs)]
    if has_slot_after_end:
        return kl_terms + [score]
    return kl_terms[:-1] + [kl_terms[-1] + score]


def advantages_of(rewards, values):
    next_values = values[1:] + [0.0]
    deltas = [r + GAMMA * next_v - v for r, v, next_v in zip(rewards, values, next_values)]
    n, decay = len(deltas), GAMMA * LAM
    return [sum(decay ** (i - t) * deltas[i] for i in range(t, n)) for t in range(n)]


def whiten(xs):
    mean, variance = statistics.fmean(xs), statistics.variance(xs)  # of a sample: divided by n - 1
    return [(x - mean) / (variance + 1e-8) ** 0.5 for x in xs]


def keep(x, low, high):
    return min(max(x, low), high)


def policy_loss(ratios, advantages):
    pairs = list(zip(ratios, advantages))
    return statistics.fmean(max(-a * r, -a * keep(r, 1 - CLIP, 1 + CLIP)) for r, a in pairs)


def value_loss(values, old_values, returns):
    losses = []
    for v, old, r in zip(values, old_values, returns):
        clipped = keep(v, old - VALUE_CLIP, old + VALUE_CLIP)
        losses.append(max((v - r) ** 2, (clipped - r) ** 2))
    return 0.5 * statistics.fmean(losses)


def rows(tensor, where):
    return [row[here].tolist() for row, here in zip(tensor.double(), where)]


def tensor(lists, where):
    flat = torch.tensor([value for row in lists for value in row], dtype=torch.float64)
    return torch.zeros(where.shape, dtype=torch.float64).masked_scatter(where, flat)


def by_the_formulas(x):
    """What an iteration computes from x, with TRL's slot after the end.

    mask (B, T) are the actions, slots (B, T) those with that slot.
    """
    slots, mask = x["slots"], x["mask"]
    logprobs, ref_logprobs = rows(x["logprobs"], mask), rows(x["ref_logprobs"], mask)
    has_slot_after_end = (slots != mask).any(1).tolist()
    scores = x["scores"].tolist()
    rewards = list(map(rewards_of, logprobs, ref_logprobs, scores, has_slot_after_end))
    advantages = tensor(map(advantages_of, rewards, rows(x["values"], slots)), slots)  # (B, T)
    returns = advantages + x["values"].double() * slots
    whitened = tensor([whiten(advantages[mask].tolist())], mask)
    ratios = (x["new_logprobs"].double() - x["logprobs"].double())[mask].exp().tolist()
    values = [t.double()[slots].tolist() for t in (x["new_values"], x["values"], returns)]
    return dict(
        rewards=tensor(rewards, slots),
        advantages=advantages,
        returns=returns,
        whitened=whitened,
        policy_loss=policy_loss(ratios, whitened[mask].tolist()),
        value_loss=value_loss(*values),
    )


# ---- numbers to compare on: random ones, or those of a real iteration of TRL


def random_iteration():
    """Four responses of 2 to 7 tokens that an update has moved far, and what the formulas give."""
    names = ("logprobs", "ref_logprobs", "values", "new_logprobs", "new_values")
    x = {name: torch.randn(4, 7, dtype=torch.float64) for name in names}
    lengths, steps = torch.tensor([2, 4, 6, 7])[:, None], torch.arange(7)
    x["scores"] = torch.randn(4, dtype=torch.float64)
    x |= dict(mask=steps < lengths, slots=steps < lengths + 1)
    return x, by_the_formulas(x)


def make_trainer(trl, folder):
    """TRL's PPOTrainer on tiny Llamas."""
    import datasets
    import tokenizers
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
        num_labels=1,
    )
    words = {str(i): i for i in range(12)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=str(PAD)))
    names = dict(eos_token=str(END), pad_token=str(PAD), padding_side="left")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)
    policy, ref = (transformers.LlamaForCausalLM(config) for _ in range(2))
    reward, critic = (transformers.LlamaForSequenceClassification(config) for _ in range(2))
    prompts = [[2 + i * j % 9 for j in range(1, 2 + i % 4)] for i in range(8)]
    prompts = datasets.Dataset.from_dict({"input_ids": prompts})
    args = trl.PPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        num_sample_generations=0,
        disable_tqdm=True,
        total_episodes=8,
        per_device_train_batch_size=8,
        num_ppo_epochs=3,
        learning_rate=1e-2,
        gradient_checkpointing=False,
        response_length=6,
        temperature=0.8,
        stop_token="eos",
        gamma=GAMMA,
        lam=LAM,
        cliprange=CLIP,
        cliprange_value=VALUE_CLIP,
        kl_coef=BETA,
    )
    return trl.PPOTrainer(args, tokenizer, policy, ref, reward, prompts, critic)


def copy_of(x):
    return x.detach().clone() if isinstance(x, torch.Tensor) else x


def watch(function, seen):
    """The function, which notes the variables of a train() that calls it in seen[its name].

    A later call overwrites what an earlier one saw.
    """

    def watched(*args, **kwargs):
        caller = sys._getframe(1)
        if caller.f_code.co_name == "train":
            variables = {name: copy_of(x) for name, x in caller.f_locals.items()}
            seen[function.__name__] = variables
        return function(*args, **kwargs)

    return watched


def trl_iteration(folder):
    """The same of TRL's PPOTrainer: its variables where it whitens and at the last epoch's end."""
    reason = "parity with TRL needs its PPO: pip install trl==1.12.0"
    trl = pytest.importorskip("trl.experimental.ppo.ppo_trainer", reason=reason)
    trainer, seen = make_trainer(trl, folder), {}
    names = ("masked_whiten", "masked_mean")
    watched = {name: watch(getattr(trl, name), seen) for name in names}
    with mock.patch.multiple(trl, **watched):
        trainer.train()
    rollout, last = seen["masked_whiten"], seen["masked_mean"]
    order = torch.from_numpy(last["micro_batch_inds"]).argsort()  # the epoch's shuffle, undone
    x = {name: rollout[name] for name in ("logprobs", "ref_logprobs", "values", "scores")}
    x |= dict(new_logprobs=last["new_logprobs"][order], new_values=last["vpred"][order])
    x |= dict(mask=~rollout["padding_mask"], slots=~rollout["padding_mask_p1"])
    results = {name: rollout[name] for name in ("rewards", "advantages", "returns")}
    results["whitened"] = last["advantages"]
    results |= dict(policy_loss=last["pg_loss"], value_loss=last["vf_loss"])
    return x, results


@pytest.fixture(params=["formulas", "trl"], scope="module")
def iteration(request, tmp_path_factory):
    torch.manual_seed(1)
    if request.param == "formulas":
        return random_iteration()
    return trl_iteration(str(tmp_path_factory.mktemp("trl")))


def assert_equal(ours, theirs):
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ---- the comparisons: the first one of TRL with the formulas, all others of ours with both


def ours_policy_loss(x, theirs, clip):
    return ppo.policy_loss(x["new_logprobs"], x["logprobs"], theirs["whitened"], x["mask"], clip)


def ours_value_loss(x, theirs, clip):
    return ppo.value_loss(x["new_values"], x["values"], theirs["returns"], x["slots"], clip)


def test_the_formulas_are_what_trl_computes(iteration):
    x, theirs = iteration
    for name, value in by_the_formulas(x).items():
        assert_equal(value, theirs[name])


def test_the_numbers_reach_every_case(iteration):
    """Responses that end early and that do not, and losses that clipping changes."""
    x, theirs = iteration
    early = (x["slots"] != x["mask"]).any(1)
    assert early.any() and not early.all() and len(x["mask"].sum(1).unique()) > 2
    assert theirs["policy_loss"] != pytest.approx(ours_policy_loss(x, theirs, clip=100.0).item())
    assert theirs["value_loss"] != pytest.approx(ours_value_loss(x, theirs, clip=100.0).item())


def test_rewards_equal_trls_but_that_the_score_comes_with_the_end_token(iteration):
    x, theirs = iteration
    rewards = ppo.token_rewards(x["scores"], x["logprobs"], x["ref_logprobs"], x["mask"], BETA)
    # (B,) each, one apart where a response ended early
    last, last_slot = x["mask"].sum(1) - 1, x["slots"].sum(1) - 1
    rows = torch.arange(len(last))
    rewards[rows, last] -= x["scores"]
    rewards[rows, last_slot] += x["scores"]
    assert_equal(rewards, theirs["rewards"])


def test_advantages_and_returns_equal_trls_over_the_slots_it_uses(iteration):
    x, theirs = iteration
    advantages, returns = ppo.gae(theirs["rewards"], x["values"], x["slots"], GAMMA, LAM)
    assert_equal(advantages, theirs["advantages"])
    assert_equal(returns, theirs["returns"])


def test_with_gamma_and_lambda_1_the_place_of_the_score_changes_no_advantage(iteration):
    x, theirs = iteration
    rewards = ppo.token_rewards(x["scores"], x["logprobs"], x["ref_logprobs"], x["mask"], BETA)
    ours, _ = ppo.gae(rewards, x["values"], x["mask"], 1.0, 1.0)
    with_the_slot, _ = ppo.gae(theirs["rewards"], x["values"], x["slots"], 1.0, 1.0)
    assert_equal(ours, with_the_slot * x["mask"])
    ours, _ = ppo.gae(rewards, x["values"], x["mask"], 1.0, LAM)
    with_the_slot, _ = ppo.gae(theirs["rewards"], x["values"], x["slots"], 1.0, LAM)
    assert not torch.allclose(ours, with_the_slot * x["mask"], atol=0.01)


def test_whitened_advantages_equal_trls_up_to_the_unbiased_variance(iteration):
    x, theirs = iteration
    n = x["mask"].sum()
    assert_equal(
        ppo.whiten(theirs["advantages"], x["mask"]), theirs["whitened"] * (n / (n - 1)) ** 0.5
    )


def test_policy_and_value_loss_equal_trls(iteration):
    x, theirs = iteration
    assert_equal(ours_policy_loss(x, theirs, CLIP), theirs["policy_loss"])
    assert_equal(ours_value_loss(x, theirs, VALUE_CLIP), theirs["value_loss"])
