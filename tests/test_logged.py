"""What a run logs, against the files and the checkpoint by hand: each record alone, in plain sums.

The last validation follows the last step, so it is that of the checkpoint.
"""

import math
import shutil
import statistics

import numpy as np
import pytest
import tiny
import torch

import ppo
import pretrain
import reward
import sft
from data import conversation
from forks import dpo, grpo
from model import GPT
from reward import RewardModel
from train.checkpoint import LANGUAGE_MODELS, load_checkpoint
from utils.files import read_jsonl, write_jsonl

TOKENIZER = tiny.byte_tokenizer()
N_TRAIN, N_VAL = 28, 68  # of the 96 records; more than the 64 of one forward pass


@pytest.fixture(autouse=True)
def in_float32():
    with tiny.in_precision(torch.float32):
        yield


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return tiny.stage_flags(tmp_path_factory.mktemp("logged"))


def run(module, flags):
    """The run's log."""
    tiny.run(module, flags)
    return read_jsonl(flags["out"].with_suffix(".jsonl"))


def language_model(path):
    return load_checkpoint(path, LANGUAGE_MODELS, GPT, tiny.CPU)[0]


@torch.no_grad()
def logprobs_of(model, tokens):
    """log p of each token but the first, given those before it: n - 1 floats."""
    logprobs = model(torch.tensor([tokens]))[0].log_softmax(-1)  # (n, V)
    return [logprobs[t, token].item() for t, token in enumerate(tokens[1:])]


def answer_logprobs(model, messages, answer):
    """log p of each token of the answer and of its end."""
    prompt = conversation.render_prompt(messages, TOKENIZER)
    tokens = prompt + TOKENIZER.encode(answer) + [TOKENIZER.end]
    return logprobs_of(model, tokens)[len(prompt) - 1 :]


def approx(x):
    return pytest.approx(x, rel=1e-4, abs=1e-5)


# ---- pretraining


def test_pretrainings_losses_are_means_over_the_windows_of_their_own_streams(flags, monkeypatch):
    """On the way over the first VAL_WINDOWS windows of val.bin, at the end over all of them.

    The model does not move, and the text holds every id, so that the checkpoint is it.
    """
    mine, trained_on = flags["pretrain"] | dict(lr=0, muon_lr=0), []
    real = pretrain.read_windows

    def read_windows(*args):
        tokens, targets = real(*args)
        if torch.is_grad_enabled():  # a step, not a validation
            trained_on.append(torch.cat((tokens, targets[:, -1:]), 1).tolist())
        return tokens, targets

    monkeypatch.setattr(pretrain, "read_windows", read_windows)
    monkeypatch.setattr(pretrain, "VAL_WINDOWS", 10)
    log = run(pretrain, mine)
    model, val = language_model(mine["out"]), np.fromfile(mine["data"] / "val.bin", np.uint16)

    def mean_loss(windows):
        return -statistics.fmean(x for window in windows for x in logprobs_of(model, window))

    windows = [val[i : i + 9].tolist() for i in range(0, len(val) - 8, 8)]
    assert len(windows) == 75
    assert [record["val_loss"] for record in log[:-1]] == [approx(mean_loss(windows[:10]))] * 2
    assert log[-1]["val_loss"] == approx(mean_loss(windows))
    assert abs(mean_loss(windows[:10]) - mean_loss(windows)) > 1e-3
    assert [record["train_loss"] for record in log] == [approx(mean_loss(w)) for w in trained_on]
    train = np.fromfile(mine["data"] / "train.bin", np.uint16)
    stretches = set(map(tuple, np.lib.stride_tricks.sliding_window_view(train, 9).tolist()))
    assert all(tuple(window) in stretches for windows in trained_on for window in windows)


def test_probes_are_logged_by_name_as_the_mean_loss_of_their_whole_answers(flags, tmp_path):
    """In nats, after a text that begins a document. Without such a file nothing is logged."""
    mine = flags["pretrain"] | dict(out=tmp_path / "out.pt", data=tmp_path / "data")
    shutil.copytree(flags["pretrain"]["data"], mine["data"])
    assert not any("recall_loss" in record for record in run(pretrain, mine))
    records = [dict(name="recall", text=f"{'Ada ' * n}is", answer=f" {n}") for n in range(5)]
    records += [dict(name="reading", text="Bo\nQ: Who?\nA:", answer=" Bo, I think.")]
    write_jsonl(mine["data"] / "probes.jsonl", records)
    log = run(pretrain, mine)
    model, losses = language_model(mine["out"]), {"recall": [], "reading": []}
    for record in records:
        text = [TOKENIZER.separator] + TOKENIZER.encode(record["text"])
        tokens = text + TOKENIZER.encode(record["answer"])
        losses[record["name"]].append(-sum(logprobs_of(model, tokens)[len(text) - 1 :]))
    for name, its in losses.items():
        assert log[-1][f"{name}_loss"] == approx(statistics.fmean(its))
        assert all(f"{name}_loss" in record for record in log)


