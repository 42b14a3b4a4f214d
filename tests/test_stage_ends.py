"""What each stage starts from, what it leaves alone, and what is left at its end.

A network equals the checkpoint that it is said to start from, those that are said to be separate
share no memory, frozen ones stay as they were to the bit.
"""

import copy
import inspect
import itertools

import numpy as np
import pytest
import tiny
import torch

import ppo
import pretrain
import reward
import sft
from forks import dpo, grpo
from train.checkpoint import read_torch
from utils.files import read_jsonl, write_jsonl

STAGES = dict(pretrain=pretrain, sft=sft, reward=reward, ppo=ppo, dpo=dpo, grpo=grpo)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return tiny.stage_flags(tmp_path_factory.mktemp("ends"))


def weights(path):
    return read_torch(path)["weights"]


def is_same(one, other):
    return one.keys() == other.keys() and all(torch.equal(x, other[k]) for k, x in one.items())


def of_trunk(state):
    return {k.removeprefix("trunk."): x for k, x in state.items() if k.startswith("trunk.")}


def watch(monkeypatch, module, function):
    """{argument: (network, its weights)} of the function's first call in the next run."""
    real, found = getattr(module, function), {}

    def watched(*args, **more):
        if not found:
            arguments = inspect.signature(real).bind(*args, **more).arguments
            for name, value in arguments.items():
                if isinstance(value, torch.nn.Module):
                    found[name] = value, copy.deepcopy(value.state_dict())
        return real(*args, **more)

    monkeypatch.setattr(module, function, watched)
    return found


def assert_separate(networks):
    """No two of them share a tensor's memory."""
    for one, other in itertools.combinations(networks, 2):
        places = [
            {x.untyped_storage().data_ptr() for x in network.state_dict().values()}
            for network in (one, other)
        ]
        assert not places[0] & places[1]


# ---- with a learning rate of 0 the end is the beginning


@pytest.mark.parametrize("stage", ["sft", "ppo", "dpo", "grpo"])
def test_a_stage_starts_from_the_weights_of_its_init(flags, stage):
    tiny.run(STAGES[stage], flags[stage] | dict(lr=0))
    assert is_same(weights(flags[stage]["out"]), weights(flags[stage]["init"]))


def test_a_reward_models_trunk_starts_as_the_sft_model(flags):
    tiny.run(reward, flags["reward"] | dict(lr=0))
    assert is_same(of_trunk(weights(flags["reward"]["out"])), weights(flags["reward"]["init"]))


# ---- which networks there are, before the first step and after the last


def test_ppos_four_networks_start_as_said_are_separate_and_two_of_them_never_change(
    flags, monkeypatch
):
    mine, loaded = flags["ppo"], []
    networks, real = watch(monkeypatch, ppo, "rollout"), ppo.load_score

    def load_score(*args):
        loaded.append(real(*args))
        return loaded[0]

    monkeypatch.setattr(ppo, "load_score", load_score)
    tiny.run(ppo, mine)
    (policy, at_first), (ref, ref_at_first), (critic, critic_at_first) = networks.values()
    assert list(networks) == ["policy", "ref", "critic"]
    ((_, reward_model),) = loaded
    assert_separate([policy, ref, critic, reward_model])
    sft_weights, reward_weights = weights(mine["init"]), weights(mine["reward"])
    assert is_same(at_first, sft_weights) and is_same(ref_at_first, sft_weights)
    assert is_same(critic_at_first, reward_weights)

    assert is_same(ref.state_dict(), sft_weights)
    assert is_same(reward_model.state_dict(), reward_weights)
    assert is_same(policy.state_dict(), weights(mine["out"]))
    for trained, before in ((policy, sft_weights), (critic, reward_weights)):
        for name, weight in trained.named_parameters():  # each of them, the head's too
            assert not torch.equal(weight, before[name]), name


