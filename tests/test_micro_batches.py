"""--micro_batch_size splits a step into several forward passes. It changes no result.

Here pretraining, SFT and the reward model from end to end, and PPO's rollout; PPO's update is
tested in test_policy_and_value_loss.py.
"""

import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny
import torch

import ppo
import pretrain
import reward
import sft
from forks import dpo, grpo
from model import GPT
from train.checkpoint import save_checkpoint
from utils.files import read_jsonl, write_jsonl, write_text

STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward}
BATCH_SIZE = 8
# The sizes of the forward passes of a step, for each --micro_batch_size.
PARTS = {0: [8], 1: [1] * 8, 3: [3, 3, 2]}


def make_flags(folder):
    """{stage: flags}, with answers of 1 to 24 letters: a mean of means would not be the mean."""
    torch.manual_seed(0)
    tokenizer = tiny.byte_tokenizer()
    model = tiny.gpt(vocab_size=tokenizer.vocab_size, block_size=64)
    save_checkpoint(folder / "base.pt", "base", model, tokenizer, sft.Config())
    conversations, pairs = [], []
    for i in range(24):
        question, answer = {"role": "user", "content": f"{i}?"}, "abcdef"[i % 6] * (i + 1)
        demonstration = [question, {"role": "assistant", "content": answer}]
        conversations.append({"messages": demonstration})
        pairs.append({"messages": [question], "chosen": answer, "rejected": "no " * (i % 5)})
    write_jsonl(folder / "conversations.jsonl", conversations)
    write_jsonl(folder / "preferences.jsonl", pairs)
    write_text(folder / "tokenizer.tiktoken", tokenizer.dumps())
    for name in ("train", "val"):
        stream = np.random.default_rng(0).integers(97, 123, 600)
        stream.astype(tokenizer.id_type).tofile(folder / f"{name}.bin")
    common = dict(device="cpu", batch_size=BATCH_SIZE, steps=4, warmup=0, eval_every=1)
    common |= dict(init=folder / "base.pt", out=folder / "out.pt")
    sizes = dict(seq_len=16, block_size=32, n_layer=1, n_head=2, n_kv_head=1, n_embd=16)
    return {
        "sft": common | dict(data=folder / "conversations.jsonl", val_fraction=0.1),
        "reward": common | dict(data=folder / "preferences.jsonl", max_new_tokens=4),
        "pretrain": {k: v for k, v in common.items() if k != "init"} | sizes | dict(data=folder),
    }


def plain_gradient_steps(model, *args, **options):
    """[SGD]: AdamW would blow rounding up to full size."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["initial_lr"] = 0.1
    return [optimizer]


def trained(stage, flags, micro_batch_size):
    """The weights after a run of the stage's main, its log, and the sizes of its forward passes."""
    module, parts = STAGES[stage], []
    real = module.micro_batches

    def micro_batches(rows, size):
        split = real(rows, size)
        parts.append([len(part) for part in split])
        return split

    with (
        mock.patch.object(module, "make_optimizers", plain_gradient_steps),
        mock.patch.object(module, "micro_batches", micro_batches),
    ):
        tiny.run(module, flags | dict(micro_batch_size=micro_batch_size))
    log = read_jsonl(flags["out"].with_suffix(".jsonl"))
    for record in log:
        for name in ("seconds", "tokens_per_s"):  # they differ between any two runs
            record.pop(name, None)
    return torch.load(flags["out"], weights_only=True)["weights"], log, parts


@tiny.in_precision(torch.float32)
@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_of_any_size_give_the_same_run(stage):
    """Weights, losses and gradient norms to float32 rounding; 3 does not divide the 8 rows."""
    with tempfile.TemporaryDirectory() as folder:
        flags = make_flags(Path(folder))[stage]
        whole, log, parts = trained(stage, flags, 0)
        assert len(log) == 4 and parts == [PARTS[0]] * 4
        losses = [record["train_loss"] for record in log]
        assert max(losses) - min(losses) > 1e-3  # it trains
        for size in (1, 3):
            split, split_log, parts = trained(stage, flags, size)
            assert parts == [PARTS[size]] * 4
            torch.testing.assert_close(split, whole, atol=2e-6, rtol=1e-5)
            for record, expected in zip(split_log, log, strict=True):
                assert dict(record) == pytest.approx(dict(expected), rel=1e-5)


# ---- memory: what lies around a step takes no more rows at once than the step


ALL = STAGES | dict(ppo=ppo, dpo=dpo, grpo=grpo)


@pytest.fixture(scope="module")
def tiny_flags(tmp_path_factory):
    return tiny.stage_flags(tmp_path_factory.mktemp("rows"))


def most_rows(module, flags):
    """The most rows of any forward pass of a run: of those that read, of those that sample."""
    most, real = dict(read=0, sampled=0), GPT.hidden

    def hidden(self, tokens, n_pad=None, cache=None, cache_positions=None):
        kind = "sampled" if cache else "read"
        most[kind] = max(most[kind], len(tokens))
        return real(self, tokens, n_pad, cache, cache_positions)

    with mock.patch.object(GPT, "hidden", hidden):
        tiny.run(module, flags)
    return most


@pytest.mark.parametrize("size", [0, 2])
@pytest.mark.parametrize("stage", ALL)
def test_no_forward_pass_sees_more_rows_than_a_steps(tiny_flags, stage, size):
    """Neither validation nor PPO's rollout, of 68 records, 75 windows and 9 prompts.

    The reward model's calibration samples 64 answers at once, where only a cache is kept.
    """
    flags = tiny_flags[stage] | dict(micro_batch_size=size)
    most = most_rows(ALL[stage], flags)
    rows = size or flags["batch_size"]
    assert most["read"] == (2 * rows if stage in ("reward", "dpo") else rows)
    assert most["sampled"] <= (64 if stage == "reward" else flags["batch_size"])


@tiny.in_precision(torch.float32)
def test_a_rollout_is_the_same_in_micro_batches_of_any_size():
    torch.manual_seed(0)
    policy, ref = tiny.gpt(vocab_size=5), tiny.gpt(vocab_size=5)
    critic = tiny.critic(policy)
    prompts = tiny.prompts([torch.randint(5, (1 + i % 5,)).tolist() for i in range(8)])
    rollouts = []
    for size in (0, 1, 3):
        config = ppo.Config(batch_size=8, micro_batch_size=size, max_new_tokens=6)
        torch.manual_seed(1)
        arguments = (policy, ref, critic, odd_ids, prompts, tiny.EnumerableTokenizer(), config)
        rollouts.append(ppo.rollout(*arguments))
    whole = rollouts[0]
    assert len(set(whole["mask"].sum(1).tolist())) > 2  # lengths differ
    for split in rollouts[1:]:
        for name, x in whole.items():
            torch.testing.assert_close(split[name], x, atol=1e-5, rtol=1e-5)


def odd_ids(tokens, mask, prompts, responses):
    return (tokens[:, 1:] % 2 * mask).sum(1).float()  # (B,)
