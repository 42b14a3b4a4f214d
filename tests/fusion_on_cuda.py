"""Which attentions torch.compile would make one kernel on CUDA, found without a GPU.

    python tests/fusion_on_cuda.py    # {case: fused attentions}, of two layers, as JSON

Nothing computes here: the compiler traces tensors that have a shape, a dtype and the device cuda,
but no numbers, and is stopped before it writes code for a GPU.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import pretend  # noqa: F401  before torch: its driver, without which autograd refuses "cuda"
import torch
import torch._dynamo
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

sys.path.insert(0, str(Path(__file__).parent.parent))
import pretrain  # noqa: E402
from model import GPT, GPTConfig, KVCache  # noqa: E402

B, T, VOCAB = 2, 128, 256
CASES = {
    "training": dict(),
    "training, grouped queries, qk_norm": dict(n_kv_head=1, qk_norm=True),
    "training, pads, grouped queries": dict(n_kv_head=1),
    "training, pads, qk_norm": dict(qk_norm=True),
    "generation, prompt, grouped queries, qk_norm": dict(n_kv_head=1, qk_norm=True),
    "generation, token": dict(),
}


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
        return pretrain.next_token_loss.__wrapped__(model, tokens, tokens)

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


def main():
    counts = {}
    for case, sizes in CASES.items():
        grad = torch.set_grad_enabled(case.startswith("training"))
        with FakeTensorMode(shape_env=ShapeEnv()), grad, torch.device("cuda"):
            counts[case] = count(case, sizes)
    print(json.dumps(counts))


if __name__ == "__main__":
    # a CPU build of torch would refuse CUDA's autocast
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.cuda.is_bf16_supported", lambda *args, **options: True),
    ):
        main()