def test_without_a_reward_model_the_critic_is_the_policys_copy_with_values_of_0():
    policy = tiny.gpt()
    critic = ppo.make_critic(policy, None)
    assert_separate([policy, critic])
    assert is_same(critic.trunk.state_dict(), policy.state_dict())
    assert all(weight.requires_grad for weight in critic.parameters())
    tokens = torch.randint(11, (3, 9))
    assert not ppo.action_values(critic, tokens, torch.ones(3, 8, dtype=torch.bool)).any()


@pytest.mark.parametrize("stage, function", [("dpo", "pair_logprobs"), ("grpo", "rollout")])
def test_a_forks_reference_starts_as_its_policy_is_separate_and_never_changes(
    flags, monkeypatch, stage, function
):
    networks = watch(monkeypatch, STAGES[stage], function)
    tiny.run(STAGES[stage], flags[stage])
    before = weights(flags[stage]["init"])
    assert all(is_same(at_first, before) for _, at_first in networks.values())
    policy, ref = (networks[name][0] for name in ("policy", "ref"))
    assert_separate([policy, ref])
    assert is_same(ref.state_dict(), before)
    assert is_same(policy.state_dict(), weights(flags[stage]["out"]))
    assert not is_same(policy.state_dict(), before)


def test_the_sft_model_that_answers_in_the_calibration_is_the_untrained_one(flags, monkeypatch):
    networks = watch(monkeypatch, reward, "calibrate")
    tiny.run(reward, flags["reward"])
    (model, trained), (answering, its_weights) = networks["model"], networks["sft"]
    assert_separate([model, answering])
    assert is_same(its_weights, weights(flags["reward"]["init"]))
    assert not is_same(of_trunk(trained), its_weights)


# ---- pretraining's last act


def test_pretraining_keeps_what_it_trained_and_draws_afresh_what_the_text_never_holds(
    flags, tmp_path, monkeypatch
):
    after_step, real = [], pretrain.optimizer_step

    def optimizer_step(model, *args):
        norm = real(model, *args)
        after_step.append(copy.deepcopy(model.state_dict()))
        return norm

    folder = flags["pretrain"]["data"]
    for name in ("tokenizer.tiktoken", "val.bin"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    stream = np.fromfile(folder / "train.bin", np.uint16)
    stream[(stream >= 64) & (stream < 128)] = 5
    stream.tofile(tmp_path / "train.bin")
    seen = torch.zeros(320, dtype=torch.bool)  # 261 ids, padded to a multiple of 64
    seen[stream.astype(int)] = True
    assert seen.sum() == 261 - 64

    monkeypatch.setattr(pretrain, "optimizer_step", optimizer_step)
    tiny.run(pretrain, flags["pretrain"] | dict(data=tmp_path))
    trained, end = after_step[-1], weights(flags["pretrain"]["out"])
    assert trained.keys() == end.keys()
    for name in end.keys() - {"embed.weight", "lm_head.weight"}:
        assert torch.equal(trained[name], end[name]), name
    is_kept = (trained["embed.weight"] == end["embed.weight"]).all(1)
    assert torch.equal(is_kept, seen)


def test_fresh_embeddings_are_half_as_large_as_the_trained_ones_and_point_everywhere():
    """Before they all point the same way, as pushing out of the softmax leaves them."""
    model = tiny.gpt(vocab_size=320, n_embd=64)
    weight = model.embed.weight.data
    weight[100:] = weight[:1]
    before = weight.clone()
    pretrain.reinit_unseen_embeddings(model, np.arange(100, dtype=np.uint16))
    assert torch.equal(weight[:100], before[:100])
    fresh = weight[100:]
    assert fresh.std().item() == pytest.approx(before[:100].std().item() / 2, rel=0.03)
    cosines = torch.nn.functional.normalize(fresh) @ torch.nn.functional.normalize(fresh).T
    assert (cosines - torch.eye(220)).abs().max() < 0.7


# ---- PPO's scores, draws and beta


def rollouts(monkeypatch, flags):
    """Each rollout's batch of a run of ppo.main: validation, the steps, validation, one more."""
    batches, real = [], ppo.rollout

    def rollout(*args):
        batches.append(real(*args))
        return batches[-1]

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "rollout", rollout)
        tiny.run(ppo, flags)
    return batches