# ---- SFT


def test_sfts_losses_are_means_over_the_answers_tokens_of_training_and_held_out_records(flags):
    """train_loss of the one batch that all training records make, by a model that stays."""
    mine = flags["sft"] | dict(batch_size=N_TRAIN, steps=2)
    records = read_jsonl(mine["data"])

    def mean_loss(model, records):
        losses = []
        for record in records:
            *prompt, answer = record["messages"]
            losses += [-x for x in answer_logprobs(model, prompt, answer["content"])]
        return statistics.fmean(losses)

    log = run(sft, mine)
    assert log[-1]["val_loss"] == approx(mean_loss(language_model(mine["out"]), records[-N_VAL:]))
    assert log[0]["val_loss"] > log[1]["val_loss"] + 1e-3
    base = language_model(mine["init"])
    assert log[0]["train_loss"] == approx(mean_loss(base, records[:N_TRAIN]))


# ---- comparisons


def accuracy_and_error(margins):
    fraction = statistics.fmean(margin > 0 for margin in margins)
    return approx(fraction), approx(math.sqrt(fraction * (1 - fraction) / len(margins)))


def test_the_reward_models_accuracy_and_loss_are_those_of_the_files_chosen_answers(flags):
    """By the checkpoint's scores: the calibration scales them, by a positive number.

    train_loss and margin are of the one batch that all training pairs make.
    """
    mine = flags["reward"] | dict(batch_size=N_TRAIN, steps=1, lr=0)
    (record,), pairs = run(reward, mine), read_jsonl(mine["data"])
    model, _ = load_checkpoint(mine["out"], ["reward"], RewardModel, tiny.CPU)

    @torch.no_grad()
    def score(messages, answer):
        tokens = conversation.render_prompt(messages, TOKENIZER)
        tokens = tokens + TOKENIZER.encode(answer) + [TOKENIZER.end]
        head = model.head(model.trunk.hidden(torch.tensor([tokens])))[0, -1, 0]
        logprob = sum(answer_logprobs(model.trunk, messages, answer))
        return (head + model.logprob_weight * logprob).item()

    margins = []
    for pair in pairs:
        chosen, rejected = (score(pair["messages"], pair[x]) for x in ("chosen", "rejected"))
        margins.append(chosen - rejected)
    accuracy, error = accuracy_and_error(margins[-N_VAL:])
    assert 0.1 < record["val_accuracy"] < 0.9
    assert (record["val_accuracy"], record["val_accuracy_se"]) == (accuracy, error)
    scale = record["margin"] / statistics.fmean(margins[:N_TRAIN])
    losses = [math.log(1 + math.exp(-scale * margin)) for margin in margins[:N_TRAIN]]
    assert scale > 0.1 and record["train_loss"] == approx(statistics.fmean(losses))


def test_a_run_of_the_reward_model_learns_to_prefer_what_was_chosen(flags):
    """Most of the held-out pairs are ordered as most of the training pairs say."""
    mine = flags["reward"]
    log = run(reward, mine | dict(epochs=10, lr=3e-3))
    assert log[-1]["val_accuracy"] > 0.6
    assert log[-1]["train_loss"] < log[0]["train_loss"] and log[-1]["margin"] > 0


def test_dpos_loss_and_accuracy_are_those_of_the_implicit_rewards(flags):
    """r = beta log(pi / pi_ref) of whole answers (arXiv 2305.18290, equation 7)."""
    mine = flags["dpo"] | dict(beta=0.7, lr=1e-3)
    log, pairs = run(dpo, mine), read_jsonl(mine["data"])
    assert log[0]["train_loss"] == approx(math.log(2))  # the policy is still its reference
    policy, ref = language_model(mine["out"]), language_model(mine["init"])
    margins, of_policy = [], []
    for pair in pairs[-N_VAL:]:
        its = []
        for model in (policy, ref):
            chosen, rejected = (
                sum(answer_logprobs(model, pair["messages"], pair[x]))
                for x in ("chosen", "rejected")
            )
            its.append(chosen - rejected)
        margins.append(0.7 * (its[0] - its[1]))
        of_policy.append(its[0])
    # what the policy alone finds likelier is another matter
    assert sum(m > 0 for m in margins) != sum(m > 0 for m in of_policy)
    losses = [math.log(1 + math.exp(-margin)) for margin in margins]
    assert log[-1]["val_loss"] == approx(statistics.fmean(losses))
    accuracy, error = accuracy_and_error(margins)
    assert 0.1 < log[-1]["val_accuracy"] < 0.9
    assert (log[-1]["val_accuracy"], log[-1]["val_accuracy_se"]) == (accuracy, error)


