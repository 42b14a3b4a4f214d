"""The attention written by hand: values, gradients, and that torch.compile fuses it."""

import functools
import shutil

import pytest
import tiny
import torch
import torch._dynamo
import torch.nn.functional as F

import ppo
import pretrain
import reward
import sft
import train.device
from data.examples import Example, Pair
from model import attention, causal_mask
from train.device import compiled
from train.optim import make_optimizers

has_compiler = any(map(shutil.which, ("c++", "g++", "clang++")))
needs_compiler = pytest.mark.skipif(
    not has_compiler, reason="torch.compile on a CPU needs a C++ compiler"
)


def visible(T, lengths):
    """May query t look at key s? Not at the future, not at pads; a pad only at itself.

    (B, 1, T, T)
    """
    table = torch.zeros(len(lengths), T, T, dtype=torch.bool)
    for row, n in zip(table, lengths):
        for t in range(T):
            for s in range(t + 1):
                row[t, s] = s >= T - n or s == t
    return table[:, None]


def heads(dtype, B=3, H=2, T=9, D=8):
    return [torch.randn(B, H, T, D, dtype=dtype, requires_grad=True) for _ in "qkv"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_equals_pytorchs_own_forward_and_backward(dtype):
    """softmax(q k^T / sqrt(D) + mask) v (arXiv 1706.03762), without and with pads on the left."""
    tolerance = dict(atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=0)
    for lengths in (None, [9, 4, 1]):
        q, k, v = heads(dtype)
        n_pad = None if lengths is None else 9 - torch.tensor(lengths)
        ours = attention(q, k, v, causal_mask(torch.arange(9), 9, n_pad))
        mask = None if lengths is None else visible(9, lengths)
        theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        torch.testing.assert_close(ours, theirs, **tolerance)
        upstream = torch.randn_like(ours)
        gradients = [torch.autograd.grad(y, (q, k, v), upstream) for y in (ours, theirs)]
        torch.testing.assert_close(*gradients, **tolerance)


def compile_counting_attentions(step):
    """Compiles the step. Returns (matched, forward, backward, masks, result).

    matched is how many attentions the inductor says that it replaced, forward and backward how
    many fused operations are in its graphs, masks how many of these read a mask.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    operations, masks = [], []

    def record(graph):
        for node in graph.nodes:
            if "scaled_dot_product" in str(node.target):
                operations.append(str(node.target))
                masks.append(node.kwargs.get("attn_mask"))

    # without caches: a graph that comes from one would be neither matched nor counted again
    settings = dict(force_disable_caches=True, joint_custom_post_pass=record)
    with torch._inductor.config.patch(**settings):
        result = step()
    matched = torch._dynamo.utils.counters["inductor"]["fuse_attention"]
    n_backward = sum("backward" in operation for operation in operations)
    n_masks = sum(mask is not None for mask in masks)
    return matched, len(operations) - n_backward, n_backward, n_masks, result


FUSED_CASES = [(torch.float32, None, 2), (torch.bfloat16, [0, 3, 1, 8], 1)]


@needs_compiler
@pytest.mark.parametrize(("dtype", "n_pad", "n_kv_head"), FUSED_CASES)
def test_compiled_attention_is_one_fused_kernel_forward_and_backward(dtype, n_pad, n_kv_head):
    """In each layer of a real training step: in float32, and in bfloat16 with pads and GQA.

    Loss and gradients are those of eager. Without pads the kernel is causal by itself and reads no
    mask. With them the match is brittle (pytorch issues 195412, 195782): it is lost where v is laid
    out unlike q and k.
    """
    model = tiny.gpt(n_kv_head=n_kv_head)
    tokens, n_pad = torch.randint(11, (4, 9)), n_pad and torch.tensor(n_pad)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(tokens, n_pad)[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        return loss, torch.autograd.grad(loss, list(model.parameters()))

    eager = step()
    model.compile()
    matched, n_forward, n_backward, n_masks, fused = compile_counting_attentions(step)
    assert n_forward == n_backward == model.config.n_layer
    if n_pad is None:
        assert n_masks == 0
    else:
        assert matched >= model.config.n_layer
        assert n_masks == n_forward + n_backward
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(fused, eager, atol=tolerance, rtol=0)


# ---- a fixed number of graphs


@pytest.fixture
def compiling(monkeypatch):
    """As with --compile; which graphs there are does not depend on what is made of them."""
    monkeypatch.setattr(train.device, "compiling", True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    train.device.compiled_version.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    train.device.compiled_version.cache_clear()


def pretrain_steps():
    model = tiny.gpt()
    return lambda length: pretrain.next_token_loss(model, *torch.randint(11, (2, 4, 16))).backward()


def examples(length):
    """Four Examples, the longest of this length."""
    lengths = range(length, length - 4, -1)
    masks = [[0, 0] + [1] * (n - 2) for n in lengths]
    tokens = [torch.randint(11, (n,)).tolist() for n in lengths]
    return [Example(*row, line=0) for row in zip(tokens, masks)]


def sft_steps():
    model = tiny.gpt()

    def step(length):
        tokens, targets, mask = sft.inputs_and_targets(examples(length), 0, tiny.CPU)
        sft.answer_loss(model, tokens, targets, mask).backward()

    return step


def reward_steps():
    model = tiny.critic(tiny.gpt())

    def step(length):
        pairs = [Pair(*two, line=0) for two in zip(examples(length), examples(length))]
        reward.preference_loss(*reward.score_pairs(model, pairs, 0, tiny.CPU)).backward()

    return step


def random_scores(tokens, mask, prompts, responses):
    return torch.randn(len(prompts))


def ppo_steps():
    policy, ref = tiny.gpt(), tiny.gpt()
    critic = tiny.critic(policy)
    policy.next_logits = compiled(policy.next_logits)
    optimizers = make_optimizers(policy, 1e-3) + make_optimizers(critic, 1e-3)
    config = ppo.Config(minibatch_size=4, micro_batch_size=4, epochs=1, max_new_tokens=4)
    tokenizer = tiny.EnumerableTokenizer()

    def step(length):
        prompts = tiny.prompts([example.tokens for example in examples(length)])
        batch = ppo.rollout(policy, ref, critic, random_scores, prompts, tokenizer, config)
        batch |= dict(whitened_advantages=batch["values"], returns=batch["values"])
        ppo.update(policy, critic, optimizers, batch, 1.0, config)

    return step


@pytest.mark.parametrize("make_steps", [pretrain_steps, sft_steps, reward_steps, ppo_steps])
def test_the_steps_of_a_stage_stay_at_a_fixed_number_of_graphs(compiling, make_steps):
    """After two batches of different lengths nothing is compiled again, whatever the lengths.

    The first graph is for one shape, the second for all. torch.compile gives up after eight,
    silently.
    """
    step = make_steps()
    for length in (6, 14):
        step(length)
    n_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert n_graphs > 0
    for length in (22, 7, 28, 15, 6):
        step(length)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == n_graphs