@tiny.in_precision(torch.float32)
def test_a_score_is_the_reward_models_at_the_responses_last_token(flags, monkeypatch):
    """head(hidden) + w log p(response | prompt), each response alone, in a run with its floor.

    A response that has not ended scores --missing_eos_score; none scores less than --min_score.
    """
    mine = flags["ppo"] | dict(min_score=-12.0, missing_eos_score=-2.5)
    batches, loaded, real = [], [], ppo.load_score

    def load_score(*args):
        loaded.append(real(*args))
        return loaded[0]

    monkeypatch.setattr(ppo, "load_score", load_score)
    batches = rollouts(monkeypatch, mine)
    model, n_floor, n_missing = loaded[0][1], 0, 0
    for batch in batches:
        for tokens, mask, score, ended in zip(
            batch["tokens"], batch["mask"], batch["scores"], batch["ended"]
        ):
            places = mask.nonzero().flatten() + 1  # of the response's tokens
            row = tokens[: places[-1] + 1]
            with torch.no_grad():
                hidden = model.trunk.hidden(row[None])  # (1, n, C)
                logprobs = model.trunk.logits(hidden)[0].log_softmax(-1)  # (n, V)
                expected = model.head(hidden)[0, -1, 0]
            chosen = logprobs[places - 1, row[places]].sum()
            expected = (expected + model.logprob_weight * chosen).item()
            assert ended == (row[-1] == tiny.byte_tokenizer().end)
            if not ended:
                n_missing, expected = n_missing + 1, -2.5
            n_floor += expected < -12
            assert score.item() == pytest.approx(max(expected, -12.0), abs=1e-3)
    assert n_floor > 5 and n_missing > 5


def test_each_iteration_draws_anew_and_both_validations_draw_the_same(flags, tmp_path, monkeypatch):
    """With one question only and a policy that does not move, so that draws alone can differ."""
    write_jsonl(tmp_path / "prompts.jsonl", read_jsonl(flags["ppo"]["data"])[:1] * 30)
    mine = flags["ppo"] | dict(data=tmp_path / "prompts.jsonl", val_size=7, lr=0)
    first, *steps, last, picture = rollouts(monkeypatch, mine)
    assert torch.equal(first["tokens"], last["tokens"])
    assert len(steps) == 3
    tokens = [batch["tokens"].tolist() for batch in (*steps, picture)]
    for one, other in itertools.combinations(tokens, 2):
        assert one != other
    again = rollouts(monkeypatch, mine)
    assert [batch["tokens"].tolist() for batch in again[1:4]] == tokens[:3]


def test_beta_follows_the_kl_to_the_reference(flags):
    """beta *= 1 + n / 10,000 clip(KL / target - 1, -0.2, 0.2), KL(pi || pi_ref) a response.

    arXiv 1909.08593, section 2.2. The target lies near the KL of a run before, so that the clip
    does not hide which KL it was.
    """
    mine = flags["ppo"] | dict(steps=5, lr=1e-3)

    def log(kl_target):
        tiny.run(ppo, mine | dict(kl_target=kl_target))
        records = read_jsonl(mine["out"].with_suffix(".jsonl"))
        return [record for record in records if "beta" in record]

    target = 0.9 * log(1.0)[-2]["kl_ref"]
    records, inside = log(target), 0
    assert records[0]["beta"] == ppo.Config.beta
    for record, following in itertools.pairwise(records):
        error = record["kl_ref"] / target - 1
        inside += 0 < abs(error) < 0.2
        factor = 1 + mine["batch_size"] / 10_000 * min(max(error, -0.2), 0.2)
        assert following["beta"] == pytest.approx(record["beta"] * factor, rel=1e-9)
    assert inside