# ---- PPO


def rollouts(monkeypatch, module, flags):
    """(log, batches): of validation, each step, validation and PPO's one more."""
    batches, real = [], module.rollout

    def rollout(*args):
        batches.append(real(*args))
        return batches[-1]

    monkeypatch.setattr(module, "rollout", rollout)
    return run(module, flags), batches


def rows_of(batch, *names):
    """For each response the values of its tokens, a list of floats for each name."""
    for i, mask in enumerate(batch["mask"]):
        yield [batch[name][i][mask].tolist() for name in names]


def metrics_by_hand(batch):
    scores, n = batch["scores"].tolist(), len(batch["scores"])
    kls, logprobs, lengths = [], [], []
    for log_pi, log_ref in rows_of(batch, "logprobs", "ref_logprobs"):
        kls.append(sum(log_pi) - sum(log_ref))
        logprobs += log_pi
        lengths.append(len(log_pi))
    ended = batch["ended"].tolist()
    return dict(
        score=statistics.fmean(scores),
        score_se=statistics.stdev(scores) / math.sqrt(n),
        kl_ref=statistics.fmean(kls),
        entropy=-statistics.fmean(logprobs),
        length=statistics.fmean(lengths),
        missing_eos=ended.count(False) / n,
    )


def test_ppos_log_describes_its_rollouts(flags, monkeypatch):
    """Validations before the first step and after the last, a line for each step between them."""
    log, batches = rollouts(monkeypatch, ppo, flags["ppo"])
    first, *steps, last = log
    assert len(steps) == 3 and len(batches) == 6
    for record, batch in ((first, batches[0]), (last, batches[-2])):
        its = {k.removeprefix("val_"): x for k, x in record.items() if k.startswith("val_")}
        assert its == approx(metrics_by_hand(batch))
    assert last["val_kl_ref"] > 0.1
    for record, batch in zip(steps, batches[1:]):
        expected = metrics_by_hand(batch)
        assert {name: record[name] for name in expected} == approx(expected)
        returns, errors = [], []
        for its_returns, values in rows_of(batch, "returns", "values"):
            returns += its_returns
            errors += [r - v for r, v in zip(its_returns, values)]
        variances = statistics.pvariance(errors), statistics.pvariance(returns)
        assert record["explained_variance"] == approx(1 - variances[0] / variances[1])
        assert abs(record["explained_variance"]) > 0.01
        assert record["beta"] == ppo.Config.beta


def test_ppos_logged_losses_are_means_over_the_actions_and_over_the_steps_of_the_optimizer(
    flags, monkeypatch
):
    """Nothing moves, so values and log-probabilities are the rollout's in both epochs.

    Without a weight of its loss the critic has no gradient.
    """
    mine = flags["ppo"] | dict(lr=0, minibatch_size=8, value_coef=0, epochs=2)
    log, batches = rollouts(monkeypatch, ppo, mine)
    for record, batch in zip(log[1:-1], batches[1:], strict=False):
        squares = []
        for returns, values in rows_of(batch, "returns", "values"):
            squares += [(r - v) ** 2 for r, v in zip(returns, values)]
        assert record["value_loss"] == approx(0.5 * statistics.fmean(squares))
        for name in ("policy_loss", "approx_kl", "clip_fraction", "critic_grad_norm"):
            assert record[name] == pytest.approx(0, abs=1e-5), name
        assert record["policy_grad_norm"] > 0.01


def test_grpos_logged_loss_is_minus_the_mean_advantage_of_an_action(flags, monkeypatch):
    """Nothing moves: score minus the mean of the 4 responses to the prompt, at each token."""
    mine = flags["grpo"] | dict(lr=0, minibatch_size=8)
    log, batches = rollouts(monkeypatch, grpo, mine)
    assert len(batches) == 3 and len(log) == 5  # its validations are ppo's
    for record, batch in zip(log[1:-1], batches, strict=True):
        scores, total, n_actions = batch["scores"].tolist(), 0.0, 0
        for i, (logprobs,) in enumerate(rows_of(batch, "logprobs")):
            group = scores[i // 4 * 4 : i // 4 * 4 + 4]
            total += (scores[i] - statistics.fmean(group)) * len(logprobs)
            n_actions += len(logprobs)
        assert record["policy_loss"] == approx(-total / n_actions)
        expected = metrics_by_hand(batch)
        assert {name: record[name] for name in expected} == approx(expected)
