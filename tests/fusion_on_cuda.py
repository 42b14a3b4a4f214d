"""What torch.compile would make one kernel or one graph on CUDA, found without a GPU.

    python tests/fusion_on_cuda.py    # as JSON:
        {"attentions": {case: how many of two layers' are fused},
         "losses": {stage: [operations of autograd, dtypes of the logits that leave the graph]}}

Nothing computes here: the compiler traces tensors that have a shape, a dtype and the device cuda,
but no numbers, and is stopped before it writes code for a GPU.
"""

import functools
import json
import sys
from pathlib import Path
from unittest import mock

import pretend  # noqa: F401  before torch: its driver, without which autograd refuses "cuda"
import torch
import torch._dynamo
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

sys.path.insert(0, str(Path(__file__).parent.parent))
import ppo  # noqa: E402
import pretrain  # noqa: E402
import sft  # noqa: E402
import train.device  # noqa: E402
from model import GPT, GPTConfig, KVCache  # noqa: E402

B, T, VOCAB = 2, 128, 250
CASES = {
    "training": dict(),
    "training, grouped queries, qk_norm": dict(n_kv_head=1, qk_norm=True),
    "training, pads, grouped queries": dict(n_kv_head=1),
    "training, pads, qk_norm": dict(qk_norm=True),
    "generation, prompt, grouped queries, qk_norm": dict(n_kv_head=1, qk_norm=True),
    "generation, token": dict(),
}


# ---- attention


class FarEnough(Exception):
    """What follows would need a GPU."""


def stop(graph):
    raise FarEnough


def causal_kernels(function):
    """How many calls of a causal fused attention without a mask the graph holds."""
    calls = []

    def backend(graph, inputs):
        nodes = graph.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
        calls.extend(node.kwargs for node in nodes)
        return graph.forward

    torch.compile(function, backend=backend)()
    return calls.count(dict(is_causal=True))


def replaced_attentions(function):
    """How many attentions written by hand the inductor replaces by a fused one."""
    options = dict(force_disable_caches=True, joint_graph_constant_folding=False)
    try:
        with torch._inductor.config.patch(**options, joint_custom_post_pass=stop):
            torch.compile(function)()
    except Exception as e:  # the compiler wraps it
        if "FarEnough" not in repr(e):
            raise
    n = torch._dynamo.utils.counters["inductor"]["fuse_attention"]
    return n // 2 if torch.is_grad_enabled() else n  # forward and backward count


def count(case, sizes):
    """Fused attentions in the case: of the stages' own functions, in bfloat16."""
    sizes = dict(n_layer=2, n_head=2, n_kv_head=2, n_embd=64, vocab_size=VOCAB) | sizes
    model = GPT(GPTConfig(**sizes, block_size=T))
    tokens, n_pad = torch.randint(VOCAB, (B, T)), torch.randint(4, (B,))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def loss():
        return pretrain.next_token_loss(model, tokens, tokens)

    def padded_loss():
        return F.cross_entropy(model(tokens, n_pad).flatten(0, 1), tokens.flatten())

    def next_logits():
        n = 1 if "token" in case else T // 2
        cache = KVCache(model.config, B, T, torch.bfloat16, model.device)
        return model.next_logits(tokens[:, :n], n_pad, cache, torch.arange(n))

    with torch.autocast("cuda", torch.bfloat16):
        if case.startswith("generation"):
            return replaced_attentions(next_logits)
        if "pads" in case:
            return replaced_attentions(padded_loss)
        return causal_kernels(loss)


# ---- the loss


def pretraining(model, tokens, mask):
    return pretrain.next_token_loss(model, tokens[:, :-1], tokens[:, 1:])


def fine_tuning(model, tokens, mask):
    return sft.answer_loss(model, tokens[:, :-1], tokens[:, 1:], mask)


def ppo_logprobs(model, tokens, mask):
    return ppo.response_logprobs(model, tokens, mask, 0.7)


def operations(result):
    """What autograd holds between the weights and the result: names of its nodes."""
    found, left = set(), [result.grad_fn]
    while left:
        node = left.pop()
        if node and node not in found:
            found.add(node)
            left += [parent for parent, _ in node.next_functions]
    names = [type(node).__name__ for node in found]
    return [name for name in names if name != "AccumulateGrad"]


def trace(loss):
    """The loss's operations, and the dtypes of the logits that its graphs give or keep."""
    kept = []

    def inner_compile(graph, inputs, **options):
        results = [node.meta["val"] for node in graph.graph.output_node().all_input_nodes]
        results = [x for x in results if isinstance(x, torch.Tensor) and x.dim() > 1]
        kept.extend(str(x.dtype) for x in results if x.size(-1) >= VOCAB)
        return make_boxed_func(graph.forward)

    # 250 tokens, padded to 256: nothing else is as wide
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_kv_head=2, n_embd=64, vocab_size=VOCAB))
    tokens, mask = torch.randint(VOCAB, (B, T + 1)), torch.ones(B, T, dtype=torch.bool)
    backend = functools.partial(compile_fx, inner_compile=inner_compile)
    options = dict(force_disable_caches=True, joint_graph_constant_folding=False)
    torch._dynamo.reset()
    train.device.compiled_version.cache_clear()
    with (
        mock.patch.object(train.device, "compiling", True),
        mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=backend)),
        torch._inductor.config.patch(**options),
        torch.autocast("cuda", torch.bfloat16),
    ):
        return operations(loss(model, tokens, mask)), kept


def main():
    attentions, losses = {}, {}
    for case, sizes in CASES.items():
        grad = torch.set_grad_enabled(case.startswith("training"))
        with FakeTensorMode(shape_env=ShapeEnv()), grad, torch.device("cuda"):
            attentions[case] = count(case, sizes)
    for loss in (pretraining, fine_tuning, ppo_logprobs):
        with FakeTensorMode(shape_env=ShapeEnv()), torch.device("cuda"):
            losses[loss.__name__] = trace(loss)
    print(json.dumps(dict(attentions=attentions, losses=losses)))


if __name__ == "__main__":
    # a CPU build of torch would refuse CUDA's autocast
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.cuda.is_bf16_supported", lambda *args, **options: True),
    ):
        main()
