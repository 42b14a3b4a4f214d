"""The attention written by hand: its values, its gradients, and that torch.compile makes one fused kernel of it."""

import shutil

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F

import ppo
import pretrain
import reward
import sft
import tiny
from model import attention, attention_bias

COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "g++", "clang"))), reason="torch.compile on a CPU needs a C compiler")


def visible(T, lengths):
    """May query t look at key s? The rule in words: not at the future, not at pads; a pad only at itself. (B, 1, T, T)"""
    table = [[[s <= t and (s >= T - n or s == t) for s in range(T)] for t in range(T)] for n in lengths]
    return torch.tensor(table)[:, None]


def heads(dtype, B=3, H=2, T=9, D=8):
    return [torch.randn(B, H, T, D, dtype=dtype, requires_grad=True) for _ in "qkv"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_equals_pytorchs_own_forward_and_backward(dtype):
    """softmax(q k^T / sqrt(D) + bias) v (arXiv 1706.03762) against F.scaled_dot_product_attention, without and with pads on the left."""
    tolerance = dict(atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=0)
    for lengths in (None, [9, 4, 1]):
        q, k, v = heads(dtype)
        n_pad = None if lengths is None else 9 - torch.tensor(lengths)
        ours = attention(q, k, v, attention_bias(torch.arange(9), 9, n_pad))
        mask = None if lengths is None else visible(9, lengths)
        theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        torch.testing.assert_close(ours, theirs, **tolerance)
        upstream = torch.randn_like(ours)
        gradients = [torch.autograd.grad(y, (q, k, v), upstream) for y in (ours, theirs)]
        torch.testing.assert_close(*gradients, **tolerance)


def fused(function, *args):
    """How many attentions the inductor replaced by a fused kernel while it compiled the call, and the call's result."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._inductor.config.patch(force_disable_caches=True):  # a graph from the cache is not matched again
        result = function(*args)
    return torch._dynamo.utils.counters["inductor"]["fuse_attention"], result


@COMPILER
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_attention_fuses_forward_and_backward(dtype, padded):
    """In every layer of a training step, as float32 and under bfloat16 autocast; the loss and the gradients stay those of eager."""
    model = tiny.gpt(n_head=2, n_kv_head=2)
    tokens, n_pad = torch.randint(11, (4, 9)), torch.tensor([0, 3, 1, 8]) if padded else None

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = F.cross_entropy(model(tokens, n_pad)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return loss, torch.autograd.grad(loss, list(model.parameters()))

    eager = step()
    model.compile()
    count, compiled = fused(step)
    assert count == model.config.n_layer
    torch.testing.assert_close(compiled, eager, atol=1e-5 if dtype == torch.float32 else 3e-2, rtol=0)
