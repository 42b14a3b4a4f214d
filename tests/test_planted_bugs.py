"""Bugs that RLHF code has shipped with, planted one at a time: the test that must go red, does.

A bug is one edit of the real function's source: in owner.function, `right` becomes `wrong`. The
check is a test of this folder (which passes on the code as it is), and only a failed assertion of
it counts, not a crash.
"""

import inspect
import textwrap
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import test_first_step
import test_forks
import test_gae
import test_kl_and_preference
import test_loss_mask
import test_micro_batches
import test_model
import test_policy_and_value_loss
import test_ppo_optimum
import test_rewards_and_whitening as test_rewards
import test_stage_ends
import test_windows
import torch

import model
import ppo
import pretrain
import reward
import sft
from data import conversation
from forks import dpo, grpo


class Bug(NamedTuple):
    owner: object  # the module or class that looks the function up
    function: str
    right: str
    wrong: str
    check: object


# ---- the checks

dpo_optimum = partial(
    test_forks.test_dpo_reaches_the_closed_form_optimum_of_the_labellers_rewards, seed=0
)
dpo_sums = test_forks.test_a_responses_log_probability_is_the_chain_rules_whatever_stands_beside_it
groups = (
    test_forks.test_group_advantages_are_differences_within_the_group_and_equal_rewards_give_none
)
group_tokens = (
    test_forks.test_a_groups_responses_share_a_prompt_and_their_own_advantage_at_each_token
)
grpo_micro = test_forks.test_grpos_micro_batches_of_any_size_give_the_same_update

optimum = partial(test_ppo_optimum.test_ppo_reaches_the_closed_form_optimum, seed=0)
first_step = partial(
    test_first_step.test_at_the_first_step_ratios_are_1_and_both_kl_are_0, torch.float32, 1e-4
)
unmoved = partial(
    test_first_step.test_with_learning_rate_0_they_hold_through_all_epochs, torch.float32, 1e-4
)
samples = (
    test_first_step.test_the_rollout_samples_from_the_policy_whose_log_probabilities_it_records
)
rewards = test_rewards.test_a_token_is_rewarded_by_its_kl_term_and_the_last_one_by_the_score_too
whitening = (
    test_rewards.test_whitened_advantages_have_mean_0_and_variance_1_over_the_responses_tokens
)
value_loss = partial(
    test_policy_and_value_loss.test_the_value_loss_is_the_worse_of_the_plain_and_the_clipped_error,
    seed=0,
)
compares = test_policy_and_value_loss.test_the_update_compares_with_what_the_rollout_recorded
fresh = (
    test_stage_ends.test_fresh_embeddings_are_half_as_large_as_the_trained_ones_and_point_everywhere
)
sft_mask = (
    test_loss_mask
).test_every_batch_of_an_sft_run_to_its_last_trains_exactly_the_assistants_words_and_end_tokens
left_padding = partial(
    test_model.test_left_padding_and_the_cache_change_no_logit, test_model.SIZES[0]
)
inverse_cdf = partial(
    (
        test_model
    ).test_a_given_random_number_is_sent_through_the_inverse_of_the_cumulative_distribution,
    temperature=1.0,
    top_k=1,
    top_p=1.0,
)
reward_score = (
    test_kl_and_preference.test_a_score_is_the_heads_plus_the_weighed_log_probability_of_the_answer
)
reward_pads = partial(
    test_kl_and_preference.test_a_score_does_not_depend_on_the_padding_or_the_neighbours,
    logprob_term=True,
)
micro_batches = test_micro_batches.test_micro_batches_of_any_size_give_the_same_run

# ---- the bugs

