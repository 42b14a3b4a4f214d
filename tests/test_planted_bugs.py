"""Bugs that RLHF code has shipped with, planted here one at a time: for each, the test that must go red does.

A bug is one edit of the real function's source: in owner.function, `right` becomes `wrong`. The check is a test of this
folder (which passes on the code as it is), and only a failed assertion of it counts, not a crash.
"""

import inspect
import textwrap
from functools import partial
from typing import NamedTuple

import pytest
import test_first_step
import test_gae
import test_kl_and_preference
import test_loss_mask
import test_model
import test_policy_and_value_loss
import test_ppo_optimum
import test_rewards_and_whitening
import torch

import model
import ppo
import reward
import sft
from data import conversation


class Bug(NamedTuple):
    owner: object
    function: str
    right: str
    wrong: str
    check: object


optimum = partial(test_ppo_optimum.test_ppo_reaches_the_closed_form_optimum, seed=0)
first_step = partial(test_first_step.test_at_the_first_step_ratios_are_1_and_both_kl_are_0, torch.float32, 1e-4)
unmoved = partial(test_first_step.test_with_learning_rate_0_they_hold_through_all_epochs, torch.float32, 1e-4)
left_padding = partial(test_model.test_left_padding_and_the_cache_change_no_logit, test_model.SIZES[0])

BUGS = {
    "KL sign flipped": Bug(ppo, "token_rewards", "-beta * (", "beta * (", optimum),
    "k2 in the reward": Bug(ppo, "token_rewards", "(logprobs - ref_logprobs)", "0.5 * (logprobs - ref_logprobs) ** 2", optimum),
    "k3 in the reward": Bug(
        ppo,
        "token_rewards",
        "(logprobs - ref_logprobs)",
        "(torch.exp(ref_logprobs - logprobs) - 1 + logprobs - ref_logprobs)",
        optimum,
    ),
    "reference at another temperature": Bug(
        ppo,
        "rollout",
        "response_logprobs(ref, *mine, config.temperature)",
        "response_logprobs(ref, *mine, 1.0)",
        first_step,
    ),
    "rollout at another temperature than training": Bug(
        ppo,
        "generate_responses",
        "config.max_new_tokens, config.temperature",
        "config.max_new_tokens, 1.0",
        test_first_step.test_the_rollout_samples_from_the_policy_whose_log_probabilities_it_records,
    ),
    "training at another temperature than rollout": Bug(
        ppo, "update", 'b["tokens"], b["mask"], config.temperature', 'b["tokens"], b["mask"], 1.0', first_step
    ),
    "GAE off by one: V_t in place of V_{t+1}": Bug(
        ppo,
        "gae",
        "gamma * next_value - values",
        "gamma * values[:, t] - values",
        test_gae.test_gae_is_the_mixture_of_n_step_advantages,
    ),
    "score one slot late": Bug(
        ppo,
        "token_rewards",
        "last_true(mask)[:, None]",
        "(last_true(mask) + 1).clamp(max=mask.size(1) - 1)[:, None]",
        test_rewards_and_whitening.test_a_token_is_rewarded_by_its_kl_term_and_the_last_one_by_the_score_too,
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
        test_rewards_and_whitening.test_whitened_advantages_have_mean_0_and_variance_1_over_the_responses_tokens,
    ),
    "uncentred advantages": Bug(
        ppo,
        "whiten",
        "return (x - mean) *",
        "return x *",
        test_rewards_and_whitening.test_whitened_advantages_have_mean_0_and_variance_1_over_the_responses_tokens,
    ),
    "value clip against a fresh value": Bug(
        ppo,
        "value_loss",
        "old_values + (values - old_values)",
        "values.detach() + (values - values.detach())",
        partial(test_policy_and_value_loss.test_the_value_loss_is_the_worse_of_the_plain_and_the_clipped_error, seed=0),
    ),
    "mean of microbatch means": Bug(
        ppo,
        "update",
        'b["mask"].sum() / n_actions',
        "len(micro) / len(minibatch)",
        test_policy_and_value_loss.test_microbatches_of_any_size_give_the_same_update,
    ),
    "SFT mask shifted by one": Bug(
        sft,
        "collate",
        "mask[:, 1:]",
        "mask[:, :-1]",
        test_loss_mask.test_every_batch_of_an_sft_run_to_its_last_trains_exactly_the_assistants_words_and_end_tokens,
    ),
    "SFT mask on the prompt too": Bug(
        conversation,
        "render",
        'int(message["role"] == "assistant")',
        "1",
        test_loss_mask.test_every_batch_of_an_sft_run_to_its_last_trains_exactly_the_assistants_words_and_end_tokens,
    ),
    "loss on pads": Bug(
        sft,
        "collate",
        "for _, mask in examples], 0, device",
        "for _, mask in examples], 1, device",
        test_loss_mask.test_every_batch_of_an_sft_run_to_its_last_trains_exactly_the_assistants_words_and_end_tokens,
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
        "slots if n_pad is None else",
        "slots if n_pad is None else slots.expand(len(tokens), 1) if T == 1 else",
        left_padding,
    ),
    "pads are looked at": Bug(
        model.GPT, "hidden", "attention_bias(slots, n_slots, n_pad)", "attention_bias(slots, n_slots)", left_padding
    ),
    "dropout between old and new log-probabilities": Bug(
        ppo,
        "response_logprobs",
        "model.hidden(tokens[:, :-1])[mask]",
        "F.dropout(model.hidden(tokens[:, :-1])[mask], 0.1)",
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
        test_kl_and_preference.test_a_score_does_not_depend_on_the_padding_or_the_neighbours,
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_turns_its_check_red(name, monkeypatch):
    bug = BUGS[name]
    function = inspect.unwrap(getattr(bug.owner, bug.function))
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(bug.right) == 1, f"{bug.function} no longer says `{bug.right}` once: plant this bug anew"
    edited = {}
    exec(source.replace(bug.right, bug.wrong), function.__globals__, edited)
    monkeypatch.setattr(bug.owner, bug.function, edited[bug.function])
    with pytest.raises(AssertionError):
        bug.check()
