"""Real parts in the smallest size, and a world of 40 responses in which every expectation is a finite sum."""

import contextlib
import itertools
from unittest import mock

import torch

import common
from data.tokenizer import BYTES, Tokenizer
from model import GPT, GPTConfig
from reward import RewardModel

CPU = torch.device("cpu")


def gpt(**sizes):
    """A GPT with larger weights than at initialization: there all logits are nearly alike, and bugs hide."""
    model = GPT(GPTConfig(**dict(vocab_size=11, block_size=32, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, n_inner=16) | sizes))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:  # a tied embedding of the others' size would mostly predict the last token again
            parameter.data *= 5 if name == "embed.weight" else 14
    return model


def critic(policy):
    """A RewardModel on a copy of the policy's trunk."""
    model = RewardModel(policy.config)
    model.trunk.load_state_dict(policy.state_dict())
    return model


def in_precision(dtype):
    """A context in which the stages compute in dtype, whatever this machine's own choice would be."""
    autocast = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)
    return mock.patch.object(common, "autocast", lambda device: autocast)


def byte_tokenizer():
    """The 256 bytes and the special tokens: 261 ids, no merges."""
    return Tokenizer({bytes([b]): i for i, b in enumerate(BYTES)})


def pads_on_the_left(prompts):
    """tokens (B, T) and n_pad (B,) of token lists of unequal length."""
    T = max(map(len, prompts))
    return torch.tensor([[0] * (T - len(p)) + p for p in prompts]), torch.tensor([T - len(p) for p in prompts])


# ---- ids 0, 1, 2 and the end token 3, at most three tokens: 1 + 3 + 9 responses that end, 27 that do not

END = 3
MAX_NEW_TOKENS = 3
RESPONSES = [[*body, END] for n in range(MAX_NEW_TOKENS) for body in itertools.product(range(END), repeat=n)]
RESPONSES += [list(body) for body in itertools.product(range(END), repeat=MAX_NEW_TOKENS)]


class EnumerableTokenizer:
    end, pad = END, 0

    def decode(self, ids):
        return " ".join(map(str, ids))


def enumerate_responses(prompt):
    """Every response in ppo's index frame: tokens (40, T+1), mask (40, T)."""
    tokens = common.pad_rows([prompt + r for r in RESPONSES], EnumerableTokenizer.pad, CPU)
    mask = common.pad_rows([[0] * len(prompt) + [1] * len(r) for r in RESPONSES], 0, CPU)
    return tokens, mask[:, 1:].bool()


@torch.no_grad()
def exact_logprobs(model, prompt, temperature):
    """log pi(response | prompt) of all 40 by the chain rule, each token from a forward pass of its own: (40,), float64."""

    def of(response):
        total = 0.0
        for i, token in enumerate(response):
            logits = model(torch.tensor([prompt + response[:i]]))[0, -1].double() / temperature  # (V,)
            total += logits.log_softmax(0)[token].item()
        return total

    return torch.tensor([of(response) for response in RESPONSES], dtype=torch.float64)