BUGS = {
    "KL sign flipped": Bug(
        ppo,
        "token_rewards",
        "rewards = -beta * (",
        "rewards = beta * (",
        optimum,
    ),
    "k2 in the reward": Bug(
        ppo,
        "token_rewards",
        "* (logprobs - ref_logprobs)",
        "* (0.5 * (logprobs - ref_logprobs) ** 2)",
        optimum,
    ),
    "k3 in the reward": Bug(
        ppo,
        "token_rewards",
        "* (logprobs - ref_logprobs)",
        "* (torch.exp(ref_logprobs - logprobs) - 1 + logprobs - ref_logprobs)",
        optimum,
    ),
    "reference at another temperature": Bug(
        ppo,
        "rollout",
        "size, ref, *args",
        "size, ref, tokens, mask, 1.0",
        first_step,
    ),
    "rollout at another temperature than training": Bug(
        ppo,
        "generate_responses",
        "config.temperature,",
        "1.0,",
        samples,
    ),
    "training at another temperature than rollout": Bug(
        ppo,
        "ppo_loss",
        "tokens, mask, config.temperature",
        "tokens, mask, 1.0",
        first_step,
    ),
    "one random number for a whole response": Bug(
        model.GPT,
        "generate",
        "uniforms[:, step]",
        "uniforms[:, 0]",
        samples,
    ),
    "a random number of 0 chooses an id of probability 0": Bug(
        test_model,
        "sample",
        "right=True",
        "right=False",
        inverse_cdf,
    ),
    "GAE off by one: V_t in place of V_{t+1}": Bug(
        ppo,
        "gae",
        "gamma * next_value - values",
        "gamma * values[:, t] - values",
        test_gae.test_gae_is_the_mixture_of_n_step_advantages,
    ),
    "values off by one: V after the action": Bug(
        ppo,
        "action_values",
        "[:, :-1]",
        "[:, 1:]",
        test_model.test_a_value_does_not_depend_on_the_action_it_is_the_baseline_of,
    ),
    "score one slot late": Bug(
        ppo,
        "token_rewards",
        "last_true(mask)[:, None]",
        "(last_true(mask) + 1).clamp(max=mask.size(1) - 1)[:, None]",
        rewards,
    ),
    "end token left out of the loss": Bug(
        ppo,
        "generate_responses",
        "[1] * len(r)",
        "[1] * (len(r) - (r[-1] == tokenizer.end)) + [0] * (r[-1] == tokenizer.end)",
        test_loss_mask.test_the_mask_of_a_rollout_covers_exactly_the_response_and_its_end_token,
    ),
    "pads inside the whitening": Bug(
        ppo,
        "whiten",
        "mean = masked_mean(x, mask)\n    var = masked_mean((x - mean) ** 2, mask)",
        "mean, var = x.mean(), x.var()",
        whitening,
    ),
    "uncentred advantages": Bug(
        ppo,
        "whiten",
        "return (x - mean) *",
        "return x *",
        whitening,
    ),
    "value clip against a fresh value": Bug(
        ppo,
        "value_loss",
        "old_values + (values - old_values)",
        "values.detach() + (values - values.detach())",
        value_loss,
    ),
    "ratio of the policy to itself": Bug(
        ppo,
        "ppo_loss",
        "policy_loss(logprobs, old_logprobs,",
        "policy_loss(logprobs, logprobs.detach(),",
        compares,
    ),
    "values clipped against themselves": Bug(
        ppo,
        "ppo_loss",
        'value_loss(values, batch["values"],',
        "value_loss(values, values.detach(),",
        compares,
    ),
    "trained embeddings thrown away": Bug(
        pretrain,
        "reinit_unseen_embeddings",
        "weight[~seen] = torch.randn_like(weight[~seen]) * weight[seen].std()",
        "weight[seen] = torch.randn_like(weight[seen]) * weight[~seen].std()",
        fresh,
    ),
    "mean of micro-batch means": Bug(
        ppo,
        "update",
        'micro["mask"].sum() / n_actions',
        "len(rows) / len(minibatch)",
        test_policy_and_value_loss.test_micro_batches_of_any_size_give_the_same_update,
    ),
    "mean of micro-batch means in SFT": Bug(
        sft,
        "main",
        "(mask.sum() / n_trained)",
        "(len(micro) / len(batch))",
        partial(micro_batches, "sft"),
    ),
    "mean of unequal micro-batches' means in the reward model": Bug(
        reward,
        "main",
        "len(micro) / config.batch_size",
        "1 / len(micro_batches(batch, config.micro_batch_size))",
        partial(micro_batches, "reward"),
    ),
    "sum of micro-batch means in pretraining": Bug(
        pretrain,
        "main",
        "loss * (len(starts) / config.batch_size)",
        "loss",
        partial(micro_batches, "pretrain"),
    ),
    "a window's targets are its inputs": Bug(
        pretrain,
        "read_windows",
        "return windows[:, :-1], windows[:, 1:]",
        "return windows[:, :-1], windows[:, :-1]",
        test_windows.test_an_epoch_covers_the_stream_once,
    ),
    "every epoch reads the same windows": Bug(
        pretrain.Windows,
        "start",
        "(self.seed, epoch)",
        "self.seed",
        test_windows.test_each_epoch_begins_at_an_offset_and_in_an_order_of_its_own,
    ),
    "SFT mask shifted by one": Bug(
        sft,
        "inputs_and_targets",
        "mask[:, 1:]",
        "mask[:, :-1]",
        sft_mask,
    ),
    "SFT mask on the prompt too": Bug(
        conversation,
        "render",
        "mask += [0] * len(opening + content + closing)",
        "mask += [1] * len(opening + content + closing)",
        sft_mask,
    ),
    "loss on pads": Bug(
        sft,
        "collate",
        "pad_rows([example.mask for example in examples], 0, device)",
        "pad_rows([example.mask for example in examples], 1, device)",
        sft_mask,
    ),
    "SFT mask lost": Bug(
        sft,
        "masked_loss",
        "(losses * mask.flatten()).sum() / mask.sum()",
        "losses.mean()",
        test_loss_mask.test_the_sft_loss_is_the_mean_over_the_tokens_that_train_and_nothing_else,
    ),
    "positions wrong under left padding": Bug(
        model.GPT,
        "hidden",
        "n_pad.view(-1, 1, 1)).clamp",
        "n_pad.view(-1, 1, 1) * (T > 1)).clamp",
        left_padding,
    ),
    "pads are looked at": Bug(
        model.GPT,
        "hidden",
        "causal_mask(cache_positions, n_keys, n_pad)",
        "causal_mask(cache_positions, n_keys)",
        left_padding,
    ),
    "dropout between old and new log-probabilities": Bug(
        ppo,
        "response_logprobs",
        "model.hidden(tokens[:, :-1])[places]",
        "F.dropout(model.hidden(tokens[:, :-1])[places], 0.1)",
        first_step,
    ),
    "noise between old and new log-probabilities": Bug(
        ppo,
        "response_logprobs",
        "model.logits(hidden) /",
        "(model.logits(hidden) + 0.01 * torch.randn(())) * 1.001 ** torch.randn(()) /",
        unmoved,
    ),
    "reward model's score read at the pad": Bug(
        reward.RewardModel,
        "score",
        ".gather(1, last_true(mask)[:, None]).squeeze(1)",
        "[:, -1]",
        reward_pads,
    ),
    "reward model likes what its trunk finds unlikely": Bug(
        reward.RewardModel,
        "forward",
        "scores + self.logprob_weight",
        "scores - self.logprob_weight",
        reward_score,
    ),
    "DPO forgets the reference": Bug(
        dpo, "dpo_loss", "(logprobs - ref_logprobs)", "logprobs", dpo_optimum
    ),
    "DPO's beta on the wrong side": Bug(
        dpo, "dpo_loss", "beta * (logprobs", "1 / beta * (logprobs", dpo_optimum
    ),
    "DPO likes the rejected responses": Bug(
        dpo,
        "dpo_loss",
        "preference_loss(chosen, rejected)",
        "preference_loss(rejected, chosen)",
        dpo_optimum,
    ),
    "DPO averages log-probabilities over the length": Bug(
        dpo,
        "response_sums",
        "logprobs.cumsum(1)",
        "logprobs.cumsum(1) / mask[:, 1:].cumsum(1).clamp(min=1)",
        dpo_sums,
    ),
    "DPO counts the prompt": Bug(
        dpo, "response_sums", "mask[:, 1:]", "torch.ones_like(mask[:, 1:])", dpo_sums
    ),
    "DPO lacks the end token": Bug(
        dpo,
        "response_sums",
        "mask[:, 1:]",
        "mask[:, 1:] & F.pad(mask[:, 2:], (0, 1))",
        dpo_sums,
    ),
    "GRPO mixes groups up": Bug(
        grpo, "group_advantages", "x.view(-1, group_size)", "x.view(group_size, -1)", groups
    ),
    "GRPO's baseline is the batch's mean": Bug(
        grpo, "group_advantages", "groups.mean(1, keepdim=True)", "groups.mean()", groups
    ),
    "GRPO forgets the KL": Bug(
        grpo, "compute_advantages", "advantages - config.beta", "advantages - 0.0", group_tokens
    ),
    "GRPO's KL with the wrong sign": Bug(
        grpo,
        "compute_advantages",
        "advantages - config.beta",
        "advantages + config.beta",
        group_tokens,
    ),
    "GRPO repeats the batch in place of each prompt": Bug(
        grpo,
        "rollout",
        "[prompt for prompt in prompts for _ in range(config.group_size)]",
        "list(prompts) * config.group_size",
        group_tokens,
    ),
    "GRPO averages over micro-batches": Bug(
        grpo, "update", "(mask.sum() / n_actions)", "(len(rows) / len(minibatch))", grpo_micro
    ),
    "reward model's log-probability lacks the last token": Bug(
        reward.RewardModel,
        "answer_logprobs",
        "F.pad(logprobs.cumsum(1), (1, 0))",
        "F.pad(logprobs.cumsum(1)[:, :-1], (2, 0))",
        reward_score,
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_turns_its_check_red(name, monkeypatch):
    bug = BUGS[name]
    function = inspect.unwrap(getattr(bug.owner, bug.function))
    source = textwrap.dedent(inspect.getsource(function))
    once = f"{bug.function} no longer says `{bug.right}` once: plant this bug anew"
    assert source.count(bug.right) == 1, once
    edited = {}
    exec(source.replace(bug.right, bug.wrong), function.__globals__, edited)
    monkeypatch.setattr(bug.owner, bug.function, edited[bug.function])
    with pytest.raises(AssertionError):
        bug.check()


def test_the_page_of_proofs_counts_the_bugs():
    page = Path(__file__).parent.parent / "docs/proofs.md"
    assert f"| {len(BUGS)} bugs planted one by one" in page.read_text()
