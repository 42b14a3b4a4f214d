"""bench.memory's arithmetic against the bytes that are alive at the peak of real steps, on a CPU.

Counted are the storages of all tensors that operations return. What a kernel allocates for
itself, and what torch.compile does, is not seen.
"""

import copy
import weakref
from unittest import mock

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
import ppo
import pretrain
from bench import memory
from model import GPT
from reward import from_gpt
from train.optim import make_optimizers, optimizer_step

C = memory.gpt(vocab_size=1024, n_layer=3, n_head=4, n_embd=64, block_size=128)


class LiveBytes(TorchDispatchMode):
    """Bytes of the networks' weights and of what is made while it is active, at the peak."""

    def __init__(self, *networks):
        super().__init__()
        self.storages, self.now, self.peak = set(), 0, 0
        for network in networks:
            for weight in network.parameters():
                self.note(weight.untyped_storage())

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.note(x.untyped_storage())
        return result

    def note(self, storage):
        address, size = storage._cdata, storage.nbytes()
        if address not in self.storages:
            self.storages.add(address)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, address, size)

    def forget(self, address, size):
        self.storages.discard(address)
        self.now -= size


def on_cpu(c, n_tokens, networks=1):
    """A CPU's RMSNorm keeps its normalized input too: two a block and the last."""
    return networks * n_tokens * 4 * c.n_embd * (2 * c.n_layer + 1)


def sdpa(q, k, v, attn_mask):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_pretraining_step_needs_what_its_sizes_say(dtype, fused):
    rows, T = 4, 128
    network = GPT(C)
    optimizers = make_optimizers(network, 1e-3)
    attention = sdpa if fused else model.attention
    with tiny.in_precision(dtype), mock.patch.object(model, "attention", attention):
        with LiveBytes(network) as counted:
            for _ in range(2):  # the optimizer's state is made in the first step
                counted.peak = counted.now
                for _ in range(2):  # the gradients are there from the second micro-batch on
                    tokens = torch.randint(C.vocab_size, (rows, T + 1))
                    with pretrain.autocast(tiny.CPU):
                        loss = pretrain.next_token_loss(network, tokens[:, :-1], tokens[:, 1:])
                    loss.backward()
                optimizer_step(network, optimizers, 1.0)
    parts = memory.pretraining(C, rows, T, width=dtype.itemsize)
    parts["activations"] = memory.activations(C, rows * T, T, dtype.itemsize, fused)
    expected = sum(parts.values()) + on_cpu(C, rows * T)
    assert counted.peak == pytest.approx(expected, rel=0.02)


def test_a_ppo_iteration_needs_what_its_sizes_say():
    policy = GPT(C)
    ref = copy.deepcopy(policy).requires_grad_(False)
    critic = from_gpt(policy, logprob_term=True)
    optimizers = [make_optimizers(net, 1e-3, weight_decay=0.0)[0] for net in (policy, critic)]
    config = ppo.Config(batch_size=8, minibatch_size=8, micro_batch_size=4, max_new_tokens=64)
    prompts = tiny.prompts(torch.randint(C.vocab_size, (8, 64)).tolist())
    tokenizer = tiny.EnumerableTokenizer()
    tokenizer.end = -1  # no response ends early

    def score(tokens, mask, prompts, responses):
        return torch.randn(len(prompts))

    with tiny.in_precision(torch.bfloat16), LiveBytes(policy, ref, critic) as counted:
        for _ in range(2):
            counted.peak = counted.now
            batch = ppo.rollout(policy, ref, critic, score, prompts, tokenizer, config)
            batch |= ppo.compute_advantages(batch, config.beta, config)
            ppo.update(policy, critic, optimizers, batch, 1.0, config)
    parts = memory.ppo(C, rows=4, episodes=8, prompt=64, new_tokens=64)
    no_reward_model = 4 * policy.n_params()
    expected = sum(parts.values()) + on_cpu(C, 4 * 128, networks=2) - no_reward_model
    assert counted.peak == pytest.approx(expected, rel=0.02)


def test_the_parameters_are_counted_as_they_are():
    for c in (C, memory.gpt(1000, 2, 2, 48, 64)):
        network = GPT(c)
        norms = sum(p.numel() for p in network.parameters() if p.dim() == 1)
        padding = (network.embed.num_embeddings - c.vocab_size) * c.n_embd
        assert memory.n_params(c) == network.n_params() - norms - padding


def test_the_table_says_no_more_than_the_arithmetic_allows():
    """The rows that it names fit, and twice as many would not."""
    room = 10e9
    settings = dict(c=memory.MODELS["GPT-2, 124M"][0], T=1024, compiled=True)
    rows = memory.most_rows(memory.pretraining, room, **settings)
    assert 1 < rows < 64
    needed = [sum(memory.pretraining(rows=n, **settings).values()) for n in (rows, 2 * rows)]
    assert needed[0] <= room < needed[1]
    assert memory.most_rows(memory.pretraining, 1e9, **settings) == 0
